import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.processes import ROOT, environment
from tinymim_jax.objectives import kernels

EIGHT = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.objectives.exact import operands, run
from tinymim_jax.runtime import hlo_stats
from tinymim_jax.objectives import relation_gpu, relation_tpu
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto, AxisType.Auto))
for module in (relation_gpu, relation_tpu):
    for images, spec in ((8, P(("data", "fsdp"))), (3, P())):
        args = operands(images, 1, 17, (8, 8))
        placed = jax.device_put(args, NamedSharding(mesh, spec))
        compiled = jax.jit(lambda *x: module.both(*x, interpret=True)).lower(*placed).compile()
        assert not hlo_stats.collectives(compiled.as_text())
        for actual, expected in zip(compiled(*placed), run(module.both, *args), strict=True):
            assert actual.sharding.spec == spec
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
"""


def test_devices_work_on_their_own_images():
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment(8), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_summed_in_float32(axes, dtype):
    a, b = (jnp.asarray(np.random.default_rng(i).normal(size=(64, 64)), dtype) for i in range(2))
    found = kernels.dot(a, b, *axes)
    exact = np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), axes)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_the_hardware_does_not_round_float32():
    jaxpr = jax.make_jaxpr(lambda a: kernels.dot(a, a, 1, 1))(jnp.ones((16, 16)))
    assert jaxpr.eqns[0].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
