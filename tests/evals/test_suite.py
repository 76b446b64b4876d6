import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import measured, tiny_classify, tiny_mae
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.sources import open_source
from tinymim_jax.evals import suite
from tinymim_jax.evals.contract import Context
from tinymim_jax.evals.suite import Sets
from tinymim_jax.experiment import recipes, stage_file
from tinymim_jax.experiment.config import Classification, Corruptions, Knn
from tinymim_jax.runtime.errors import InputError


def test_the_clean_score_is_the_stage_s_own(finished, mesh, tmp_path):
    report = suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", Sets(), mesh, tmp_path)
    own = json.loads((finished / "finetune" / "DONE").read_text())["metrics"]
    assert report["results"]["digits/top1"] == own["val/top1"]
    assert report["results"]["digits/images"] == 40
    assert report["notes"] == ["measured with --suite=imagenet", "labels go by the names of the classes"]
    assert report["checkpoint"] == str(finished / "finetune") and report["model"]["width"] == 12


def test_a_model_without_a_head_is_probed(finished, mesh, tmp_path):
    report = suite.evaluate(stage_file.read_subject(finished / "distill"), "all", Sets(), mesh, tmp_path)
    assert set(report["results"]) == {"knn/top1_k10", "knn/top1_k20", "logistic/top1"}
    assert 0 <= report["results"]["logistic/top1"] <= 100


def test_probes_see_the_features_of_the_stage_s_own_evals(finished, mesh):
    own = json.loads((finished / "mae" / "DONE").read_text())["metrics"]["knn/top1_k3"]
    subject = stage_file.read_subject(finished / "mae")
    clean, bank = suite.data_sets(subject, Sets())
    knn = Knn(clean, bank, k=(3,)).build(Context(mesh, suite.predict_of(subject, clean)))
    assert measured(knn, subject.variables)["top1_k3"] == own


@pytest.mark.parametrize("name", ["imagenet", "robust"])
def test_a_head_is_needed(finished, mesh, name, tmp_path):
    with pytest.raises(InputError, match=f"--suite={name} needs a model with a head"):
        suite.evaluate(stage_file.read_subject(finished / "distill"), name, Sets(), mesh, tmp_path)


def test_an_unknown_suite(finished, mesh, tmp_path):
    with pytest.raises(
        InputError, match="--suite=x: unknown; choose one of imagenet, robust, probe, segmentation, all"
    ):
        suite.evaluate(stage_file.read_subject(finished / "finetune"), "x", Sets(), mesh, tmp_path)


def test_the_table_has_the_paper_beside_it(tmp_path):
    results = {"imagenet/top1": 75.0, "imagenet/images": 50000.0, "corruptions/fog_1": 3.0, "corruptions/fog": 4.0}
    report = {"checkpoint": "x", "model": {}, "results": results, "paper": suite.PAPER[192]}
    table = suite.table(report)
    assert "| measure | here | images | TinyMIM (paper) |" in table
    assert "| imagenet/top1 | 75.00 | 50,000 | 75.8 |" in table and "| corruptions/fog | 4.00 |  |  |" in table
    assert "fog_1" not in table and "/images" not in table
    assert "TinyMIM (paper)" not in suite.table({**report, "paper": {}})
    suite.write(report, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eval.json", "eval.md"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report


def test_features_of_a_student_are_those_before_its_half_trained_block(finished):
    model, variables = stage_file.load(finished / "distill")
    subject, data = stage_file.read_subject(finished / "distill"), tiny_mae().evals["knn"].data
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)}
    found = suite.predict_of(subject, data)(subject.variables, {}, batch)
    pixels = normalize(to_float(batch["image"]), data.mean, data.std)
    trace = model.apply(variables, pixels, capture=(1, 2)).trace
    np.testing.assert_allclose(found.features, trace[1].out[:, 1:].mean(axis=1), rtol=1e-5, atol=1e-6)
    assert found.logits is None and not np.allclose(found.features, trace[2].out[:, 1:].mean(axis=1), atol=1e-3)


def tree(root, splits=("train", "val"), classes=10, images=3):
    for split in splits:
        for c in range(classes):
            (root / split / f"c{c}").mkdir(parents=True)
            for i in range(images):
                pixels = np.full((16, 16, 3), 20 * c + i, np.uint8)
                Image.fromarray(pixels).save(root / split / f"c{c}" / f"{i}.png")
    return str(root)


def test_another_tree(finished, mesh, tmp_path):
    data = tree(tmp_path / "tree")
    sets = Sets(data, per_class=2, bank_per_class=1)
    report = suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", sets, mesh, tmp_path / "out")
    assert report["results"]["tree/images"] == 20
    measured, note = report["notes"]  # digits are called 0 to 9, and these c0 to c9
    assert measured.startswith("measured with --suite=imagenet, --data=")
    assert note.startswith("names of classes cannot be compared: output 0 of the model is taken to be 'c0'")
    assert f"N{note[1:]}." in (tmp_path / "out" / "eval.md").read_text()
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
    clean, bank = suite.data_sets(stage_file.read_subject(finished / "finetune"), sets)
    assert (clean.split, clean.per_class, bank.split, bank.per_class) == ("val", 2, "train", 1)
    for splits, classes, message in (
        (("train",), 10, "other101/val: no such folder; the tree needs SPLIT/<class>/"),
        (("train", "val"), 7, "has 7 classes and the model 10"),
    ):
        other = tree(tmp_path / f"other{classes}{len(splits)}", splits, classes, 1)
        with pytest.raises(InputError, match=message):
            suite.evaluate(
                stage_file.read_subject(finished / "finetune"), "imagenet", Sets(other), mesh, tmp_path / "out"
            )
    # Probes learn the classes of another data set.
    report = suite.evaluate(
        stage_file.read_subject(finished / "finetune"), "probe", Sets(other), mesh, tmp_path / "out"
    )
    assert set(report["results"]) == {"knn/top1_k1", "logistic/top1"}


def test_train_is_asked_for_where_a_probe_learns_from_it(finished, mesh, tmp_path):
    sets = Sets(tree(tmp_path / "tree", ("test",)))
    report = suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", sets, mesh, tmp_path / "out")
    assert report["results"]["tree/images"] == 30
    for name in ("probe", "all"):
        with pytest.raises(InputError, match="tree/train: no such folder; .*; probes learn from it, --suite=imagenet"):
            suite.evaluate(stage_file.read_subject(finished / "finetune"), name, sets, mesh, tmp_path / "out")


def test_images_that_cannot_be_read_are_left_out_if_asked(finished, mesh, tmp_path):
    path = tree(tmp_path / "tree", ("val",))
    (tmp_path / "tree" / "val" / "c1" / "0.png").write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"c1/0\.png: cannot be decoded .* with on_bad_image=skip \(.* elsewhere --on_bad_image=skip"
    ):
        suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", Sets(path), mesh, tmp_path / "out")
    sets = Sets(path, on_bad_image="skip")
    report = suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", sets, mesh, tmp_path / "out")
    assert report["results"]["tree/images"] == 29


def test_a_tree_that_is_not_split(finished, mesh, tmp_path, capsys):
    """A stage may have been trained on the other part; a converted model was not."""
    path = tree(tmp_path / "tree", ("",), images=20)
    subject = stage_file.read_subject(finished / "finetune")
    report = suite.evaluate(subject, "imagenet", Sets(path), mesh, tmp_path / "out")
    held = report["results"]["tree/images"]
    assert (
        10 <= held <= 50
        and "is not split: its 10 folders are classes, and about 10% of each" in capsys.readouterr().out
    )
    report = suite.evaluate(subject, "imagenet", Sets(path, val_fraction=1.0), mesh, tmp_path / "out")
    assert report["results"]["tree/images"] == 200
    converted = dataclasses.replace(
        subject, training=None, evals={}, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    assert [data.val_fraction for data in suite.data_sets(converted, Sets(path), probes=False)] == [1.0, 1.0]
    queries, bank = suite.data_sets(converted, Sets(path))
    seen = [{s.describe(i) for i in range(len(s))} for s in map(open_source, (queries, bank))]
    assert len(seen[0]) == held and len(seen[1]) == 200 - held and not seen[0] & seen[1]


def test_a_stage_without_evals_has_a_held_out_set_of_its_own(finished, mesh, tmp_path):
    assert stage_file.read_stage(finished / "distill").evals == {}
    clean, bank = suite.data_sets(stage_file.read_subject(finished / "distill"), Sets())
    assert (clean.split, clean.per_class, bank.split, bank.per_class) == ("test", None, "train", 4)
    imagenet = recipes.imagenet(True)
    assert suite._held_out(imagenet).split == "validation" and suite._held_out(imagenet).num_examples is None
    folder = recipes.imagenet(True, tree(tmp_path / "tree"))
    assert suite._held_out(folder).split == "val"


def test_the_clean_set_is_not_a_corrupted_one(finished):
    stage = tiny_classify()
    clean = stage.evals["val"].data
    others = {
        "stored": Corruptions(dataclasses.replace(clean, path="/c"), stored=True),
        "a": Classification(dataclasses.replace(clean, path="/a"), subset="imagenet_a"),
        "fog": Classification(dataclasses.replace(clean, corruption="fog")),
    }
    assert [suite._is_clean(cfg) for cfg in (*others.values(), stage.evals["val"])] == [False, False, False, True]


def test_corruptions_are_made_as_imagenet_c_was_unless_asked_otherwise(finished, tmp_path):
    model = tiny_classify().model
    clean = tiny_classify().evals["val"].data

    def made(**sets):
        subject = suite.Subject("x", dataclasses.replace(model, num_classes=1000), {}, [], None, {}, {})
        return suite.evals("robust", subject, clean, clean, Sets(**sets))["corruptions"]

    assert made().published and not made(direct=True).published
    stored = made(imagenet_c=str(tmp_path))
    assert stored.stored and not stored.published  # they have been made


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(finished, mesh, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        suite.evaluate(stage_file.read_subject(finished / "finetune"), "imagenet", Sets(), mesh, tmp_path / "file")


def test_labels_of_a_model_with_names_in_another_order(finished, mesh, tmp_path):
    """The tree's folders are its classes, whatever the order of the outputs; an image is scored by its name."""
    data = Sets(tree(tmp_path / "tree", ("val", "train"), images=1))
    subject = stage_file.read_subject(finished / "finetune")
    logits = {}
    for title, names in (
        ("ordered", [f"c{i}" for i in range(10)]),
        ("turned", [f"c{(i + 3) % 10}" for i in range(10)]),
    ):
        named = dataclasses.replace(subject, classes=names)
        report = suite.evaluate(named, "imagenet", data, mesh, tmp_path / title)
        assert report["notes"][1:] == ["labels go by the names of the classes"]
        logits[title] = report["results"]["tree/top1"]
    pixels = np.stack([np.full((16, 16, 3), 20 * c, np.uint8) for c in range(10)])
    clean, _ = suite.data_sets(subject, data)
    best = np.asarray(suite.predict_of(subject, clean)(subject.variables, {}, {"image": pixels}).logits).argmax(-1)
    assert logits["ordered"] == 100 * np.mean(best == np.arange(10))
    assert logits["turned"] == 100 * np.mean((best + 3) % 10 == np.arange(10))
