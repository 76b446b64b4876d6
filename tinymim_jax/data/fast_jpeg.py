"""A crop straight from the bytes of a JPEG: decoded no further down and no finer than it needs, by libjpeg-turbo."""

import dataclasses
import functools
import struct
import threading
import types
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # there is none for Linux on ARM; Pillow does the same, three to five times slower
    cykooz_resizer = None

FILTERS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")
RESAMPLE = {name: Image.Resampling[name.upper()] for name in FILTERS}
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame and hold its size
SEQUENTIAL = (0xC0, 0xC1)
SCAN = 0xDA
END = b"\xff\xd9"
BLOCK = 8  # pixels a side
LEFT_OUT = "extraneous bytes before marker 0xd"  # what libjpeg says of the rows that a header does not count
SCALES = (8, 4, 2)  # that libjpeg-turbo is fast at

Box = tuple[int, int, int, int]
_local = threading.local()


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands at the beginning of a JPEG."""

    width: int
    height: int
    height_at: int  # where in the bytes
    block_rows: int  # pixels of a row of blocks, the most coarsely sampled colour included
    is_cuttable: bool  # all colours in one scan from top to bottom: rows at the bottom can be left out
    is_scalable: bool  # no colour is stored more coarsely across than down, or the other way: it would stay so


def read_header(image: bytes) -> Header | None:
    """None: no JPEG, or one that is PIL's to judge: CMYK, cut short, damaged, enormous."""
    if not image.startswith(b"\xff\xd8\xff"):
        return None
    at, frame = 2, None
    try:
        while image[at] == 0xFF:
            marker = image[at + 1]
            if marker == SCAN:
                return _header(image, frame, at) if frame else None
            frame = at if marker in FRAMES else frame
            # A marker may be preceded by any number of 0xFF.
            at += 1 if marker == 0xFF else 2 + int.from_bytes(image[at + 2 : at + 4])
    except (IndexError, struct.error):
        pass
    return None


def _header(image: bytes, frame: int, scan: int) -> Header | None:
    height, width, components = struct.unpack_from(">HHB", image, frame + 5)
    is_whole = image.rfind(END, scan) >= 0
    if components not in (1, 3) or not 0 < height * width <= (Image.MAX_IMAGE_PIXELS or np.inf) or not is_whole:
        return None
    across, down = zip(
        *(divmod(factors, 16) for factors in image[frame + 11 : frame + 10 + 3 * components : 3]), strict=True
    )
    if 0 in (*across, *down):
        return None
    return Header(
        width=width,
        height=height,
        height_at=frame + 5,
        block_rows=BLOCK * max(down),
        is_cuttable=image[frame + 1] in SEQUENTIAL and image[scan + 4] == components,
        is_scalable=all(x * max(down) == y * max(across) for x, y in zip(across, down, strict=True)),
    )


def crop(image: bytes, header: Header, box: Box, size: int, interpolation: str) -> np.ndarray | None:
    """The part `box` (left, top, width, height in pixels) as uint8 [size, size, 3]; None: libjpeg-turbo gives up.

    A part of at least 2, 4 or 8 times `size` is decoded at 1/2, 1/4 or 1/8.
    """
    left, top, width, height = box
    scale = next((s for s in SCALES if header.is_scalable and min(width, height) >= s * size), 1)
    pixels = decode_rows(image, header, top + height, scale)
    if pixels is None:
        return None
    x, y = left // scale, top // scale
    pixels = pixels[y : -(-(top + height) // scale), x : -(-(left + width) // scale)]
    part = left / scale - x, top / scale - y, width / scale, height / scale
    return resize(pixels, part, (size, size), interpolation)


def decode_rows(image: bytes, header: Header, bottom: int, scale: int = 1) -> np.ndarray | None:
    """The rows above `bottom` and perhaps more, at 1 / `scale`, uint8 [rows, W, 3]; None: libjpeg-turbo gives up."""
    short, rows = _without_bottom(image, header, bottom)
    pixels = np.empty((-(-rows // scale), -(-header.width // scale), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            short, buffer=pixels, min_height=pixels.shape[0], min_width=pixels.shape[1], min_factor=scale
        )
    except ValueError as error:
        if short is image or LEFT_OUT not in str(error):
            return None
    return pixels


def _without_bottom(image: bytes, header: Header, bottom: int) -> tuple[bytes, int]:
    """The JPEG with the rows above `bottom` and few more, and how many: bytes that a smaller height makes superfluous.

    A row of blocks more than is needed where colours are stored coarsely: they are smoothed with the row below.
    """
    blocks = -(-bottom // header.block_rows) + (header.block_rows > BLOCK)
    rows = blocks * header.block_rows
    if not header.is_cuttable or rows >= header.height:
        return image, header.height
    at = header.height_at
    return b"".join((image[:at], rows.to_bytes(2), image[at + 2 :])), rows


def resize(
    pixels: np.ndarray, box: tuple[float, ...], size: tuple[int, int], interpolation: str, antialias: bool = True
) -> np.ndarray:
    """The part `box` (left, top, width, height) of uint8 [H, W, 3] as uint8 [*size, 3], antialiased as by PIL.

    Without `antialias`, each pixel is mixed of the nearest few, however far apart they come to lie: OpenCV's resize.
    """
    if cykooz_resizer is None:
        return _resize_with_pillow(Image.fromarray(pixels), box, size, RESAMPLE[interpolation], antialias)
    kind = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    target = cykooz_resizer.ImageData(size[1], size[0], kind)
    options = cykooz_resizer.ResizeOptions(_algorithm(interpolation, antialias), use_alpha=False)
    options.crop_box = cykooz_resizer.CropBox(*box)
    if not hasattr(_local, "resizer"):  # one a thread: it keeps buffers
        _local.resizer = cykooz_resizer.Resizer()
    _local.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


def _resize_with_pillow(
    image: Image.Image, box: tuple[float, ...], size: tuple[int, int], kind: Image.Resampling, antialias: bool
) -> np.ndarray:
    left, top, width, height = box
    if antialias:
        return np.asarray(image.resize(size[::-1], kind, box=(left, top, left + width, top + height)))
    across, down = width / size[1], height / size[0]
    return np.asarray(image.transform(size[::-1], Image.Transform.AFFINE, (across, 0, left, 0, down, top), kind))


@functools.cache
def _algorithm(interpolation: str, antialias: bool) -> Any:
    names = {"bicubic": "catmull_rom", "bilinear": "bilinear"}
    kind = cykooz_resizer.FilterType[names[interpolation]]
    if antialias:
        return cykooz_resizer.ResizeAlg.convolution(kind)
    # What a ResizeAlg has: it makes none of this algorithm.
    return types.SimpleNamespace(algorithm=cykooz_resizer.Algorithm.interpolation, filter_type=kind, multiplicity=None)
