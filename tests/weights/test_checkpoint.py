import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinymim_jax.experiment.config import Optim
from tinymim_jax.runtime.errors import InputError, Unavailable
from tinymim_jax.training import optim
from tinymim_jax.weights import checkpoint
from tinymim_jax.weights.checkpoint import Checkpoints, restore
from tinymim_jax.weights.parameters import paths


def state(seed=0, updates=3):
    """(model, optim) items of a run of some steps, with frozen parameters and an average."""
    draw = np.random.default_rng(seed)
    params = {
        "encoder": {
            "head": {"kernel": jnp.asarray(draw.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)},
            "norm": {"scale": jnp.asarray(draw.normal(size=5), jnp.float32)},
        }
    }
    cfg = Optim(0.1, None, freeze=(".*/scale",), clip_norm=1.0)
    tx = optim.make_optimizer(
        cfg, lambda _: 0.1, optim.rules(params, cfg, lambda _: False), jax.tree.map(lambda _: 1.0, params)
    )
    opt_state, start = tx.init(params), params
    for _ in range(updates):
        grads = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params)
        change, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, change)
    model = {"params": params, "model_state": {}, "ema": start}
    return model, {"opt_state": opt_state, "step": jnp.asarray(updates, jnp.int32)}


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_save_and_restore_everything(tmp_path):
    model, optimizer = state()
    log = {"window": {"loss": [0.1 + 0.2, 3.0]}, "averages": {"loss": 1 / 3, "bad": float("inf")}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.manager.latest_step() is None
        checkpoints.save(3, {"model": model, "optim": optimizer}, log)
    restored, found = restore(tmp_path, 3, shapes_of({"model": model, "optim": optimizer}))
    assert_same(restored, {"model": model, "optim": optimizer})
    assert found == log
    assert int(restored["optim"]["step"]) == 3


def test_an_empty_average_stays_empty(tmp_path):
    model, optimizer = state()
    model["ema"] = {}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
    assert restore(tmp_path, 3, {"model": shapes_of(model)})[0]["model"]["ema"] == {}
    assert not checkpoint.read_model(tmp_path).get("ema")


def test_what_is_saved_does_not_follow_later_changes(tmp_path):
    """Donated buffers may be overwritten while orbax still writes."""
    model, optimizer = state()
    expected = jax.device_get(model)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        jax.block_until_ready(overwrite(model))
    assert_same(checkpoint.read_model(tmp_path)["params"], expected["params"])


def test_keep(tmp_path):
    model, optimizer = state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5, 10):
            checkpoints.save(step, {"model": model, "optim": optimizer}, {"step": step})
            checkpoints.wait()
        assert checkpoints.manager.latest_step() == 10
    assert restore(tmp_path, 5, {"model": shapes_of(model)})[1] == {"step": 5}
    assert sorted(checkpoint.steps(tmp_path)) == [5, 10]


def test_saving_a_step_again_does_nothing(tmp_path):
    (model, optimizer), (other, _) = state(0), state(1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, {"model": model, "optim": optimizer}, {})
        checkpoints.save(4, {"model": other, "optim": optimizer}, {})
    assert_same(checkpoint.read_model(tmp_path)["params"], model["params"])


def test_steps_without_checkpoints(tmp_path):
    assert checkpoint.steps(tmp_path) == [] == checkpoint.steps(tmp_path / "none")


def test_an_unfinished_checkpoint_is_none(tmp_path):
    model, optimizer = state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
    left = tmp_path / checkpoint.FOLDER / "7.orbax-checkpoint-tmp-1"
    left.mkdir()
    assert checkpoint.steps(tmp_path) == [3]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.manager.latest_step() == 3
    assert_same(checkpoint.read_model(tmp_path)["params"], model["params"])


def test_model_shapes(tmp_path):
    model, optimizer = state()
    model["params"]["encoder"]["half"] = jnp.ones((2, 2), jnp.bfloat16)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
    shapes = checkpoint.model_shapes(tmp_path)["params"]
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in zip(*named(shapes), strict=True)}
    assert found == {
        "encoder/half": ((2, 2), jnp.bfloat16),
        "encoder/head/bias": ((3,), np.float32),
        "encoder/head/kernel": ((4, 3), np.float32),
        "encoder/norm/scale": ((5,), np.float32),
    }


def named(tree):
    return jax.tree.leaves(paths(tree)), jax.tree.leaves(tree)


def test_read_model_gives_numpy_of_the_newest(tmp_path):
    (old, optimizer), (new, _) = state(0), state(1)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(9, {"model": old, "optim": optimizer}, {})
        checkpoints.save(10, {"model": new, "optim": optimizer}, {})
    model = checkpoint.read_model(tmp_path)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(model))
    assert_same(model["params"], new["params"])
    assert_same(model["ema"], new["ema"])


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    model, optimizer = state()
    with Checkpoints(Path("stage"), keep=1) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
    assert_same(checkpoint.read_model(Path("stage"))["params"], model["params"])


def test_no_checkpoint_is_bad_input(tmp_path):
    for read in (checkpoint.model_shapes, checkpoint.read_model):
        with pytest.raises(InputError, match="has no checkpoint") as error:
            read(tmp_path / "stage")
        assert str(tmp_path / "stage") in str(error.value)
    assert not (tmp_path / "stage").exists()


# What is at fault: the files, or something else

KERNEL = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)  # more bytes than its metadata
MODEL = {"params": {"encoder": {"kernel": KERNEL, "bias": np.zeros(3, np.float32)}}}


def written(folder, kind):
    """A checkpoint of a run, or of converted weights; its folder, and its step."""
    if kind == "converted":
        checkpoint.save_model(folder, MODEL["params"])
        return folder / checkpoint.FOLDER / "0", 0
    model, optimizer = state()
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, {"model": {**model, **jax.tree.map(jnp.asarray, MODEL)}, "optim": optimizer}, {"a": 1})
    return folder / checkpoint.FOLDER / "3", 3


def largest(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def chunk_of_zeros(path):
    """What a missing file of an array is otherwise read as."""
    (file,) = path.glob("model/params.encoder.bias/0")
    return file


BROKEN_FILES = {
    "flipped": ("run converted", lambda p: flip(largest(p / "model")), "its values are not those that were saved"),
    "cut": ("run converted", lambda p: cut(largest(p / "model")), "OUT_OF_RANGE|FAILED_PRECONDITION"),
    "gone": ("run converted", lambda p: largest(p / "model").unlink(), "FAILED_PRECONDITION|NOT_FOUND"),
    "zeros gone": ("converted", lambda p: chunk_of_zeros(p).unlink(), "NOT_FOUND"),
    "manifest": ("run", lambda p: flip(p / "model" / "manifest.ocdbt"), "DATA_LOSS"),
    "no manifest": ("run", lambda p: (p / "model" / "manifest.ocdbt").unlink(), "its values are not those"),
    "metadata": ("run converted", lambda p: cut(p / "model" / "_METADATA"), "JSONDecodeError"),
    "no metadata": ("run converted", lambda p: (p / "model" / "_METADATA").unlink(), "FileNotFoundError"),
    "sharding": ("run", lambda p: cut(p / "model" / "_sharding"), "JSONDecodeError"),
    "log": ("run converted", lambda p: cut(p / "log" / "metadata"), "JSONDecodeError"),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for name, (kinds, *_) in BROKEN_FILES.items() for kind in kinds.split()]
)
def test_broken_files_are_damage(kind, name, tmp_path):
    path, step = written(tmp_path, kind)
    assert checkpoint.fault(tmp_path, step) is None
    _, break_it, why = BROKEN_FILES[name]
    break_it(path)
    with pytest.raises(InputError, match=f"the checkpoint of step {step} is damaged .*({why}).*make it again"):
        checkpoint.read_model(tmp_path)
    assert path.is_dir()


@pytest.mark.parametrize("kind", ["run", "converted"])
@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, FileNotFoundError, AttributeError, RuntimeError])
def test_a_fault_of_the_software_is_raised_as_it_is(kind, error, tmp_path, monkeypatch):
    path, _ = written(tmp_path, kind)

    def restore(*_, **__):
        raise error("unexpected keyword argument 'args'")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", restore)
    with pytest.raises(error, match="unexpected keyword") as raised:
        checkpoint.read_model(tmp_path)
    assert not isinstance(raised.value, InputError) and path.is_dir()


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x.astype(np.float16)], ids=["values", "dtype"])
def test_values_that_a_library_changes_are_no_damage(change, tmp_path, monkeypatch):
    _, step = written(tmp_path, "run")
    whole = checkpoint.ocp.StandardCheckpointHandler.restore
    monkeypatch.setattr(
        checkpoint.ocp.StandardCheckpointHandler, "restore", lambda *a, **k: jax.tree.map(change, whole(*a, **k))
    )
    with pytest.raises(ValueError, match="the values that were read are not those that were saved") as raised:
        checkpoint.read_model(tmp_path)
    target = shapes_of(jax.tree.map(jnp.asarray, {"model": {**state()[0], **MODEL}}))
    with pytest.raises(ValueError, match="the values that were read are not those") as again:
        restore(tmp_path, step, target)
    assert not isinstance(raised.value, InputError) and not isinstance(again.value, InputError)


def test_a_checkpoint_that_is_not_there_is_not_damaged(tmp_path):
    written(tmp_path, "run")
    assert checkpoint.fault(tmp_path, 7) is None
    with pytest.raises(FileNotFoundError):
        restore(tmp_path, 7, shapes_of({"model": jax.tree.map(jnp.asarray, MODEL)}))


@pytest.mark.parametrize("name", ["a b", "100%", "a?b#c&d", "è日"])
def test_names_of_folders(name, tmp_path):
    written(tmp_path / name, "run")
    assert checkpoint.fault(tmp_path / name, 3) is None


def test_a_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    model, optimizer = state()
    checked, whole = [], checkpoint.fault
    monkeypatch.setattr(checkpoint, "fault", lambda folder, step: checked.append(step) or whole(folder, step))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 1, 2, 3):
            checkpoints.save(step, {"model": model, "optim": optimizer}, {})
    assert checked == [1]


def test_a_first_checkpoint_that_is_not_what_was_written_stops_the_run(tmp_path, monkeypatch):
    model, optimizer = jax.tree.map(jnp.asarray, MODEL), state()[1]
    wait = Checkpoints.wait

    def lose(self):
        wait(self)
        flip(largest(tmp_path / checkpoint.FOLDER / "1" / "model"))

    monkeypatch.setattr(Checkpoints, "wait", lose)
    why = "step 1 is not what was written .*; mend the storage or choose another --workdir"
    with pytest.raises(Unavailable, match=why), Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": optimizer}, {})
    assert checkpoint.steps(tmp_path) == [1]


SAVE_ON_FOUR = """
    import sys, json
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np, optax
    from tinymim_jax.runtime import sharding
    from tinymim_jax.weights.checkpoint import Checkpoints

    grid = sharding.make_mesh(fsdp=2)
    params = {"kernel": jnp.arange(256 * 512, dtype=jnp.float32).reshape(256, 512), "bias": jnp.arange(5.0)}
    tree = {"params": params, "opt": optax.adam(1.0).init(params)}
    shardings = sharding.state_sharding(grid, tree)
    placed = jax.device_put(tree, shardings)
    kernel = placed["params"]["kernel"]
    print("RESULT" + json.dumps([list(kernel.addressable_shards[0].data.shape), len(kernel.sharding.device_set)]))
    with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
        model = {"params": placed["params"], "model_state": {}, "ema": {}}
        optimizer = {"opt_state": placed["opt"], "step": jax.device_put(2, sharding.replicated(grid))}
        checkpoints.save(2, {"model": model, "optim": optimizer}, {})
"""


def test_restore_on_fewer_devices(tmp_path):
    """Written by 4 devices with fsdp 2, read by 1."""
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(SAVE_ON_FOUR), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("RESULT")[1]) == [[256, 256], 4]

    expected = {"kernel": np.arange(256 * 512, dtype=np.float32).reshape(256, 512), "bias": np.arange(5.0)}
    model = checkpoint.read_model(tmp_path)
    np.testing.assert_array_equal(model["params"]["kernel"], expected["kernel"])
    np.testing.assert_array_equal(model["params"]["bias"], expected["bias"])
    params = {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(5)}
    optimizer = {"opt_state": optax.adam(1.0).init(params), "step": 0}
    target = {"model": {"params": params, "model_state": {}, "ema": {}}, "optim": optimizer}
    restored, _ = restore(tmp_path, 2, shapes_of(jax.tree.map(jnp.asarray, target)))
    restored, optimizer = restored["model"], restored["optim"]
    assert len(restored["params"]["kernel"].sharding.device_set) == 1
    np.testing.assert_array_equal(restored["params"]["kernel"], expected["kernel"])
    assert int(optimizer["step"]) == 2
    assert jax.tree.structure(optimizer["opt_state"]) == jax.tree.structure(optax.adam(1.0).init(params))
