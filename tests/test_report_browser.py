"""The report as a browser shows it: on a phone and a screen, light and dark."""

import browser
import pytest
from report_problem import make_sae, put_pursuit

from mpsae.report import read_record, write_report

WINDOWS = [(360, 800), (1280, 900)]


@pytest.fixture(scope="module")
def window():
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser found; looked for {', '.join(browser.NAMES)}")
    opened = browser.Browser(program)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / ("a" * 60)
    folders = [
        make_sae(run, "matching_pursuit", 16, fvu=0.1),
        make_sae(run, "topk", 16, prompts={"examples": 10, "spelled": 0.5}),
        make_sae(run, "of_a_name_that_is_rather_long_to_be_shown", 32, without=["probing"]),
    ]
    put_pursuit(folders[1], "nonnegative_omp", 16)
    out = run.parent / "page.html"
    write_report([read_record(folder, run) for folder in folders], out)
    return out


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_the_page_fits_asks_for_nothing_and_shows_its_pictures(
    window, report, width, height, dark, tmp_path
):
    window.open(report, width=width, height=height, dark=dark)
    open_all = "document.querySelectorAll('details').forEach((part) => { part.open = true })"
    window.value(open_all)  # what is folded has to fit too
    assert window.value("innerWidth") == width
    assert window.value("document.documentElement.scrollWidth") <= width
    assert [r["request"]["url"] for r in window.happened("Network.requestWillBeSent")] == [
        report.as_uri()
    ]
    assert not window.happened("Log.entryAdded")
    assert not window.happened("Runtime.exceptionThrown")
    sizes = window.value(
        "[...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect())"
        ".map((box) => [box.width, box.height, box.right])"
    )
    assert len(sizes) == 16
    assert all(250 < w <= width and h > 180 and right <= width for w, h, right in sizes), sizes
    window.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_an_encoder_and_the_pursuit_in_its_place_are_seen_at_once(window, report, width, height):
    window.open(report, width=width, height=height)
    boxes = window.value(
        "(() => { const table = document.querySelector('table.encoders');"
        "const frame = table.parentElement.getBoundingClientRect();"
        "const place = [...table.querySelectorAll('thead th')]"
        ".findIndex((th) => th.textContent === 'FVU');"
        "return [...table.querySelectorAll('tbody tr')]"
        ".map((row) => [...row.querySelectorAll('td')][place - 1].getBoundingClientRect())"
        ".map((box) => [box.width, box.height, frame.right - box.right]) })()"
    )
    assert len(boxes) == 4  # it is open, and FVU is in sight before anything is moved
    assert all(w > 0 and h > 0 and left >= 0 for w, h, left in boxes), boxes


def test_dark_pages_have_other_colours_and_text_that_can_be_read(window, report):
    light = "(c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)" \
        ".map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)" \
        ".reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)"  # fmt: skip
    grounds = []
    for dark in (False, True):
        window.open(report, width=360, height=800, dark=dark)
        ground, ink, drawn = window.value(
            f"(() => {{ const light = {light}; const of = (node) => getComputedStyle(node);"
            "const label = document.querySelector('svg text');"
            "return [of(document.body).backgroundColor, of(document.body).color, of(label).fill]"
            ".map(light) })()"
        )
        for colour in (ink, drawn):
            bright, faint = max(colour, ground), min(colour, ground)
            assert (bright + 0.05) / (faint + 0.05) > 7, (dark, ground, colour)
        grounds.append(ground)
    assert grounds[0] > 0.9
    assert grounds[1] < 0.05


def test_latents_are_filtered_and_sorted_and_reached_by_links(window, report):
    window.open(report, width=1280, height=900)
    ids = (
        "[...document.querySelectorAll('#sae-1 article')].filter((card) => !card.hidden)"
        ".map((card) => Number(card.dataset.id))"
    )
    assert window.value(ids) == [9, 5, 3]
    choose = (
        "(() => {{ const field = document.querySelector('#sae-1 {}'); field.value = '{}';"
        "field.dispatchEvent(new Event('{}')) }})()"
    )
    window.value(choose.format("select", "id", "change"))
    assert window.value(ids) == [3, 5, 9]
    window.value(choose.format("select", "embedding", "change"))
    assert window.value(ids) == [3, 5, 9]
    window.value(choose.format("select", "frequency", "change"))
    window.value(choose.format("input", "ON <I>words", "input"))
    assert window.value(ids) == [3]
    assert window.value("document.querySelector('#sae-1 output').value") == "1 of 3"
    assert not window.value("document.querySelector('#sae-2').open")
    window.value("document.querySelector('a[href=\"#sae-2\"]').click()")
    window.value("location.hash = '#sae-2-5'")
    assert window.value("document.querySelector('#sae-2').open")


def test_without_scripts_everything_is_there_but_the_tools(window, report):
    window.open(report, width=360, height=800, script=False)
    nodes = window.send("DOM.getDocument", depth=1)["root"]["nodeId"]

    def count(selector):
        return len(window.send("DOM.querySelectorAll", nodeId=nodes, selector=selector)["nodeIds"])

    assert count("article") == 9
    assert count(".tools[hidden]") == count(".tools") == 3
