import dataclasses
import io
import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_mae
from tinymim_jax.__main__ import main
from tinymim_jax.bench import loader
from tinymim_jax.data import decode, fast_jpeg
from tinymim_jax.experiment.config import Config, Data
from tinymim_jax.runtime.errors import InputError

DIGITS = "--config=configs/digits/chain.py"


@pytest.fixture
def few(monkeypatch):
    for name, value in (("IMAGES", 5), ("IN_TURN", 2), ("BATCH_SIZE", 4), ("BATCHES", 2)):
        monkeypatch.setattr(loader, name, value)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "train" / "only").mkdir(parents=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "only" / f"{i}.jpg")
    return tmp_path


@pytest.mark.slow
def test_one_json_object(few, capsys):
    assert main(["bench", "loader", DIGITS, "--stage=mae_l", "--rounds=1", "--config.stages.mae_l.data.workers=1"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    one_core = [result[f"{name}_images_per_s"] for name in ("decode", "pil", "transform")]
    assert min(one_core) > 0
    assert result["of_decode"] == pytest.approx(one_core[2] / one_core[0])
    assert result["of_pil"] == pytest.approx(one_core[2] / one_core[1])
    assert {one["workers"] for one in result["all_cores"]} == {1, result["cores"]}
    for one in result["all_cores"]:
        assert one["of_decode"] == pytest.approx(one["transform_images_per_s"] / one_core[0] / result["cores"])
    assert "rand_augment" not in out
    assert err.count("transform_s ") == err.count("batch_s with 1 workers ") == 2
    assert not multiprocessing.active_children()


def config(data):
    return Config("c", {"s": dataclasses.replace(tiny_mae(), data=data)})


@pytest.mark.slow
def test_rand_augment_is_measured_apart(few, tree):
    cfg = config(Data("folder", path=str(tree), image_size=16, rand_augment="rand-m9-inc1", workers=1))
    result = loader.loader(cfg, "s", 1)
    assert result["fast_crop"] and result["image_size"] == 16
    assert result["rand_augment_images_per_s"] > 0
    assert [one["workers"] for one in result["all_cores"] if "rand_augment_images_per_s" in one].count(1) == 1
    assert result["of_decode"] == pytest.approx(result["transform_images_per_s"] / result["decode_images_per_s"])


def test_an_image_that_cannot_be_read_is_named(few, tree):
    (tree / "train" / "only" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"only/3\.jpg: cannot be decoded"):
        loader.loader(config(Data("folder", path=str(tree), image_size=16)), "s", 1)


def test_the_limit_is_a_whole_image(tree):
    for image in sorted((tree / "train" / "only").iterdir()):
        content = image.read_bytes()
        np.testing.assert_array_equal(loader._decode(content, "x", 0), decode.decode(content, "x"))
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(buffer, "PNG")
    assert fast_jpeg.read_header(buffer.getvalue()) is None
    assert loader._decode(buffer.getvalue(), "x", 0).shape == (4, 5, 3)
