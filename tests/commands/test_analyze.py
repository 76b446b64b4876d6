"""`analyze`: files, notes and refusals; what the numbers are is held by tests/evals/test_analysis.py."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_segment
from tinymim_jax.__main__ import main
from tinymim_jax.evals.analyze import short_names
from tinymim_jax.training.loop import run_stage


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)
        (tmp_path / "photos" / "x").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / "x" / f"{i}.png")
    return tmp_path / "photos"


def error(capsys, *argv):
    assert main(["analyze", *map(str, argv)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_student_beside_its_teacher(finished, tmp_path, capsys):
    out = tmp_path / "out"
    blocks = ["--student_block=2", "--teacher_block=2", "--images=12"]
    assert main(["analyze", f"{finished}/distill", f"{finished}/mae", f"--out={out}", *blocks]) == 0
    said = capsys.readouterr().out
    assert "note: distill: behind block 1 not all was trained" in said
    names = {"cka_distill_mae", "relation_distill_mae"}
    names |= {f"{kind}_{model}" for kind in ("attention", "spectrum", "neighbours") for model in ("distill", "mae")}
    assert {path.stem for path in out.glob("*.npz")} == names
    drawn = {path.stem for path in out.glob("*.svg")}
    assert drawn == {"cka_distill_mae", "relation_distill_mae_kl"} | {
        f"{kind}_{model}_{what}" for model in ("distill", "mae")
        for kind, what in (("attention", "distance"), ("attention", "entropy"), ("spectrum", "effective_rank"), ("spectrum", "norm"))
    }  # fmt: skip
    pictures = {"relation_distill_mae_maps", "neighbours_distill", "neighbours_mae"}
    assert {path.stem for path in out.glob("*.png")} == drawn | pictures
    report = json.loads((out / "analysis.json").read_text())
    assert set(report["results"]) == names and report["checkpoints"]["mae"] == f"{finished}/mae"
    with np.load(out / "cka_distill_mae.npz") as arrays:
        assert list(arrays["models"]) == ["distill", "mae"] and arrays["cka"].shape == (3, 4)
    with np.load(out / "relation_distill_mae.npz") as arrays:
        assert arrays["teacher"].shape == arrays["student"].shape == (2, 1, 2, 6, 5, 5)


def test_one_model_on_a_folder_of_images(finished, photos, capsys):
    out = photos.parent / "out"
    call = ["analyze", f"{finished}/finetune", f"--data={photos}", f"--out={out}", "--what=cka,attention"]
    assert main(call) == 0
    assert {path.stem for path in out.glob("*.npz")} == {"cka_finetune", "attention_finetune"}
    with np.load(out / "cka_finetune.npz") as arrays:
        np.testing.assert_allclose(np.diag(arrays["cka"]), 1, atol=1e-6)
    assert "cka_finetune: mean" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_segments(photos, mesh, capsys):
    run_stage(tiny_segment(), "seg", photos.parent, mesh)
    call = ["analyze", f"{photos.parent}/seg", "--what=attention", f"--out={photos.parent}/out"]
    assert main(call) == 2 and "give --data=FOLDER" in capsys.readouterr().err
    assert main([*call, f"--data={photos}"]) == 0
    assert (photos.parent / "out" / "attention_seg.npz").is_file()


def test_what_cannot_be_done_is_said_in_a_line(finished, photos, tmp_path, capsys):
    mae, out = f"{finished}/mae", tmp_path / "out"
    assert "--what=depth: unknown; choose from cka, attention" in error(capsys, mae, "--what=depth", f"--out={out}")
    assert "compares two checkpoints" in error(capsys, mae, "--what=relation", f"--out={out}")
    assert "expected CHECKPOINT..." in error(capsys, "--what=cka")
    assert "cka needs 4 images" in error(capsys, mae, "--images=3", "--what=cka", f"--out={out}")
    assert "patch_px is 0" in error(capsys, mae, "--patch_px=0", "--what=attention", f"--out={out}")
    assert "is not the folder of a stage" in error(capsys, finished, f"--out={out}")
    (photos / "x" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in error(capsys, mae, f"--data={photos}", "--what=spectrum", f"--out={out}")
    assert not list(out.glob("*"))
    skipping = ["analyze", mae, f"--data={photos}", "--what=cka,spectrum", f"--out={out}", "--on_bad_image=skip"]
    assert main(skipping) == 0


def test_names_are_as_short_as_they_tell_apart():
    assert short_names(["runs/a/mae", "runs/a/distill"]) == ["mae", "distill"]
    assert short_names(["runs/a/mae", "runs/b/mae/"]) == ["a_mae", "b_mae"]
    assert short_names(["x/mae", "x/mae"]) == ["mae_1", "mae_2"]
