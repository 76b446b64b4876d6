import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data import pipeline, resident, sources
from tinymim_jax.experiment.config import Data
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import FAILED, GO_ON, STOP, StopRequest

DIGITS = Data("digits", image_size=16, crop_scale=(0.3, 1.0), resident=True)


def rows_of(data, batch_size=8, seed=0):
    return pipeline.train_rows(data, sources.open_source(data), batch_size, seed)


def batches(data, start, stop, mesh, seed=0, **asked):
    rows = rows_of(data, 4 if data.source == "folder" else 8, seed)
    make = jax.jit(functools.partial(resident.make_batch, data))
    return [make(batch) for batch in resident.train_batches(rows, start, stop, mesh, **asked)]


def image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "out"), [((3, 5, 20, 9), 16), ((0, 0, 32, 32), 32), ((1, 2, 3, 4), 24), ((0, 0, 32, 32), 7)]
)
def test_resampling_is_that_of_pil(box, out, interpolation):
    pixels = image(32, 32)
    left, top, w, h = box
    expected = Image.fromarray(pixels).crop((left, top, left + w, top + h))
    expected = np.asarray(expected.resize((out, out), getattr(Image.Resampling, interpolation.upper()))).astype(int)
    across = resident.resampling(left, w, 32, out, interpolation)
    down = resident.resampling(top, h, 32, out, interpolation)
    once = np.clip(np.floor(np.einsum("hwc,sw->hsc", pixels, across) + 0.5), 0, 255)
    found = np.clip(np.floor(np.einsum("hsc,th->tsc", once, down) + 0.5), 0, 255)
    assert np.abs(found - expected).max() <= 1  # PIL adds up in whole numbers
    assert np.abs(found - expected).mean() < 0.05


def boxes(width, height, scale, ratio, n=2000):
    draw = jax.vmap(lambda key: jnp.stack(resident.crop_box(key, width, height, scale, ratio)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), n)))


def test_boxes_are_distributed_like_those_of_the_host():
    from tinymim_jax.data import augment

    args = (40, 30, (0.2, 1.0), (3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    device, host = boxes(*args), np.array([augment.crop_box(*args, rng) for _ in range(2000)])
    left, top, w, h = device.T
    assert (left >= 0).all() and (left + w <= 40).all() and (top >= 0).all() and (top + h <= 30).all()
    for ours, theirs in zip(device.T, host.T, strict=True):
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * (2 / 2000) ** 0.5
        assert ours.std() == pytest.approx(theirs.std(), rel=0.1)


def test_a_very_long_image_falls_back_to_its_middle():
    found = boxes(300, 4, (0.9, 1.0), (3 / 4, 4 / 3), n=5)
    assert (found == [(300 - 5) // 2, 0, 5, 4]).all()


def test_batches_are_those_of_the_host_but_for_the_crop(mesh):
    rows = rows_of(DIGITS)
    ours, theirs = batches(DIGITS, 3, 6, mesh), list(pipeline.train_batches(rows, 3, 6, mesh))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
        for key in ("index", "label", "is_valid", "stop"):
            np.testing.assert_array_equal(a[key], b[key])
        assert 0.5 < np.mean(a["image"]) / np.mean(b["image"]) < 2
        assert (np.asarray(a["image"]) != np.asarray(b["image"])).any()


def test_whole_images_are_those_of_the_host(mesh):
    whole = dataclasses.replace(DIGITS, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=1.0)
    a = batches(whole, 0, 1, mesh)[0]["image"]
    b = next(pipeline.train_batches(rows_of(whole), 0, 1, mesh))["image"]
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_draws_are_a_function_of_seed_epoch_index_and_repeat(mesh):
    few = dataclasses.replace(DIGITS, per_class=2)  # an epoch of 2 steps leaves 4 of the 20 out

    def images(start, stop, seed=0):
        rows = [
            zip(np.asarray(b["index"]), np.asarray(b["image"]), strict=True)
            for b in batches(few, start, stop, mesh, seed)
        ]
        return {int(index): image for pairs in rows for index, image in pairs}

    first, again, later, other = images(0, 2), images(0, 2), images(2, 4), images(0, 2, seed=1)
    assert all((first[i] == again[i]).all() for i in first)
    for changed in (later, other):
        assert any((first[i] != changed[i]).any() for i in set(first) & set(changed))
    repeated = dataclasses.replace(DIGITS, repeats=2)
    (batch,) = batches(repeated, 0, 1, mesh)
    assert batch["index"][0] == batch["index"][1] and (batch["image"][0] != batch["image"][1]).any()


def test_the_example_has_the_shapes_of_a_batch(mesh, tree, tmp_path):
    for data in (dataclasses.replace(DIGITS, per_class=3), tree):
        example = resident.example_batch(data, 4)
        batch = next(resident.train_batches(rows_of(data, 4), 0, 1, mesh))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), example) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0.png: cannot be decoded .* the size of an image must be known"):
        resident.example_batch(tree, 4)


def test_a_wish_to_stop_travels_with_the_batch(mesh):
    request = StopRequest()
    assert (np.asarray(batches(DIGITS, 0, 1, mesh, request=request)[0]["stop"]) == GO_ON).all()
    request.asked = True
    assert (np.asarray(batches(DIGITS, 0, 1, mesh, request=request)[0]["stop"]) == STOP).all()
    request.fail(InputError("no"))
    assert (np.asarray(batches(DIGITS, 0, 1, mesh, request=request)[0]["stop"]) == FAILED).all()


@pytest.mark.parametrize("per_call", [1, 2])
def test_batches_of_replicas_are_those_of_each(mesh, per_call):
    rows = pipeline.ReplicaRows((rows_of(DIGITS, seed=3), rows_of(DIGITS, seed=9)))
    alone = [list(resident.train_batches(one, 1, 3, mesh)) for one in rows.each]
    found = list(resident.train_batches(rows, 1, 3, mesh, per_call=per_call))
    join = np.stack if per_call == 1 else np.concatenate
    numbers = join([batch["numbers"] for batch in found])
    np.testing.assert_array_equal(numbers, [[batch["numbers"] for batch in both] for both in zip(*alone, strict=True)])
    for r, own in enumerate(alone):
        jax.tree.map(
            lambda of_all, one, r=r: np.testing.assert_array_equal(of_all[r], one), found[0]["held"], own[0]["held"]
        )


def test_steps_of_a_call_are_stacked(mesh):
    one = list(resident.train_batches(rows_of(DIGITS), 1, 4, mesh))
    first, second = resident.train_batches(rows_of(DIGITS), 1, 4, mesh, per_call=2)
    stacks = np.concatenate([first["numbers"], second["numbers"]])
    np.testing.assert_array_equal(stacks, np.stack([batch["numbers"] for batch in one]))


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(image(8, 8, i)).save(tmp_path / "train" / "a" / f"{i}.png")
    resident._read.cache_clear()
    return Data("folder", path=str(tmp_path), image_size=8, resident=True, crop_scale=(1.0, 1.0))


def test_an_unreadable_image(tree, tmp_path, mesh):
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"2.png: cannot be decoded .* or leave such images out with on_bad_image=skip"
    ):
        resident.train_batches(rows_of(tree, 4), 0, 1, mesh)
    skipping = dataclasses.replace(tree, on_bad_image="skip")
    (batch,) = batches(skipping, 0, 1, mesh)
    bad = np.asarray(batch["index"]) == 2
    np.testing.assert_array_equal(batch["is_valid"], ~bad)
    assert not np.asarray(batch["image"])[bad].any()


def test_images_of_two_sizes_and_too_many(tree, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(resident, "MAX_BYTES", 100)
    for ask in (lambda: resident.train_batches(rows_of(tree, 4), 0, 1, mesh), lambda: resident.example_batch(tree, 4)):
        with pytest.raises(InputError, match=r"4 images of 8 x 8 pixels take .* set data.resident=False"):
            ask()
    monkeypatch.setattr(resident, "MAX_BYTES", 1000)
    Image.fromarray(image(9, 8)).save(tmp_path / "train" / "a" / "3.png")
    with pytest.raises(InputError, match=r"3.png: is 9 x 8 pixels, others 8 x 8; data.resident needs one size"):
        resident.train_batches(rows_of(tree, 4), 0, 1, mesh)
