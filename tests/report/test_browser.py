"""The page in a real headless Chromium: apt install chromium (root of Debian has it installed here)."""

import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest

from tests.report import analyses as made
from tests.report.chrome import Chromium
from tinymim_jax.__main__ import main
from tinymim_jax.report.sections import TITLES

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror='window.evil = 1'><a href='javascript:alert(1)'>x</a>"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def program():
    """The browser, installed if that can be done in a minute or two."""
    if not any(map(shutil.which, NAMES)) and shutil.which("apt-get") and os.getuid() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-q", *command], capture_output=True, timeout=600)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("needs a Chromium: apt install chromium")


@pytest.fixture(scope="module")
def url(finished, tmp_path_factory):
    work = tmp_path_factory.mktemp("browser") / "work"
    shutil.copytree(finished, work)
    made.save(work / "distill" / "evals")
    np.savez(work / "distill" / "evals" / "evil.npz", **made.cka(rows=[EVIL, "norm"], models=[EVIL, EVIL]))
    row = {"mean": 40.0, "stderr": 1.5, "values": [38.0, 42.0]}
    compare = {"metric": "val/top1", "rows": {"a": row, EVIL: {**row, "mean": 44.0}}, "paper": {"a": 80.0, EVIL: 81.0}}
    (work / "results.json").write_text(json.dumps({"config": "tiny", "stages": {}, "compare": {"T": compare}}))
    assert main(["report", str(work)]) == 0
    return f"file://{work}/report/index.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(program(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def wait(chromium, script, seconds=20):
    end = time.monotonic() + seconds
    while not (value := chromium.js(script)):
        assert time.monotonic() < end, script
        time.sleep(0.1)
    return value


def scroll_through(chromium):
    """Every chart comes into view and is drawn."""
    for i in range(chromium.js("document.querySelectorAll('.plot').length")):
        chromium.js(f"document.querySelectorAll('.plot')[{i}].scrollIntoView({{behavior: 'instant'}})")
        wait(chromium, f"!!document.querySelectorAll('.plot')[{i}].querySelector('.main-svg')")


def errors(chromium):
    logged = [e for e in chromium.said("Log.entryAdded") if e["entry"]["level"] == "error"]
    said = [e for e in chromium.said("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
    return logged + said + chromium.said("Runtime.exceptionThrown")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_opens_quickly_and_draws_everything_without_an_error(width, theme, chromium, url):
    chromium.page(url, width, 900, theme)
    milliseconds = chromium.js(
        "(() => { const t = performance.getEntriesByType('navigation')[0]; return t.loadEventStart })()"
    )
    assert 0 < milliseconds < 2000
    scroll_through(chromium)
    assert errors(chromium) == [] and chromium.js("window.evil") is None
    assert chromium.js("document.querySelectorAll('a[href^=javascript]').length") == 0
    asked = [event["request"]["url"].split(":")[0] for event in chromium.said("Network.requestWillBeSent")]
    assert set(asked) <= {"file", "data", "blob"}
    shown = chromium.js("[...document.querySelectorAll('section')].filter((s) => s.offsetHeight > 60).map((s) => s.id)")
    assert shown == list(TITLES)
    assert chromium.js("document.documentElement.scrollWidth") <= width
    assert chromium.js(
        "[...document.images].every((image) => image.complete && image.naturalWidth > 0 && image.alt.length > 3)"
    )
    ground = chromium.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (theme == "dark")


@pytest.mark.parametrize("which", ["#curve", ".plot[data-chart=distill_cka]", ".plot[data-chart=compare_t]",
                                   ".plot[data-chart=distill_attention_distance]", "#by-class"])  # fmt: skip
def test_a_chart_answers_a_hover(which, chromium, url):
    chromium.page(url)
    chromium.js(f"document.querySelector('{which}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    wait(chromium, f"!!document.querySelector('{which} .main-svg')")
    time.sleep(0.5)
    # Over what is drawn, then over a grid of points of the plot, until something answers.
    places = chromium.js(f"""(() => {{
      const plot = document.querySelector('{which}'), r = plot.querySelector('.nsewdrag').getBoundingClientRect();
      const drawn = [...plot.querySelectorAll('.point')].map((one) => one.getBoundingClientRect());
      const grid = [...Array(225).keys()].map((i) => [r.x + r.width * (1 + i % 15) / 16, r.y + r.height * (1 + i / 15) / 16]);
      return [...drawn.map((one) => [one.x + one.width / 2, one.y + one.height / 2]), ...grid];
    }})()""")
    for x, y in places:
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        time.sleep(0.02)
        if text := chromium.js(f"document.querySelector('{which} .hoverlayer').textContent"):
            assert any(character.isdigit() for character in text)
            return
    pytest.fail(f"{which} says nothing")


def choose(chromium, control, value):
    chromium.js(f"(() => {{ const c = document.getElementById('{control}'); c.value = '{value}';"
                " c.dispatchEvent(new Event('input', {bubbles: true})) })()")  # fmt: skip


def test_choices_change_what_is_shown_and_outlive_a_reload(chromium, url):
    chromium.page(url)
    chromium.js("sessionStorage.clear()")
    options = chromium.js("[...document.querySelectorAll('#curve-choice option')].map((o) => o.dataset.chart)")
    choose(chromium, "curve-choice", options.index("lr"))
    chromium.js("document.getElementById('curve').scrollIntoView({behavior: 'instant'})")
    label = "document.querySelector('#curve .ytitle')?.textContent"
    wait(chromium, f"{label} === 'learning rate'")
    sources = "[...document.querySelectorAll('[data-pictures=distill_relation_maps] img')].map((i) => i.src)"
    before = chromium.js(sources)
    choose(chromium, "distill_relation_maps-3", 2)
    after = chromium.js(sources)
    assert len(before) == len(after) == 3 and before[0] == after[0] and before[1:] != after[1:]
    many = chromium.js("document.querySelectorAll('[data-pictures=pictures] img').length")
    choose(chromium, "pictures-1", 3)
    assert 1 < chromium.js("document.querySelectorAll('[data-pictures=pictures] img').length") < many
    assert chromium.js("document.querySelector('[data-pictures=pictures] output').textContent") == "3 of 6"
    assert chromium.js("document.querySelector('[data-pictures=pictures] .cell').getBoundingClientRect().width") > 100
    chromium.events.clear()
    chromium.call("Page.reload")
    wait(
        chromium,
        f"document.readyState === 'complete' && document.getElementById('pictures-1').value === '3' && {label} === 'learning rate'",
    )
    assert errors(chromium) == []


def test_the_theme_changes_while_it_is_open_and_all_is_drawn_for_print(chromium, url):
    chromium.page(url)
    chromium.js("document.getElementById('curve').scrollIntoView({behavior: 'instant'})")
    colour = "getComputedStyle(document.querySelector('#curve .ytitle') || document.body).fill"
    wait(chromium, "!!document.querySelector('#curve .ytitle')")
    before = chromium.js(colour)
    chromium.media(features=[{"name": "prefers-color-scheme", "value": "dark"}])
    wait(chromium, f"{colour} !== '{before}'")
    chromium.page(url)
    chromium.js("dispatchEvent(new Event('beforeprint'))") if wait(chromium, "!!window.Plotly") else None
    wait(chromium, "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    assert len(chromium.call("Page.printToPDF", printBackground=False)["data"]) > 50_000
    assert errors(chromium) == []
