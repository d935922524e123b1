"""The page in a real browser (headless Chromium, driven by selenium), with its folded parts open where not said.

    python -m pytest -m browser

Skipped, with the reason, where Chromium or its driver is absent; `.ci/run` installs both.
"""

import json
import re
import shutil
import time

import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed (the extra `dev`)")
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from pipeline_steps.common.params import ROOT  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium or no driver (Debian: apt-get install chromium chromium-driver)"
    ),
]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
COMMANDS = rf"`|\bmake (?:{'|'.join(TARGETS)})\b|\bpython -m\b|\bdvc "
GAZE_TASKS = ("ask_colour", "ask_place", "card", "follow")
CONTRAST = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ground = (e) => { const c = rgba(getComputedStyle(e).backgroundColor);
  return c.length === 4 && c[3] === 0 && e.parentElement ? ground(e.parentElement) : c; };
const worst = {};
for (const e of document.querySelectorAll("main *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !e.offsetParent) continue;
  const [x, y] = [rgba(getComputedStyle(e).color), ground(e)].map(luminance);
  const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  if (ratio < 4.5) worst[e.tagName + "." + e.className] = ratio;
}
return worst;
"""


@pytest.fixture(scope="module")
def page(built):
    """The address of the page."""
    return (built[0] / "reports/report.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options, ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, page):
    """The page, opened anew: 1280 px wide, light, with JavaScript."""
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # what earlier tests left
    show(chromium, width=1280, scheme="light")
    chromium.get(page)
    chromium.execute_script("document.querySelectorAll('details').forEach((folded) => { folded.open = true; })")
    return chromium


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """The address of a page with a headline study of three arms and eight seeds, and another study."""
    from tests.pipeline_steps.reported import build, study_summary, write_root, write_study

    root = tmp_path_factory.mktemp("full")
    write_root(root)
    write_study(root, study_summary("confirm", ("none", "A6", "B1"), tuple(range(8))))
    write_study(root, study_summary("phase1a", ("none", "F1", "LR2", "A1", "D1"), (31, 32, 33)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        build(root, monkeypatch)
    return (root / "reports/report.html").as_uri()


@pytest.fixture(scope="module")
def real_page(tmp_path_factory):
    """The address of a page with the committed studies, and two clips of each task that needs a gaze."""
    from tests.pipeline_steps.reported import build, write_root

    root = tmp_path_factory.mktemp("real")
    write_root(root)
    shutil.copytree(ROOT / "reports/study", root / "reports/study")
    path = root / "reports/heatmaps/index.json"
    index = json.loads(path.read_text())
    index["clips"] = [clip | {"task": task} for clip in index["clips"] for task in GAZE_TASKS for _ in range(2)]
    path.write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as monkeypatch:
        build(root, monkeypatch)
    return (root / "reports/report.html").as_uri()


def show(browser, width, scheme):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # no scrolling below a click
    features = [{"name": name, "value": value} for name, value in preferences.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for(condition, seconds=15):
    """The first true value of condition(); fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.05)
    return value


def requested(browser):
    """Every address that the page asked for, itself included (and not what the browser's own start page did)."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["request"]["url"] for event in sent if not event["documentURL"].startswith("chrome:")]


def shown_frame(browser):
    """Grey level of the first tile of the clip's canvas, which tells the frame: 60 t + 40."""
    script = "const c = document.querySelector('.clip canvas');"
    return browser.execute_script(f"{script} return c.getContext('2d').getImageData(16, 44, 1, 1).data[0];")


def column(browser, table, name):
    """(header button, function that reads the column's cells from top to bottom)."""
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{table}-rows thead button")
    number = [head.text for head in heads].index(name)
    script = (
        "return [...document.querySelector(arguments[0]).tBodies[0].rows].map((r) => r.cells[arguments[1]].innerText)"
    )
    return heads[number], lambda: browser.execute_script(script, f"#{table}-rows", number)


def test_the_page_logs_nothing_fetches_nothing_and_loads_every_image(browser, page):
    script = "return [...document.images].map((i) => [i.alt, i.complete, i.naturalWidth])"
    wait_for(lambda: all(complete for _, complete, _ in browser.execute_script(script)))
    images = browser.execute_script(script)
    assert len(images) == 10  # seven figures, frames and sheet of one clip, sheet of many
    assert all(alt and width > 0 for alt, _, width in images)
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, ".clip canvas").is_displayed())
    addresses = [address for address in requested(browser) if not address.startswith("data:")]
    assert addresses == [page]
    assert browser.get_log("browser") == []


def test_a_click_sorts_numerically_and_a_second_click_reverses(browser):
    head, cells = column(browser, "reading", "frames")
    assert cells() == ["84", "516", "600"] * 3
    head.click()
    assert cells() == ["516"] * 3 + ["84"] * 3 + ["600"] * 3  # the sums stay below; as words 84 would come first
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    head.click()
    assert cells() == ["84"] * 3 + ["516"] * 3 + ["600"] * 3
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"


def test_the_keyboard_sorts_words_and_missing_values_stay_last(browser):
    head, cells = column(browser, "accuracy", "task")
    assert cells()[0] == "ask_colour"
    head.send_keys(Keys.ENTER)
    head.send_keys(Keys.ENTER)
    assert cells()[0] == "image"
    assert cells()[-2:] == ["mean of tasks", "text only (no frames)"]
    head, cells = column(browser, "flops", "training")
    for _ in range(2):
        head.send_keys(Keys.SPACE)
        assert cells()[-3:] == ["–"] * 3


def test_the_slider_steps_through_the_frames(browser):
    slider = browser.find_element(By.CSS_SELECTOR, ".clip input")
    wait_for(slider.is_displayed)
    assert shown_frame(browser) == 100  # the first one with a planned query
    assert browser.find_element(By.CSS_SELECTOR, ".clip output").text == "frame 1 (0–2)"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert shown_frame(browser) == 160
    slider.send_keys(Keys.HOME)
    assert shown_frame(browser) == 40


def test_play_advances_the_frames_and_pause_stops(browser):
    button = browser.find_element(By.CSS_SELECTOR, ".clip button")
    wait_for(button.is_displayed)
    button.click()
    assert button.accessible_name == "Pause"
    wait_for(lambda: shown_frame(browser) == 160)
    button.click()
    frame = shown_frame(browser)
    time.sleep(1)  # longer than a frame is shown
    assert shown_frame(browser) == frame
    assert button.accessible_name == "Play"


def test_without_javascript_every_frame_is_visible(chromium, page):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(page)
        visible = {
            name: chromium.find_element(By.CSS_SELECTOR, name).is_displayed()
            for name in (".clip .frames", ".clip canvas", ".clip .controls", "#accuracy-rows", "figure img")
        }
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert [name for name, shown in visible.items() if not shown] == [".clip canvas", ".clip .controls"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_legible(browser, width, scheme):
    show(browser, width, scheme)
    browser.refresh()
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CONTRAST) == {}
    chosen = browser.execute_script("const i = document.querySelector('figure img'); return i.currentSrc === i.src")
    assert chosen == (scheme == "light")  # figures are drawn for both


@pytest.mark.parametrize("name", ["full_page", "real_page"])
def test_the_page_is_short_until_it_is_unfolded(chromium, name, request):
    """Limits of a reader's patience at 1280 px; a page with more clips and more tasks has them to spare."""
    show(chromium, 1280, "light")
    chromium.get(request.getfixturevalue(name))
    script = "return [...document.querySelectorAll('table')].filter((t) => t.checkVisibility()).length"
    assert chromium.execute_script(script) <= 13
    assert chromium.execute_script("return document.documentElement.scrollHeight") <= 13_000
    results = chromium.execute_script("return document.body.innerText")
    assert len(results.split()) <= 4_600
    assert re.findall(COMMANDS, results) == []
    assert re.findall(COMMANDS, chromium.execute_script("return document.body.textContent"))  # they are folded
    assert results.index("Exact match") < results.index("Token accuracy") < results.index("Verdict")


@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_with_studies_fits(chromium, full_page, width):
    show(chromium, width, "light")
    chromium.get(full_page)
    chromium.execute_script("document.querySelectorAll('details').forEach((folded) => { folded.open = true; })")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert chromium.execute_script(CONTRAST) == {}
