import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from tests.models import reference
from tests.objectives.exact import check, check_against_pure_jax, exact, operands, run
from tinymim_jax.objectives import relation_gpu
from tinymim_jax.objectives.relation_kl import relation_kl


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("b", "heads", "n", "widths"),
    [(2, 3, 17, (24, 32)), (1, 5, 65, (64, 24)), (2, 1, 64, (16, 16)), (1, 3, 197, (64, 12)), (1, 1, 100, (9, 128))],
)
def test_against_float64(b, heads, n, widths, dtype):
    """Also where E or N is no power of 2 and where it is, where the last block is full and where it is not.

    What is read beyond an array's end is NaN here.
    """
    check(relation_gpu, operands(b, heads, n, widths, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_tokens_against_float64(dtype):
    check(relation_gpu, operands(1, 1, 1025, (16, 24), dtype))


def test_a_teacher_of_another_precision():
    args = operands(1, 2, 33, (24, 16))
    check(relation_gpu, [*[x.astype(jnp.bfloat16) for x in args[:2]], *args[2:]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [17, 65, 197])
def test_against_pure_jax(n, dtype):
    check_against_pure_jax(relation_gpu, n, dtype)


def test_exactly_zero_when_equal():
    tq, tk, *_ = operands(1, 2, 50, (8, 8), scale=4)
    for result in run(relation_gpu, tq, tk, tq, tk):
        assert not np.any(result)


@pytest.mark.parametrize("at", [0, 70])
@pytest.mark.parametrize("gap", [200.0, 1000.0])
def test_finite_where_softmax_underflows(gap, at):
    """An outlier in the first block of keys or in the last."""
    one = jnp.ones((1, 1, 71, 1))
    key = one.at[0, 0, at, 0].set(gap)
    flat = operands(1, 1, 71, (1, 1))[:2]
    for args in ([*flat, one, key], [one, key, *flat], [one, key, one, key[:, :, ::-1]]):
        check(relation_gpu, args)


def test_large_logits():
    """Rows whose largest logit grows from block to block, to thousands: a sum is moved from one to the next."""
    ramp = jnp.linspace(-1, 1, 100)[None, None, :, None]
    tq, _, q, _ = operands(1, 1, 100, (4, 4))
    args = [tq * 40, ramp * jnp.ones(4) * 40, q * 40, -ramp * jnp.ones(4) * 40]
    logits = np.einsum("bhne,bhme->bhnm", *map(reference.f64, args[:2])) / 2
    assert np.ptp(logits, axis=-1).max() > 5000
    value, *grads = run(relation_gpu, *args)
    kl, *expected = exact(*args)
    np.testing.assert_allclose(value, kl, rtol=1e-5)
    for grad, wanted in zip(grads, expected, strict=True):
        reference.close(grad, wanted, 1e-3)  # a logit of 5000 is off by 5e-4 in float32


@pytest.mark.parametrize("shape", [(16,), (16, 32)])
def test_where_a_block_lies_within_the_array(shape):
    n, width = 37, 24
    for block in range(3):
        inside = np.broadcast_to(relation_gpu._is_inside(block, shape, n, width), shape)
        for index in np.ndindex(shape):
            assert inside[index] == (block * 16 + index[0] < n and (len(index) == 1 or index[1] < width))


def test_every_write_is_masked(monkeypatch):
    """A GPU would write rows beyond N into the next head; the interpreter cuts them off."""
    masks, store = [], triton.store

    def noted(ref, x, mask):
        masks.append(mask)
        store(ref, x, mask=mask)

    monkeypatch.setattr(triton, "store", noted)
    run(relation_gpu, *operands(1, 1, 20, (8, 8)))
    assert [mask.shape for mask in masks] == [(32,), (32,), (32,), (32, 16), (32, 16)]  # KL, log-sum-exps, dq; dk


def test_too_wide_for_the_memory_of_a_kernel():
    def supports(teacher, student, dtype, n=197):
        return relation_gpu.supports(*(jax.ShapeDtypeStruct((1, 2, n, e), dtype) for e in (teacher, student)))

    for dtype in ("float32", "bfloat16"):
        assert all(supports(e, e, dtype, n) for e in (1, 12, 16, 24, 48, 64, 128, 256) for n in (2, 17, 4097, 10**6))
    assert not supports(64, 1024, "float32")
    assert not supports(64, 64, "float64")
    q = jnp.ones((1, 2, 17, 1024))
    with pytest.raises(ValueError, match="heads of widths 1024 and 1024 do not fit"):
        jax.eval_shape(functools.partial(relation_gpu.kl_sums, False), q, q, q, q)


TRITON = r"__gpu\$xla\.gpu\.triton\(.*: \((tensor<[^)]*)\) ->"


def lowered(function, *args, platform="cuda", devices=1):
    """Its program for `devices` GPUs, among which the images are split, as text."""
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=gpu())
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in args]
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def gpu():
    return AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")


def loss(kernel):
    def of(*args):
        teacher, student = ([x.swapaxes(1, 2) for x in p] for p in (args[:2], args[2:]))
        return relation_kl(teacher, student, kernel=kernel).mean()

    return of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(64, 32), (24, 12), (128, 128), (256, 16)])
def test_lowered_for_gpus(widths, dtype):
    """Triton takes the kernels for a GPU, and no other platform gets them."""
    for n in (17, 197, 4097):
        args = [jax.ShapeDtypeStruct((8, 3, n, e), dtype) for e in (*widths[:1] * 2, *widths[1:] * 2)]
        gradient = jax.grad(loss("pallas"), argnums=(2, 3))
        assert len(re.findall(TRITON, lowered(gradient, *args))) == 2
    assert len(re.findall(TRITON, lowered(loss("pallas"), *args))) == 1
    assert "triton" not in lowered(loss("xla"), *args)
    assert "triton" not in lowered(loss("pallas"), *args, platform="cpu")


def test_each_gpu_is_given_its_own_images():
    args = [jax.ShapeDtypeStruct((8, 3, 17, 16), "float32") for _ in range(4)]
    for devices, heads in ((1, 24), (4, 6), (8, 3)):
        calls = re.findall(TRITON, lowered(jax.grad(loss("pallas"), argnums=(2, 3)), *args, devices=devices))
        assert len(calls) == 2
        assert all(call.startswith(f"tensor<{heads}x17x16xf32>") for call in calls)
