for (const part of document.querySelectorAll(".sae")) {
  const tools = part.querySelector(".tools");
  const [find, order, found] = ["input", "select", "output"].map((name) => tools.querySelector(name));
  const cards = [...part.querySelectorAll("article")];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const number = (card, key) => Number(card.dataset[key] ?? -Infinity);
  tools.hidden = false;
  find.addEventListener("input", () => {
    const wanted = find.value.toLowerCase();
    for (const card of cards) card.hidden = !texts.get(card).includes(wanted);
    const left = cards.filter((card) => !card.hidden).length;
    found.value = wanted ? `${left} of ${cards.length}` : "";
  });
  order.addEventListener("change", () => {
    const key = order.value;
    const sign = key === "id" ? 1 : -1;
    cards.sort((a, b) => sign * (number(a, key) - number(b, key)) || a.dataset.id - b.dataset.id);
    part.querySelector(".cards").append(...cards);
  });
}
