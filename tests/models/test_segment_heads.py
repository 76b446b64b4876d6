"""Heads, against a few lines of PyTorch; UPerNet and FCN are compared with BEiT's in test_segment_beit.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.segment import Functional, compare, count, map_shapes, maps, shapes, taps, variables
from tests.models.test_vit import flat, is_normal
from tinymim_jax.experiment.config import Optim, ViT
from tinymim_jax.models.segment_heads import Fcn, Fpn, Linear, UPer
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import matches


@pytest.mark.parametrize(("width", "parameters"), [(768, 67_963_542), (384, 17_024_406), (192, 4_272_918)])
def test_number_of_parameters_of_upernet(width, parameters):
    assert count(UPer(width).build(150, "float32"), map_shapes(32, width)) == parameters


@pytest.mark.parametrize(("width", "parameters"), [(768, 1_808_534), (384, 923_798), (192, 481_430)])
def test_number_of_parameters_of_the_auxiliary_head(width, parameters):
    assert count(Fcn().build(150, "float32"), map_shapes(32, width)) == parameters


def test_number_of_parameters_of_the_others():
    assert count(Fpn().build(150, "float32"), map_shapes(32, 48)) == 684_694
    assert count(Linear().build(150, "float32"), [(1, 32, 32, 192)] * 4) == 192 * 150 + 150


def test_names_and_shapes():
    found = shapes(UPer(24).build(5, "float32"), map_shapes(4, 12))
    layers = [*(f"pool{n}" for n in (1, 2, 3, 6)), "bottleneck", "fuse"]
    layers += [f"{part}{i}" for part in ("lateral", "fpn") for i in (1, 2, 3)]
    named = {f"{layer}/{end}" for layer in layers for end in ("conv/kernel", "norm/scale", "norm/bias")}
    assert set(found) == named | {"classifier/kernel", "classifier/bias"}
    assert found["bottleneck/conv/kernel"] == (3, 3, 12 + 4 * 24, 24) and found["classifier/kernel"] == (1, 1, 24, 5)
    rules = Optim(lr=1.0)
    for name in found:
        assert (
            matches(rules.decay, f"pretext/{name}")
            == name.endswith("kernel")
            != matches(rules.no_decay, f"pretext/{name}")
        )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("head", "inputs", "theirs"),
    [(Fpn(8, dropout=0.0), maps(), Functional.fpn), (Linear(), taps(), Functional.linear)],
    ids=["fpn", "linear"],
)
def test_values_and_gradients_are_torch_s(head, inputs, theirs, train):
    compare(head.build(5, "float32"), inputs, theirs, train)


def test_initial_values():
    init = jax.jit(functools.partial(Fcn(64).build(200, "float32").init, train=False))
    params = {name: np.asarray(value) for name, value in flat(init(jax.random.key(0), maps())["params"]).items()}
    is_normal(params.pop("classifier/kernel"), 0.01)
    is_normal(params.pop("conv1/conv/kernel"), (2 / (9 * 64)) ** 0.5, 0.05)  # what comes out is counted
    for name, value in params.items():
        assert (value == name.endswith("/scale")).all(), name


def test_dropout_of_channels_stands_before_the_classifier():
    """What enters the classifier is found from its many outputs."""
    made = variables(Fcn(8).build(20, "float32"), maps())
    classifier = made["params"]["classifier"]

    def hidden(dropout, train, rngs=None):
        head = Fcn(8, dropout=dropout).build(20, "float32")
        logits = head.apply(made, maps(), train, rngs=rngs, mutable=["batch_stats"])[0]
        return (np.asarray(logits) - classifier["bias"]) @ np.linalg.pinv(classifier["kernel"][0, 0])

    plain, dropped = hidden(0.0, True), hidden(0.5, True, {"drop_path": jax.random.key(3)})
    kept = np.abs(dropped).max(axis=(1, 2), keepdims=True) > 1e-4  # of each image and channel
    assert 2 < kept.sum() < 14
    np.testing.assert_allclose(dropped, 2 * plain * kept, atol=1e-4)
    np.testing.assert_array_equal(hidden(0.5, False), hidden(0.0, False))


@pytest.mark.parametrize("config", [Fcn(8), Linear()])
def test_bfloat16_but_for_logits_and_statistics(config):
    exact, module = (config.build(5, dtype) for dtype in ("float32", "bfloat16"))
    made = variables(exact, maps())
    logits, wide = (jax.jit(lambda v, x, m=m: m.apply(v, x, False))(made, maps()) for m in (module, exact))
    assert logits.dtype == jnp.float32
    reference.close(logits, wide, 0.05)
    with pytest.raises(AssertionError):
        reference.close(logits, wide, 1e-4)  # it is computed in bfloat16

    def loss(params):
        rngs = {"drop_path": jax.random.key(0)}
        out, state = module.apply({**made, "params": params}, maps(), True, rngs=rngs, mutable=["batch_stats"])
        return (out**2).mean(), state

    gradients, state = jax.jit(jax.grad(loss, has_aux=True))(made["params"])
    assert {x.dtype for x in jax.tree.leaves((gradients, state))} == {jnp.dtype("float32")}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


# Cost and errors


def places_of(name):
    """Pixels that the kernel `name` is applied to, behind 8 x 8 patches."""
    areas, layer = [32**2, 16**2, 8**2, 4**2], name.split("/")[0]
    if layer in ("fuse", "classifier", "bottleneck"):
        return areas[3 if layer == "bottleneck" else 0]
    if layer.startswith("pool"):
        return int(layer[4:]) ** 2
    if layer.startswith("level"):  # of Semantic-FPN
        return areas[int(layer[5]) - 1] * 4 ** (int(layer[-1]) - 1)
    return areas[int(layer[-1]) - 1]


@pytest.mark.parametrize("head", [UPer(10), Fpn(10)])
def test_flops_are_those_of_the_kernels(head):
    kernels = {n: s for n, s in shapes(head.build(5, "float32"), map_shapes(8, 6)).items() if n.endswith("kernel")}
    assert head.flops(8, 6, 5) == sum(2 * np.prod(shape) * places_of(name) for name, shape in kernels.items())


def test_flops_of_small_heads():
    assert Linear().flops(8, 6, 5) == 2 * 64 * 6 * 5
    assert Fcn(10, level=1).flops(8, 6, 5) == 2 * 256 * (9 * 6 * 10 + 10 * 5)


def test_what_does_not_fit():
    encoder = ViT(12, 4, 3, image_size=32, patch_size=8)
    for config in (UPer(), Fpn(), Linear(), Fcn()):
        config.check("x", encoder)
    for config, message in (
        (UPer(bins=(1, 2, 1)), r"x: bins \(1, 2, 1\) has a number twice; leave one out"),
        (Fcn(level=4), "x: there is no level 4; choose one of 0, the finest, to 3"),
        (Fcn(level=-1), "x: there is no level -1"),
    ):
        with pytest.raises(InputError, match=message):
            config.check("x", encoder)
