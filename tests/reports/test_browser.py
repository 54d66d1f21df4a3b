"""The page in a real browser: nothing missing, nothing loaded, nothing cut off, readable for everybody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.reports.browser import Browser, browsing, find_browser
from tests.reports.made_study import make_study

from fedmira.graphs.graph import group_graph
from fedmira.reports.render import write_report

NAMES = [
    "<script>document.title='x'</script>",
    '"><img src=x onerror="document.title=1">',
    "\u202edetrevni",
    "w" * 200,
    *(f"c{place}" for place in range(8)),
]
WIDTHS = (320, 390, 800, 1280)

# Every piece of text that is seen, with its colour and the colour behind it.
CONTRASTS = """(() => {
  const parts = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = parts(c).map(v => v / 255).map(v =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parts(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || e.closest('title') || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => x - y);
    found.push([(b + 0.05) / (a + 0.05), text.slice(0, 40)]);
  }
  return found; })()"""

# Text that ends beyond the right edge, but for what can be scrolled there.
CUT_OFF = """(() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, range = document.createRange();
    if (e.closest('.scroll, title, .skip') || !e.checkVisibility()) continue;
    range.selectNodeContents(walk.currentNode);
    for (const box of range.getClientRects())
      if (box.right > innerWidth + 1 || box.left < -1) found.push(e.textContent.slice(0, 40));
  }
  return found; })()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on the PATH (chromium, google-chrome, chrome)")
    with browsing(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with hostile names, every section and an unfinished run."""
    groups = [f"g{place % 3}" for place in range(len(NAMES))]
    path = tmp_path_factory.mktemp("studies") / "study"
    make_study(path, NAMES, groups=groups, graph=group_graph(groups), state="interrupted")
    return write_report(path)


@pytest.fixture
def page(browser: Browser, report: Path) -> Browser:
    browser.events.clear()
    browser.open(report, width=1280)
    return browser


def test_every_section_is_there_and_is_seen(page: Browser):
    seen = page.evaluate(
        "[...document.querySelectorAll('main > section')].filter(e => e.checkVisibility()).map(e => e.id)"
    )
    assert seen == [
        "",
        "",
        "methods",
        "loss",
        "merges",
        "gain",
        "graph",
        "clients",
        "costs",
        "data",
        "settings",
        "reading",
    ]
    empty = page.evaluate("[...document.querySelectorAll('main > section')].filter(e => e.offsetHeight < 40).length")
    assert empty == 0


def test_every_picture_has_a_size_and_something_in_it(page: Browser):
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(e => e.checkVisibility())"
        ".map(e => [e.getBoundingClientRect().width, e.getBBox().width, e.querySelectorAll('*').length])"
    )
    assert len(sizes) > 40
    assert all(width > 8 and drawn > 0 and count > 0 for width, drawn, count in sizes)


def test_no_number_of_a_drawing_is_broken(page: Browser):
    wrong = page.evaluate(
        "[...document.querySelectorAll('svg *')].flatMap(e => [...e.attributes])"
        ".filter(a => !['class', 'aria-label'].includes(a.name) && /nan|inf|none[^a-z]|undefined/i.test(a.value))"
        ".map(a => a.name + '=' + a.value)"
    )
    assert wrong == []


def test_the_console_stays_empty_and_nothing_else_is_loaded(page: Browser, report: Path):
    assert page.said("Log.entryAdded") == []
    assert page.said("Runtime.exceptionThrown") == []
    assert page.said("Runtime.consoleAPICalled") == []
    asked = [one["request"]["url"] for one in page.said("Network.requestWillBeSent")]
    assert asked == [report.resolve().as_uri()]


def test_a_script_that_got_in_would_not_run(browser: Browser, report: Path, tmp_path: Path):
    planted = tmp_path / "planted.html"
    text = report.read_text(encoding="utf-8").replace("</main>", "<script>document.title = 'ran'</script></main>")
    planted.write_text(text, encoding="utf-8")
    browser.open(planted, width=1280)
    assert browser.evaluate("document.title") == "study: FedMira report"


def test_hostile_names_are_text(page: Browser):
    assert page.evaluate("document.title") == "study: FedMira report"
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    names = page.evaluate("[...document.querySelectorAll('#clients tbody th')].map(e => e.textContent.trim())")
    assert names[: len(NAMES)] == [name.replace("\u202e", "[U+202E]") for name in NAMES]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_at_any_width(width: int, browser: Browser, report: Path):
    browser.open(report, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(CUT_OFF) == []


def test_the_tables_of_a_usual_study_need_no_scrolling_on_a_desk(browser: Browser, tmp_path: Path):
    clients = [f"north-{place}" for place in range(12)]
    path = write_report(make_study(tmp_path / "usual", clients, graph=group_graph(["a"] * 12)))
    browser.open(path, width=1280)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert browser.evaluate(f"{wide}.map(e => e.getAttribute('aria-label'))") == []


def test_text_on_a_phone_is_not_shrunk(browser: Browser, report: Path):
    browser.open(report, width=390)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    shares = browser.evaluate(
        "[...document.querySelectorAll('svg')].filter(e => e.checkVisibility() && e.querySelector('text'))"
        ".map(e => e.getBoundingClientRect().width / e.viewBox.baseVal.width)"
    )
    assert min(shares) > 0.85


@pytest.mark.parametrize("width", [390, 1280])
def test_every_text_has_enough_contrast(width: int, browser: Browser, report: Path):
    browser.open(report, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    found: list[list[Any]] = browser.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [one for one in found if one[0] < 4.5] == []


def test_a_keyboard_reaches_everything_in_order_and_sees_where_it_is(page: Browser):
    reached = []
    for _ in range(8):
        page.send("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        page.send("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    assert reached[:2] == ["Skip to the results", "Methods compared"]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_screen_reader_finds_named_pictures_and_real_tables(width: int, browser: Browser, report: Path):
    browser.open(report, width=width)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]
    pictures = [name for role, name in seen if role in ("image", "img")]
    assert any(name.startswith("Mean validation loss by round: local from 4.000") for name in pictures)
    assert all(pictures)
    assert ("rowheader", "mira") in [(role, name.strip("\u00a0 ")) for role, name in seen]
    assert ("columnheader", "Lowest tenth") in seen
    assert ("region", "Read with care") in seen
    assert ("main", "") in seen


def test_the_graph_shows_every_client_with_its_gain(page: Browser):
    told = page.evaluate("[...document.querySelectorAll('#graph svg.wide g > title')].map(e => e.textContent)")
    assert len(told) == len(NAMES)
    assert told[-1].startswith("c7 (g2): gain ")


def test_print_shows_what_is_folded_and_leaves_out_what_is_only_for_screens(page: Browser):
    seen = "['details:not([open]) :not(summary)', 'nav'].map(e => document.querySelector(e).checkVisibility())"
    assert page.evaluate(seen) == [False, True]
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.evaluate(seen) == [True, False]
    finally:
        page.send("Emulation.setEmulatedMedia", media="")


def test_on_a_phone_each_method_is_a_card_with_its_own_labels(browser: Browser, report: Path):
    browser.open(report, width=390)
    assert browser.evaluate("document.querySelector('.cards thead').offsetHeight") <= 1
    labels = browser.evaluate(
        "[...document.querySelectorAll('.cards tr:last-child td')].slice(0, 2)"
        ".map(e => getComputedStyle(e, '::before').content)"
    )
    assert labels == ['"View"', '"Mean ± 95 %"']
    bare = "[...document.querySelectorAll('.cards td')].filter(e => e.checkVisibility() && !e.dataset.label).length"
    assert browser.evaluate(bare) == 0
