"""A whole data set in the memory of every device: crops and flips are made there, and the host only counts."""

import concurrent.futures
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data import sources
from tinymim_jax.data.augment import CROP_ATTEMPTS
from tinymim_jax.data.config import Data
from tinymim_jax.data.decode import decode, skipping
from tinymim_jax.data.pipeline import ReplicaRows, TrainRows, calls, stacked
from tinymim_jax.data.sources import IDENTITY, Source
from tinymim_jax.runtime import keys, sharding
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.preemption import StopRequest
from tinymim_jax.runtime.progress_bar import bar

MAX_BYTES = 2**33  # of a data set, on each device
SLOW = 10_000  # images, from which on decoding has a bar
Batch = dict[str, Any]


def train_batches(
    rows: TrainRows | ReplicaRows,
    start: int,
    stop: int,
    mesh: jax.sharding.Mesh,
    request: StopRequest | None = None,
    per_call: int = 1,
) -> Iterator[Batch]:
    """What `make_batch` makes the batches of steps start to stop - 1 from, inside the train step; stacked likewise.

    Its draws are its own, likewise a function of (seed, epoch, index, repeat). Raises InputError, here, if images
    differ in size, take too much memory, or cannot be read.
    """
    sharding.check_batch(rows.batch_size, mesh)
    each = rows.each if rows.replicas else (rows,)
    held = []
    for one in each:
        found = _read(sources.identity(one.data), one.data.on_bad_image)
        _check_bytes(len(found["image"]) * len(each), found["image"].shape[1:])
        # Crops and flips are folded from this key, training steps from another.
        held.append({**found, "key": np.asarray(jax.random.key_data(keys.key(one.seed, keys.CROPS)))})
    held = {name: np.stack([one[name] for one in held]) for name in held[0]} if rows.replicas else held[0]
    held = {name: sharding.put_tree(array, sharding.replicated(mesh)) for name, array in held.items()}
    per_process, wish = rows.batch_size // rows.num_processes, (request or StopRequest()).wish
    own = slice(rows.process * per_process, (rows.process + 1) * per_process)

    def numbers(one: TrainRows, step: int) -> np.ndarray:
        epoch, index, repeat = one.numbers(step)
        columns = [np.full_like(index, epoch), index, repeat, np.full_like(index, wish())]
        return np.stack(columns, axis=1)[own].astype(np.int32)

    def batch(step: int) -> dict[str, np.ndarray]:
        found = [numbers(one, step) for one in each]
        return {"numbers": np.stack(found) if rows.replicas else found[0]}

    def dispatched(steps: range) -> Batch:
        stack = stacked([batch(step) for step in steps], per_call)
        return {"held": held, **sharding.put_batch(stack, mesh, axis=int(per_call > 1) + bool(rows.replicas))}

    return (dispatched(steps) for steps in calls(start, stop, per_call))


@functools.lru_cache(maxsize=2)  # stages of a chain share their data
def _read(identity: tuple, on_bad_image: str) -> dict[str, np.ndarray]:
    source = sources.open_source(Data(**dict(zip(IDENTITY, identity, strict=True))))
    images: list[np.ndarray | None] = [None] * len(source)
    labels = np.zeros(len(source), np.int32)

    def read(index: int) -> None:
        with skipping(on_bad_image):
            record = source[index]
            images[index] = np.asarray(decode(record["image"], source.describe(index)))
            labels[index] = record["label"]
        if images[index] is not None:
            _check_bytes(len(source), images[index].shape)  # before all of them are here

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = pool.map(read, range(len(source)))
        try:
            with bar("decoding", len(source), "img", disable=len(source) < SLOW) as shown:
                for _ in done:
                    shown.update()
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise
    return _stacked(images, labels, source)


def _stacked(images: list[np.ndarray | None], labels: np.ndarray, source: Source) -> dict[str, np.ndarray]:
    """image uint8 [n, H, W, 3], label int32 [n], is_valid bool [n]; raises InputError if they make no array."""
    is_valid = np.array([image is not None for image in images])
    if not is_valid.any():
        raise InputError(f"{source.describe(0)}: neither this nor any other image can be read")
    shape = images[int(is_valid.argmax())].shape
    for index, image in enumerate(images):
        if image is not None and image.shape != shape:
            raise InputError(
                f"{source.describe(index)}: is {image.shape[1]} x {image.shape[0]} pixels, others {shape[1]} x"
                f" {shape[0]}; data.resident needs one size: set data.resident=False"
            )
    blank = np.zeros(shape, np.uint8)
    pixels = np.stack([blank if image is None else image for image in images])
    return {"image": pixels, "label": labels, "is_valid": is_valid}


def _check_bytes(count: int, shape: tuple[int, ...]) -> None:
    if count * np.prod(shape) > MAX_BYTES:
        raise InputError(
            f"data.resident: {count} images of {shape[1]} x {shape[0]} pixels take"
            f" {count * np.prod(shape) / 1e9:.1f} GB on each device, more than {MAX_BYTES / 1e9:.1f} GB; set"
            " data.resident=False"
        )


def example_batch(data: Data, batch_size: int, replicas: int = 0) -> Batch:
    """jax.ShapeDtypeStructs of what `train_batches` yields, if all images are of the size of the first.

    With `replicas`, of as many that do not share their batches.

    Raises InputError if that cannot be read, or all of them take too much memory.
    """
    try:
        source = sources.open_source(data)
        shape = np.asarray(decode(source[0]["image"], source.describe(0))).shape
    except InputError as error:
        raise InputError(f"{error}; with data.resident=True the size of an image must be known") from error
    _check_bytes(len(source) * max(replicas, 1), shape)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    n, front = len(source), (replicas,) if replicas else ()
    shapes = {"image": ((n, *shape), np.uint8), "label": ((n,), np.int32), "is_valid": ((n,), bool)}
    shapes["key"] = key.shape, key.dtype
    held = {name: jax.ShapeDtypeStruct((*front, *size), dtype) for name, (size, dtype) in shapes.items()}
    return {"held": held, "numbers": jax.ShapeDtypeStruct((*front, batch_size, 4), np.int32)}


def make_batch(data: Data, batch: Batch) -> Batch:
    """Of what `train_batches` here yields, what `pipeline.train_batches` would; a batch of that one as it is."""
    if "held" not in batch:
        return batch
    held, (epoch, index, repeat, stop) = batch["held"], batch["numbers"].T
    stream = jax.random.wrap_key_data(held["key"])
    keys = jax.vmap(lambda *row: functools.reduce(jax.random.fold_in, row, stream))(epoch, index, repeat)
    image = jax.vmap(functools.partial(crop_and_flip, data))(held["image"][index], keys)
    is_valid = held["is_valid"][index]
    image = jnp.where(is_valid[:, None, None, None], image, 0)
    return {
        "image": image,
        "label": held["label"][index],
        "is_valid": is_valid,
        "index": index,
        "stop": stop.astype(jnp.uint8),
    }


def crop_and_flip(data: Data, image: jax.Array, key: jax.Array) -> jax.Array:
    """Random-resized-crop and flip of one image, uint8 [H, W, 3] -> uint8 [S, S, 3]; resampled as PIL does."""
    crop_key, flip_key = jax.random.split(key)
    height, width, _ = image.shape
    left, top, w, h = crop_box(crop_key, width, height, data.crop_scale, data.crop_ratio)
    across = resampling(left, w, width, data.image_size, data.interpolation)
    across = jnp.where(jax.random.uniform(flip_key) < data.hflip, across[::-1], across)
    down = resampling(top, h, height, data.image_size, data.interpolation)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    # PIL rounds between its two passes too.
    rows = _levels(jnp.einsum("hwc,sw->hsc", image.astype(jnp.float32), across, **exact))
    return _levels(jnp.einsum("hsc,th->tsc", rows, down, **exact)).astype(jnp.uint8)


def _levels(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)


def crop_box(
    key: jax.Array, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `augment.crop_box`: (left, top, width, height) int32 scalars."""
    keys = jax.random.split(key, 4)
    area = width * height * jax.random.uniform(keys[0], (CROP_ATTEMPTS,), minval=scale[0], maxval=scale[1])
    log_ratio = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(keys[1], (CROP_ATTEMPTS,), minval=log_ratio[0], maxval=log_ratio[1]))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    # No draw fits a very long image: the largest central part with an allowed aspect.
    most_w = max(1, min(width, round(height * ratio[1])))
    most_h = max(1, min(height, round(width / ratio[0])))
    w = jnp.where(fits.any(), w[first], most_w).astype(jnp.int32)
    h = jnp.where(fits.any(), h[first], most_h).astype(jnp.int32)
    left, top = jax.random.randint(keys[2], (), 0, width - w + 1), jax.random.randint(keys[3], (), 0, height - h + 1)
    central = (width - w) // 2, (height - h) // 2
    return jnp.where(fits.any(), left, central[0]), jnp.where(fits.any(), top, central[1]), w, h


def resampling(start: jax.Array, length: jax.Array, size: int, out: int, interpolation: str) -> jax.Array:
    """The matrix [out, size] that resizes pixels start to start + length - 1 of a line, antialiased like PIL's."""
    scale = length / out
    stretch = jnp.maximum(scale, 1.0)
    place = jnp.arange(size) - start
    distance = (place + 0.5 - (jnp.arange(out)[:, None] + 0.5) * scale) / stretch
    weights = KERNELS[interpolation](jnp.abs(distance)) * ((place >= 0) & (place < length))
    return weights / weights.sum(axis=1, keepdims=True)


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys's cubic with a = -1/2."""
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


KERNELS = {"bicubic": _bicubic, "bilinear": lambda x: jnp.maximum(1 - x, 0)}
