import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError

FOUR_DEVICES = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from tinymim_jax.runtime import sharding
    from tinymim_jax.runtime.errors import InputError

    def message(f, *args):
        try:
            f(*args)
        except InputError as error:
            return str(error)

    out = {}
    grids = {"all data": (), "half": (-1, 2), "all fsdp": (-1, 4), "given": (2, 2)}
    meshes = {name: sharding.make_mesh(*grid) for name, grid in grids.items()}
    out["shapes"] = {name: dict(m.shape) for name, m in meshes.items()}
    out["part"] = dict(sharding.make_mesh(devices=jax.devices()[:2]).shape)
    out["errors"] = [message(sharding.make_mesh, *grid) for grid in ((-1, 3), (3, 1), (4, 2), (-1, 8))]

    arrays = {"kernel": (256, 1024), "wide": (1024, 256), "odd": (257, 1024), "qkv": (128, 3, 2, 256),
              "none": (257, 255), "small": (256, 255), "edge": (256, 256), "scalar": (), "cube": (64, 64, 64)}
    tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in arrays.items()}
    for name in ("half", "all fsdp", "all data"):
        out[name] = {k: list(map(str, s.spec)) for k, s in sharding.state_sharding(meshes[name], tree).items()}

    batch = {"image": np.arange(8 * 2 * 2 * 3, dtype=np.uint8).reshape(8, 2, 2, 3), "label": np.arange(8)}
    placed = sharding.put_batch(batch, meshes["half"])
    out["same"] = all(np.array_equal(placed[k], batch[k]) for k in batch)
    rows = {str(s.device.id): np.asarray(s.data).tolist() for s in placed["label"].addressable_shards}
    out["rows"] = rows
    out["checks"] = [message(sharding.check_batch, n, meshes["half"]) for n in (4, 8, 6, 3, 11)]

    big = jax.device_put(np.ones((256, 1024), np.float32), sharding.state_sharding(meshes["half"], tree)["kernel"])
    out["shard"] = list(big.addressable_shards[0].data.shape)
    out["replicated"] = [list(s.data.shape) for s in
                         jax.device_put(np.ones((4, 2)), sharding.replicated(meshes["half"])).addressable_shards]
    print("RESULT" + json.dumps(out))
"""


@pytest.fixture(scope="module")
def four():
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = textwrap.dedent(FOUR_DEVICES)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def test_grids(four):
    assert four["shapes"] == {
        "all data": {"data": 4, "fsdp": 1},
        "half": {"data": 2, "fsdp": 2},
        "all fsdp": {"data": 1, "fsdp": 4},
        "given": {"data": 2, "fsdp": 2},
    }
    assert four["part"] == {"data": 2, "fsdp": 1}


def test_grids_that_do_not_fill_the_devices(four):
    for message, data, fsdp in zip(four["errors"], (-1, 3, 4, -1), (3, 1, 2, 8), strict=True):
        assert message.startswith(f"mesh: data {data} x fsdp {fsdp} does not fill 4 devices")


def test_state_sharding(four):
    whole = []
    assert four["half"] == {
        "kernel": ["None", "fsdp"],  # the longer axis
        "wide": ["fsdp"],
        "odd": ["None", "fsdp"],
        "qkv": ["None", "None", "None", "fsdp"],
        "none": whole,  # no axis divides
        "small": whole,  # below 2^16 values
        "edge": ["fsdp"],  # 2^16 values; of two equal axes the first
        "scalar": whole,
        "cube": ["fsdp"],
    }
    assert four["all fsdp"]["odd"] == ["None", "fsdp"]
    assert all(spec == whole for spec in four["all data"].values())
    assert four["shard"] == [256, 512]
    assert four["replicated"] == [[4, 2]] * 4


def test_put_batch(four):
    assert four["same"]
    assert four["rows"] == {"0": [0, 1], "1": [2, 3], "2": [4, 5], "3": [6, 7]}


def test_batches_that_the_devices_cannot_share(four):
    assert four["checks"] == [
        None,
        None,
        "batch_size 6 is not a multiple of the 4 devices; use 4",
        "batch_size 3 is not a multiple of the 4 devices; use 4",
        "batch_size 11 is not a multiple of the 4 devices; use 8",
    ]


def test_one_device():
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1} and one.axis_names == ("data", "fsdp")
    assert one.axis_types == (AxisType.Auto, AxisType.Auto)
    specs = sharding.state_sharding(one, {"a": jnp.zeros((512, 512))})
    assert specs["a"].spec == PartitionSpec()
    assert sharding.batch_sharding(one).spec == PartitionSpec(("data", "fsdp"))
    batch = {"x": np.arange(3), "y": np.ones((3, 2))}
    placed = sharding.put_batch(batch, one)
    assert set(placed) == {"x", "y"} and placed["y"].sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(placed["x"], batch["x"])


def test_one_device_cannot_be_two():
    with pytest.raises(InputError, match=r"mesh: data 2 x fsdp 1 does not fill 1 devices"):
        sharding.make_mesh(data=2, devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What JAX reads of a device to lay out a grid."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def tpu_slices(count, kind="TPU v4"):
    """Slices of 2 x 2 x 2 chips; their numbers begin with the last slice's."""
    places = [(s, coords) for s in reversed(range(count)) for coords in itertools.product(range(2), repeat=3)]
    return [FakeDevice(i, s, coords, device_kind=kind) for i, (s, coords) in enumerate(places)]


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
def test_an_fsdp_group_lies_in_one_slice_of_several(fsdp, kind):
    devices = tpu_slices(3, kind)
    grid = sharding.slices_grid(24 // fsdp, fsdp, devices)
    assert grid.shape == (24 // fsdp, fsdp) and set(grid.flat) == set(devices)
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    np.testing.assert_array_equal(slices, np.repeat(range(3), 8).reshape(grid.shape))


def test_an_fsdp_group_that_no_slice_holds():
    line = "mesh: fsdp 16 does not fit into a slice: 32 devices are 4 slices; set mesh.fsdp to a divisor of 8"
    with pytest.raises(InputError, match=line):
        sharding.make_mesh(fsdp=16, devices=tpu_slices(4))


def test_hosts_of_gpus_are_slices_that_an_fsdp_group_may_span():
    devices = [FakeDevice(i, i % 2, platform="gpu", device_kind="H200") for i in range(4)]
    grids = {fsdp: sharding.slices_grid(4 // fsdp, fsdp, devices) for fsdp in (1, 2, 4)}
    assert [[d.id for d in row] for row in grids[2]] == [[0, 2], [1, 3]]  # the two of a host together
    assert [d.id for d in grids[4].flat] == [d.id for d in grids[1].flat] == [0, 2, 1, 3]
