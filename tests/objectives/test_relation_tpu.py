import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.objectives.exact import check, check_against_pure_jax, operands, run
from tinymim_jax.objectives import relation_tpu
from tinymim_jax.objectives.relation_kl import relation_kl
from tinymim_jax.planning import estimate
from tinymim_jax.runtime import hlo_stats

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n", "heads", "widths"), [(17, 3, (24, 32)), (65, 5, (64, 24)), (197, 3, (64, 12))])
def test_against_float64(n, heads, widths, dtype):
    check(relation_tpu, operands(2, heads, n, widths, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_tokens_against_float64(dtype):
    check(relation_tpu, operands(1, 1, 1025, (16, 24), dtype))


@pytest.mark.parametrize(("n", "dtype"), [(128, "float32"), (129, "bfloat16"), (256, "bfloat16"), (300, "float32")])
def test_where_blocks_and_chunks_end(n, dtype, monkeypatch):
    monkeypatch.setattr(relation_tpu, "CHUNK", 128)
    check(relation_tpu, operands(1, 2, n, (8, 8), dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [17, 65, 197])
def test_against_pure_jax(n, dtype):
    check_against_pure_jax(relation_tpu, n, dtype)


def test_exactly_zero_when_equal():
    tq, tk, *_ = operands(1, 2, 17, (8, 8))
    for result in run(relation_tpu, tq, tk, tq, tk):
        assert not np.any(result)


def test_finite_where_softmax_underflows(monkeypatch):
    monkeypatch.setattr(relation_tpu, "CHUNK", 16)  # the outlier is in the first of two
    one = jnp.ones((1, 1, 20, 1))
    key = one.at[0, 0, 0, 0].set(1000.0)
    flat = operands(1, 1, 20, (1, 1))[:2]
    for args in ([*flat, one, key], [one, key, *flat], [one, key, one, key[:, :, ::-1]]):
        check(relation_tpu, args)


def test_too_many_tokens_for_the_memory_of_a_kernel():
    tq, q = (jax.ShapeDtypeStruct((1, 2, 20000, e), jnp.bfloat16) for e in (64, 32))
    assert not relation_tpu.supports(tq, q)
    with pytest.raises(ValueError, match="20000 tokens of widths 64 and 32 do not fit"):
        jax.eval_shape(functools.partial(relation_tpu.kl_sums, False), tq, tq, q, q)


def loss(q, k, tq, tk):
    return relation_kl((tq, tk), (q, k), kernel="pallas").mean()


GRADIENT = jax.value_and_grad(loss, argnums=(0, 1))


def test_the_loss_takes_the_kernel_on_a_tpu_alone():
    args = [jax.ShapeDtypeStruct((8, 197, 3, e), jnp.bfloat16) for e in (32, 32, 64, 64)]
    for platform, calls in (("tpu", 1), ("cpu", 0)):
        text = jax.jit(GRADIENT).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("@tpu_custom_call(") == calls


def compiled_for_tpu(n, widths, dtype, topology="v5e:2x4"):
    """Loss and gradient of 8 images on each of 8 devices; tokens before heads, as models have them."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # none is run on
    devices = np.array(estimate.devices_of(topology)).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    args = [jax.ShapeDtypeStruct((64, n, 12, e), dtype, sharding=sharding) for e in (*widths[:1] * 2, *widths[1:] * 2)]
    return jax.jit(GRADIENT).lower(*args[2:], *args[:2]).compile()


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiling for a TPU needs libtpu")
@pytest.mark.parametrize(
    ("widths", "dtype"), [((64, 32), jnp.bfloat16), ((64, 64), jnp.float32), ((24, 12), jnp.bfloat16)]
)
@pytest.mark.usefixtures("optimised")
def test_compiled_for_tpus(widths, dtype):
    """No token leaves its device, and memory grows no faster than the arguments."""
    for n in (197, 1025, 4097):
        compiled = compiled_for_tpu(n, widths, dtype)
        text = compiled.as_text()
        assert "tpu_custom_call" in text
        assert set(hlo_stats.collectives(text)) == {"all-reduce"}  # the mean
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < memory.argument_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiling for a TPU needs libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.usefixtures("optimised")
def test_every_chip_takes_the_kernel(topology):
    assert "tpu_custom_call" in compiled_for_tpu(197, (64, 32), jnp.bfloat16, topology).as_text()
