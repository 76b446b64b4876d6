"""MoCo v3: its loss against PyTorch, its momentum encoder, its views."""

import colorsys
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.tasks import stages
from tinymim_jax.data import contrastive_augment, device_augment
from tinymim_jax.experiment import config
from tinymim_jax.objectives.losses import contrastive
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks import moco
from tinymim_jax.weights.parameters import flatten


def theirs(torch, widths, flat):
    """torch's layers with our arrays, in training, float64."""
    layers = []
    for i, width in enumerate(widths, 1):
        kernel = torch.tensor(flat[f"fc{i}/kernel"].T.astype(np.float64))
        layers.append(torch.nn.Linear(kernel.shape[1], width, bias=False).double())
        layers[-1].weight.data = kernel
        layers.append(torch.nn.BatchNorm1d(width, affine=i < len(widths)).double())
        if i < len(widths):
            layers[-1].weight.data, layers[-1].bias.data = (
                torch.tensor(flat[f"bn{i}/{name}"].astype(np.float64)) for name in ("scale", "bias")
            )
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


def test_projections_and_loss_and_their_gradients_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=(8, 12)).astype(np.float32) for _ in range(2)]
    sizes = {"projector": (10, 10, 6), "predictor": (10, 6)}
    mlps = {name: moco.Mlp(widths) for name, widths in sizes.items()}
    params = {
        name: reference.random_params(mlp.init, jnp.zeros((1, 12 if name == "projector" else 6)), jnp.ones(1))
        for name, mlp in mlps.items()
    }
    valid = jnp.ones(8, bool)

    def loss(params, tokens):
        projected = [mlps["projector"].apply({"params": params["projector"]}, x, valid) for x in tokens]
        queries = [mlps["predictor"].apply({"params": params["predictor"]}, x, valid) for x in projected]
        keys = [jax.lax.stop_gradient(x) for x in projected]
        return sum(contrastive(q, k, valid, 0.2).mean() for q, k in ((queries[0], keys[1]), (queries[1], keys[0])))

    value, grads = jax.value_and_grad(loss, (0, 1))(params, tokens)
    nets = {name: theirs(torch, widths, flatten(params[name])) for name, widths in sizes.items()}
    seen = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in tokens]
    normal = functools.partial(torch.nn.functional.normalize, dim=1)
    projected = [nets["projector"](x) for x in seen]
    queries, keys = [normal(nets["predictor"](x)) for x in projected], [normal(x.detach()) for x in projected]
    wanted = sum(
        torch.nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(8)) * 0.4
        for q, k in ((queries[0], keys[1]), (queries[1], keys[0]))
    )
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-6)
    for found, exact in zip(grads[1], seen, strict=True):
        reference.close(found, exact.grad.numpy(), 1e-5)
    for name, net in nets.items():
        linear = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        for i, layer in enumerate(linear, 1):
            reference.close(grads[0][name][f"fc{i}"]["kernel"], layer.weight.grad.numpy().T, 1e-5)


def test_an_image_that_could_not_be_read_is_nobodys_negative():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(2, 4, 3)).astype(np.float32)
    kept = np.array([0, 1, 3])
    found = contrastive(queries, keys, jnp.array([True, True, False, True]), 0.2)[kept]
    alone = contrastive(queries[kept], keys[kept], jnp.ones(3, bool), 0.2)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


@pytest.mark.slow
def test_the_second_encoder_follows_the_first():
    """At once, then by 0.99, and at the end not at all; it learns nothing by itself."""
    task = stages.moco(total_steps=4)
    variables, _ = stages.fresh(task)
    params = jax.tree.map(lambda x: x + 1.0, variables["params"])
    old = variables["moco"]
    for step, momentum in ((0, 0.0), (2, 0.995), (4, 1.0)):
        state = {"moco": {**old, "step": jnp.int32(step)}}
        loss = functools.partial(task.loss, train=True)
        _, aux = jax.jit(loss)(params, state, {}, stages.batch(), stages.rngs())
        new = aux.model_state["moco"]
        assert new["step"] == step + 1
        own = {"encoder": params["encoder"], "projector": params["pretext"]["projector"]}
        for name in own:
            jax.tree.map(
                lambda a, b, c, m=momentum: np.testing.assert_allclose(a, m * b + (1 - m) * c, rtol=1e-5, atol=1e-6),
                new[name], old[name], own[name],
            )  # fmt: skip
    gradient = jax.grad(
        lambda moving: task.loss(params, {"moco": {**old, **moving}}, {}, stages.batch(), stages.rngs(), train=True)[0]
    )({name: old[name] for name in ("encoder", "projector")})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_what_cannot_be_compared():
    for fields in ({"num_classes": 5}, {"pool": "mean"}):
        with pytest.raises(InputError, match="s.task: (moco compares class tokens|model.pool .* has no norm)"):
            config.Moco().check("s.task", stages.vit(**fields))


def test_initial_values():
    """MoCo's: q, k and v each for itself; a table that encodes the row first (its meshgrid is of columns and rows)."""
    cfg = config.ViT(48, 1, 3, image_size=24, patch_size=8, weight_init="moco")
    params = jax.jit(cfg.build().init)(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]
    assert np.abs(params["block1"]["attn"]["qkv"]["kernel"]).max() == pytest.approx((6 / 96) ** 0.5, rel=0.01)
    assert np.abs(params["block1"]["attn"]["proj"]["kernel"]).max() == pytest.approx((6 / 96) ** 0.5, rel=0.01)
    assert np.abs(params["patch_embed"]["kernel"]).max() == pytest.approx((6 / (192 + 48)) ** 0.5, rel=0.01)
    assert not np.any(params["patch_embed"]["bias"]) and 0 < np.abs(params["cls_token"]).max() < 1e-5
    first, second = np.meshgrid(np.arange(3), np.arange(3), indexing="ij")
    omega = 10000.0 ** -(np.arange(12) / 12)
    angles = [axis.reshape(-1, 1) * omega for axis in (first, second)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(params["pos_embed"][0, 1:], table, atol=1e-6)


# Views


def pictures(size=12):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(6, size, size, 3)).astype(np.float32))


def test_hue_is_that_of_hsv():
    images, shift = pictures(4), np.linspace(-0.1, 0.1, 6)
    images = images.at[0, 0, 0].set(0.5)  # grey has none
    found = np.asarray(device_augment.shifted_hue(images, jnp.asarray(shift)[:, None, None]))
    for image, moved, by in zip(np.asarray(images), found, shift, strict=True):
        for pixel, actual in zip(image.reshape(-1, 3), moved.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
            np.testing.assert_allclose(actual, colorsys.hsv_to_rgb((h + by) % 1, s, v), atol=1e-5)


def test_blur_is_a_gaussian():
    scipy = pytest.importorskip("scipy.ndimage")
    images, sigma = pictures(20), np.linspace(0.1, 2, 6).astype(np.float32)
    found = contrastive_augment.blurred(images, jnp.asarray(sigma))
    for image, actual, s in zip(np.asarray(images), found, sigma, strict=True):
        expected = scipy.gaussian_filter(image.astype(np.float64), (s, s, 0), mode="nearest", radius=(6, 6, 0))
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_how_often_each_is_done():
    """Of 600 images: the second view is solarised in a fifth; grey is a fifth of either."""
    key, images = jax.random.key(0), jnp.tile(pictures(4), (100, 1, 1, 1))
    for view in contrastive_augment.VIEWS:
        made = np.asarray(contrastive_augment.make_view(key, images, view))
        assert made.min() >= 0 and made.max() <= 1
        grey = np.ptp(made, axis=-1).max(axis=(1, 2)) < 1e-6
        assert 0.14 < grey.mean() < 0.27
    same = contrastive_augment.View(blur=0.0, solarize=0.0)
    made = np.asarray(contrastive_augment.make_view(key, images, same))
    unchanged = np.abs(made - images).max(axis=(1, 2, 3)) == 0
    assert 0.1 < unchanged.mean() < 0.22  # neither jittered nor grey: 0.2 x 0.8
    solarised = contrastive_augment.make_view(key, images, contrastive_augment.View(0.0, 1.0))
    np.testing.assert_allclose(solarised, np.where(made * 255 >= 128, 1 - made, made), atol=1e-6)


DEVICES = """
import sys, json
import jax, numpy as np
from tests.tasks import stages
from tinymim_jax.runtime import sharding
task = stages.moco()
variables, _ = stages.fresh(task)
params = stages.reference.random_params(lambda k, b: task.init(k, b)[0], stages.batch())
state = {"moco": variables["moco"]}
def loss(params, batch):
    return task.loss(params, state, {}, batch, stages.rngs(), train=True)[0]
out = []
for data, fsdp in ((1, 1), (2, 2)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("data", "fsdp"))
    batch = sharding.put_batch(stages.batch(8), mesh, axis=0)
    placed = sharding.put_tree(params, sharding.state_sharding(mesh, params))
    value, grads = jax.jit(jax.value_and_grad(loss))(placed, batch)
    out.append([float(value), float(sum(np.abs(np.asarray(g)).sum() for g in jax.tree.leaves(grads)))])
print("RESULT" + json.dumps(out))
"""


@pytest.mark.slow
def test_on_two_by_two_devices_the_negatives_are_those_of_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    del env["JAX_DISABLE_MOST_OPTIMIZATIONS"]  # with it, XLA 0.10 partitions the second view to other pixels
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    one, four = json.loads(done.stdout.split("RESULT")[1])
    assert four == pytest.approx(one, rel=1e-5)
