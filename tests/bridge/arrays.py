"""Checkpoints as dicts of small arrays by other people's names, and what `layout.understand` makes of them."""

import functools

import numpy as np
import pytest

from tinymim_jax.bridge import convert, formats, layout
from tinymim_jax.bridge.files import Source
from tinymim_jax.bridge.layout import Told
from tinymim_jax.experiment import config
from tinymim_jax.models import posembed
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights.parameters import shapes_of

SMALL = {"image_size": 16, "patch_size": 8}
HF = {"architectures": ["ViTModel"], "num_attention_heads": 3}


def weights(width=24, depth=2, decoder=None, **model):
    """The arrays of a model of our own by MAE's names: ones, but for the positions, which are MAE's table."""
    return dict(_weights(decoder, width=width, depth=depth, num_heads=1, **{**SMALL, **model}))


@functools.cache
def _weights(decoder, **model):
    cfg = config.ViT(**model)
    shapes = shapes_of(convert.shapes(cfg, decoder and config.Decoder(*decoder)))
    arrays = {formats.mae_name(key): formats.to_mae(key, np.ones(shape, np.float32)) for key, shape in shapes.items()}
    grid = cfg.image_size // cfg.patch_size
    return arrays | {"pos_embed": posembed.sincos(grid, cfg.width, 1 + cfg.dist_token)}


def star(**model):
    return weights(pool="mean", num_classes=5, dist_token=True, neck=40, **model)


def understand(arrays, settings=None, told=None, form="pth"):
    return layout.understand(Source("x", form, arrays, settings or {}, {}), dict(arrays), told or Told(num_heads=3))


def rejected(message, arrays, settings=None, told=None, form="pth"):
    with pytest.raises(InputError, match=message):
        understand(arrays, settings, told, form)
