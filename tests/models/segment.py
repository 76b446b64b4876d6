"""Inputs, variables and a PyTorch version for the tests of pyramids and of what reads them."""

import functools

import jax
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_vit import flat

torch = pytest.importorskip("torch")
F = torch.nn.functional


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def taps(grid=4, width=12, batch=2):
    return [draw(batch, grid, grid, width, seed=i) for i in range(4)]


def maps(grid=4, width=12, batch=2):
    return [draw(batch, side, side, width, seed=side) for side in (4 * grid, 2 * grid, grid, grid // 2)]


def variables(module, *args):
    """None of which is as by initialisation."""
    shapes = jax.eval_shape(functools.partial(module.init, jax.random.key(0), train=False), *args)
    rng = np.random.default_rng(1)

    def make(path, leaf):
        name = path[-1].key
        value = {"var": lambda: rng.uniform(0.5, 2, leaf.shape), "count": lambda: np.ones(leaf.shape)}.get(
            name, lambda: rng.normal(name == "scale", 0.2, leaf.shape)
        )
        return np.asarray(value(), np.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


def shapes(module, inputs):
    """{name: shape} of the parameters behind inputs of these shapes."""
    inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in inputs]
    made = jax.eval_shape(functools.partial(module.init, jax.random.key(0), train=False), inputs)
    return {name: leaf.shape for name, leaf in flat(made["params"]).items()}


def map_shapes(grid, width):
    return [(1, side, side, width) for side in (4 * grid, 2 * grid, grid, grid // 2)]


def count(module, inputs):
    return sum(int(np.prod(shape)) for shape in shapes(module, inputs).values())


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float64))


def nchw(x):
    """[B, H, W, C] -> [B, C, H, W] in float64, with a gradient."""
    return to_torch(x).permute(0, 3, 1, 2).contiguous().requires_grad_()


class Functional:
    """Layers in float64 on NCHW, with our variables by our names; running statistics, or the batch's in training."""

    def __init__(self, made, train):
        self.params, self.train = {k: to_torch(v).requires_grad_() for k, v in flat(made["params"]).items()}, train
        self.stats = {k: to_torch(v) for k, v in flat(made["batch_stats"]).items()} if "batch_stats" in made else {}

    def conv(self, x, name, stride=1):
        kernel = self.params[f"{name}/kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, self.params.get(f"{name}/bias"), stride, kernel.shape[-1] // 2)

    def up(self, x, name):
        return F.conv_transpose2d(x, self.params[f"{name}/kernel"].permute(0, 3, 1, 2), self.params[f"{name}/bias"], 2)

    def norm(self, x, name):
        stats = [self.stats[f"{name}/{key}"] for key in ("mean", "var")]
        return F.batch_norm(x, *stats, *(self.params[f"{name}/{key}"] for key in ("scale", "bias")), self.train)

    def conv_norm(self, x, name):
        return F.relu(self.norm(self.conv(x, f"{name}/conv"), f"{name}/norm"))

    def double(self, x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    def fpn(self, maps):
        total = self.conv_norm(maps[0], "level1_conv1")
        for level in (2, 3, 4):
            x = maps[level - 1]
            for i in range(1, level):
                x = self.double(self.conv_norm(x, f"level{level}_conv{i}"))
            total = total + x
        return [self.conv(total, "classifier")]

    def linear(self, taps):
        return [self.conv(taps[-1], "classifier")]

    def pyramid(self, taps):
        one = F.gelu(self.norm(self.up(taps[0], "level1_up1"), "level1_norm"))
        return [self.up(one, "level1_up2"), self.up(taps[1], "level2_up"), self.conv(taps[2], "level3_conv")]

    def lite(self, taps):
        return [*self.pyramid(taps), F.max_pool2d(self.conv(taps[3], "level4_conv"), 2)]

    def star(self, taps):
        norm, fc = ([self.params[f"{name}/{key}"] for key in keys] for name, keys in
                    (("fc_norm", ("scale", "bias")), ("fc", ("kernel", "bias"))))  # fmt: skip
        x = F.layer_norm(taps[3].permute(0, 2, 3, 1), (12,), *norm) @ fc[0] + fc[1]
        return [*self.pyramid(taps), self.conv(F.gelu(x).permute(0, 3, 1, 2), "level4_conv", 2)]


def compare(module, inputs, theirs, train):
    """Values and gradients of a module, whose output is a map or several, and of a method of `Functional`."""
    made = variables(module, inputs)
    state = {"batch_stats": made.get("batch_stats", {})}

    def apply(params, inputs):
        out = module.apply({"params": params, **state}, inputs, train, mutable=["batch_stats"])[0]
        return out if isinstance(out, list) else [out]

    @jax.jit
    def compute(params, inputs):
        out, pull = jax.vjp(apply, params, inputs)
        return out, pull([x**2 for x in out])

    out, (by_params, by_inputs) = compute(made["params"], inputs)
    functional, wide = Functional(made, train), [nchw(x) for x in inputs]
    expected = theirs(functional, wide)
    sum((x**3).sum() / 3 for x in expected).backward()
    for ours, x in zip(out, expected, strict=True):
        reference.close(ours, x.detach().permute(0, 2, 3, 1), 1e-5)
    for name, gradient in flat(by_params).items():
        if not train or name != "level1_up1/bias":  # a norm of the batch takes it away
            reference.close(gradient, functional.params[name].grad, 1e-4)
    for gradient, x in zip(by_inputs, wide, strict=True):
        if x.grad is not None:
            reference.close(gradient, x.grad.permute(0, 2, 3, 1), 1e-4)
