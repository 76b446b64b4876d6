import fractions
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils.epath import Path
from PIL import Image

from tests.data.test_fast_jpeg import jpeg, picture
from tests.data.test_sources import write_tfds
from tinymim_jax.data import manifest
from tinymim_jax.data.decode import decode, decode_mask
from tinymim_jax.data.manifest import Settings
from tinymim_jax.data.pipeline import train_rows
from tinymim_jax.data.prepare import Packer, fit, prepare
from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment.config import Data, Masks
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.workdir_lock import WorkdirLock

SIZES = ((90, 60), (60, 90), (100, 100), (41, 40), (40, 50), (12, 13), (300, 41))


@pytest.fixture
def tree(tmp_path):
    """Two classes of 14 images; each image's number is in its name, most are larger than 40 pixels."""
    for split, n in (("train", 28), ("val", 6)):
        for i in range(n):
            folder = tmp_path / "tree" / split / ("ant", "bee")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}.jpg").write_bytes(jpeg(picture(*SIZES[i % len(SIZES)], seed=i), quality=95))
    return str(tmp_path / "tree")


def packer(tree, folder, on_bad_image="stop", split="train", **settings):
    data = Data("folder", path=tree, split=split)
    settings = Settings(**{"short_side": 40, "images_per_shard": 10, **settings})
    source = open_source(data)
    return Packer(source, str(folder), manifest.new(data, source, settings), settings, on_bad_image)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (1000, 41), (41, 41)])
def test_larger_images_are_made_smaller(size):
    image = jpeg(picture(*size), quality=98)
    made = decode(fit(image, "x", Settings(short_side=40)), "x")
    assert min(made.size) == 40
    assert abs(made.width / made.height - size[0] / size[1]) < 0.5 / 40 * max(size) / min(size) + 0.02
    expected = decode(image, "x").resize(made.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).mean() < 3
    smaller = fit(image, "x", Settings(short_side=40, quality=50))
    assert len(smaller) < len(fit(image, "x", Settings(short_side=40)))
    header = Image.open(io.BytesIO(smaller))
    assert header.format == "JPEG" and [layer[1:3] for layer in header.layer] == [(1, 1)] * 3  # colours at full size


@pytest.mark.parametrize("short_side", [None, 60, 500])
def test_other_images_are_copied(short_side):
    image = jpeg(picture(90, 60).convert("CMYK"))
    assert fit(image, "x", Settings(short_side=short_side)) == image


def test_arrays_become_pngs_of_the_same_pixels():
    pixels = np.asarray(picture(20, 30))
    np.testing.assert_array_equal(decode(fit(pixels, "x", Settings(short_side=20)), "x"), pixels)
    assert decode(fit(pixels, "x", Settings(short_side=10)), "x").size == (10, 15)


@pytest.mark.parametrize("size", [(30, 66_000), (66_000, 30)])
def test_what_is_too_long_for_a_jpeg_becomes_a_png(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0]), np.uint8)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    made = fit(file.getvalue(), "x", Settings(short_side=29))
    assert Image.open(io.BytesIO(made)).format == "JPEG" and max(Image.open(io.BytesIO(made)).size) == 63_800
    made = fit(file.getvalue(), "x", Settings(short_side=30))
    assert made == file.getvalue()
    wide = image.resize([2 * side for side in image.size], Image.Resampling.NEAREST)
    file = io.BytesIO()
    wide.save(file, "PNG")
    made = Image.open(io.BytesIO(fit(file.getvalue(), "x", Settings(short_side=30))))
    assert made.format == "PNG" and made.size == size
    np.testing.assert_array_equal(np.asarray(made), np.asarray(wide.resize(size, Image.Resampling.BICUBIC)))


def test_what_cannot_be_decoded_is_named():
    for image in (b"", b"text", jpeg(picture(50, 50))[:800]):
        with pytest.raises(InputError, match=r"^a/b\.jpg: cannot be decoded"):
            fit(image, "a/b.jpg", Settings())


def test_a_shard(tree, tmp_path):
    pack = packer(tree, tmp_path)
    seen = []
    facts = [pack(shard, lambda: seen.append(1)) for shard in range(3)]
    assert [f["records"] for f in facts] == [10, 9, 9] and len(seen) == 28
    for name, fact in zip(sorted(p.name for p in tmp_path.glob("*.array_record")), facts, strict=True):
        assert storage.sha256(tmp_path / name) == fact["sha256"] and os.path.getsize(tmp_path / name) == fact["bytes"]
    packed = open_source(Data("array_record", path=str(tmp_path)))
    order = np.random.default_rng(0).permutation(28)
    for i, index in enumerate(order.tolist()):
        assert packed[i]["label"] == pack.source[index]["label"]
        assert packed[i]["image"] == fit(pack.source[index]["image"], "", pack.settings)
    assert order.tolist() != sorted(order)


@pytest.fixture
def masked(tmp_path):
    """A tree of seven images with masks of twenty classes, in one split."""
    for i, (width, height) in enumerate(SIZES):
        for folder in ("train", "trainannot"):
            (tmp_path / "masked" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "masked" / "train" / f"{i}.jpg").write_bytes(jpeg(picture(width, height, seed=i)))
        mask = np.random.default_rng(i).integers(0, 20, (height // 5 + 1, width // 5 + 1), np.uint8)
        mask = mask.repeat(5, 0).repeat(5, 1)[:height, :width]
        Image.fromarray(mask).save(tmp_path / "masked" / "trainannot" / f"{i}.png")
    (tmp_path / "masked" / "classes.txt").write_text("\n".join(f"class {i}" for i in range(20)))
    return Data("pairs", path=str(tmp_path / "masked"))


@pytest.mark.parametrize("short_side", [None, 30])
def test_masks_go_with_their_images(masked, tmp_path, short_side):
    prepare([masked], Path(tmp_path / "out"), Settings(short_side, images_per_shard=4), workers=1)
    source = open_source(masked)
    packed = open_source(Data("array_record", path=str(tmp_path / "out"), masks=Masks(20)))
    assert packed.classes == source.classes and len(packed) == 7
    order = np.random.default_rng(0).permutation(7).tolist()
    for i, index in enumerate(order):
        before, after = source[index], packed[i]
        if short_side is None:
            assert before == after
            continue
        values, made = decode_mask(before, ""), decode_mask(after, "")  # which says whether sizes agree
        assert min(made.shape) == min(30, *values.shape) and after["label"] == -1
        rows, columns = (
            [math.floor((i + fractions.Fraction(1, 2)) * old / new) for i in range(new)]
            for new, old in zip(made.shape, values.shape, strict=True)
        )
        np.testing.assert_array_equal(made, values[rows][:, columns])


def test_masks_of_arrays_become_pngs(tmp_path):
    data = Data("scenes", split="test")
    prepare([data], Path(tmp_path), Settings(), workers=1)
    packed, source = open_source(Data("array_record", path=str(tmp_path), split="test")), open_source(data)
    index = int(np.random.default_rng(0).permutation(100)[5])
    np.testing.assert_array_equal(decode_mask(packed[5], ""), source[index]["mask"])
    np.testing.assert_array_equal(decode(packed[5]["image"], ""), source[index]["image"])


def test_a_mask_of_another_size_stops_its_shard(masked, tmp_path):
    Image.new("L", (9, 9)).save(os.path.join(masked.path, "trainannot", "2.png"))
    source = open_source(masked)
    pack = Packer(source, str(tmp_path), manifest.new(masked, source, Settings()), Settings())
    with pytest.raises(InputError, match=r"train/2\.jpg: is 100 x 100 pixels and its mask 9 x 9; both must be of one"):
        pack(0)


def bad_image(tree):
    file = Path(tree) / "train" / "bee" / "05.jpg"
    file.write_bytes(file.read_bytes()[:700])
    return str(file)


def test_a_bad_image_stops_its_shard(tree, tmp_path):
    name = bad_image(tree)
    pack = packer(tree, tmp_path / "out", images_per_shard=28)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=rf"^{name}: cannot be decoded .*, or leave such images out with on_bad_image="
    ):
        pack(0)
    assert not list((tmp_path / "out").iterdir())


def test_a_bad_image_is_left_out(tree, tmp_path):
    name = bad_image(tree)
    facts = packer(tree, tmp_path, "skip", images_per_shard=28)(0)
    assert facts["records"] == 27 and len(facts["skipped"]) == 1 and facts["skipped"][0].startswith(f"{name}: cannot")
    assert len(open_source(Data("array_record", path=str(tmp_path)))) == 27


def test_a_folder_that_cannot_be_written(tree, tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(.*No such file.*\); make room or mend the storage"):
        packer(tree, tmp_path / "none")(0)


def run(tree, out, splits=("train", "val"), workers=2, on_bad_image="stop", **settings):
    data = [Data("folder", path=tree, split=split) for split in splits]
    settings = Settings(**{"short_side": 40, "images_per_shard": 10, **settings})
    prepare(data, Path(out), settings, workers, on_bad_image)


@pytest.fixture
def prepared(tree, tmp_path):
    run(tree, tmp_path / "out")
    return tmp_path / "out"


def test_both_splits(tree, prepared, capsys):
    shards = [f"train-{i:05d}-of-00003.array_record" for i in range(3)] + ["val-00000-of-00001.array_record"]
    assert sorted(contents(prepared)) == sorted([*shards, "train.json", "val.json"])
    assert len(manifest.verify(Path(prepared))) == 2
    made = json.loads((prepared / "train.json").read_text())
    assert (made["classes"], made["images"], made["source"]["path"]) == (["ant", "bee"], 28, tree)
    once = contents(prepared)
    run(tree, prepared)  # finds nothing to do
    assert contents(prepared) == once
    (prepared / shards[1]).unlink()
    run(tree, prepared, workers=1)
    assert contents(prepared) == once
    assert capsys.readouterr().out.splitlines()[-2:] == [
        manifest.read(Path(prepared / f"{split}.json")).summary() for split in ("train", "val")
    ]


def test_training_on_it(tree, prepared):
    data = Data("array_record", path=str(prepared), image_size=32, num_examples=28)
    batch = train_rows(data, open_source(data), 28, seed=0)(0)
    assert batch["is_valid"].all() and sorted(batch["label"]) == [0] * 14 + [1] * 14
    whole = Data("folder", path=tree, image_size=32, transform="eval", crop_pct=1.0)
    # The same pictures, but for two resizings and JPEG.
    source, packed = open_source(whole), open_source(data)
    for i, index in enumerate(np.random.default_rng(0).permutation(28).tolist()):
        assert packed[i]["label"] == source[index]["label"]
        theirs = decode(source[index]["image"], "").resize((32, 32), Image.Resampling.BICUBIC)
        ours = decode(packed[i]["image"], "").resize((32, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean() < 4


def test_nothing_is_written_unless_everything_is_there(tree, tmp_path):
    with pytest.raises(InputError, match="tree/extra: no such folder"):
        run(tree, tmp_path / "out", ("train", "extra"))
    with pytest.raises(InputError, match="splits 'train' and 'train2' would be read together"):
        run(tree, tmp_path / "out", ("train", "train2"))
    with pytest.raises(InputError, match="shards must be on a disk"):
        run(tree, "gs://bucket/out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out cannot be made"):
        run(tree, tmp_path / "file" / "out")


def test_other_settings_leave_everything_as_it_is(tree, prepared):
    before = contents(prepared)
    with pytest.raises(InputError, match=r"settings\.short_side: 40 -> 48"):
        run(tree, prepared, short_side=48)
    assert contents(prepared) == before


def test_a_bad_image_stops_and_can_then_be_left_out(tree, tmp_path):
    name = bad_image(tree)
    with pytest.raises(InputError, match=rf"^{name}: cannot be decoded"):
        run(tree, tmp_path / "out", workers=1)
    shards = {file for file in contents(tmp_path / "out") if "array_record" in file}
    assert not any(file.startswith(".") for file in contents(tmp_path / "out"))
    assert shards < {f"train-{i:05d}-of-00003.array_record" for i in range(3)}
    run(tree, tmp_path / "out", on_bad_image="skip")
    skipped = [s for shard in manifest.read(Path(tmp_path / "out" / "train.json")).shards.values() for s in shard.get("skipped", [])]  # fmt: skip
    assert len(skipped) == 1 and name in skipped[0]
    assert len(open_source(Data("array_record", path=str(tmp_path / "out")))) == 27


def test_one_run_at_a_time(tree, tmp_path):
    (tmp_path / "out").mkdir()
    with WorkdirLock(Path(tmp_path / "out")), pytest.raises(InputError, match="is in use by process"):
        run(tree, tmp_path / "out")


def test_tfds(tmp_path):
    write_tfds(tmp_path / "tfds")
    data = Data("tfds", name="tiny", path=str(tmp_path / "tfds"))
    prepare([data], Path(tmp_path / "out"), Settings(), 1)
    source, packed = open_source(data), open_source(Data("array_record", path=str(tmp_path / "out")))
    order = np.random.default_rng(0).permutation(6).tolist()
    assert [packed[i] for i in range(6)] == [source[i] for i in order]


START = "import sys; from tinymim_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"


def start(tree, out):
    """Six shards of a few images, each of them slow."""
    arguments = ["prepare", tree, str(out), "--splits=train", "--short_side=40", "--images_per_shard=5", "--workers=2"]
    return subprocess.Popen([sys.executable, "-c", START, *arguments], stderr=subprocess.PIPE, text=True)


def wait_for_a_shard(process, out):
    for _ in range(3000):
        if (out / "train.json").exists() and manifest.read(Path(out / "train.json")).shards:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_resumed_is_as_never_killed(tree, tmp_path, kill, status):
    for file in (tmp_path / "tree" / "train").glob("*/*.jpg"):
        file.write_bytes(jpeg(picture(1800, 1500, seed=int(file.stem))))
    out = tmp_path / "out"
    first = start(tree, out)
    wait_for_a_shard(first, out)
    first.send_signal(kill)
    _, err = first.communicate(timeout=60)
    if first.returncode != status:  # it was done
        assert first.returncode == 0
    elif kill == signal.SIGINT:
        assert "interrupted: whole shards are kept; the same command goes on" in err and "Traceback" not in err
        assert not list(out.glob(".*")) and not (out / "run.lock").exists()
    kept = {name: (out / name).stat().st_ino for name in manifest.read(Path(out / "train.json")).shards}
    assert start(tree, out).wait(timeout=120) == 0
    assert kept == {name: (out / name).stat().st_ino for name in kept}
    assert start(tree, tmp_path / "other").wait(timeout=120) == 0
    assert contents(out) == contents(tmp_path / "other")
