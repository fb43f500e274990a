"""The search page in a real browser: what users do, hostile content, keys, a phone, and nothing from other origins."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("starlette", reason="pip install -e '.[search]'")
pytest.importorskip("uvicorn", reason="pip install -e '.[search]'")
from helpers.browser import PHONE, Watch, missing, open_browser
from helpers.search_collection import Encoder, make_collection, make_picture, running

if why := missing():
    pytest.skip(why, allow_module_level=True)

ROWS = 90
HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>{{7*7}}\u202e"
LONG_WORD = "W" * 3000


@pytest.fixture(scope="module")
def collection():
    changes = {
        0: {"id": HOSTILE, "text": HOSTILE, "fields": {"background": HOSTILE, "things": 2, HOSTILE: HOSTILE}},
        1: {"id": LONG_WORD, "text": LONG_WORD, "fields": {"background": "sky", "things": 2, "w": LONG_WORD}},
        2: {"id": "javascript:alert(3)", "text": "javascript:alert(3)"},
    }
    found = make_collection(ROWS, size=64, changes=changes)
    found._pictures[7] = b"no picture"
    return found


@pytest.fixture(scope="module")
def url(collection):
    with running(collection) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser, url):
    """visit(path, **context options) -> the page, loaded and watched; no problem may be left at the end."""
    opened = []

    def go(path="/", at=url, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(15_000)
        page = context.new_page()
        opened.append((context, Watch(page, at)))
        page.goto(at + path)
        page.wait_for_selector(".tile, .message:not([hidden])")
        return page

    yield go
    problems = [problem for _, watch in opened for problem in watch.problems]
    for context, _ in opened:
        context.close()
    assert not problems


def rows_of(page):
    return page.eval_on_selector_all(".tile", "tiles => tiles.map(tile => Number(tile.dataset.row))")


def wait_until(page, expression):
    """Until it is true. (Playwright's own wait_for_function needs eval, which the page's policy forbids.)"""
    end = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def wait_for_answer(page):
    wait_until(page, "document.getElementById('progress').hidden && Boolean(document.querySelector('a.tile'))")


def search(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")
    wait_for_answer(page)


def expect_rows(collection, text, count):
    return collection.vectors.search(collection.model.encode_text(text)[None], count)[0][0].tolist()


def focused_row(page):
    return page.evaluate("Number(document.activeElement.dataset.row ?? -1)")


# ---- what users do ---------------------------------------------------------------------------------------------------


def test_first_results(visit, collection):
    page = visit("/")
    assert page.title() == "Image search" and page.locator("h1").is_visible()
    assert f"{ROWS} pictures" in page.inner_text("#lead")
    assert rows_of(page)[:3] == [0, 1, 2] and page.evaluate("document.activeElement.id") == "text"
    text = collection.describe(30)["text"]
    search(page, text)
    assert rows_of(page)[:20] == expect_rows(collection, text, 20)
    assert page.locator(".tile .score").first.inner_text().startswith("0.")
    assert collection.describe(30)["text"] in page.locator(".tile .caption").all_inner_texts()
    assert f"{ROWS} pictures searched" in page.inner_text("#status")
    page.wait_for_selector(".tile img.shown")
    assert page.url.endswith(f"/?q={text.replace(' ', '+').replace(',', '%2C')}")


def test_a_link_brings_its_question(visit, collection):
    page = visit("/?q=a+red+circle")
    assert page.input_value("#text") == "a red circle" and "a red circle" in page.title()
    assert rows_of(page)[:10] == expect_rows(collection, "a red circle", 10)


def test_what_others_append_to_links_is_ignored(visit, collection):
    page = visit("/?q=a+red+circle&utm_source=x&fbclid=y")
    assert rows_of(page)[:10] == expect_rows(collection, "a red circle", 10)


def test_an_example_is_a_question(visit):
    page = visit("/")
    example = page.locator(".examples a").nth(1)
    text = example.inner_text()
    example.click()
    wait_for_answer(page)
    assert page.input_value("#text") == text and not page.locator(".examples").is_visible()


def test_click_through_mixture_and_back(visit, collection):
    page = visit("/?q=a+blue+star")
    first = rows_of(page)
    page.locator(".tile").nth(3).click()
    wait_until(page, f"document.querySelector('.tile').dataset.row !== '{first[0]}'")
    row = first[3]
    assert page.url.endswith(f"/?row={row}") and page.input_value("#text") == ""
    nearest = collection.vectors.search(collection.vectors.take([row]), 11)[0][0].tolist()
    assert rows_of(page)[:10] == [other for other in nearest if other != row][:10]  # the picture itself is above
    assert page.inner_text("#subject-text") == collection.describe(row)["text"]
    assert collection.describe(row)["id"] in page.inner_text("#subject-facts")
    assert not page.locator("#slider").is_visible()
    search(page, "a red circle")
    page.wait_for_selector("#slider:visible")
    half = rows_of(page)
    page.evaluate("document.getElementById('weight').value = 0")
    page.dispatch_event("#weight", "input")
    page.wait_for_url(f"**/?q=a+red+circle&row={row}&weight=0")
    wait_for_answer(page)
    words_only = [other for other in expect_rows(collection, "a red circle", 40) if other != row]
    assert rows_of(page)[:10] == words_only[:10] != half[:10]
    page.go_back()
    page.wait_for_url(f"**/?row={row}")
    page.go_back()
    page.wait_for_url("**/?q=a+blue+star")
    assert rows_of(page)[:20] == first[:20] and page.input_value("#text") == "a blue star"
    page.go_forward()
    page.wait_for_url(f"**/?row={row}")
    page.click("#token-remove")
    page.wait_for_url("**/")
    assert page.locator("h1").is_visible()


def test_back_keeps_the_place(visit):
    page = visit("/?q=red")
    page.mouse.wheel(0, 1500)
    wait_until(page, "scrollY > 1000")
    page.wait_for_timeout(400)
    place = page.evaluate("scrollY")
    page.evaluate("[...document.querySelectorAll('.tile')].find(t => t.getBoundingClientRect().top > 100).click()")
    page.wait_for_url("**/?row=*")
    wait_for_answer(page)
    assert page.evaluate("scrollY") == 0
    page.go_back()
    page.wait_for_url("**/?q=red")
    wait_until(page, f"Math.abs(scrollY - {place}) < 2")


def test_more_comes_with_scrolling(visit):
    page = visit("/?q=red")
    assert len(rows_of(page)) == 40
    for _ in range(20):
        page.mouse.wheel(0, 2000)
        page.wait_for_timeout(100)
    wait_until(page, f"document.querySelectorAll('.tile').length === {ROWS}")
    assert len(set(rows_of(page))) == ROWS and page.locator("#more").is_hidden()


@pytest.mark.parametrize("way", ["button", "drop", "paste"])
def test_a_picture_of_the_users(visit, collection, tmp_path, way):
    page, file = visit("/"), tmp_path / "<b>photo.jpg"
    file.write_bytes(collection.picture(40))
    if way == "button":
        with page.expect_file_chooser() as chooser:
            page.click("#upload")
        chooser.value.set_files(file)
    else:
        give = """([bytes, name, way]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/jpeg"}));
            const field = way === "drop" ? "dataTransfer" : "clipboardData";
            const enter = new DragEvent("dragenter", {bubbles: true, dataTransfer: data});
            if (way === "drop") document.body.dispatchEvent(enter);
            window.shown = !document.getElementById("drop").hidden;
            const kind = way === "drop" ? DragEvent : ClipboardEvent;
            document.body.dispatchEvent(new kind(way, {bubbles: true, cancelable: true, [field]: data}));
        }"""
        page.evaluate(give, [list(file.read_bytes()), file.name, way])
        assert page.evaluate("window.shown") == (way == "drop") and page.locator("#drop").is_hidden()
    page.wait_for_selector("#subject:visible")
    wait_for_answer(page)
    vector = collection.model.encode_picture(collection.picture(40))
    assert rows_of(page)[:10] == collection.vectors.search(vector[None], 10)[0][0].tolist()
    assert page.inner_text("#subject-text") == file.name
    wait_until(page, "document.getElementById('subject-image').naturalWidth === 64")
    search(page, "a plain red star")
    mixed = rows_of(page)
    page.locator(".tile").first.click()
    page.wait_for_url("**/?row=*")
    page.go_back()
    page.wait_for_url("**/?q=a+plain+red+star")
    wait_until(page, f"document.querySelector('.tile').dataset.row === '{mixed[0]}'")
    page.reload()  # the picture is gone with the page's memory
    page.wait_for_selector(".message:visible")
    assert "choose it again" in page.inner_text("#message-text")


def test_what_is_no_picture_is_refused_in_words(visit, tmp_path):
    page = visit("/")
    (tmp_path / "a.txt").write_text("x")
    page.set_input_files("#file", tmp_path / "a.txt")
    assert "not a picture file" in page.inner_text("#message-text")
    (tmp_path / "a.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "a.png")
    wait_until(page, "document.getElementById('message-text').textContent.includes('in a format that is read')")
    (tmp_path / "b.png").write_bytes(bytes(32_000_001))
    page.set_input_files("#file", tmp_path / "b.png")
    assert "too large" in page.inner_text("#message-text")
    (tmp_path / "c.png").write_bytes(make_picture())
    page.set_input_files("#file", tmp_path / "c.png")
    wait_for_answer(page)
    assert page.locator("#message").is_hidden()


def test_filters(visit, collection):
    page = visit("/?q=red")
    page.click(".menu summary:has-text('things')")
    page.click(".menu[open] label:has-text('3')")
    page.wait_for_url("**/?q=red&things=3")
    wait_for_answer(page)
    three = {row for row in range(ROWS) if collection.describe(row)["fields"]["things"] == 3}
    wait_until(page, f"document.getElementById('status').textContent.startsWith('{len(three)} ')")
    assert set(rows_of(page)) <= three
    page.locator(".tile").first.click()
    page.wait_for_url("**/?row=*&things=3")
    page.click("#chosen button")
    page.wait_for_url(lambda address: "things" not in address)
    assert page.locator("#chosen").is_hidden()


def test_captions_and_scores_can_be_switched_off(visit):
    page = visit("/?q=red")
    assert page.locator(".caption").first.is_visible() and page.locator(".score").first.is_visible()
    page.uncheck("#captions")
    page.uncheck("#scores")
    assert not page.locator(".caption").first.is_visible() and not page.locator(".score").first.is_visible()
    page.reload()
    wait_for_answer(page)
    assert not page.locator(".caption").first.is_visible() and not page.is_checked("#scores")


def test_keys(visit):
    page = visit("/?q=red")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("/")  # in the box it is a letter
    assert "/" in page.input_value("#text")
    page.keyboard.press("ArrowDown")
    rows = rows_of(page)
    columns = page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    steps = [
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", len(rows) - 1),
    ]
    assert focused_row(page) == rows[0]
    for key, place in [*steps, ("Home", 0), ("ArrowLeft", 0)]:
        page.keyboard.press(key)
        assert focused_row(page) == rows[place], key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/?row={rows[1]}")
    wait_for_answer(page)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("blue")
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""
    page.keyboard.press("Escape")  # the picture goes next
    page.wait_for_url("**/")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "text"


# ---- content of any kind ---------------------------------------------------------------------------------------------


def test_hostile_texts_are_texts(visit):
    page = visit("/")
    assert page.locator(".tile").first.locator(".caption").inner_text().startswith("<img src=x onerror")
    search(page, HOSTILE)
    assert page.input_value("#text") == HOSTILE.strip() and page.locator(".grid img[src='x']").count() == 0
    page.reload()
    wait_for_answer(page)
    page.goto(page.url.split("?")[0] + "?row=0")
    wait_until(page, "document.getElementById('subject-text').textContent.startsWith('<img')")
    assert HOSTILE[:20] in page.inner_text("#subject-facts")
    menu = page.locator(".menu").first
    menu.locator("summary").click()
    menu.locator("label").filter(has_text="onerror").click()
    page.wait_for_selector("#chosen button:has-text('onerror')")
    page.wait_for_selector(".message:visible")  # the only row with this value is the one that is searched by
    assert page.locator("script:not([src])").count() == 0 and page.locator("img[src='x']").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize(
    "parameters", ["?q=%3Cscript%3Ealert(1)%3C/script%3E", "?row=2", "?row=999999999", "?row=x", "#<b>"]
)
def test_hostile_links(visit, parameters):
    page = visit(f"/{parameters}")
    assert page.locator("script:not([src])").count() == 0


def test_long_texts(visit):
    page = visit("/")
    search(page, "red circle " * 455)  # 5,005 letters
    assert len(rows_of(page)) == 40 and page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.goto(page.url.split("?")[0] + "?row=1")  # its id, text and a field are one word of 3,000 letters
    wait_for_answer(page)
    wait_until(page, "document.getElementById('subject-text').textContent.length === 3000")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_picture_that_cannot_be_shown(visit):
    page = visit("/")
    page.wait_for_selector(".tile[data-row='7'] .broken")
    assert "cannot be shown" in page.inner_text(".tile[data-row='7'] .broken")


# ---- the server's troubles -------------------------------------------------------------------------------------------


def test_waiting_errors_and_another_attempt(visit, collection, monkeypatch):
    gate = threading.Event()

    class Slow(Encoder):
        def encode_text(self, text):
            if text == "wrong":
                raise RuntimeError("bug")
            gate.wait(20)
            return super().encode_text(text)

    monkeypatch.setattr(collection, "model", Slow())
    page = visit("/")
    page.fill("#text", "red")
    page.press("#text", "Enter")
    page.wait_for_selector("#progress:visible")
    assert page.inner_text("#status") == "Searching …" and page.get_attribute("#grid", "aria-busy") == "true"
    gate.set()
    wait_for_answer(page)
    page.fill("#text", "wrong")
    page.press("#text", "Enter")
    page.wait_for_selector("#retry:visible")
    assert "error of the server" in page.inner_text("#message-text") and not rows_of(page)
    monkeypatch.setattr(collection, "model", Encoder())
    page.click("#retry")
    wait_for_answer(page)
    assert page.locator("#message").is_hidden()


def test_a_newer_question_wins(visit, collection, monkeypatch):
    class Slow(Encoder):
        def encode_text(self, text):
            time.sleep(1.0 if text == "slow" else 0.0)
            return super().encode_text(text)

    monkeypatch.setattr(collection, "model", Slow())
    page = visit("/")
    page.fill("#text", "slow")
    page.press("#text", "Enter")
    search(page, "a red circle")
    page.wait_for_timeout(1300)
    assert rows_of(page)[:10] == expect_rows(collection, "a red circle", 10)


def test_a_server_that_is_gone(visit, collection):
    with running(collection) as url:
        page = visit("/", at=url)
    page.fill("#text", "red")
    page.press("#text", "Enter")
    page.wait_for_selector("#retry:visible")
    assert "does not answer" in page.inner_text("#message-text")


# ---- how it is seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/?q=red+circle&background=sky", "/?row=1&q=blue", "/api"])
def test_a_phone(visit, browser, url, path):
    if path == "/api":
        context = browser.new_context(**PHONE)
        page = context.new_page()
        page.goto(url + path)
    else:
        page = visit(path, **PHONE)
        columns = page.evaluate(
            "getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length"
        )
        assert columns == 2
        for button in ("#upload", ".go"):
            box = page.locator(button).bounding_box()
            assert box["width"] >= 36 and box["height"] >= 36 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    if path == "/api":
        context.close()


def contrast(a, b):
    """Of WCAG 2.2, of two colours "rgb(r, g, b)"."""

    def luminance(color):
        parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(visit, scheme):
    page = visit("/?q=red", color_scheme=scheme)
    color = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
    paper = page.evaluate(color, ["body", "backgroundColor"])
    assert (contrast(paper, "rgb(255, 255, 255)") > 10) == (scheme == "dark")
    for selector in ("body", ".caption", "#status", "footer a"):
        assert contrast(page.evaluate(color, [selector, "color"]), paper) >= 4.5, selector
    button = [page.evaluate(color, [".go", name]) for name in ("color", "backgroundColor")]
    assert contrast(*button) >= 4.5


def test_reduced_motion(visit):
    page = visit("/?q=red", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.frame')).transitionDuration") == "0s"


def test_everything_has_a_name(visit):
    page = visit("/?q=red&row=3")
    unnamed = """() => [...document.querySelectorAll("button, a, input, summary")]
        .filter(element => element.checkVisibility())
        .filter(element => !(element.getAttribute("aria-label") || element.textContent.trim() || element.title
            || element.labels?.length || element.querySelector("img[alt]:not([alt=''])")))
        .map(element => element.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.locator(".tile").first.get_attribute("aria-label").endswith("More like this")
    assert page.get_attribute("#status", "role") == "status"


@pytest.mark.parametrize(
    ("locale", "said"), [("zh-CN", "搜索"), ("zh-TW", "搜索"), ("en-GB", "Search"), ("de-DE", "Search")]
)
def test_language(visit, locale, said):
    page = visit("/", locale=locale)
    assert page.inner_text(".go") == said
    assert page.get_attribute("html", "lang") == ("zh-CN" if said == "搜索" else "en")
    search(page, "一个红色圆形")
    assert "undefined" not in page.inner_text("body") and rows_of(page)
