# ruff: noqa: E402 (torch is looked for before what needs it)
"""Our models and their parts against the PyTorch reference of `bridge.torch_reference` and against Hugging Face.

`python -m tests.test_parity` prints how far the losses of fifty training steps are from PyTorch's.
"""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.weights.parameters import flatten

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch; install tinymim_jax[test]")

from tests import torch_files as files
from tinymim_jax.bridge import convert, formats
from tinymim_jax.bridge.torch_reference import mae as torch_mae
from tinymim_jax.bridge.torch_reference import vit as torch_vit
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Data, Decoder, ViT
from tinymim_jax.models import layers, mae, posembed
from tinymim_jax.objectives import losses
from tinymim_jax.tasks.contract import Context, Task
from tinymim_jax.tasks.mae import MaeTask
from tinymim_jax.weights import handoff, resize

torch.set_num_threads(1)  # of models this small, threads only wait for each other

IMAGE = {"image_size": 16, "patch_size": 4}
ENCODER = ViT(24, 2, 3, **IMAGE)
DECODER = Decoder(16, 1, 4)


# Both sides of one model


def reference_vit(cfg: ViT, seed: int = 0) -> torch_vit.ViT:
    return files.build(lambda: torch_vit.ViT(cfg), seed)


def reference_mae(cfg: ViT, task: config.Mae, seed: int = 0) -> torch_mae.MAE:
    return files.build(lambda: torch_mae.MAE(cfg, task), seed)


def mae_task(cfg: ViT, decoder: Decoder, norm_pix: bool = True) -> MaeTask:
    data = Data("digits", image_size=cfg.image_size)
    return config.Mae(decoder=decoder, norm_pix_loss=norm_pix).build(Context(cfg, data))


def shapes_of(task: Task) -> Any:
    """The parameters of a task, as shapes."""
    batch = task.fields.batch(task.data, 1)
    return jax.eval_shape(task.init, jax.random.key(0), batch)[0]["params"]


def in_our_layout(tensors: dict[str, Any], shapes: Any) -> dict[str, np.ndarray]:
    """{our key: array} of PyTorch's weights or gradients, for every key of `shapes`."""
    flat = flatten(shapes)
    return {
        key: formats.from_mae(key, tensors[formats.mae_name(key)].numpy(), leaf.shape) for key, leaf in flat.items()
    }


def params_of(model: torch.nn.Module, shapes: Any) -> Any:
    """The weights of `model` as our tree; of a teacher that we cut off, those that `shapes` has."""
    return flax.traverse_util.unflatten_dict(in_our_layout(model.state_dict(), shapes), sep="/")


def channels_first(images: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def pictures() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def draws() -> np.ndarray:
    """The noise that masks `pictures`."""
    return np.random.default_rng(1).uniform(size=(2, 16)).astype(np.float32)


# Comparing


def difference(ours: Any, theirs: Any) -> float:
    """max|a - b| / max|b|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Key by key; the message, and the captured output, has the largest difference."""
    assert ours.keys() == theirs.keys()
    found = {key: difference(ours[key], theirs[key]) for key in ours}
    worst = max(found, key=lambda key: np.nan_to_num(found[key], nan=np.inf))
    print(f"largest relative difference {found[worst]:.2g}, of {worst}")
    assert found[worst] < tolerance, f"{worst}: relative difference {found[worst]:.2g}, allowed {tolerance}"


# Forward

MODELS = {
    "encoder": {},
    "other heads in the last block": {"last_block_heads": 6},
    "cls head": {"num_classes": 5},
    "mean head": {"pool": "mean", "num_classes": 5},
    "mean head, neck": {"pool": "mean", "neck": 20, "num_classes": 5},
    "cls head, dist_token": {"dist_token": True, "num_classes": 5},
    "mean head, dist_token": {"dist_token": True, "pool": "mean", "num_classes": 5},
    "TinyMIM*": {"dist_token": True, "pool": "mean", "neck": 20, "num_classes": 5, "last_block_heads": 6},
}


def ours_and_theirs(cfg: ViT, model: torch_vit.ViT) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that a ViT computes, on both sides."""
    images = pictures()
    module = cfg.build()
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = params_of(model, {"encoder": shapes})
    blocks = tuple(range(1, cfg.depth + 1))
    out = jax.jit(lambda p, x: module.apply({"params": p}, x, capture=blocks))(params["encoder"], images)
    with torch.no_grad():
        expected = model(channels_first(images))
    ours, theirs = {}, {}
    for i, trace in enumerate(expected.trace, 1):
        theirs |= {f"block {i}, {name}": getattr(trace, name).transpose(1, 2) for name in ("q", "k", "v")}
        ours |= {f"block {i}, {name}": getattr(out.trace[i], name) for name in ("q", "k", "v")}
        theirs[f"block {i}, out"], ours[f"block {i}, out"] = trace.out, out.trace[i].out
    if not cfg.neck:  # the reference's tokens are those behind the neck
        ours["tokens"], theirs["tokens"] = out.tokens, expected.tokens
    if cfg.num_classes:
        ours["logits"], theirs["logits"] = out.logits, expected.logits
    return ours, theirs


@pytest.mark.parametrize("case", MODELS)
def test_every_block_tokens_and_logits(case):
    cfg = dataclasses.replace(ENCODER, **MODELS[case])
    assert_close(*ours_and_theirs(cfg, reference_vit(cfg)), 1e-5)


@pytest.mark.parametrize("case", ["cls head", "mean head", "TinyMIM*"])
def test_small_activations(case):
    """Where each eps counts: the residual stream has a variance of about 1e-6."""
    cfg = dataclasses.replace(ENCODER, **MODELS[case])
    model = reference_vit(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("token", "pos_embed", "proj", "fc2")):
                p.mul_(1e-3)
    assert_close(*ours_and_theirs(cfg, model), 1e-5)


def our_mae(cfg: ViT, decoder: Decoder, params: Any, images: Any, noise: Any, norm_pix: bool) -> dict[str, Any]:
    task = mae_task(cfg, decoder, norm_pix)
    pred, is_masked = jax.jit(task.reconstruct)(params, images, noise)
    target = layers.patchify(jnp.asarray(images), cfg.patch_size)
    target = losses.normalize_patches(target) if norm_pix else target
    keep = mae.mask_by_noise(jnp.asarray(noise), task.task.mask_ratio)[0]
    encoded = jax.jit(task.model.apply)({"params": params["encoder"]}, images, keep=keep).tokens
    loss = losses.reconstruction(pred, target, is_masked, norm_pix_loss=False).mean()
    return {"loss": loss, "reconstruction": pred, "mask": is_masked, "encoded": encoded}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae(norm_pix):
    images, noise = pictures(), draws()
    model = reference_mae(ENCODER, config.Mae(decoder=DECODER, norm_pix_loss=norm_pix))
    ours = our_mae(ENCODER, DECODER, params_of(model, shapes_of(mae_task(ENCODER, DECODER))), images, noise, norm_pix)
    with torch.no_grad():
        loss, pred, mask = model(channels_first(images), torch.from_numpy(noise))
        keep = torch_mae.random_masking(torch.from_numpy(noise), 0.75)[0]
        encoded = model.encode(channels_first(images), keep)[0]
    assert_close(ours, {"loss": loss, "reconstruction": pred, "mask": mask, "encoded": encoded}, 1e-5)


# Parts


@pytest.mark.parametrize(("grid", "width"), [(14, 768), (4, 24)])
def test_sincos_table(grid, width):
    # Both are rounded once, from float64.
    np.testing.assert_allclose(posembed.sincos(grid, width), torch_vit.sincos(grid, width), rtol=0, atol=6e-8)


@pytest.mark.parametrize("new", [32, 12])
def test_bicubic_resize(new):
    table = np.random.default_rng(0).normal(size=(1, 197, 6)).astype(np.float32)
    square = torch.from_numpy(table[:, 1:]).double().view(1, 14, 14, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    resized = resize.resize(table, new)
    assert difference(resized[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2)) < 1e-6
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])


def test_gelu_is_exact():
    eye = {"kernel": np.eye(64, dtype=np.float32), "bias": np.zeros(64, np.float32)}
    x = np.linspace(-6, 6, 64, dtype=np.float32)[None, None]
    out = layers.Mlp(64, jnp.float32).apply({"params": {"fc1": eye, "fc2": eye}}, x)
    assert difference(out, torch.nn.functional.gelu(torch.from_numpy(x).double())) < 1e-6


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1e-3), (0.0, 1e-5), (1.0, 1e-2)])
def test_layer_norm_of_small_variance(mean, std):
    x = np.random.default_rng(0).normal(mean, std, (4, 96)).astype(np.float32)
    module = layers.layer_norm(jnp.float32)
    out = module.apply({"params": {"scale": np.ones(96), "bias": np.zeros(96)}}, x)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (96,), eps=1e-6)
    # float32 keeps 6e-8 of the mean, which is to be compared with std.
    assert difference(out, expected) < 1e-6 + 2e-7 * mean / std


@pytest.mark.parametrize("std", [1.0, 1e-3])
def test_normalised_patches_have_unbiased_variance(std):
    patches = np.random.default_rng(0).normal(0.0, std, (2, 3, 12)).astype(np.float32)
    out = losses.normalize_patches(jnp.asarray(patches))
    exact = torch.from_numpy(patches).double()
    variance, mean = torch.var_mean(exact, dim=-1, unbiased=True, keepdim=True)
    assert difference(out, (exact - mean) / (variance + 1e-6).sqrt()) < 1e-6
    assert difference(out, torch_mae.normalise_patches(exact)) < 1e-6


# Hugging Face


def hugging_face_mae(norm_pix: bool) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="ViTMAE of transformers is the other implementation")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, **IMAGE}
    prefixed = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in prefixed.items()}
    settings = transformers.ViTMAEConfig(**sizes, **decoder, layer_norm_eps=1e-6, norm_pix_loss=norm_pix)
    model = files.build(lambda: transformers.ViTMAEForPreTraining(settings), 0)
    with torch.no_grad():  # initial weights are so small that attention is uniform, whatever the heads
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return model


@pytest.mark.parametrize("norm_pix", [True, False])
def test_hugging_face_mae(norm_pix, tmp_path):
    model = hugging_face_mae(norm_pix)
    model.save_pretrained(tmp_path)
    found, images, noise = convert.read(tmp_path), pictures(), draws()
    layout = found.layout
    ours = our_mae(layout.model, layout.decoder, handoff.grouped(found.params), images, noise, layout.norm_pix_loss)
    with torch.no_grad():
        expected = model(channels_first(images), noise=torch.from_numpy(noise))
    del ours["encoded"]
    assert_close(ours, {"loss": expected.loss, "reconstruction": expected.logits, "mask": expected.mask}, 1e-5)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    from tests.test_parity_training import KINDS, STEPS, trajectory_difference

    for kind in KINDS:
        print(f"{kind}: largest relative difference of the loss in {STEPS} steps {trajectory_difference(kind):.2g}")
