"""What the kernels of the relation loss, `relation_tpu` and `relation_gpu`, share."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

Arrays = tuple[jax.Array, ...]
HIDDEN = -1e30  # logit of what is no key; finite, so that the difference of two is 0


def per_device(function: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
    """`function` of the images of each device: the compiler does not partition kernels, and refuses those it has to.

    The mesh is known from the arrays' types. All its axes share the batch; where they cannot, each device does all.
    """
    # Not `custom_partitioning`: libtpu has no part in it.
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = next((m for m in meshes if not m.empty), meshes[0])
    axes = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    devices = math.prod(mesh.shape[a] for a in axes)
    if devices == 1:
        return function(*arrays)
    spec = PartitionSpec(tuple(axes)) if len(arrays[0]) % devices == 0 else PartitionSpec()
    # Results of a kernel do not say over which axes they vary.
    shards = {"mesh": mesh, "in_specs": spec, "out_specs": spec, "axis_names": set(axes), "check_vma": False}
    return jax.shard_map(function, **shards)(*arrays)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Of two matrices, summed over these axes in float32."""
    # Left to itself, the hardware rounds float32 to bfloat16 (TPU) or TF32 (GPU).
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
