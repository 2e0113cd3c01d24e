"""One picture: from whatever holds it to RGB as a person sees it, to its tiles, and to the tower's input.

path, URL, bytes, PIL, array or tensor
   | read_picture       upright, opaque, 8 bits                                 RGB of any size
   | cut_tiles          the parts of a big picture, where they are asked for    RGB, S x S each
   v
TowerInput              padded to a square, resized, normalized                 (3, S, S) float32
"""

import base64
import binascii
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import get_sampling
from transformers.image_transforms import normalize, rescale

EXIF_ORIENTATION = 0x0112
DOWNLOAD_TIMEOUT = 60  # seconds
JPEG = ("JPEG", "MPO")  # Pillow's names; MPO is what many phones write, a JPEG with another behind it

# Pillow loads a picture of the caller's when it is first used, and not safely from two threads. One lock in 64 by the
# picture's place in memory keeps two readers of the same apart, and hardly ever two of different ones.
_LOCKS = [threading.Lock() for _ in range(64)]


def find_picture(source: Any, name: str, *, download: bool = False) -> tuple[Any, str]:
    """What is to be read of a picture, and its name in errors: as much as can be known without decoding it.

    `source` is what `read_picture` takes. A path becomes a string and must be there, base64 becomes bytes, and with
    `download` a URL too. Calling this again with its result changes nothing.

    Raises FileNotFoundError for a missing file, TypeError for an unknown kind of source.
    """
    if isinstance(source, dict) and {"bytes", "path"} <= source.keys():
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if isinstance(source, Path):
        source = str(source)
    if isinstance(source, str):
        name = f"{source[:100]!r}"
        with _errors_name(name):
            if not is_url(source):
                source = _open_string(source)
            elif download:
                source = fetch(source)
    if not isinstance(source, str | bytes | bytearray | Image.Image | np.ndarray | torch.Tensor):
        raise TypeError(f"{name} is a {type(source).__name__}; a picture is a path, URL, bytes, PIL, array or tensor")
    return source, name


def read_picture(source: Any, name: str, *, side: int | None = None) -> Image.Image:
    """An RGB picture, upright and opaque, as a person sees it.

    `source` is a path, a URL, a `data:` URL or base64 string, bytes, a PIL picture, an array or a tensor (height x
    width, with channels first, last or absent; uint8, uint16, floats in 0..1). A row of a `datasets` column with
    `{"bytes", "path"}` works too. `name` says in errors which picture it was; paths and URLs speak for themselves.
    With `side`, the picture is meant to be made that small (pixels), and a far larger JPEG may come at a part of its
    size (see `_draft_part`).

    Raises FileNotFoundError for a missing file, TypeError for an unknown kind of source and ValueError for anything
    that cannot be read. That includes files of more pixels than Pillow trusts, twice `PIL.Image.MAX_IMAGE_PIXELS`
    (179 million by default): a larger picture needs a higher value there, or None.
    """
    source, name = find_picture(source, name, download=True)
    with _errors_name(name):
        if isinstance(source, str | bytes | bytearray):
            with Image.open(as_file(source)) as picture:
                part = 1 if side is None else _draft_part(picture, side)
                if part > 1:
                    picture.draft(None, (picture.width // part, picture.height // part))
                picture.load()
                if part == 1 or not _has_hard_edges(picture):
                    return to_rgb(picture)
            return read_picture(source, name)
        if isinstance(source, Image.Image):
            with _LOCKS[id(source) // 16 % len(_LOCKS)]:
                return to_rgb(source)
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.is_floating_point() else source).numpy()
        return to_rgb(_picture_of_array(source))


def picture_size(source: Any, name: str) -> tuple[int, int]:
    """(width, height) of what `read_picture` gives, for a JPEG without decoding it.

    Other formats may be turned while they are decoded, or say behind their pixels that they have to be.
    """
    source, name = find_picture(source, name, download=True)
    with _errors_name(name):
        if isinstance(source, str | bytes | bytearray):
            with Image.open(as_file(source)) as picture:
                if picture.format in JPEG:
                    turned = picture.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                    return (picture.height, picture.width) if turned else picture.size
    return read_picture(source, name).size


@contextmanager
def _errors_name(name: str) -> Iterator[None]:
    """What cannot be read becomes a ValueError that says which picture it was."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's sentence holds both numbers, the picture's pixels and the limit.
        raise ValueError(f"{name} is too large: {error} PIL.Image.MAX_IMAGE_PIXELS sets half this limit.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """What is at a URL."""
    request = urllib.request.Request(url, headers={"User-Agent": "longllava"})  # some sites refuse Python's own name
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        return response.read()


def _open_string(source: str) -> str | bytes:
    """A string's file (its path) or content: `data:` URL, path or plain base64."""
    if source.startswith("data:"):
        return base64.b64decode(source.partition(",")[2])
    try:
        if Path(source).is_file():
            return source
    except OSError:  # a string too long for a file name
        pass
    try:
        # Anything shorter is no picture but a mistyped path.
        if len(source) > 64:
            return base64.b64decode(source, validate=True)
    except binascii.Error:
        pass
    raise FileNotFoundError(f"there is no file {source[:100]!r}")


def as_file(source: str | bytes | bytearray) -> str | BytesIO:
    """What libraries open: a path, or content as a file."""
    return source if isinstance(source, str) else BytesIO(source)


# ---- JPEGs far larger than the tower needs

# A JPEG can be decoded at 1/2 or 1/4 of its size. In the tower's input that stays within 2 of 255 of a full decode, on
# average within 0.2, under three conditions; measured on photographs, noise, gratings, print and drawings:
# - at least 12 drafted pixels per pixel of the tower; with 10 coarse noise is off by 3, with 4 photographs are too;
# - colours stored at the full size. Where they are not, a full decode mixes those of neighbours at an edge and cuts
#   off what leaves 0..255; the draft does not, and is off by up to 4;
# - no hard edges at black and white, where a full decode cuts off the overshoot of JPEG; drawings are off by up to 6.
#   They show in the draft, which then was in vain: half of the photographs.
DRAFT_OVERSIZE = 12
DRAFT_CLIPPED = 12 * 255
_BLACK_OR_WHITE = [255 if value <= 2 or value >= 253 else 0 for value in range(256)]


def _draft_part(picture: Image.Image, side: int) -> int:
    """2 or 4 where a half or a quarter is enough of a picture that becomes `side` pixels, else 1."""
    if picture.format not in JPEG or not (picture.mode == "L" or get_sampling(picture) == 0):
        return 1
    for part in (4, 2):
        # An even number of drafted pixels each way: the picture then keeps its place in the middle of its square.
        even = not any(size % (2 * part) for size in picture.size)
        if even and max(picture.size) >= part * DRAFT_OVERSIZE * side:
            return part
    return 1


def _has_hard_edges(picture: Image.Image) -> bool:
    """Whether black or white (0 or 255 in a channel) shares a pixel of the tower's input with something else."""
    black_or_white = picture.point(_BLACK_OR_WHITE * len(picture.getbands()))
    share = np.asarray(black_or_white.reduce(DRAFT_OVERSIZE), dtype=np.int32)
    mean = np.asarray(picture.reduce(DRAFT_OVERSIZE), dtype=np.int32)
    return bool((share * np.minimum(mean, 255 - mean)).max() > DRAFT_CLIPPED)


# ---- colours, tiles


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright, 8 bits per channel, transparency laid on white, RGB."""
    if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        # Pillow clips 16 bits to 8 where one sees a scale. Mode I holds them as well, from older files and Pillows.
        picture = _picture_of_array(np.asarray(picture).clip(0, 65535).astype(np.uint16))
    elif picture.mode == "F":
        values = np.asarray(picture)
        picture = _picture_of_array(values if values.max() <= 1 else values.clip(0, 255).astype(np.uint8))
    elif picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _picture_of_array(array: np.ndarray) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) with 1 to 4 channels; bool, integers of 8 or 16 bits, floats in 0..1."""
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or 0 in array.shape:
        raise ValueError(f"shape {shape} is not height x width with 1 to 4 channels first, last or absent")

    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257
    else:
        low, high = array.min(), array.max()
        limit = 1 if np.issubdtype(array.dtype, np.floating) else 255
        # Not `low < 0 or high > limit`: NaN must fail too.
        if not (low >= 0 and high <= limit):
            raise ValueError(f"values of type {array.dtype} lie in 0..{limit}, these in {low}..{high}")
        if limit == 1:
            array = np.rint(array * 255)
    array = np.ascontiguousarray(array, dtype=np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def best_grid(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(rows, cols) of square tiles of `tile` pixels for a big picture, at most `max_tiles` of them.

    As LLaVA chooses among resolutions: keep as many of the picture's own pixels as possible, then waste as few pixels
    of the tiles as possible. The picture is never enlarged, so a grid larger than the picture only wastes.
    """
    best, best_key = (1, 1), (-1, 0)
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles // rows + 1):
            scale = min(rows * tile / height, cols * tile / width, 1.0)
            kept = int(height * scale) * int(width * scale)
            key = (kept, kept - rows * cols * tile * tile)
            if key > best_key:
                best, best_key = (rows, cols), key
    return best


def cut_tiles(picture: Image.Image, tile: int, max_tiles: int) -> list[list[Image.Image]]:
    """Rows of tiles (tile x tile pixels, RGB) of a picture laid in the middle of its best grid, on white.

    A picture that fits its grid keeps its pixels. No rows at all where one tile would do: it would repeat the picture.
    """
    rows, cols = best_grid(picture.height, picture.width, tile, max_tiles)
    if rows * cols == 1:
        return []
    scale = min(rows * tile / picture.height, cols * tile / picture.width, 1.0)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (cols * tile, rows * tile), "white")
    canvas.paste(picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2))
    return [
        [canvas.crop((x, y, x + tile, y + tile)) for x in range(0, canvas.width, tile)]
        for y in range(0, canvas.height, tile)
    ]


# ---- the tower's input


class TowerInput:
    """Pictures to the tower's input of `side` pixels, with the settings of LLaVA's image processor (do_pad=True).

    Equal to the last bit to what that class makes of them on its Pillow backend.
    """

    def __init__(self, image_processor: Any):
        self.side = dict(image_processor.crop_size)["height"]
        self.resample = image_processor.resample
        # Truncated as in the original, which is where the last bit of the equality comes from.
        self.mean_color = tuple(int(channel * 255) for channel in image_processor.image_mean)
        # Rescaling and normalizing see one value of one channel at a time: they are done once for each of 256 values.
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))  # channels first, a picture of one row
        table = normalize(
            rescale(values, image_processor.rescale_factor),
            mean=image_processor.image_mean,
            std=image_processor.image_std,
            input_data_format="channels_first",
        )
        self.table = table[:, 0].astype(np.float32)  # (3, 256)

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """(3, S, S) float32 of an RGB picture."""
        pixels = np.asarray(self.square(picture))
        out = np.empty((3, self.side, self.side), dtype=np.float32)
        for channel in range(3):
            np.take(self.table[channel], pixels[..., channel], out=out[channel], mode="clip")
        return torch.from_numpy(out)

    def square(self, picture: Image.Image) -> Image.Image:
        """S x S: the picture in the middle of a square of the mean colour, resized."""
        width, height = picture.size
        side = max(width, height)
        if width == side != self.side:
            # Pillow resizes along the rows first, and rows of padding are the same before and after that.
            picture = picture.resize((self.side, height), self.resample)
        if width != height:
            canvas = Image.new("RGB", (side if width < side else picture.width, side), self.mean_color)
            canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
            picture = canvas
        return picture if side == self.side else picture.resize((self.side, self.side), self.resample)
