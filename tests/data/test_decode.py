import io

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data.decode import decode, decode_mask, image_size
from tinymim_jax.runtime.errors import InputError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode, colour, size=(6, 4)):
    return Image.new(mode, size, colour)


CASES = {
    "grey": (encoded(flat("L", 90)), (90, 90, 90)),
    "rgb jpeg": (encoded(flat("RGB", (200, 30, 60)), "JPEG", quality=95), (200, 30, 60)),
    "rgba": (encoded(flat("RGBA", (10, 20, 30, 128))), (10, 20, 30)),
    "palette": (encoded(flat("RGB", (250, 100, 50)).quantize(4)), (250, 100, 50)),
    "bilevel": (encoded(flat("1", 1)), (255, 255, 255)),
    "16-bit grey": (encoded(Image.fromarray(np.full((4, 6), 100 * 257, np.uint16))), (100, 100, 100)),
    "cmyk jpeg": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "webp": (encoded(flat("RGB", (9, 99, 199)), "WEBP", lossless=True), (9, 99, 199)),
    "bmp": (encoded(flat("RGB", (9, 99, 199)), "BMP"), (9, 99, 199)),
    "array": (np.full((4, 6, 3), 7, np.uint8), (7, 7, 7)),
    "grey array": (np.full((4, 6, 1), 8, np.uint8), (8, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_becomes_rgb(name):
    data, colour = CASES[name]
    image = decode(data, "x.JPEG")
    assert (image.mode, image.size) == ("RGB", (6, 4))
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3), np.tile(colour, (24, 1)), atol=3)


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    out = np.asarray(decode(encoded(Image.fromarray(ramp)), "x"))[..., 0]
    np.testing.assert_allclose(out, ramp / 257, atol=0.51)


def noisy_jpeg():
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


BAD = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "truncated": noisy_jpeg()[:1500],
    "truncated png": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))[:3000],
    "postscript": encoded(flat("RGB", (1, 2, 3)), "EPS"),
    "float array": np.zeros((4, 4, 3), np.float32),
    "four channels": np.zeros((4, 4, 4), np.uint8),
    "empty array": np.zeros((0, 4, 3), np.uint8),
}


@pytest.mark.parametrize("name", BAD)
def test_undecodable_is_named_in_one_line(name):
    with pytest.raises(
        InputError,
        match=r"^a/b\.JPEG: (cannot be decoded as an image \(.+\); remove or replace it|an array .+ is no image; give .+)$",
    ) as e:
        decode(BAD[name], "a/b.JPEG")
    assert "\n" not in str(e.value)
    assert "0x" not in str(e.value)  # no address of a buffer


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="decompression bomb"):
        decode(noisy_jpeg(), "x")


VALUES = np.array([[0, 1, 2, 7], [255, 9, 3, 250]], np.uint8)
MASKS = {
    "grey": encoded(Image.fromarray(VALUES)),
    "tiff": encoded(Image.fromarray(VALUES), "TIFF"),
    "16-bit grey": encoded(Image.fromarray(VALUES.astype(np.uint16))),
    "32-bit grey": encoded(Image.fromarray(VALUES.astype(np.int32)), "TIFF"),
    "grey written in colours": encoded(Image.fromarray(VALUES[..., None].repeat(3, -1))),
    "array": VALUES,
    "array of one channel": VALUES[..., None],
    "array of another type": VALUES.astype(np.int64),
}


def masked(mask):
    return decode_mask({"image": np.zeros((2, 4, 3), np.uint8), "mask": mask}, "a.jpg")


@pytest.mark.parametrize("name", MASKS)
def test_masks_keep_their_values(name):
    found = masked(MASKS[name])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, VALUES)


def test_masks_with_a_palette_are_its_numbers():
    image = Image.fromarray(VALUES, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    np.testing.assert_array_equal(masked(encoded(image)), VALUES)
    np.testing.assert_array_equal(masked(encoded(Image.fromarray(VALUES > 5))), VALUES > 5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (encoded(flat("RGB", (1, 2, 3), (4, 2))), "a.jpg: its mask is in colours (uint8[2, 4, 3]); save the number of"),
        (VALUES.astype(np.float32), "a.jpg: its mask holds values that are not whole numbers from 0 to 255"),
        (encoded(Image.fromarray(VALUES.astype(np.uint16) + 1)), "a.jpg: its mask holds values that are not whole"),
        (-VALUES.astype(np.int64), "a.jpg: its mask holds values that are not whole numbers"),
        (b"", "a.jpg: its mask: cannot be decoded as an image (no bytes)"),
        (b"mask", "a.jpg: its mask: cannot be decoded as an image (in none of the formats"),
        (encoded(Image.fromarray(VALUES))[:-24], "a.jpg: its mask: cannot be decoded as an image"),
        (VALUES.T, "a.jpg: is 4 x 2 pixels and its mask 2 x 4; both must be of one size"),
        (None, "a.jpg: has no mask; use images with masks"),
    ],
)
def test_what_is_no_mask(mask, message):
    with pytest.raises(InputError) as error:
        masked(mask)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_sizes_from_headers(tmp_path):
    image = flat("RGB", (1, 2, 3), (6, 4))
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG"))
    with (tmp_path / "a.jpg").open("rb") as file:
        assert image_size(file, "") == image_size(encoded(image, "JPEG")[:-1], "") == (4, 6)
    assert image_size(np.zeros((3, 5, 3), np.uint8), "") == (3, 5)
    with pytest.raises(InputError, match=r"^a\.jpg: cannot be decoded as an image \(no bytes\)"):
        image_size(b"", "a.jpg")
