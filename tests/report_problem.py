"""SAEs' folders with made-up measures, and a page read back."""

import json
from html.parser import HTMLParser

from mpsae.evaluation import files

NASTY = ["<script>alert(1)</script>", " &amp;", "\n", "\t\"'", "\u202egnp", "  ", "é", "\ud800"]
VOID = {"meta", "input", "br"}


def make_sae(
    run, architecture, k, *, hookpoint="layers.2", without=(), n=64, prompts=None, **changed
):
    """Write an SAE's folder under a run; ``changed`` are numbers of reconstruction.json."""
    folder = run / architecture / hookpoint
    folder.mkdir(parents=True)
    own = {"architecture": architecture, "config": {"d_in": 8, "d_sae": n, "k": k}}
    metadata = {"model_name": "tiny", "hook_name": hookpoint, "mpsae": own}
    config = {"architecture": architecture, "d_in": 8, "d_sae": n, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config))
    start = {"tokens": 5000}
    pursuit = architecture == "matching_pursuit"
    made = {
        "reconstruction": start
        | {
            "model": "tiny", "hookpoint": hookpoint, "dataset": "words",
            "fvu": 0.2, "cosine": 0.9, "ce_recovered": 0.95, "l0": float(k),
            "dead_fraction": 0.125, "dense_fraction": 0.03125, "coherence": 0.5,
            "firing": {"log10_edges": [-2, -1, 0], "counts": [40, n - 48], "dead": 8},
            "downstream_fvu": {"layers.3": 0.31, "layers.4": 0.4321},
            "fvu_at_k": [0.8, 0.5, 0.2] if pursuit else [],
            "l0_at_k": [1.0, 2.0, 3.0] if pursuit else [],
            "encode_us": 12.5, "l0_min": k - 2, "l0_max": k + 3, "ce_clean": 2.5, "ce_sae": 2.75,
            "ce_mean": 7.5, "mean_coherence": 0.0625, "babel": {"1": 0.5, "2": 0.875},
            "babel_selected": {"1": 0.25, "2": 0.375},
            "reselection_rate": 0.125 if pursuit else None,
            "rescored_rate": 0.25 if pursuit else None,
        }
        | changed,
        "probing": start
        | {
            "activations": {"accuracy": 0.9, "f1": 0.777},
            "sparse_probing": {
                "1": {"accuracy": 0.7, "f1": 0.625 - k / 1000}, "5": {"accuracy": 0.8, "f1": 0.7},
                "10": {"accuracy": 0.85, "f1": 0.75},
            },
            "tasks": {"first_letter": {"rows": 9}, "digit": {"rows": 9}, "comment": {
                "unavailable": "the text is not Python source"}},
            "prompts": prompts,
            "splitting": {"classes": 3, "latents": 1.5},
            "absorption": {"classes": 3, "fraction": 0.25 + k / 1000, "full": 0.1},
        },
        "latents": start | {"window": 8, "latents": [latent(i, n) for i in (3, 5, 9)]},
        "autointerp": start
        | {
            "explainer": "a <b>model</b>", "scorer": "same",
            "means": {"detection": 0.8125, "fuzzing": None, "embedding": 0.75},
            "latents": {
                "3": {"explanation": "fires on <i>words</i> & co", "detection": 0.875,
                      "fuzzing": None, "embedding": 0.5},
                "5": {"explanation": None, "detection": None, "fuzzing": None, "embedding": 0.25},
            },
        },
    }  # fmt: skip
    for name, result in made.items():
        if name not in without:
            files.write(folder, name, result)
    return folder


def put_pursuit(folder, method, k, name="", **changed):
    """Write what a pursuit in place of an SAE's encoder did; ``changed`` are its numbers."""
    result = files.read(folder, "reconstruction") or {"tokens": 5000, "dataset": "words"}
    result |= {"sae": {"k": k}, "ito": method, "fvu_at_k": [], "l0_at_k": []} | changed
    files.write(folder, f"reconstruction-ito-{method}{name}", result)


def latent(number, n):
    """A latent as in latents.json, with text that would break a page."""
    values = [0.5, 0.0, 2.0, -1.0, 0.0, 0.25, 0.0, 0.0]
    top = [{"tokens": NASTY, "activations": [v * scale for v in values]} for scale in (2, 1)]
    many = [{"tokens": [f"w{i}"], "activations": [0.125]} for i in range(30)]
    return {
        "id": number, "frequency": number / n, "contexts": 50, "top": top + many,
        "quantiles": [{"quantile": 1, **context} for context in top], "nearest": [5, 60],
    }  # fmt: skip


class Node:
    """An element of a page."""

    def __init__(self, name, attributes=(), parent=None):
        self.name, self.attributes, self.parent = name, dict(attributes), parent
        self.children = []

    def text(self):
        return "".join(c if isinstance(c, str) else c.text() for c in self.children)

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, name, **attributes):
        """Elements below of a name, or of any, with attributes; ``class_`` is one of theirs."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        for node in self.walk():
            own = node.attributes
            if name in ("*", node.name) and all(
                value in (own.get(key) or "").split() if key == "class" else own.get(key) == value
                for key, value in wanted.items()
            ):
                yield node

    def one(self, name, **attributes):
        (found,) = self.all(name, **attributes)
        return found


class _Tree(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = self.at = Node("")

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs, self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag, attrs):
        self.at.children.append(Node(tag, attrs, self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.name, f"</{tag}> in <{self.at.name}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def read_page(text):
    """Read a page, of which every element must be closed."""
    tree = _Tree()
    tree.feed(text)
    tree.close()
    assert tree.at is tree.root
    return tree.root


def cells(page):
    """What the summary says, by SAE and column, and which of it is marked as the best."""
    shown, marked = {}, set()
    for table in page.all("table", class_="summary"):
        _, names = table.one("thead").all("tr")
        columns = [" ".join(th.text().split()) for th in names.all("th")]
        for row in table.all("tr"):
            data = list(row.all("td"))
            if data:
                sae = row.one("th").text()
                assert len(data) == len(columns)
                for column, cell in zip(columns, data, strict=True):
                    shown[sae, column] = cell.text()
                    if list(cell.all("strong")):
                        marked.add((sae, column))
    return shown, marked
