"""Tests of the inspector's page in a real browser: Chromium, driven by playwright (`pip install -e ".[dev]"`).

    apt-get install chromium

The tests are skipped if either is missing. They operate the page's own controls (pointer, touch, keyboard, search) and
compare the numbers on the screen with the input data. `-s` prints the measured times.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest

from alignvlm_jax.inspector import page
from alignvlm_jax.inspector.inspection import Answer
from tests.inspector.samples import FakeTokenizer, nine_tiles

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

FLAGS = """--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync""".split()
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
MAX_REACTION_TIME = 0.1  # seconds from a pointer move to the next frame


@pytest.fixture(scope="module")
def inspection():
    return nine_tiles()


@pytest.fixture(scope="module")
def url(inspection, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    page.write(page.render(inspection.to_json(), title="nine tiles"), file)
    return file.as_uri()


@pytest.fixture(scope="module")
def browser():
    # Chromium refuses to use its sandbox as root, the usual user in containers.
    flags = [*FLAGS, "--no-sandbox"] if os.getuid() == 0 else FLAGS
    with playwright.sync_playwright() as driver:
        with contextlib.closing(driver.chromium.launch(executable_path=CHROMIUM, args=flags)) as browser:
            yield browser


def wait_until(tab, expression: str) -> None:
    """Waits until a JavaScript expression is true."""
    # playwright's own wait_for_function is blocked by the page's content security policy.
    end = time.monotonic() + 10
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


@contextlib.contextmanager
def open_page(browser, url, **options):
    """Opens the page. On exit, asserts that it logged nothing, raised no error and fetched nothing else."""
    with contextlib.closing(browser.new_context(**options)) as context:
        tab, messages, fetched = context.new_page(), [], []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(url)
        wait_until(tab, "window.inspector !== undefined")
        yield tab
        assert messages == []
        assert [address for address in fetched if not address.startswith("data:")] == [url]


@pytest.fixture
def desktop(browser, url):
    with open_page(browser, url, **DESKTOP) as tab:
        yield tab


def center_of(tab, patch: int) -> tuple[float, float]:
    """Returns the screen coordinates of the center of a patch."""
    return tuple(
        tab.evaluate(
            """(t) => {
                const [left, top, right, bottom] = inspector.rectangle(t);
                const box = document.getElementById('viewport').getBoundingClientRect();
                const { left: x, top: y, scale } = inspector.frame;
                return [box.left + 1 + x + (left + right) / 2 * scale, box.top + 1 + y + (top + bottom) / 2 * scale];
            }""",
            patch,
        )
    )


def displayed_words(tab) -> list[tuple[str, str]]:
    """Returns the words in the list and their probabilities, as displayed."""
    rows = tab.query_selector_all("#words li:not([hidden])")
    return [(row.query_selector(".word").text_content(), row.query_selector(".share").text_content()) for row in rows]


def expected_words(inspection, patch: int) -> list[tuple[str, str]]:
    """Returns the expected result of `displayed_words`: the patch's eight likeliest words, rounded as on the page."""
    ids, shares = inspection.words.ids.reshape(-1, 32)[patch], inspection.words.probabilities.reshape(-1, 32)[patch]
    words = [FakeTokenizer().token_text(int(word)).replace(" ", "␣") for word in ids[:8]]

    # Two significant digits. No word of the samples is displayed with less than 1 %.
    def percent(share):
        return f"{share * 100:.0f}" if share >= 0.0995 else f"{share * 100:.1f}" if share >= 0.01 else None

    return [(word, f"{percent(share)}\u00a0%") for word, share in zip(words, shares, strict=False)]


@pytest.mark.parametrize("patch", [729, 729 + 5 * 27 + 20, 5 * 729 + 365, 7290 - 1])
def test_pointing_at_a_patch_lists_its_words(desktop, inspection, patch):
    desktop.mouse.move(*center_of(desktop, patch))
    wait_until(desktop, f"inspector.state.patch === {patch}")
    assert displayed_words(desktop) == expected_words(inspection, patch)
    words = float(np.exp(inspection.words.entropy.reshape(-1)[patch]))
    number = desktop.text_content("#patch-doubt").split()[0]
    assert float(number) == pytest.approx(words, rel=0.05)
    column = patch % 27 + 1
    assert desktop.text_content("#patch-place") == (
        f"tile {patch // 729} of 9 · row {patch % 729 // 27 + 1}, column {column}"
    )


def test_a_click_pins_a_patch_and_escape_unpins_it(desktop):
    desktop.mouse.click(*center_of(desktop, 2000))
    desktop.mouse.move(*center_of(desktop, 4000))
    assert "pinned" in desktop.text_content("#patch-place") and desktop.evaluate("inspector.state.patch") == 2000
    desktop.keyboard.press("Escape")
    desktop.mouse.move(*center_of(desktop, 4001))
    assert desktop.evaluate("inspector.state.patch") == 4001


def test_arrow_keys_cross_tile_borders(desktop):
    desktop.focus("#viewport")
    desktop.mouse.click(*center_of(desktop, 729 + 26))  # the top right patch of the first tile
    desktop.keyboard.press("ArrowRight")
    assert desktop.evaluate("inspector.state.patch") == 2 * 729
    desktop.keyboard.press("ArrowLeft")
    for _ in range(27):
        desktop.keyboard.press("ArrowDown")
    assert desktop.evaluate("inspector.state.patch") == 4 * 729 + 26
    wait_until(
        desktop, "document.getElementById('announcement').textContent.startsWith('tile 4 of 9 · row 1, column 27: ')"
    )
    desktop.keyboard.press("ArrowUp")
    assert desktop.evaluate("inspector.state.patch") == 729 + 26 * 27 + 26


def test_a_search_shows_the_probability_of_the_word_in_each_patch(desktop, inspection):
    """The probability of a word is the sum over its four spellings."""
    word = FakeTokenizer().token_text(4004)
    desktop.keyboard.press("/")
    desktop.keyboard.type(word)
    assert desktop.is_checked("#views [value=find]") and desktop.evaluate("inspector.state.query") == word
    ids, shares = inspection.words.ids.reshape(-1, 32), inspection.words.probabilities.reshape(-1, 32)
    values = np.array(desktop.evaluate("Array.from(inspector.state.result.values)"))
    matches = np.isin(ids, [4004, 4005, 4006, 4007])
    np.testing.assert_allclose(values, np.where(matches, shares, 0).sum(axis=1), rtol=2e-4, atol=1e-6)
    assert values[2000] == pytest.approx(0.918, rel=1e-3) and np.count_nonzero(values) == 1
    assert "92\u00a0%" in desktop.text_content("#legend-title")
    desktop.fill("#search", "")
    assert not desktop.is_checked("#views [value=find]")


def test_spellings_can_be_excluded(desktop):
    desktop.fill("#search", FakeTokenizer().token_text(4004))
    value = "inspector.state.result.values[2000]"
    assert desktop.evaluate(value) == pytest.approx(0.918, rel=1e-3)
    chips = desktop.locator("#variants button")
    assert chips.all_text_contents() == [FakeTokenizer().token_text(word).replace(" ", "␣") for word in (4005, 4006)]
    chips.first.click()
    assert desktop.evaluate(value) == pytest.approx(0.018, rel=1e-3)
    assert chips.first.get_attribute("aria-pressed") == "false"
    chips.first.click()
    assert desktop.evaluate(value) == pytest.approx(0.918, rel=1e-3)


def test_a_word_spelled_by_neighboring_patches_is_found(desktop, inspection):
    ids = inspection.words.ids.reshape(-1, 32)[:, 0]  # the likeliest word of each patch
    patches = [4 * 729 + 10 * 27 + 26, 5 * 729 + 10 * 27, 5 * 729 + 10 * 27 + 1]  # across the border of two tiles
    word = "".join(FakeTokenizer().token_text(int(ids[patch])).strip() for patch in patches)
    shares = inspection.words.probabilities.reshape(-1, 32)[patches, 0]
    desktop.fill("#search", word)
    chains = desktop.evaluate("inspector.findChains(inspector.state.query.toLowerCase())")
    (chain,) = [chain for chain in chains if chain["patches"] == patches]
    assert chain["score"] == pytest.approx(float(np.exp(np.mean(np.log(shares)))), rel=1e-3)
    assert "spelled by neighbors" in desktop.text_content("#legend-title")


def test_a_word_that_is_not_on_the_page_is_reported(desktop):
    desktop.fill("#search", "xylophone")
    assert "not among the 32 likeliest" in desktop.text_content("#legend-title")
    assert max(desktop.evaluate("Array.from(inspector.state.result.values)")) == 0


def test_suggestions_are_selected_with_the_keyboard(desktop):
    desktop.focus("#search")
    desktop.keyboard.type("tago")
    assert desktop.is_visible("#suggestions") and desktop.get_attribute("#search", "aria-expanded") == "true"
    desktop.keyboard.press("ArrowDown")
    chosen = desktop.get_attribute("#search", "aria-activedescendant")
    word = desktop.evaluate(f"document.getElementById('{chosen}').firstChild.textContent")
    desktop.keyboard.press("Enter")
    assert desktop.input_value("#search") == word and word.startswith("tago") and not desktop.is_visible("#suggestions")


def test_shares_are_shown_for_the_answer_and_for_each_token(desktop, inspection):
    shares = inspection.answers[0].attribution.shares
    maps = "Array.from(inspector.answerMap())"
    total = shares.sum(axis=0)
    # Maps are packed as 16-bit integers.
    np.testing.assert_allclose(desktop.evaluate(maps), total, atol=np.abs(total).max() / 60000)
    title = desktop.text_content("#legend-title").replace("−", "-")
    sums = [float(number) for number in re.findall(r"[+-]\d+\.\d\d", title)]
    assert "tiles" in title and "thumbnail" in title
    np.testing.assert_allclose(sums, [total[729:].sum(), total[:729].sum()], atol=0.05)
    desktop.click("#answer button >> nth=3")
    np.testing.assert_allclose(desktop.evaluate(maps), shares[3], atol=np.abs(shares[3]).max() / 60000)
    assert desktop.get_attribute("#answer button >> nth=3", "aria-pressed") == "true"
    assert "Probability of this token" in desktop.text_content("#answer-note")
    desktop.mouse.move(*center_of(desktop, 2000))
    assert f"+{shares[3, 2000]:.1f}" in desktop.text_content("#patch-share")


def test_the_thumbnail_has_patches_of_its_own(desktop, inspection):
    desktop.mouse.move(*center_of(desktop, 5 * 729 + 365))
    desktop.click("#layers label >> nth=1")
    # The center of the page is the center of the thumbnail.
    assert desktop.evaluate("inspector.state.patch") == 13 * 27 + 13
    assert displayed_words(desktop) == expected_words(inspection, 13 * 27 + 13)


@pytest.mark.parametrize("answers", [[], [Answer("Total?", "", np.zeros(0, int), None)]], ids=["none", "empty"])
def test_a_page_without_an_answer_starts_with_the_words(browser, inspection, tmp_path, answers):
    """The answer view is disabled if there is no question, or if the answer is empty."""
    file = tmp_path / "page.html"
    page.write(page.render(dataclasses.replace(inspection, answers=answers).to_json(), title="no answer"), file)
    with open_page(browser, file.as_uri(), **DESKTOP) as tab:
        assert tab.is_checked("#views [value=words]") and tab.is_disabled("#views [value=answer]")
        assert tab.is_visible("#question-card") == bool(answers) and (
            not answers or tab.text_content("#answer") == "no answer"
        )
        tab.mouse.move(*center_of(tab, 4000))
        assert displayed_words(tab) == expected_words(inspection, 4000) and tab.text_content("#patch-share") == ""


def test_zooming_keeps_the_patch_under_the_pointer(desktop):
    x, y = center_of(desktop, 4321)
    desktop.mouse.move(x, y)
    desktop.keyboard.down("Control")
    desktop.mouse.wheel(0, -300)
    desktop.keyboard.up("Control")
    wait_until(desktop, "inspector.state.zoom > 3")
    assert desktop.evaluate("inspector.frame.scale") > 2
    after = center_of(desktop, 4321)
    assert abs(after[0] - x) < 25 and abs(after[1] - y) < 25
    desktop.mouse.move(*after)
    assert desktop.evaluate("inspector.state.patch") == 4321
    desktop.click("#zoom-fit")
    assert desktop.evaluate("inspector.state.zoom") == 1


def test_a_finger_taps_a_patch(browser, url, inspection):
    with open_page(browser, url, **PHONE) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than the screen"
        tab.evaluate("document.getElementById('viewport').scrollIntoView()")
        tab.touchscreen.tap(*center_of(tab, 5 * 729 + 365))
        wait_until(tab, f"inspector.state.patch === {5 * 729 + 365}")
        assert displayed_words(tab) == expected_words(inspection, 5 * 729 + 365)
        heights = tab.evaluate("""[...document.querySelectorAll('.choice span, .choice button, #words button, #search')]
            .filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().height)""")
        assert min(heights) >= 38, "a control is too small for a finger"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser, url, scheme):
    """The contrast of text and background is at least 4.5 in both themes, as WCAG 2.1 (AA) requires."""
    with open_page(browser, url, **DESKTOP, color_scheme=scheme) as tab:
        assert tab.evaluate("document.documentElement.dataset.theme") == scheme
        pairs = tab.evaluate(
            """() => {
                const style = getComputedStyle(document.documentElement);
                const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
                const context = canvas.getContext('2d', { willReadFrequently: true });
                const rgb = (name) => {
                    const text = style.getPropertyValue(name).trim();
                    context.fillStyle = text.includes(',') ? `rgb(${text})` : text;
                    context.fillRect(0, 0, 1, 1);
                    return Array.from(context.getImageData(0, 0, 1, 1).data.slice(0, 3));
                };
                const pairs = [];
                for (const text of ['--ink', '--quiet']) {
                    for (const ground of ['--paper', '--card', '--sheet']) pairs.push([rgb(text), rgb(ground)]);
                }
                return [...pairs, [rgb('--card'), rgb('--ink')], [rgb('--card'), rgb('--for')]];
            }"""
        )

        def luminance(rgb):
            linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
            return np.dot(linear, [0.2126, 0.7152, 0.0722])

        for pair in pairs:
            dark, light = sorted(map(luminance, pair))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, pair
        tab.click("#theme")
        assert tab.evaluate("document.documentElement.dataset.theme") != scheme


def test_controls_have_accessible_names(desktop):
    unnamed = desktop.evaluate(
        """[...document.querySelectorAll('button, input, [tabindex]')].filter((e) => e.offsetParent &&
            !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    facts = "[...document.querySelectorAll('[data-fact]')].filter((e) => !e.closest('p[hidden]'))"
    assert desktop.evaluate(facts + ".map((e) => e.textContent)")[:3] == ["128,256", "32", "0.001\u00a0%"]
    assert desktop.evaluate(facts + ".filter((e) => !e.textContent || e.textContent.includes('undefined')).length") == 0
    assert desktop.evaluate("document.querySelectorAll('*').length") < 400, "patches must not be elements"


def test_the_page_reacts_within_100_ms(browser, url):
    """Asserts the median time from a pointer move to its frame. Load, search and drawing times are only printed."""
    with open_page(browser, url, **DESKTOP) as tab:
        paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
        ready = tab.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1000
        hover = tab.evaluate(
            """async () => {
                const viewport = document.getElementById('viewport');
                const box = viewport.getBoundingClientRect();
                const times = [];
                for (let i = 0; i < 60; i++) {
                    const clientX = box.left + box.width * (0.3 + 0.4 * ((i * 37) % 60) / 60);
                    const clientY = box.top + box.height * (0.1 + 0.8 * ((i * 23) % 60) / 60);
                    const start = performance.now();
                    const options = { clientX, clientY, pointerType: 'mouse', bubbles: true };
                    viewport.dispatchEvent(new PointerEvent('pointermove', options));
                    await new Promise(requestAnimationFrame);
                    await new Promise((done) => setTimeout(done));
                    times.push(performance.now() - start);
                }
                return times;
            }"""
        )
        find = tab.evaluate(
            """() => ['ba', 'tago', 'bandafer', 'tagobirozanbe'].map((word) => {
                const start = performance.now();
                inspector.locate(word);
                return performance.now() - start;
            })"""
        )
        draw = tab.evaluate(
            """() => ['page', 'doubt', 'answer', 'words'].map((view) => {
                inspector.state.view = view;
                const start = performance.now();
                inspector.drawPage();
                return performance.now() - start;
            })"""
        )
        size = pathlib.Path(url.removeprefix("file://")).stat().st_size
        measurements = {
            "size_mb": size / 1e6,
            "first_paint_s": paint,
            "ready_s": ready,
            "hover_ms": {"median": float(np.median(hover)), "95 %": float(np.quantile(hover, 0.95))},
            "find_ms": find,
            "draw_ms": draw,
        }
        print("\nnine tiles:", json.dumps(measurements))
        assert np.median(hover) < 1000 * MAX_REACTION_TIME
