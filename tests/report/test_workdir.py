import json
import shutil

import numpy as np
import pytest

from tinymim_jax.report import curves, workdir
from tinymim_jax.runtime.errors import InputError


@pytest.fixture
def copied(finished, tmp_path):
    """A workdir that may be changed."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def notes(folder):
    return ["; ".join(note) for note in workdir.read(folder).notes]


def write_log(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_says_what_it_was(copied):
    run = workdir.read(copied)
    assert list(run.stages) == ["distill", "finetune", "mae"] and run.finished()  # of stages run one by one
    assert run.stages["distill"].sources() == {"task.teacher": "mae"}
    assert run.stages["finetune"].sources() == {"init": "distill"}
    stage = run.stages["mae"]
    assert (stage.step, stage.total_steps()) == (4, 4)
    found = stage.content
    assert found["machine"]["devices"] == "1 x cpu" and found["machine"]["processes"] == 1
    assert "not trained" not in "".join(text for name, text in run.notes if name == "mae")  # positions are fixed


def test_hand_overs_that_change_something_are_told(copied):
    told = "\n".join(notes(copied))
    assert "distill; not trained, as the loss does not read it or it is fixed: encoder/block2 (8 arrays)" in told
    lines = json.loads((copied / "finetune" / "stage.json").read_text())["handover"]
    assert any("loaded" in line for line in lines)
    for line in lines:
        if "regrouped" in line:
            assert f"finetune; {line.strip()}" in told
    assert "finetune; not trained by the source: encoder/block2/attn/proj" in told and "pos_embed" not in told


def test_a_stage_goes_on_with_the_hand_over_of_its_begin(chain, mesh, tmp_path):
    from tinymim_jax.training.loop import run_stage

    run_stage(chain.stages["mae"], "mae", tmp_path, mesh)
    run_stage(chain.stages["distill"], "distill", tmp_path, mesh)
    file = tmp_path / "distill" / "stage.json"
    before = file.read_text()
    assert "teacher from" in "".join(json.loads(before)["handover"])
    (tmp_path / "distill" / "DONE").unlink()
    shutil.rmtree(tmp_path / "distill" / "checkpoints" / "4")
    run_stage(chain.stages["distill"], "distill", tmp_path, mesh)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("chain.json", "{", "; chain.json is damaged; the run command makes it anew"),
        ("results.json", "[1]", "; results.json is damaged; the run command makes it anew"),
        ("mae/metrics.jsonl", '{"step": 1, "loss": 2}\nx\n', "mae; metrics.jsonl is damaged in line 2 of 2: curves end there"),
        ("chain.json", '{"changed": 5}', "; chain.json is damaged; the run command makes it anew"),
        ("mae/metrics.jsonl", '{"step": "1", "loss": 2}', "mae; metrics.jsonl is damaged in line 1 of 1: curves end there"),
        ("mae/metrics.jsonl", "", "mae; there is no metrics.jsonl, or it is empty: there are no curves yet"),
        ("mae/DONE", "{", "mae; {}/mae/DONE is damaged; delete it, and the stage goes on from its newest checkpoint"),
        ("mae/stage.json", "{", "mae; {}/mae/stage.json is damaged; bring back a copy of it: the weights beside it may be whole"),
        ("results.json", '{"compare": {"T": {"metric": "a", "rows": {"b": {"mean": "x"}}}}}',
         "; results.json is damaged; the run command makes it anew"),
    ],
)  # fmt: skip
def test_what_is_damaged_becomes_a_note(name, content, expected, copied):
    (copied / name).write_text(content)
    assert expected.format(copied) in notes(copied)


def test_bad_images_and_skipped_updates_are_told(copied):
    file = copied / "mae" / "DONE"
    content = json.loads(file.read_text())
    content["metrics"] |= {"bad_images": 3, "skipped": 2}
    file.write_text(json.dumps(content))
    told = "\n".join(notes(copied))
    assert "mae; 3 images could not be read" in told and "mae; 2 updates were left out" in told


def test_a_run_under_way(copied):
    (copied / "chain.json").write_text(json.dumps({"name": "tiny", "stages": ["mae", "distill", "finetune", "last"]}))
    for name in ("mae", "distill", "finetune"):
        (copied / name / "DONE").unlink()
    run = workdir.read(copied)
    assert list(run.stages) == ["mae", "distill", "finetune"] and run.waiting == ["last"] and not run.finished()
    assert ("mae", "not finished: step 4 of 4") in run.notes
    assert any("no stage is finished yet" in text for _, text in run.notes)
    assert run.results() == {"config": "tiny", "stages": {}, "compare": {}}


def test_a_run_is_finished_with_its_results(copied):
    names = ["mae", "distill", "finetune"]
    (copied / "chain.json").write_text(json.dumps({"name": "tiny", "stages": names}))
    assert not workdir.read(copied).finished()  # results.json comes last
    (copied / "results.json").write_text(json.dumps({"stages": dict.fromkeys(names)}))
    assert workdir.read(copied).finished()


def test_what_is_no_workdir(copied, tmp_path):
    with pytest.raises(InputError, match="mae is the folder of a stage; give the folder above"):
        workdir.read(copied / "mae")
    with pytest.raises(InputError, match="there is no such folder"):
        workdir.read(tmp_path / "none")
    with pytest.raises(InputError, match="holds no run"):
        workdir.read(tmp_path)


def test_the_time_of_training_is_that_of_its_images(copied):
    lines = [{"step": 10, "images_per_s": 8.0}, {"step": 30, "images_per_s": 16.0}, {"step": 30, "val/top1": 1.0}]
    write_log(copied / "mae", lines)
    assert workdir.read(copied).stages["mae"].seconds() == 10 * 8 / 8 + 20 * 8 / 16


def by_key(folder, **options):
    return {chart.key: chart for chart in curves.curves([workdir.read(folder)], **options)}


def test_the_curve_shows_the_logged_losses(copied):
    found = by_key(copied)
    assert {"loss_mae", "loss_distill", "loss_classify", "lr", "grad_norm", "images_per_s", "data_wait"} <= set(found)
    lines = [json.loads(line) for line in (copied / "mae" / "metrics.jsonl").read_text().splitlines()]
    (series,) = found["loss_mae"].series
    expected = [(line["epoch"], line["loss"]) for line in lines if "epoch" in line]
    np.testing.assert_allclose(list(zip(series.x, series.y, strict=True)), expected)
    assert [line.name for line in found["lr"].series] == ["distill", "finetune", "mae"]
    assert [chart.key for chart in curves.of_papers(list(found.values()))] == [
        "loss_distill",
        "loss_classify",
        "loss_mae",
    ]


def test_what_was_evaluated_while_training_is_a_curve_over_epochs(copied):
    lines = [{"step": 4, "epoch": 2.0, "loss": 1.0}, {"step": 8, "epoch": 4.0, "loss": float("nan")}]
    # The first evaluation took longer than the four steps behind it.
    lines += [{"step": s, "val/top1": float(s), "val/top5": 50.0, "val/images": 9.0} for s in (8, 2)]
    lines += [{"step": 8, "replica0/val/top1": 7.0}]
    write_log(copied / "finetune", lines)
    write_log(copied / "mae", [{"step": 8, "epoch": 1.0, "loss": 1.0}, {"step": 8, "knn/top1_k3": 20.0}])
    found = by_key(copied)
    assert "knn_top1_k3" not in found and "loss_mae" in found  # both measured once
    chart = found["val_top1"]
    assert [(list(s.x), list(s.y), s.is_thin) for s in chart.series] == [
        ([4.0], [7.0], True),  # behind the mean
        ([1.0, 4.0], [2.0, 8.0], False),
    ]
    assert (chart.x_label, chart.y_label) == ("epoch", "top1, %") and "val_images" not in found


def test_heads_are_lines_of_one_chart(copied):
    lines = [
        {"step": s, "epoch": float(s), "kl/kl_qk_head1": 0.1 * s, "kl/kl_qk_head2": 0.2, "kl/kl_qk": 0.3}
        for s in (1, 2)
    ]
    lines += [{"step": 2, "my_heads/kl_qk": 1.0}, {"step": 1, "my_heads/kl_qk": 2.0}]
    write_log(copied / "distill", lines)
    found = by_key(copied)
    assert [(line.name, list(line.y)) for line in found["my_heads_kl_qk"].series] == [("distill", [2.0, 1.0])]
    chart = found["kl_kl_qk_by_head"]
    assert [(line.name, list(line.y)) for line in chart.series] == [
        ("distill head 1", [0.1, 0.2]), ("distill head 2", [0.2, 0.2]),
    ]  # fmt: skip
    assert (
        chart.y_label == "kl_qk by head"
        and len({line.group for line in chart.series}) == 2
        and len(found["kl_kl_qk"].series) == 1
    )


def test_comparisons_of_numbers_are_a_curve_each(copied):
    def table(first):
        rows = {str(k): {"mean": first + k, "stderr": 0.5 if k else None, "values": [1.0]} for k in (0, 2, 4)}
        return {"metric": "val/top1", "counts": "blocks taken over", "paper": {}, "rows": rows}

    (copied / "results.json").write_text(json.dumps({"compare": {"from a": table(40.0), "from b": table(50.0)}}))
    (chart,) = curves.comparisons([workdir.read(copied)])
    assert (chart.x_label, chart.y_label) == ("blocks taken over", "val/top1, %")
    assert [(s.name, s.x, s.y, s.error[1:]) for s in chart.series] == [
        ("from a", [0, 2, 4], [40, 42, 44], [0.5, 0.5]), ("from b", [0, 2, 4], [50, 52, 54], [0.5, 0.5]),
    ]  # fmt: skip
    assert np.isnan(chart.series[0].error[0])  # of a single run none is known


def test_only_percentages_are_labelled_so(copied):
    row = {"mean": 1.0, "stderr": None, "values": [1.0]}
    compare = {name: {"metric": name, "rows": {"a": row, "b": row}} for name in ("val/top1", "spectrum/norm", "loss")}
    (copied / "results.json").write_text(json.dumps({"compare": compare}))
    found = curves.comparisons([workdir.read(copied)])
    assert [chart.label for chart in found] == ["val/top1, %", "spectrum/norm", "loss"]


def test_long_curves_are_thinned_and_keep_their_end(copied):
    write_log(copied / "mae", [{"step": s, "epoch": s / 10, "loss": 1 / s} for s in range(1, 1001)])
    (series,) = by_key(copied, most=500)["loss_mae"].series
    assert 20 <= len(series.x) <= 50 and series.x[-1] == 100.0
    steps = np.diff(series.x)
    np.testing.assert_allclose(steps, steps[0])


def test_only_stages_that_differ_by_nothing_but_seed_share_a_line(copied):
    for seed in (0, 1):
        shutil.copytree(copied / "finetune", copied / f"tuned_{seed}")
        shutil.copytree(copied / "finetune", copied / f"first_{seed}")
        for name, field, value in ((f"tuned_{seed}", "seed", seed), (f"first_{seed}", "batch_size", 8 + seed)):
            content = json.loads((copied / name / "stage.json").read_text())
            content["stage"]["run"][field] = value
            (copied / name / "stage.json").write_text(json.dumps(content))
    series = by_key(copied)["loss_classify"].series
    assert [line.name for line in series] == ["finetune", "first_0", "first_1", "tuned", "tuned"]
    assert len({line.group for line in series}) == 4
