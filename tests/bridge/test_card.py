"""What is said of a checkpoint: sizes, the last block, and what it was made from."""

import dataclasses
import json
import shutil

import pytest

from tests.bridge.test_export import DISTILL as TASK
from tests.bridge.test_export import random_params, stage
from tests.conftest import tiny_classify, tiny_distill, tiny_mae
from tests.weights.test_handoff import write_stage
from tinymim_jax.bridge import card, convert
from tinymim_jax.bridge.export import export
from tinymim_jax.bridge.layout import Told
from tinymim_jax.commands.run import run_chain
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Config
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import read_done
from tinymim_jax.weights import handoff

MAE = "MAE pre-training, 4 steps of digits, batch 8"
DISTILL = "relation distillation, student block 2, 4 steps of digits, batch 8"
CLASSIFY = "supervised training, 4 steps of digits, batch 8"
PIXELS = (
    "images: 16 px, mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], interpolation bicubic, crop_pct {},"
    " crop_mode center"
)
REMARK = (
    "block 2: only its norm1 and q, k, v were trained; its projection and MLP (and the final norm) were not:"
    " take features from the output of block 1, or fine-tune"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """mae -> distill -> finetune, four steps each."""
    folder = tmp_path_factory.mktemp("chain")
    stages = {"mae": tiny_mae(), "distill": tiny_distill(), "finetune": tiny_classify()}
    run_chain(check(Config("tiny", stages)), folder)
    return folder


# inspect


def test_lines_of_a_teacher(workdir):
    assert card.lines(workdir / "mae") == [
        f"{workdir}/mae: {MAE}, finished",
        "model: ViT, width 24, 3 blocks, 6 heads, 16 px in patches of 8, no head",
        "with a decoder",
        "not trained: encoder/pos_embed, pretext/decoder/pos_embed",
        PIXELS.format(1.0),
        "block 3: trained like the others",
        "made from:",
        f"  - mae: {MAE}",
    ]


def test_lines_of_a_student(workdir):
    text = card.lines(workdir / "distill")
    assert text[:3] == [
        f"{workdir}/distill: {DISTILL}, finished",
        "model: ViT, width 12, 2 blocks, 2 heads (6 in the last block), 16 px in patches of 8, no head",
        "no decoder to export",
    ]
    assert text[3].startswith("not trained: ")
    for part in ("encoder/block2/attn/proj", "encoder/block2/mlp", "encoder/block2/norm2", "encoder/norm"):
        assert part in text[3]
    assert "qkv" not in text[3] and "block1" not in text[3]
    assert text[4:] == [PIXELS.format(0.875), REMARK, "made from:", f"  - distill: {DISTILL}", f"    - mae: {MAE}"]


def test_lines_of_a_fine_tuned_student(workdir):
    text = card.lines(workdir / "finetune")
    sizes = "width 12, 2 blocks, 2 heads, 16 px in patches of 8, 10 classes on the mean patch token"
    accuracy = read_done(workdir / "finetune" / "DONE")
    assert text[1:] == [
        f"model: ViT, {sizes}",
        "no decoder to export",
        PIXELS.format(1.0),
        "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        *(f"measured: val/top{k} {accuracy[f'val/top{k}']:.2f}" for k in (1, 5)),
        "block 2: trained like the others",
        "made from:",
        f"  - finetune: {CLASSIFY}",
        f"    - distill: {DISTILL}",
        f"      - mae: {MAE}",
    ]


def test_an_unfinished_stage(workdir, tmp_path):
    shutil.copytree(workdir / "distill", tmp_path / "distill")
    (tmp_path / "distill" / "DONE").unlink()
    text = card.lines(tmp_path / "distill")
    assert text[0].endswith(", not finished") and REMARK in text
    assert text[-1] == "    - mae: not at hand any more"


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"is not the folder of a stage: it has no stage\.json"):
        card.lines(tmp_path)


# The last block

BLOCK = ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp")


def keys(block, parts=BLOCK):
    """All parameters of these parts of a block."""
    starts = tuple(f"encoder/block{block}/{part}/" for part in parts)
    return [name for name in convert.names(config.ViT(24, block, 3)) if name.startswith(starts)]


@pytest.mark.parametrize(
    ("depth", "untrained", "expected"),
    [
        (12, [], "block 12: trained like the others"),
        (12, ["encoder/pos_embed"], "block 12: trained like the others"),
        (2, keys(2, BLOCK[2:]), REMARK),
        (1, keys(1, BLOCK[2:]), REMARK.replace("block 2", "block 1").split(": take")[0] + ": fine-tune before use"),
        (3, keys(2, BLOCK[2:]) + keys(3), REMARK.replace(": take", "; nothing behind block 2 was: take")),
        (12, keys(1) + keys(12), "block 12: not trained in this stage"),
        (12, keys(1) + keys(2), "block 12: trained like the others"),
    ],
)
def test_the_last_block(depth, untrained, expected):
    model = config.ViT(24, depth, 3)
    names = convert.names(model)
    assert card.last_block(model, names, untrained) == expected.replace(" (and the final norm)", "")
    assert card.last_block(model, names, [*untrained, "encoder/norm/scale"]) == expected


# Model cards


def test_the_card_of_an_exported_student(workdir, tmp_path):
    export(workdir / "distill", tmp_path / "out", "timm", regroup_heads=True)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "---\n\n# distill\n\nViT, width 12, 2 blocks, 2 heads (6 in the last block), 16 px in patches of 8, no head.\n",
        "\nBlock 2 was trained with 6 heads and is read with 2 here.\n",
        f"\n{REMARK}.\n",
        "Images: RGB in [0, 1], the shorter side resized to 18 px (bicubic, PIL), then the central 16 px, normalised"
        " with mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]. LayerNorm eps 1e-06, exact GELU.\n\n## Use",
        'model = timm.create_model("local-dir:PATH", pretrained=True)  # PATH: this folder\n',
        f"## Provenance\n\n- distill: {DISTILL}\n  - mae: {MAE}\n",
        "## Licence\n\nWeights keep the licence of those that they were made from (above), and of the data.",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("form", "name", "usage"),
    [
        ("hf", "mae", 'ViTMAEForPreTraining.from_pretrained("PATH")'),
        ("hf", "finetune", 'BeitForImageClassification.from_pretrained("PATH")'),
        ("timm", "finetune", 'timm.create_model("local-dir:PATH", pretrained=True)'),
    ],
)
def test_usage_and_no_word_of_regrouping(form, name, usage, workdir, tmp_path):
    export(workdir / name, tmp_path / "out", form)
    text = (tmp_path / "out" / "README.md").read_text()
    assert usage in text and "is read with" not in text and "trained like the others" in text


def test_usage_of_a_model_without_a_pooler(tmp_path):
    made = stage(TASK)
    write_stage(tmp_path / "ours", made, random_params(made.model))
    export(tmp_path / "ours", tmp_path / "out", "hf")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'model = ViTModel.from_pretrained("PATH", add_pooling_layer=False)  # PATH: this folder' in text
    assert "- teacher: not at hand any more" in text


# Other people's teachers

LICENCE = "licence: Apache-2.0 if these are the weights of facebookresearch/deit"


@pytest.fixture
def student(workdir, tmp_path):
    """work/student, distilled from the file x.safetensors, which was converted into a folder of work/converted."""
    export(workdir / "finetune", tmp_path / "timm", "timm")
    (tmp_path / "timm" / "model.safetensors").rename(tmp_path / "x.safetensors")
    converted = convert.read(tmp_path / "x.safetensors", Told(num_heads=2))
    licensed = dataclasses.replace(converted.layout, licence=LICENCE.removeprefix("licence: "))
    init = config.Init(path=str(tmp_path / "x.safetensors"))
    folder = handoff.source_folder(init, tmp_path / "work")
    convert.write(lambda: dataclasses.replace(converted, layout=licensed), folder)
    made = stage(config.Distill(init, {"relation": config.Relation(2, 2)}))
    untrained = [*keys(2, BLOCK[2:]), "encoder/norm/scale", "encoder/norm/bias"]
    write_stage(tmp_path / "work" / "student", made, random_params(made.model), untrained=untrained)
    return tmp_path / "work" / "student"


def converted_folder(student):
    (folder,) = (student.parent / "converted").iterdir()
    return folder


def origin(student):
    from tinymim_jax.runtime.storage import sha256

    digest = sha256(student.parent.parent / "x.safetensors")
    return f"- {converted_folder(student).name}: converted from x.safetensors (MAE or TinyMIM, fine-tuned), sha256 {digest}; {LICENCE}"


def test_lines_of_a_converted_checkpoint(student):
    folder = converted_folder(student)
    text = card.lines(folder)
    assert text[0] == f"{folder}: converted checkpoint, MAE or TinyMIM, fine-tuned, finished"
    assert text[1].endswith("10 classes on the mean patch token")
    assert text[-2:] == ["made from:", f"  {origin(student)}"]


def test_the_licence_of_the_teacher_is_in_the_students_card(student, tmp_path):
    export(student, tmp_path / "out", "timm")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"student block 2, 1 steps of digits, batch 4\n  {origin(student)}\n" in text
    assert REMARK in text
    assert f"    {origin(student)}" in card.lines(student)


def test_a_teacher_that_was_moved_away(student):
    name = converted_folder(student).name
    shutil.rmtree(student.parent / "converted")
    (student.parent.parent / "x.safetensors").unlink()
    assert card.provenance(student)[1] == f"  - {name}: not at hand any more"


def test_our_own_export_says_what_it_was_made_from(workdir, tmp_path):
    """There and back in MAE's format, which has no place for it of its own."""
    pytest.importorskip("torch", reason="MAE's format is PyTorch's")
    export(workdir / "distill", tmp_path / "mae", "mae")
    converted = convert.read(tmp_path / "mae" / "checkpoint.pth")
    convert.write(lambda: converted, tmp_path / "back")
    text = card.lines(tmp_path / "back")
    assert REMARK in text and any(line.startswith("not trained: encoder/") for line in text)
    assert text[-3].startswith("  - back: converted from checkpoint.pth (tinymim_jax's own export), sha256 ")
    assert text[-2:] == [f"    - distill: {DISTILL}", f"      - mae: {MAE}"]


def test_the_hub_reads_the_card(workdir, tmp_path):
    """Accuracies of DONE and of `eval`, classes, and the front matter, by the hub's own reader."""
    hub = pytest.importorskip("huggingface_hub")
    shutil.copytree(workdir, tmp_path / "work", ignore=shutil.ignore_patterns("jax_cache"))
    folder = tmp_path / "work" / "finetune"
    (folder / "eval").mkdir()
    (folder / "eval" / "eval.json").write_text(json.dumps({"results": {"photos/top1": 12.5, "photos/images": 8.0}}))
    (val,) = (v for k, v in json.loads((folder / "DONE").read_text())["metrics"].items() if k == "val/top1")
    export(folder, tmp_path / "out", "hf")
    read = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert (read.data.license, read.data.library_name, read.data.pipeline_tag) == (
        "other",
        "transformers",
        "image-classification",
    )
    text = read.text
    assert f"| val, digits, split test | top1 | {val:.2f} % |" in text and "| photos | top1 | 12.50 % |" in text
    assert "Classes, in the order of the outputs: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in text
    export(workdir / "mae", tmp_path / "mae", "mae")
    bare = hub.ModelCard.load(tmp_path / "mae" / "README.md")
    assert bare.data.library_name is None and "## Accuracy" not in bare.text
