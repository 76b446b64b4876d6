"""The page as text: what is in it, what is escaped, and that it is sound HTML."""

import collections
import html
import html.parser
import itertools
import json
import re
import shutil

import numpy as np
import plotly.graph_objects
import pytest

from tests.report import analyses as made
from tinymim_jax.__main__ import main
from tinymim_jax.report import images, page, sections, workdir
from tinymim_jax.report.charts import Heatmap, Pictures
from tinymim_jax.tasks.contract import Panels

VOID = {"meta", "link", "input", "wbr", "br", "img"}


class Parsed(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects them as (tag, attributes), and text by element."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], collections.defaultdict(str)
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.open[-1] if self.open else ""] += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def work(finished, tmp_path_factory):
    """A finished run with analyses, and its page."""
    folder = tmp_path_factory.mktemp("page") / "work"
    shutil.copytree(finished, folder)
    made.save(folder / "distill" / "evals")
    row = {"mean": 40.0, "stderr": 1.5, "values": [38.0, 42.0]}
    compare = {"metric": "val/top1", "rows": {"a": row, "b": {**row, "mean": 44.0}}, "paper": {"a": 80.0, "b": 81.0}}
    results = {"config": "tiny", "stages": dict.fromkeys(("mae", "distill", "finetune")), "compare": {"T 1": compare}}
    (folder / "results.json").write_text(json.dumps(results))
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def text(work):
    return (work / "report" / "index.html").read_text()


def test_it_is_one_sound_file_of_bounded_size_without_network(text):
    assert 4_000_000 < len(text.encode()) < page.LIMIT
    parsed = Parsed(text)
    assert not [
        a
        for a in parsed.all("link", "img", "script", "iframe", "a")
        if re.match("https?:|//", a.get("src") or a.get("href") or "")
    ]
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes["for"] for attributes in parsed.all("label")}
    assert {attributes["id"] for attributes in parsed.all("select", "input")} == labels and len(labels) > 5
    assert parsed.all("html")[0]["lang"] == "en"


def test_headings_are_in_order_and_every_section_is_there(text):
    parsed = Parsed(text)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert [a["id"] for a in parsed.all("section")] == list(sections.TITLES)
    for name in sections.TITLES:
        assert f'href="#{name}"' in text


def test_every_chart_is_described_and_plotly_takes_it(text):
    charts, parsed = data_of(text)["charts"], Parsed(text)
    plots = [a for a in parsed.all("div") if a.get("class") == "plot"]
    options = [a for a in parsed.all("option") if "data-chart" in a]
    assert {a["data-chart"] for a in plots + options} == set(charts)
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)
    assert {
        "loss_mae",
        "lr",
        "compare_t_1",
        "distill_cka",
        "distill_attention_distance",
        "finetune_val_confusion",
    } <= set(charts)
    for chart in charts.values():
        plotly.graph_objects.Figure(chart)


def test_pictures_offer_every_choice(text):
    found = data_of(text)["pictures"]
    assert set(found) == {"pictures", "distill_relation_maps", "distill_neighbours"}
    stages, samples = (labels for _, labels in found["pictures"]["axes"])
    assert stages == ["distill", "mae"] or stages == ["mae", "distill"]
    assert samples == ["all", *(f"{i} of 6" for i in range(1, 7))]
    assert len(found["pictures"]["grids"]) == 2 * 7 and len(found["distill_relation_maps"]["grids"]) == 2 * 2 * 3
    for one in found.values():
        for grid in one["grids"].values():
            assert all(0 <= number < len(one["images"]) for row in grid["rows"] for number, _ in row)
    assert all(source.startswith("data:image/webp;base64,") for source, _ in found["pictures"]["images"])


def test_the_results_stand_there_with_the_papers(text, work):
    flat = re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))
    assert "40.00 1.50 2 2 80.0 2" in " ".join(flat.split()) and "T 1" in flat
    top1 = json.loads((work / "finetune" / "DONE").read_text())["metrics"]["val/top1"]
    assert f"{top1:.2f}" in flat and "teacher from mae" in " ".join(flat.split())
    assert "cpu" in flat and '"patch_size": 8' in text.replace("&quot;", '"')
    assert {path.suffix for path in (work / "report").iterdir()} == {".png", ".svg", ".md", ".html"}


EVIL = "</script><img src=x onerror=alert(1)>&\"'"


def test_names_cannot_break_out(finished, tmp_path):
    work = tmp_path / "w"
    shutil.copytree(finished, work)
    stage = json.loads((work / "mae" / "stage.json").read_text())
    stage["stage"]["data"]["path"], stage["machine"]["system"], stage["handover"] = EVIL, EVIL, [f"note: {EVIL}"]
    (work / "mae" / "stage.json").write_text(json.dumps(stage))
    (work / "chain.json").write_text(
        json.dumps({"name": EVIL, "config": EVIL, "changed": [EVIL], "stages": ["mae", EVIL]})
    )
    log = [{"step": s, "epoch": s / 4, f"{EVIL}/x": 1.0, "loss": 1.0} for s in (1, 2)]
    (work / "mae" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row = {"mean": 1.0, "stderr": None, "values": [1.0]}
    results = {"compare": {EVIL: {"metric": EVIL, "rows": {EVIL: row}}}}
    (work / "results.json").write_text(json.dumps(results))
    arrays = {**made.cka(), "rows": [EVIL, "b"], "models": [EVIL, EVIL]}
    np.savez(work / "mae" / "evals" / "cka.npz", **arrays) if (work / "mae" / "evals").is_dir() else None
    (work / "finetune" / "evals").mkdir(exist_ok=True)
    np.savez(work / "finetune" / "evals" / "cka.npz", **arrays)
    assert main(["report", str(work)]) == 0
    text = (work / "report" / "index.html").read_text()
    parsed = Parsed(text)
    assert "<img src=x" not in text and not [a for _, a in parsed.elements if any(n.startswith("on") for n in a)]
    assert EVIL in parsed.text["title"] and EVIL in parsed.text["pre"]
    shown = [chart["layout"]["xaxis"]["title"]["text"] for chart in data_of(text)["charts"].values()]
    assert any(html.escape(EVIL, quote=False) in one for one in shown) and not any(EVIL in one for one in shown)


def test_a_run_under_way_gives_a_page_of_what_there_is(finished, tmp_path, capsys):
    work = tmp_path / "w"
    (work / "mae").mkdir(parents=True)
    (work / "chain.json").write_text(json.dumps({"name": "tiny", "stages": ["mae", "later"]}))
    shutil.copy(finished / "mae" / "stage.json", work / "mae")
    assert main(["report", str(work)]) == 0
    said = capsys.readouterr().out
    assert "note: mae: there is no metrics.jsonl" in said and "note: no stage is finished yet" in said
    text = (work / "report" / "index.html").read_text()
    Parsed(text)
    for part in (
        "not begun",
        "0</b> of 2 stages finished",
        "there are no results",
        "no curves",
        "No finished stage has pictures",
    ):
        assert part in text
    shutil.rmtree(work / "mae")
    assert main(["report", str(work)]) == 0  # nothing has begun


def test_a_damaged_analysis_and_lost_data_are_notes(finished, tmp_path):
    work = tmp_path / "w"
    shutil.copytree(finished, work)
    (work / "finetune" / "evals").mkdir(exist_ok=True)
    (work / "finetune" / "evals" / "cka.npz").write_bytes(b"x")
    shutil.rmtree(work / "mae" / "checkpoints")
    assert main(["report", str(work)]) == 0
    run = workdir.read(work)
    found = page.find([run], {})
    told = "\n".join(f"{name}; {text}" for name, text in run.notes)
    assert "cka.npz is damaged" in told and "mae; no picture: " in told
    assert [chart.key for chart in found.pictures] == []  # the student's teacher is gone, too


def test_runs_stand_side_by_side(work, finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    assert main(["report", str(work), f"--compare={other}"]) == 0
    text = (work / "report" / "compare.html").read_text()
    Parsed(text)
    charts = data_of(text)["charts"]
    names = [trace["name"] for trace in charts["loss_mae"]["data"]]
    assert names == ["mae · work", "mae · other"]
    assert len({trace["line"]["dash"] for trace in charts["loss_mae"]["data"]}) == 2
    assert ">val/top1 · work</th>" in text and ">val/top1 · other</th>" in text
    assert "other · mae" in dict(data_of(text)["pictures"]["pictures"]["axes"])["stage"]


def test_a_page_that_is_watched_loads_itself_again_until_the_run_is_finished(finished, tmp_path, monkeypatch):
    work = tmp_path / "w"
    shutil.copytree(finished, work)
    done, file = (work / "mae" / "DONE"), work / "report" / "index.html"
    content, slept = done.read_text(), []
    done.unlink()

    def sleep(seconds):
        slept.append(seconds)
        assert '<meta http-equiv="refresh" content="5">' in file.read_text()
        assert [path.name for path in file.parent.iterdir()] == ["index.html"]  # figures are for the end
        done.write_text(content)

    monkeypatch.setattr("time.sleep", sleep)
    assert main(["report", str(work), "--watch=5"]) == 0
    assert len(slept) == 1 and 1 <= slept[0] <= 5
    assert 'http-equiv="refresh"' not in file.read_text() and (work / "report" / "loss_mae.svg").is_file()


def test_pictures_beyond_the_budget_are_left_out_and_the_others_shown_once():
    random = np.random.default_rng(0)
    shared = random.random((32, 32, 3))
    grids = {(i,): Panels("t", [[shared, random.random((32, 32, 3))]]) for i in range(4)}
    chart = Pictures("key", "t", {"image": list("abcd")}, grids)
    whole = images.pictures(chart, images.Room(10**6))
    assert list(whole["grids"]) == ["0", "1", "2", "3"] and len(whole["images"]) == 5
    size = len(whole["images"][0][0])
    few = images.pictures(chart, images.Room(int(3.5 * size)))
    assert list(few["grids"]) == ["0", "1"] and few["images"] == whole["images"][:3]


def test_charts_of_one_key_are_told_apart():
    charts = [Pictures("a_b", "1", {}, {}), Pictures("A_b", "2", {}, {}), Pictures("a_b_2", "3", {}, {})]
    page._tell_keys_apart(charts, set())
    assert len({chart.key.lower() for chart in charts}) == 3


def test_text_can_be_read_in_both_themes():
    css = page._asset("page.css")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for theme in (light, dark):
        for ground in ("paper", "card", "code"):
            for ink in ("ink", "soft", "accent", "good", "wait"):
                low, high = sorted(luminance(theme[name]) for name in (ground, ink))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)


@pytest.mark.slow
def test_charts_without_room_are_named_and_the_page_stays_small(work):
    run = workdir.read(work)
    found = page.find([run], {})
    names = [str(i) for i in range(100)]
    values = np.random.default_rng(0).random((100, 100))
    found.classes[:] = [Heatmap(f"map{i}", f"Map {i}", "x", "y", names, names, values, "%") for i in range(30)]
    big = [str(i) for i in range(101)]
    found.classes.append(Heatmap("big", "Big", "x", "y", big, big, np.zeros((101, 101)), "%"))
    text = page.page([run], found)
    Parsed(text)
    shown = [name for name in data_of(text)["charts"] if name.startswith("map")]
    assert 0 < len(shown) < 30 and len(text.encode()) < page.LIMIT
    (told,) = (what for where, what in run.notes if what.startswith("left out, as a page is at most 8 MB: "))
    assert told.endswith("; Map 29; Big") and told in text
    assert {a["data-chart"] for a in Parsed(text).all("option") if a.get("data-chart", "").startswith("map")} == set(
        shown
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert sections.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text
