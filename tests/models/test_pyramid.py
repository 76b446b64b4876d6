"""Maps at four strides, against a few lines of PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.segment import Functional, compare, count, shapes, taps
from tests.models.test_vit import flat, is_normal, is_uniform
from tinymim_jax.experiment.config import Optim, ViT
from tinymim_jax.models.pyramid import Pyramid
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import matches

STAR = Pyramid(width=768, hidden=384, fc=1280)  # TinyMIM*-T
LITE = Pyramid(width=48, hidden=48)  # Semantic-FPN of MAE-Lite
INPUTS = [(1, 32, 32, 192)] * 4


def test_number_of_parameters():
    assert count(LITE.build("float32"), INPUTS) == 101_712


def test_names_and_shapes():
    star = shapes(STAR.build("float32"), INPUTS)
    assert star == {
        "level1_up1/kernel": (192, 2, 2, 384), "level1_up1/bias": (384,),
        "level1_norm/scale": (384,), "level1_norm/bias": (384,),
        "level1_up2/kernel": (384, 2, 2, 768), "level1_up2/bias": (768,),
        "level2_up/kernel": (192, 2, 2, 768), "level2_up/bias": (768,),
        "level3_conv/kernel": (1, 1, 192, 768), "level3_conv/bias": (768,),
        "fc_norm/scale": (192,), "fc_norm/bias": (192,), "fc/kernel": (192, 1280), "fc/bias": (1280,),
        "level4_conv/kernel": (3, 3, 1280, 768), "level4_conv/bias": (768,),
    }  # fmt: skip
    assert set(shapes(Pyramid().build("float32"), INPUTS)) == {
        name for name in star if name.startswith(("level1", "level2"))
    }
    rules = Optim(lr=1.0)
    for name in star:
        assert (
            matches(rules.decay, f"pretext/{name}")
            == name.endswith("kernel")
            != matches(rules.no_decay, f"pretext/{name}")
        )


@pytest.mark.parametrize("pyramid", [Pyramid(), LITE, STAR])
def test_sides_and_channels(pyramid):
    init = functools.partial(pyramid.build("bfloat16").init_with_output, jax.random.key(0), train=False)
    found, _ = jax.eval_shape(init, [jax.ShapeDtypeStruct((2, 32, 32, 192), "float32")] * 4)
    channels = pyramid.channels(192)
    assert [m.shape for m in found] == [(2, side, side, channels) for side in (128, 64, 32, 16)]
    assert {m.dtype for m in found} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("pyramid", "theirs"),
    [(Pyramid(width=6, hidden=5), Functional.lite), (Pyramid(width=16, hidden=8, fc=20), Functional.star)],
)
def test_values_and_gradients_are_torch_s(pyramid, theirs, train):
    """TinyMIM's, of the encoder's width, is compared with BEiT's."""
    compare(pyramid.build("float32"), taps(), theirs, train)


def test_initial_values():
    init = functools.partial(Pyramid(64, 32, fc=300).build("float32").init, train=False)
    made = flat(jax.jit(init)(jax.random.key(0), taps())["params"])
    fans = {"level1_up1": 4 * 32, "level1_up2": 4 * 64, "level2_up": 4 * 64, "level3_conv": 12, "level4_conv": 9 * 300}
    for name, fan_in in fans.items():
        is_uniform(np.asarray(made[f"{name}/kernel"]), fan_in**-0.5)
        assert 0 < np.abs(made[f"{name}/bias"]).max() <= fan_in**-0.5
    is_normal(np.asarray(made["fc/kernel"]), 0.02, 0.05)
    assert not made["fc/bias"].any()


@pytest.mark.parametrize(("pyramid", "coarse"), [(Pyramid(), None), (Pyramid(10, 7), 64), (Pyramid(10, 7, fc=20), 16)])
def test_flops_are_those_of_its_kernels(pyramid, coarse):
    places = {"level1_up2": 256, "level4_conv": coarse}  # of the others: 64
    kernels = {n: s for n, s in shapes(pyramid.build("float32"), [(1, 8, 8, 6)] * 4).items() if n.endswith("kernel")}
    assert pyramid.flops(8, 6) == sum(2 * np.prod(s) * places.get(n.split("/")[0], 64) for n, s in kernels.items())


def test_what_does_not_fit():
    encoder = ViT(12, 4, 3, image_size=32, patch_size=8)
    for pyramid in (Pyramid(), LITE, STAR):
        pyramid.check("x", encoder)
    for pyramid in (Pyramid(fc=3), Pyramid(hidden=3)):
        with pytest.raises(InputError, match="x: hidden and fc need a width; set width, e.g. to 12"):
            pyramid.check("x", encoder)
    with pytest.raises(InputError, match="x: the coarsest map has half the encoder's 1 patches a side, which is none"):
        Pyramid().check("x", ViT(12, 4, 3, image_size=8, patch_size=8))
    Pyramid().check_blocks("x", encoder, (1, 2, 3, 4))
    for blocks in ((1, 2, 3), (1, 2, 2, 3), (4, 3, 2, 1), (0, 1, 2, 3), (2, 3, 4, 5), ()):
        with pytest.raises(InputError, match=r"x is .*; a pyramid is made of 4 blocks in order, of 1 to 4"):
            Pyramid().check_blocks("x", encoder, blocks)
