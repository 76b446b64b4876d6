"""Files like the public ones and folders saved by transformers, converted and compared with the models they hold."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from tinymim_jax.experiment import stage_file
from tinymim_jax.weights.parameters import flatten

pytest.importorskip("torch", reason="the models that are converted are PyTorch's")

import jax
import torch
from safetensors.torch import load_file, save_file

import tinymim_jax
from tests import torch_files as files
from tinymim_jax.bridge import convert, verify
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights import handoff

SIZE = {"image_size": 16, "patch_size": 8}
CFG = config.ViT(24, 2, 3, **SIZE)
HEAD = dataclasses.replace(CFG, num_classes=5)
DECODER = config.Decoder(16, 1, 2)
TOLD = Told(num_heads=3)
BESIDE = {"optimizer", "epoch", "scaler", "args"}  # of files that hold a whole run


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file, and what must be found in it; `model` are fields that differ from CFG's."""

    write: object  # path -> the torch model
    kind: str
    licence: str
    tensors: int
    told: Told = dataclasses.field(default_factory=Told)
    heads: str = "3 heads, as you say"
    model: dict = dataclasses.field(default_factory=dict)
    decoder: config.Decoder | None = None
    ignored: set = dataclasses.field(default_factory=set)


STAR = {"pool": "mean", "num_classes": 5, "dist_token": True, "neck": 40, "num_heads": 12}
KINDS = {
    "mae_encoder": Kind(lambda p: files.mae_encoder(p, CFG), "MAE or TinyMIM, encoder only", "facebookresearch/mae", 30, TOLD),
    "mae_full": Kind(
        lambda p: files.mae_full(p, CFG, DECODER), "MAE, with decoder", "facebookresearch/mae", 50,
        Told(num_heads=3, decoder_heads=2), decoder=config.Decoder(16, 1, 2),
    ),
    "mae_finetuned": Kind(
        lambda p: files.mae_finetuned(p, HEAD), "MAE or TinyMIM, fine-tuned", "OliverRensu/TinyMIM states none", 32, TOLD,
        model={"pool": "mean", "num_classes": 5}, ignored=BESIDE,
    ),
    "tinymim_pretrained": Kind(
        lambda p: files.tinymim_pretrained(p, config.ViT(48, 2, 12, last_block_heads=16, **SIZE)),
        "TinyMIM, pre-trained", "OliverRensu/TinyMIM states none", 30,
        heads="12 heads, as its arguments name tinymim_vit_base_patch16; 16 in the last block",
        model={"width": 48, "num_heads": 12, "last_block_heads": 16}, ignored=BESIDE,
    ),
    "tinymim_finetuned": Kind(
        lambda p: files.tinymim_finetuned(p, HEAD), "MAE or TinyMIM, fine-tuned", "facebookresearch/mae", 32, TOLD,
        model={"pool": "mean", "num_classes": 5}, ignored=BESIDE,
    ),
    "tinymim_star": Kind(
        lambda p: files.tinymim_star(p, dataclasses.replace(HEAD, num_heads=12, pool="mean", neck=40)), "TinyMIM*-T, fine-tuned",
        "OliverRensu/TinyMIM states none", 39, heads="12 heads, as TinyMIM*-T has", model=STAR,
    ),
    "mae_lite": Kind(
        lambda p: files.mae_lite(p, config.ViT(192, 1, 12, **SIZE)), "MAE-Lite, with decoder", "wangsr126/MAE-Lite", 38,
        heads="12 heads, as MAE-Lite's models have",
        model={"width": 192, "depth": 1, "num_heads": 12}, decoder=config.Decoder(96, 1, 3),
        ignored={"start_epoch", "optimizer"},
    ),
    "deit": Kind(
        lambda p: files.deit(p, HEAD), "DeiT or timm classifier", "facebookresearch/deit", 32, TOLD,
        model={"num_classes": 5},
    ),
    "deit_distilled": Kind(
        lambda p: files.deit_distilled(p, HEAD), "DeiT, distilled", "facebookresearch/deit", 35, TOLD,
        model={"num_classes": 5, "dist_token": True},
    ),
    "timm_safetensors": Kind(
        lambda p: files.timm_safetensors(p, HEAD), "DeiT or timm classifier", "facebookresearch/deit", 32, TOLD,
        model={"num_classes": 5},
    ),
}  # fmt: skip


def written(kind, folder):
    """(path, the torch model in it)."""
    path = folder / (f"{kind}.safetensors" if kind == "timm_safetensors" else f"{kind}.pth")
    return path, KINDS[kind].write(path)


def differences(converted):
    return {d.name: d.relative for d in verify.verify(converted)}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file(name, tmp_path):
    kind, (path, model) = KINDS[name], written(name, tmp_path)
    converted = convert.read(path, kind.told)
    found = converted.layout
    expected = {"width": 24, "depth": 2, "num_heads": 3, "posembed": "trainable", **SIZE}
    assert found.model == config.ViT(**expected | kind.model)
    assert (found.kind, found.decoder, found.notes[0]) == (kind.kind, kind.decoder, kind.heads)
    assert kind.licence in found.licence
    assert set(found.ignored) == kind.ignored
    parameters = sum(p.numel() for p in model.parameters())
    assert f"weights: {kind.tensors} tensors, {parameters:,} parameters" in converted.lines()
    assert converted.lines()[0] == f"{path}: {kind.kind}" and converted.lines()[-1] == f"licence: {found.licence}"
    relative = differences(converted)
    names = {f"block {i} {part}" for i in range(1, found.model.depth + 1) for part in ("tokens", "q", "k", "v")}
    assert names <= set(relative)
    assert ("logits" in relative, "reconstruction" in relative) == (
        found.model.num_classes > 0,
        found.decoder is not None,
    )
    assert max(relative.values()) < 1e-5


def test_every_array_arrives(tmp_path):
    """Against the model's own state, not through the table of names."""
    path, model = written("mae_full", tmp_path)
    params = flatten(convert.read(path, KINDS["mae_full"].told).params)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert len(params) == len(state)
    equal = np.testing.assert_array_equal
    equal(params["encoder/block2/mlp/fc1/kernel"], state["blocks.1.mlp.fc1.weight"].T)
    equal(params["encoder/block2/attn/qkv/kernel"].reshape(24, 72), state["blocks.1.attn.qkv.weight"].T)
    equal(params["encoder/patch_embed/bias"], state["patch_embed.proj.bias"])
    equal(params["encoder/pos_embed"], state["pos_embed"])
    equal(params["pretext/decoder/mask_token"], state["mask_token"])
    equal(params["pretext/decoder/pos_embed"], state["decoder_pos_embed"])
    equal(params["pretext/decoder/pred/kernel"], state["decoder_pred.weight"].T)
    equal(params["pretext/decoder/block1/norm2/scale"], state["decoder_blocks.0.norm2.weight"])


@pytest.mark.parametrize("told", [Told(num_heads=4), Told(num_heads=3, last_block_heads=4)])
def test_wrong_heads_do_not_pass(told, tmp_path):
    path, _ = written("deit", tmp_path)
    found = convert.read(path, told).layout.model
    # The reference is given the heads that were told, so the source's own model stands in for it here.
    right, wrong = (convert.read(path, t) for t in (TOLD, told))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    noise = np.zeros((2, 4), np.float32)
    theirs, ours = verify._reference(right, images, noise), verify._ours(wrong, images, noise)
    compared = [
        verify.difference(name, theirs[name], ours[name]) for name in theirs if theirs[name].shape == ours[name].shape
    ]
    assert found.num_heads == told.num_heads
    with pytest.raises(InputError, match=r"block \d tokens differs by .*; the number of heads may be wrong"):
        verify.check(compared)
    verify.check([verify.difference(name, theirs[name], theirs[name]) for name in theirs])


# MAE-Lite's training files


def add_to_model(path, **tensors):
    content = torch.load(path, weights_only=False)
    content["model"] |= tensors
    torch.save(content, path)


def test_teacher_and_adapter_of_d_mae(tmp_path):
    path, _ = written("mae_lite", tmp_path)
    extra = {
        "module.tch_model.blocks.0.attn.qkv.weight": torch.ones(6, 2),
        "module.attn_adapter.0.weight": torch.ones(3),
    }
    add_to_model(path, **extra)
    converted = convert.read(path)
    assert converted.layout.ignored == {
        "start_epoch": "progress of the training",
        "optimizer": "state of the optimiser",
        "module.tch_model.blocks.0.attn.qkv.weight": "the teacher of the training",
        "module.attn_adapter.0.weight": "an adapter of the training's loss",
    }
    text = "\n".join(converted.lines())
    assert "ignored, the teacher of the training: module.tch_model.blocks.0.attn.qkv.weight" in text
    assert "weights: 38 tensors" in text
    assert max(differences(converted).values()) < 1e-5


def test_the_thirteenth_block_of_d2_mae(tmp_path):
    """Spec C.3: the model is the blocks before it, and the decoder does not read the last of them."""
    path = tmp_path / "d2.pth"
    cfg = config.ViT(24, 3, 3, **SIZE)
    model = files.mae_lite(path, cfg, decoder=DECODER)
    content = torch.load(path, weights_only=False)
    for key in list(content["model"]):
        if key.startswith(tuple(f"module.model.blocks.2.{part}" for part in ("attn.proj", "norm2", "mlp"))):
            del content["model"][key]
    torch.save(content, path)
    converted = convert.read(path, TOLD)
    assert converted.layout.model.depth == 2 and converted.layout.decoder is None
    assert set(converted.params) == {"encoder"}
    reasons = [line for line in converted.lines() if line.startswith("ignored")]
    assert "ignored, a block of D2-MAE's training, not of its model: blocks.2.norm1.weight" in "\n".join(reasons)
    assert any(line.startswith("ignored, D2-MAE's decoder, which reads block 8: mask_token") for line in reasons)
    assert " and 16 more" in "\n".join(reasons)
    # Blocks 1 and 2 of the whole model, on the same images.
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    ours = verify._ours(converted, images, np.zeros((2, 4), np.float32))
    with torch.no_grad():
        trace = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[1]
    for i in (1, 2):
        assert verify.difference("", trace[i - 1].out.numpy(), ours[f"block {i} tokens"]).relative < 1e-5


# Hugging Face

HF_SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, **SIZE}
HF_DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}  # fmt: skip
HUGGING_FACE = {  # class -> configuration, its fields, ours, tensors, what is ignored
    "ViTMAEForPreTraining": ("ViTMAEConfig", HF_DECODER, {}, 30 + 32, set()),
    "ViTMAEModel": ("ViTMAEConfig", {}, {}, 30, set()),
    "ViTModel": ("ViTConfig", {}, {}, 30, {"pooler.dense.weight", "pooler.dense.bias"}),
    "ViTForImageClassification": ("ViTConfig", {"num_labels": 5}, {"num_classes": 5}, 32, set()),
}


def hugging_face(name, folder, **changes):
    """A folder that transformers has saved, of a model with random weights; its path."""
    transformers = pytest.importorskip("transformers", reason="the folders are written by transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, fields, *_ = HUGGING_FACE[name]
    settings = getattr(transformers, kind)(**{**HF_SIZE, **fields, **changes})

    def make():
        model = getattr(transformers, name)(settings)
        for key, p in model.named_parameters():
            if "position_embeddings" in key:
                p.data.add_(torch.randn_like(p) * 0.05)
        return model

    files.build(make, seed=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_each_hugging_face_model(name, tmp_path):
    path = hugging_face(name, tmp_path / "hf")
    _, _, model, tensors, ignored = HUGGING_FACE[name]
    converted = convert.read(path)
    found = converted.layout
    assert found.model == config.ViT(24, 2, 3, posembed="trainable", layer_norm_eps=1e-12, **SIZE, **model)
    assert (found.kind, found.notes[0]) == (f"Hugging Face {name}", "3 heads, as config.json says")
    assert found.decoder == (config.Decoder(16, 2, 2) if name == "ViTMAEForPreTraining" else None)
    assert found.norm_pix_loss is (False if found.decoder else None)
    assert set(found.ignored) == ignored and "not stated in the file" in found.licence
    assert f"weights: {tensors} tensors" in "\n".join(converted.lines())
    relative = differences(converted)
    assert ("reconstruction" in relative, "logits" in relative) == (
        found.decoder is not None,
        found.model.num_classes > 0,
    )
    assert {"block 1 q", "block 2 tokens"} < set(relative)
    assert max(relative.values()) < 1e-5


def test_shards_and_a_decoder_with_a_narrow_mlp(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the folders are written by transformers")
    path = hugging_face("ViTMAEForPreTraining", tmp_path / "hf", decoder_intermediate_size=40)
    model = transformers.ViTMAEForPreTraining.from_pretrained(path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    converted = convert.read(tmp_path / "shards")
    assert len(shards) > 1 and converted.layout.decoder == config.Decoder(16, 2, 2, mlp_ratio=2.5)
    jax.tree.map(np.testing.assert_array_equal, converted.params, convert.read(path).params)
    assert max(differences(converted).values()) < 1e-5  # which transformers reads by itself
    convert.write(lambda: converted, tmp_path / "dst")
    source = convert.describe(converted)["converted"]["source"]
    assert source["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert source["sha256"] == hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    convert.check_same(tmp_path / "shards", tmp_path / "dst")
    data = bytearray(shards[-1].read_bytes())
    data[-1] ^= 1
    shards[-1].write_bytes(data)
    with pytest.raises(InputError, match="was converted from another file"):
        convert.check_same(tmp_path / "shards", tmp_path / "dst")
    shards[-1].unlink()
    convert.check_same(tmp_path / "shards", tmp_path / "dst")  # gone, which is fine


def test_the_older_spelling_of_the_decoder(tmp_path):
    path = hugging_face("ViTMAEForPreTraining", tmp_path / "hf")
    now = convert.read(path)
    weights = load_file(path / "model.safetensors")
    old = {key.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v for key, v in weights.items()}
    new_spelling = [key for key in weights if key.startswith("decoder.decoder_encoder.layer.")]
    if not new_spelling:  # transformers 4
        old = {
            key.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): v for key, v in weights.items()
        }
    assert old.keys() != weights.keys()
    save_file(old, path / "model.safetensors", metadata={"format": "pt"})
    before = convert.read(path)
    assert before.layout == dataclasses.replace(now.layout, arrays=before.layout.arrays)
    jax.tree.map(np.testing.assert_array_equal, before.params, now.params)


def test_wrong_heads_of_a_hugging_face_folder_do_not_pass(tmp_path):
    path = hugging_face("ViTForImageClassification", tmp_path / "hf")
    verify.check(verify.verify(convert.read(path)))
    with pytest.raises(InputError, match="tokens differs by .*the number of heads may be wrong"):
        verify.check(verify.verify(convert.read(path, Told(num_heads=4))))


def test_normalised_pixels_that_config_json_names(tmp_path):
    path = hugging_face("ViTMAEForPreTraining", tmp_path / "hf", norm_pix_loss=True)
    assert convert.read(path).layout.norm_pix_loss is True
    assert convert.read(path, Told(norm_pix=False)).layout.norm_pix_loss is False


# What is refused


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"blocks.0.attn.q_norm.bias": torch.ones(8)},
            "x.pth: blocks.0.attn.q_norm.bias has no place in a MAE or TinyMIM, encoder only",
        ),
        ({"head.bias": torch.ones(24), "z": torch.ones(1)}, r"head.bias \(and 1 more\) has no place"),
        ({"norm.weight": torch.ones(25)}, r"norm.weight has shape \[25\], expected \[24\]"),
        ({"blocks.1.attn.qkv.weight": torch.ones(24, 72)}, r"has shape \[24, 72\], expected \[72, 24\]"),
        (
            {"blocks.1.attn.qkv.bias": None},
            "there is no blocks.1.attn.qkv.bias, which a MAE or TinyMIM, encoder only checkpoint has",
        ),
        ({"cls_token": torch.tensor(1.0)}, r"cls_token has shape \[\], expected \[1, 1, 24\]"),
        ({"a\nb": torch.ones(1)}, r"a\?b has no place"),
    ],
)
def test_tensors_that_do_not_fit(tensors, message, tmp_path):
    path = tmp_path / "x.pth"
    state = files.mae_encoder(path, CFG).state_dict() | tensors
    torch.save({"model": {key: value for key, value in state.items() if value is not None}}, path)
    with pytest.raises(InputError, match=message) as error:
        convert.read(path, TOLD)
    assert "\n" not in str(error.value) and str(error.value).count(str(path)) == 1


# What is written


def torch_output(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


@pytest.mark.parametrize("name", ["mae_encoder", "deit_distilled", "tinymim_star", "tinymim_pretrained"])
def test_a_converted_folder_is_read_like_a_stage(name, tmp_path):
    path, model = written(name, tmp_path)
    converted = convert.read(path, KINDS[name].told)
    folder = tmp_path / "converted"
    convert.write(lambda: converted, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["DONE", "checkpoints", "stage.json"]
    assert handoff.finished(folder)
    assert stage_file.read_model(folder) == converted.layout.model
    assert stage_file.read_untrained(folder) == converted.untrained
    jax.tree.map(np.testing.assert_array_equal, handoff.read_variables(folder)["params"], converted.params)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    module, variables = tinymim_jax.load(folder)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(module.apply)(variables, images)
    theirs = torch_output(model, images)
    output = "logits" if converted.layout.model.num_classes else "tokens"
    expected = getattr(theirs, output).numpy()
    np.testing.assert_allclose(getattr(ours, output), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_stage_json_says_where_it_came_from(tmp_path):
    from tinymim_jax.runtime.storage import sha256

    path, _ = written("tinymim_pretrained", tmp_path)
    converted = convert.read(path)
    convert.write(lambda: converted, tmp_path / "converted")
    content = json.loads((tmp_path / "converted" / "stage.json").read_text())
    assert set(content) == {"format", "converted", "untrained", "classes", "versions"}
    assert set(content["versions"]) == {"jax", "flax", "orbax-checkpoint"}
    facts = stage_file.read(tmp_path / "converted")["converted"]
    assert facts["source"] == {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "made_from": [],
        "kind": "TinyMIM, pre-trained",
        "licence": converted.layout.licence,
        "notes": converted.layout.notes,
        "ignored": converted.layout.ignored,
    }
    assert facts["model"]["last_block_heads"] == 16 and facts["decoder"] is None and facts["norm_pix_loss"] is None
    assert "encoder/block2/mlp/fc1/kernel" in content["untrained"]
    assert "encoder/block2/attn/qkv/kernel" not in content["untrained"]
    with pytest.raises(InputError, match="is a converted checkpoint, not a stage that was run"):
        stage_file.read_stage(tmp_path / "converted")


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
    with pytest.raises(RuntimeError), convert.new_folder(tmp_path / "a" / "x") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []  # the parent that was made, too
    with convert.new_folder(tmp_path / "a" / "x") as partial:
        (partial / "file").write_text("whole")
        assert partial.parent == tmp_path / "a" and partial.name.startswith("x.partial.")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
    with (
        pytest.raises(InputError, match="exists; name another folder, or delete it"),
        convert.new_folder(tmp_path / "a"),
    ):
        pass
    inside = tmp_path / "a" / "x" / "file" / "y"
    with pytest.raises(InputError, match=r"cannot be made \(.+\); name another folder"), convert.new_folder(inside):
        pass


def test_another_file_is_noticed(tmp_path):
    path, folder = tmp_path / "x.pth", tmp_path / "converted"
    files.mae_encoder(path, CFG)
    convert.write(lambda: convert.read(path, TOLD), folder)
    size = path.stat().st_size
    convert.check_same(path, folder)
    files.mae_encoder(path, CFG, seed=1)
    assert path.stat().st_size == size  # as any two files of one model have
    with pytest.raises(InputError, match="was converted from another file than .*x.pth; delete it to convert again"):
        convert.check_same(path, folder)
    path.unlink()
    convert.check_same(path, folder)


def test_another_hugging_face_folder_is_noticed(tmp_path):
    path = hugging_face("ViTModel", tmp_path / "hf")
    convert.write(lambda: convert.read(path), tmp_path / "converted")
    convert.check_same(path, tmp_path / "converted")
    weights = load_file(path / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="was converted from another file"):
        convert.check_same(path, tmp_path / "converted")
