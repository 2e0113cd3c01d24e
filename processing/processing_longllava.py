"""LongLlavaProcessor: pictures, video and chat become the tensors that the model reads.

    text with placeholders, pictures, videos
       | read            path, URL, bytes, PIL, array or tensor -> RGB as a person sees it
       | square          pad to a square, resize to the tower's input            (S, S, 3) uint8 each
       | expand          one `<image>` per picture, frame or tile in the text; ids repeated rows * cols times
       v
    input_ids (B, L)  attention_mask (B, L)  pixel_values (N, 3, S, S)  image_grid_hw (N, 2)

N counts all pictures, video frames and tiles of the batch in the order of their placeholders, prompt after prompt.

The protocol is that of arXiv 2409.02889 (data processing) and of the released inference code:

- a picture is `<img><image></img>`, where `<image>` is a token of the vocabulary and the tags are ordinary text;
- a video is `<vid>`, its frames (each a picture) joined by `<t>`, `</vid>`;
- with sub-images, `<image>` becomes `<image>`, a newline, and the tiles row by row, each `<img><image></img>`, rows
  joined by a newline. The tags around the placeholder stay where they are, so that `<img>` opens before the whole
  picture and its `</img>` closes after the last tile: that is what the released weights were shown.

One difference to the released code: a picture that fits into one tile gets no tile, for the tile would repeat it.
"""

import base64
import binascii
import bisect
import inspect
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, meta
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_transforms import normalize, rescale
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

IGNORE_INDEX = -100
EXIF_ORIENTATION = 0x0112
DOWNLOAD_TIMEOUT = 60  # seconds


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def read_picture(source: Any, name: str) -> Image.Image:
    """An RGB picture, upright and opaque, as a person sees it.

    `source` is a path, a URL, a `data:` URL or base64 string, bytes, a PIL picture, an array or a tensor (height x
    width, with channels first, last or absent; uint8, uint16, floats in 0..1). A row of a `datasets` column with
    `{"bytes", "path"}` works too. `name` says in errors which picture it was; paths and URLs speak for themselves.

    Raises FileNotFoundError for a missing file, TypeError for an unknown kind of source and ValueError for anything
    that cannot be read. That includes files of more pixels than Pillow trusts, twice `PIL.Image.MAX_IMAGE_PIXELS`
    (179 million by default): a larger picture needs a higher value there, or None.
    """
    if isinstance(source, dict) and {"bytes", "path"} <= source.keys():
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if isinstance(source, Path):
        source = str(source)
    if isinstance(source, str):
        name = f"{source[:100]!r}"
    try:
        if isinstance(source, str):
            source = _open_string(source)
        if isinstance(source, bytes | bytearray):
            source = BytesIO(source)
        if isinstance(source, str | BytesIO):
            with Image.open(source) as picture:
                picture.load()
                return to_rgb(picture)
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.is_floating_point() else source).numpy()
        if isinstance(source, np.ndarray):
            return to_rgb(_picture_of_array(source))
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's sentence holds both numbers, the picture's pixels and the limit.
        raise ValueError(f"{name} is too large: {error} PIL.Image.MAX_IMAGE_PIXELS sets half this limit.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    raise TypeError(f"{name} is a {type(source).__name__}; a picture is a path, URL, bytes, PIL, array or tensor")


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "longllava"})  # some sites refuse Python's own name
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        return response.read()


def _open_string(source: str) -> str | bytes:
    """A string's file (its path) or content: URL, `data:` URL, path or plain base64."""
    if source.startswith(("http://", "https://")):
        return _download(source)
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


# ---------------------------------------------------------------------------------------------------------------------
# Video


def frame_indices(
    total: int,
    times: np.ndarray | None,
    num_frames: int | None,
    fps: float | None,
    max_frames: int,
) -> np.ndarray:
    """Which of `total` frames to look at: `fps` per second, or all; then evenly thinned to `num_frames`, `max_frames`.

    `times` (total,) are the frames' times in seconds, rising; None where there are none. The first and the last of
    the frames to choose from are always among the chosen, unless only one is.
    """
    chosen = np.arange(total)
    if fps is not None:
        if times is None:
            raise ValueError("fps needs the times of a video file; a list or array of frames has none")
        steps = np.arange(times[0], times[-1] + 1e-6, 1 / fps)
        # The frame on the screen at each step; the half millisecond is for times rounded by the file format.
        chosen = np.unique(np.searchsorted(times, steps + 5e-4, side="right") - 1)
    count = min(len(chosen), max_frames if num_frames is None else min(num_frames, max_frames))
    return chosen[np.rint(np.linspace(0, len(chosen) - 1, count)).astype(int)]


def read_video(
    source: Any, name: str, choose: Callable[[int, np.ndarray | None], np.ndarray], keep: Callable[[Image.Image], Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The chosen frames of a video, each passed through `keep` as soon as it is read, and where they came from.

    `source` is a path, URL or bytes of a video file, a sequence of pictures, or an array or tensor with one picture
    per first index. `choose(total, times)` gives the frames' indices. The second result holds `total_num_frames`,
    `fps` and `duration` (s) of the file, and of the chosen frames `frames_indices` and `timestamps` (s); what a
    sequence of pictures does not know is None.

    Raises FileNotFoundError for a missing file and ValueError, with the name, for what has no frames to give.
    """
    if isinstance(source, str | Path | bytes | bytearray):
        return _read_video_file(source, name, choose, keep)
    total = len(source)
    if total == 0:
        raise ValueError(f"{name} has 0 frames")
    try:
        indices = choose(total, None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    frames = [keep(read_picture(source[index], f"frame {index} of {name}")) for index in indices.tolist()]
    info = {"total_num_frames": total, "fps": None, "duration": None}
    return frames, {**info, "frames_indices": indices.tolist(), "timestamps": None}


def _read_video_file(
    source: str | Path | bytes | bytearray, name: str, choose: Callable, keep: Callable
) -> tuple[list[Any], dict[str, Any]]:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video file needs PyAV: pip install av") from error

    if isinstance(source, str | Path):
        name = f"{str(source)!r}"
    file: Any
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = _download(source)
        if isinstance(source, str | Path):
            if not Path(source).is_file():
                raise FileNotFoundError(f"there is no video file {name}")
            file = str(source)
        else:
            file = BytesIO(source)

        # First the packets alone, which costs no decoding: many formats do not say how many frames they hold, and
        # only the packets say when each frame is shown and where decoding can start.
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            stamps = [packet.pts for packet in packets]
            rate = float(stream.average_rate or 0) or None
            time_base = float(stream.time_base)
        if not packets:
            raise ValueError("it has 0 frames")
        # A bare stream has no times: count its frames, and decode from the start.
        counted = None in stamps
        if counted:
            stamps, keys = list(range(len(stamps))), [0]
            time_base = 1 / (rate or 25.0)
        else:
            stamps, keys = sorted(stamps), sorted(packet.pts for packet in packets if packet.is_keyframe)
        times = (np.array(stamps) - stamps[0]) * time_base
        indices = choose(len(stamps), times)

        if isinstance(file, BytesIO):
            file.seek(0)
        with av.open(file) as container:
            frames, shown = _decode(container, [stamps[index] for index in indices], keys, counted, keep)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error

    info = {"total_num_frames": len(stamps), "fps": rate, "duration": float(times[-1]) + (1 / rate if rate else 0.0)}
    timestamps = np.interp(shown, stamps, times).round(6).tolist()
    return frames, {**info, "frames_indices": indices.tolist(), "timestamps": timestamps}


def _decode(
    container: Any, wanted: list[int], keys: list[int], counted: bool, keep: Callable[[Image.Image], Any]
) -> tuple[list[Any], list[int]]:
    """The frames at the stamps `wanted` (rising), or the next that shows something, and the stamps they have.

    Jumps to the last key frame before a wanted frame where that skips something: 128 frames of an hour of video then
    cost 128 short runs instead of the whole hour. `counted`: the stamps are numbers of frames, no jumps.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    decoder = enumerate(container.decode(stream))
    frames: list[Any] = []
    shown: list[int] = []
    position = keys[0] if keys else wanted[0]
    for stamp in wanted:
        start = keys[max(bisect.bisect(keys, stamp) - 1, 0)] if keys else position
        if start > position:
            container.seek(start, stream=stream)
            decoder = enumerate(container.decode(stream))
        for number, frame in decoder:
            position = number if counted else frame.pts
            if position >= stamp:
                frames.append(keep(frame.to_image().rotate(frame.rotation, expand=True)))
                shown.append(position)
                break
    if len(frames) < len(wanted):
        raise ValueError(f"{len(wanted)} frames were chosen, only {len(frames)} can be decoded")
    return frames, shown


# ---------------------------------------------------------------------------------------------------------------------
# The processor


class LongLlavaProcessor(ProcessorMixin):
    """Turns prompts with pictures and videos into the inputs of LongLLaVA, and chat into prompts.

    `image_processor` holds the settings of the tower's preprocessing (`size`, `crop_size`, `image_mean`, `image_std`,
    `rescale_factor`, `resample`): LLaVA's with `do_pad=True`. The work is done here on Pillow and numpy, equal to the
    last bit to that class on its Pillow backend, and the same where other backends are installed.

    The numbers below are defaults, kept with the checkpoint; each can be chosen anew per call.

    Args:
        patch_size: side of the tower's patches, pixels.
        tokens_per_image: tokens of a picture or tile, a square number whose root divides the tower's patch grid.
        tokens_per_frame: tokens of a video frame; None for `tokens_per_image`.
        max_tiles: most tiles of a big picture.
        max_frames: most frames of a video.
        image_token: the placeholder, one token of the vocabulary.
    """

    video_token = "<video>"  # ordinary text: the prompt that reaches the model holds only pictures

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        patch_size: int = 14,
        tokens_per_image: int = 144,
        tokens_per_frame: int | None = None,
        max_tiles: int = 30,
        max_frames: int = 128,
        image_token: str = "<image>",
    ):
        template_file = Path(__file__).with_name("chat_template.jinja")
        if chat_template is None and template_file.is_file():  # a copy of this module alone has no template beside it
            chat_template = template_file.read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

        self.image_token = image_token
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"{image_token!r} is not in the vocabulary of the tokenizer ({len(tokenizer)} tokens); rename one "
                "of its reserved tokens, so that no embedding has to be added"
            )
        self.patch_size = patch_size
        self.tokens_per_image = tokens_per_image
        self.tokens_per_frame = tokens_per_frame
        self.max_tiles = max_tiles
        self.max_frames = max_frames

        sides = {*dict(image_processor.size).values(), *dict(image_processor.crop_size).values()} - {None}
        if len(sides) != 1 or not image_processor.do_pad:
            raise ValueError(
                "the image processor must pad to a square (do_pad=True) and resize and crop to one side, not "
                f"do_pad={image_processor.do_pad}, size={image_processor.size}, crop_size={image_processor.crop_size}"
            )
        self._grid_side(tokens_per_image, "tokens_per_image")
        self._grid_side(self._frame_tokens(None, None), "tokens_per_frame")
        _positive(max_tiles=max_tiles, max_frames=max_frames)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_hw"]

    @property
    def image_size(self) -> int:
        """Side of the tower's input, pixels."""
        return dict(self.image_processor.crop_size)["height"]

    # ---- text, pictures and videos to tensors

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        *,
        audio: None = None,
        tokens_per_image: int | None = None,
        tokens_per_frame: int | None = None,
        sub_images: bool | Sequence[bool] = False,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_metadata: bool = False,
    ) -> BatchFeature:
        """Prompts with `<image>` and `<video>` placeholders to input_ids, attention_mask, pixel_values, image_grid_hw.

        Args:
            text: one prompt or several; None for pictures alone.
            images: one picture, a list of them for all placeholders of all prompts in order, or one list per prompt.
                See `read_picture` for what a picture can be.
            videos: the same with videos. See `read_video`; a list of pictures or an array with four axes is one video,
                an array with five axes a list of them.
            tokens_per_image, tokens_per_frame: a square number each. A `tokens_per_image` of the call is also that of
                frames, unless the call or the checkpoint has one for frames.
            sub_images: give every picture its tiles (see the head of this file), at most `max_tiles`; also one choice
                per prompt.
            num_frames, fps: frames per video, evenly spaced, or frames per second of it; at most `max_frames` in both
                cases. With neither, `max_frames` evenly spaced. The checkpoint's `max_frames` never cuts `num_frames`.
            truncation, max_length: cut the text behind (or, by the tokenizer's `truncation_side`, before) `max_length`
                tokens; an error where that takes a token of a picture.
            add_special_tokens: begin each prompt with the start token, if it does not; the chat template has it.
            return_offsets_mapping: also `offset_mapping` (B, L, 2), positions in `text` as it was given.
            return_mm_token_type_ids: also `mm_token_type_ids` (B, L), 1 at tokens of pictures.
            return_metadata: also `video_metadata`, one dictionary per video (see `read_video`).

        Raises ValueError wherever counts do not agree or a picture would be lost.
        """
        if audio is not None:
            raise ValueError("LongLLaVA reads pictures and videos, no audio")
        if fps is not None and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} are two ways to choose frames; give one")
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        max_frames = max(self.max_frames, num_frames or 0) if max_frames is None else max_frames
        _positive(max_tiles=max_tiles, max_frames=max_frames, num_frames=num_frames, fps=fps)
        image_side = self._grid_side(self._image_tokens(tokens_per_image), "tokens_per_image")
        frame_side = self._grid_side(self._frame_tokens(tokens_per_image, tokens_per_frame), "tokens_per_frame")

        def choose(total: int, times: np.ndarray | None) -> np.ndarray:
            return frame_indices(total, times, num_frames, fps, max_frames)

        if text is None:
            if images is None or videos is not None:
                raise ValueError("give text, or pictures alone")
            images = _one_list(images)
            prompts = [self.image_token * len(images)]
        else:
            prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("0 prompts are given")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {number} is a {type(prompt).__name__}, not a string")
        tiled = [sub_images] * len(prompts) if isinstance(sub_images, bool) else list(sub_images)
        if len(tiled) != len(prompts):
            raise ValueError(f"{len(tiled)} choices of sub_images are given for {len(prompts)} prompts")

        pixels: list[np.ndarray] = []  # (S, S, 3) uint8 each, in the order of the placeholders
        sides: list[int] = []  # rows and columns of tokens of each
        metadata: list[dict[str, Any]] = []
        picture_tag = f"<img>{self.image_token}</img>"

        def expand_image(source: Any, with_tiles: bool) -> str:
            picture = read_picture(source, f"picture {len(pixels)}")
            tiles = cut_tiles(picture, self.image_size, max_tiles) if with_tiles else []
            pixels.extend(self._square(part) for part in [picture, *(tile for row in tiles for tile in row)])
            sides.extend([image_side] * (len(pixels) - len(sides)))
            return "\n".join([self.image_token, *(picture_tag * len(row) for row in tiles)])

        def expand_video(source: Any) -> str:
            frames, info = read_video(source, f"video {len(metadata)}", choose, self._square)
            pixels.extend(frames)
            sides.extend([frame_side] * len(frames))
            metadata.append(info)
            return f"<vid>{'<t>'.join([picture_tag] * len(frames))}</vid>"

        images_by_prompt = _by_prompt(images, [prompt.count(self.image_token) for prompt in prompts], "image")
        videos_by_prompt = _by_prompt(videos, [prompt.count(self.video_token) for prompt in prompts], "video")
        rows: list[tuple[np.ndarray, np.ndarray]] = []  # ids (L,) and positions (L, 2) of each prompt
        for number, prompt in enumerate(prompts):
            before = len(sides)
            expanded, new_bounds, old_bounds = _substitute(
                prompt,
                {
                    self.image_token: (expand_image(source, tiled[number]) for source in images_by_prompt[number]),
                    self.video_token: (expand_video(source) for source in videos_by_prompt[number]),
                },
            )
            if text is None:
                continue
            ids, offsets = self._tokenize(expanded, sides[before:])
            # Back to positions in the prompt as it was given.
            offsets = np.interp(offsets, new_bounds, old_bounds).astype(np.int64)
            if add_special_tokens and ids[:1].tolist() != [self.tokenizer.bos_token_id]:
                ids = np.concatenate([[self.tokenizer.bos_token_id], ids])
                offsets = np.concatenate([[[0, 0]], offsets])
            if truncation and max_length is not None:
                keep = self._truncate(ids, max_length, number)
                ids, offsets = ids[keep], offsets[keep]
            rows.append((ids, offsets))

        data: dict[str, Any] = {}
        if text is not None:
            data = self._pad(rows, padding, padding_side, pad_to_multiple_of, max_length, return_tensors)
            if not return_offsets_mapping:
                del data["offset_mapping"]
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = [(np.asarray(ids) == self.image_token_id) * 1 for ids in data["input_ids"]]
        if pixels:
            data["pixel_values"] = self._normalize(pixels)
            data["image_grid_hw"] = np.repeat(np.array(sides, dtype=np.int64)[:, None], 2, axis=1)
        if return_metadata:
            data["video_metadata"] = metadata
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])

    def _image_tokens(self, tokens_per_image: int | None) -> int:
        return self.tokens_per_image if tokens_per_image is None else tokens_per_image

    def _frame_tokens(self, tokens_per_image: int | None, tokens_per_frame: int | None) -> int:
        for tokens in (tokens_per_frame, self.tokens_per_frame):
            if tokens is not None:
                return tokens
        return self._image_tokens(tokens_per_image)

    def _grid_side(self, tokens: int, name: str) -> int:
        """Rows, which are also columns, of the `tokens` of a picture; ValueError where the tower cannot give them."""
        patches = self.image_size // self.patch_size
        sides = [side for side in range(1, patches + 1) if patches % side == 0]
        usable = [side * side for side in sides]
        if tokens not in usable:
            raise ValueError(
                f"{name}={tokens} is not the square of a divisor of the tower's {patches} x {patches} patches; "
                f"usable: {usable}"
            )
        return sides[usable.index(tokens)]

    def _square(self, picture: Image.Image) -> np.ndarray:
        """(S, S, 3) uint8: the picture in the middle of a square of the mean colour, resized to the tower's input."""
        side = max(picture.size)
        if picture.width != picture.height:
            # Truncated as in the original, which is where the last bit of the equality comes from.
            mean_color = tuple(int(channel * 255) for channel in self.image_processor.image_mean)
            canvas = Image.new("RGB", (side, side), mean_color)
            canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = canvas
        if side != self.image_size:
            picture = picture.resize((self.image_size, self.image_size), self.image_processor.resample)
        return np.asarray(picture)

    def _normalize(self, pixels: list[np.ndarray]) -> np.ndarray:
        """(N, 3, S, S) float32 of N pictures (S, S, 3) uint8: rescaled, and normalized with the tower's mean and std.

        Both steps see one value of one channel at a time, so they are done once for each of the 256 values.
        """
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))  # channels first, a picture of one row
        table = normalize(
            rescale(values, self.image_processor.rescale_factor),
            mean=self.image_processor.image_mean,
            std=self.image_processor.image_std,
            input_data_format="channels_first",
        )
        out = np.empty((len(pixels), 3, self.image_size, self.image_size), dtype=np.float32)
        for picture, slot in zip(pixels, out, strict=True):
            for channel in range(3):
                np.take(table[channel, 0], picture[..., channel], out=slot[channel], mode="clip")
        return out

    def _tokenize(self, prompt: str, sides: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (L,) and positions in the prompt (L, 2), each picture's placeholder repeated side * side times.

        Each stretch between two pictures is tokenized by itself, as in the original; and to repeat ids instead of text
        keeps the text of a thousand pictures short.
        """
        stretches = prompt.split(self.image_token)
        encoded = self.tokenizer(
            stretches, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        repeats: list[int] = []
        start = 0
        for number, stretch in enumerate(stretches):
            if number > 0:
                ids.append(self.image_token_id)
                offsets.append((start, start + len(self.image_token)))
                repeats.append(sides[number - 1] ** 2)
                start += len(self.image_token)
            ids += encoded["input_ids"][number]
            offsets += [(start + left, start + right) for left, right in encoded["offset_mapping"][number]]
            repeats += [1] * (len(ids) - len(repeats))
            start += len(stretch)
        return (
            np.repeat(np.array(ids, dtype=np.int64), repeats),
            np.repeat(np.array(offsets, dtype=np.int64).reshape(-1, 2), repeats, axis=0),
        )

    def _truncate(self, ids: np.ndarray, max_length: int, number: int) -> slice:
        """What to keep of prompt `number`; ValueError where a token of a picture would go."""
        keep = (
            slice(max_length)
            if self.tokenizer.truncation_side == "right"
            else slice(max(len(ids) - max_length, 0), None)
        )
        total, kept = (int((part == self.image_token_id).sum()) for part in (ids, ids[keep]))
        if kept < total:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, {total} of them of pictures; cut to max_length={max_length} "
                f"it would keep {kept} of these. Raise max_length, take fewer pictures or fewer tokens_per_image"
            )
        return keep

    def _pad(
        self,
        rows: list[tuple[np.ndarray, np.ndarray]],
        padding: bool | str,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
        max_length: int | None,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        """input_ids, attention_mask (B, L) and offset_mapping (B, L, 2); lists where rows stay of different length."""
        lengths = [len(ids) for ids, _ in rows]
        if padding in (False, "do_not_pad"):
            if return_tensors is not None and len(set(lengths)) > 1:
                raise ValueError(f"prompts of {lengths} tokens make no tensor without padding=True")
            widths = lengths
        elif padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        elif padding in (True, "longest", "max_length"):
            width = max(lengths + ([max_length or 0] if padding == "max_length" else []), default=0)
            multiple = pad_to_multiple_of or 1
            widths = [-(-width // multiple) * multiple] * len(rows)
        else:
            raise ValueError(f"padding is True, False, 'longest', 'max_length' or 'do_not_pad', not {padding!r}")
        if widths != lengths and self.tokenizer.pad_token_id is None:
            raise ValueError(f"prompts of {lengths} tokens have to be padded, and the tokenizer has no padding token")

        side = padding_side or self.tokenizer.padding_side
        data: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        for (ids, offsets), width in zip(rows, widths, strict=True):
            missing = width - len(ids)
            ends = (missing, 0) if side == "left" else (0, missing)
            data["input_ids"].append(np.pad(ids, ends, constant_values=self.tokenizer.pad_token_id or 0))
            data["attention_mask"].append(np.pad(np.ones_like(ids), ends))
            data["offset_mapping"].append(np.pad(offsets, (ends, (0, 0))))
        if return_tensors is None:
            return {name: [row.tolist() for row in values] for name, values in data.items()}
        return {name: np.stack(values) for name, values in data.items()}

    # ---- chat to text and tensors

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A conversation (a list of messages), or several, to the prompt; with `tokenize` and `return_dict`, tensors.

        The content of a message is a string, or a list of blocks: `{"type": "text", "text": ...}`, `{"type": "image",
        "image" | "url" | "path" | "base64": ...}` and `{"type": "video", "video" | "url" | "path": ...}`. Strings and
        text blocks may hold `<img><image></img>` and `<video>` themselves. Pictures and videos come in the blocks or,
        for blocks that hold none and for placeholders in text, through `images=` and `videos=`.

        Arguments of `__call__` can be given directly or in `processor_kwargs`; `tools`, `documents` and anything else
        go to the template, and are an error where it has no such variable (this package's own has none of them).
        With `return_assistant_tokens_mask` there is `assistant_masks` (B, L), 1 on answers and their ends; see
        `build_labels`. Written here and not inherited because transformers before 5.18 puts that mask at the wrong
        tokens behind a picture.
        """
        if load_audio_from_video or sanitize_control_tokens:
            raise ValueError("load_audio_from_video and sanitize_control_tokens are not available for LongLLaVA")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message goes with neither add_generation_prompt nor return_assistant_tokens_mask"
            )
        call_names = inspect.signature(self.__call__).parameters
        options = {name: kwargs.pop(name) for name in call_names if name in kwargs} | (processor_kwargs or {})
        return_tensors = options.pop("return_tensors", return_tensors)
        template: Any = chat_template or self.chat_template
        if isinstance(self.chat_template, dict):
            template = self.chat_template[chat_template or "default"]
        if template is None:
            raise ValueError("this processor has no chat template")
        extra = kwargs.keys() | {name for name, value in (("tools", tools), ("documents", documents)) if value}
        if extra and (unknown := sorted(extra - _variables(template))):
            raise TypeError(f"neither the processor nor its chat template takes {', '.join(map(repr, unknown))}")

        batched = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        conversations = [
            _clean(messages, f" of conversation {number}" if batched else "")
            for number, messages in enumerate(conversation if batched else [conversation])
        ]
        rendered: Any = render_jinja_template(
            conversations=conversations,
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        prompts, spans = rendered
        if not tokenize:
            return prompts if batched else prompts[0]

        for kind, keys in (("image", ("image", "url", "path", "base64")), ("video", ("video", "url", "path"))):
            found = [_payloads(messages, kind, keys) for messages in conversations]
            given = options.pop(f"{kind}s", None)
            if given is None:
                options[f"{kind}s"] = found if any(found) else None
            elif any(found):
                raise ValueError(
                    f"{sum(map(len, found))} {kind}s come in the messages and others through {kind}s=; use one way"
                )
            else:
                options[f"{kind}s"] = given
        out = self(prompts, return_tensors=return_tensors, return_offsets_mapping=True, **options)
        offsets = out.pop("offset_mapping")
        if return_assistant_tokens_mask:
            out["assistant_masks"] = [
                _mask(np.asarray(row).reshape(-1, 2), row_spans).tolist()
                for row, row_spans in zip(offsets, spans, strict=True)
            ]
            out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def build_labels(self, input_ids: torch.Tensor, assistant_masks: torch.Tensor) -> torch.Tensor:
        """Labels (B, L) for training on the answers, -100 elsewhere; of the two from `apply_chat_template`.

        The end of every answer teaches the end-of-text token: at the last answer the input holds it, at an answer
        inside the history the input holds a newline (the next turn's start token follows) and only the label changes.
        The tokenizer must keep that newline a token of its own. Pictures in an answer are read, not taught.
        """
        newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
        inside = assistant_masks.bool()
        following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        ends_turn = inside & (input_ids == newline) & (following == self.tokenizer.bos_token_id)
        labels = input_ids.masked_fill(~inside | (input_ids == self.image_token_id), IGNORE_INDEX)
        return labels.masked_fill(ends_turn, self.tokenizer.eos_token_id)

    # ---- for servers

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[Sequence[int]] | None = None,
        video_sizes: list[Sequence[int]] | None = None,
        tokens_per_image: int | None = None,
        tokens_per_frame: int | None = None,
        sub_images: bool = False,
        max_tiles: int | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """How many `<image>` tokens and how many pictures for the tower each input will become.

        `image_sizes` are (height, width), `video_sizes` (frames, height, width) after sampling. The text around tiles
        and frames is not counted. What `__call__` refuses is refused here too.
        """
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        _positive(max_tiles=max_tiles)
        image_side = self._grid_side(self._image_tokens(tokens_per_image), "tokens_per_image")
        frame_side = self._grid_side(self._frame_tokens(tokens_per_image, tokens_per_frame), "tokens_per_frame")
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            parts = [1] * len(image_sizes)
            if sub_images:
                grids = [best_grid(h, w, self.image_size, max_tiles) for h, w in image_sizes]
                parts = [1 + rows * cols * (rows * cols > 1) for rows, cols in grids]
            data |= {"num_image_tokens": [image_side**2 * count for count in parts], "num_image_patches": parts}
        if video_sizes is not None:
            data["num_video_tokens"] = [frame_side**2 * size[0] for size in video_sizes]
        return MultiModalData(**data)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_frame(value: Any) -> bool:
    """A picture for sure: what could also be the file of a video is not."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim < 4)


def _one_list(items: Any) -> list[Any]:
    """A picture, several, or several lists of them, as one list."""
    if isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 4:
        return list(items)
    if not _is_list(items):
        return [items]
    return [part for item in items for part in (item if _is_list(item) else [item])]


def _lists_of_videos(items: list[list[Any]], counts: list[int]) -> bool:
    """Whether a list of lists holds the videos of each prompt, and not videos that are lists of frames."""
    parts = [part for item in items for part in item]
    if any(_is_frame(part) for part in parts):
        return False
    if any(not isinstance(part, str | Path) for part in parts):
        return True
    # A path alone could be that of a video or of a frame: what fits the placeholders is meant.
    return [len(item) for item in items] == counts


def _by_prompt(items: Any, counts: list[int], kind: str) -> list[list[Any]]:
    """One list of pictures (`kind` image) or videos per prompt, as many as it has placeholders (`counts`)."""
    if items is None:
        items = []
    if kind == "video" and isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 5:
        items = list(items)  # a batch of videos
    if kind == "video" and (not _is_list(items) or (len(items) > 0 and all(_is_frame(item) for item in items))):
        items = [items]
    nested = _is_list(items) and len(items) > 0 and all(_is_list(item) for item in items)
    if kind == "video":
        nested = nested and _lists_of_videos(items, counts)
    elif not nested:
        items = _one_list(items)

    if not nested:
        if len(items) != sum(counts):
            where = "the prompt has" if len(counts) == 1 else f"{len(counts)} prompts have"
            raise ValueError(f"{where} {sum(counts)} <{kind}> placeholders, but {len(items)} {kind}s are given")
        stream = iter(items)
        return [[next(stream) for _ in range(count)] for count in counts]
    if len(items) != len(counts):
        raise ValueError(f"{len(items)} lists of {kind}s are given for {len(counts)} prompts")
    for number, (own, count) in enumerate(zip(items, counts, strict=True)):
        if len(own) != count:
            raise ValueError(f"prompt {number} has {count} <{kind}> placeholders, but {len(own)} {kind}s are given")
    return [list(own) for own in items]


def _substitute(prompt: str, replacements: dict[str, Iterator[str]]) -> tuple[str, list[int], list[int]]:
    """The prompt with the next replacement for each placeholder as it comes, and positions in the new and the old text
    that correspond.

    Between two such positions both texts are the same, or one is a placeholder and the other what replaced it.
    """
    pieces: list[str] = []
    new_bounds, old_bounds = [0], [0]
    for piece in re.split(f"({'|'.join(map(re.escape, replacements))})", prompt):
        pieces.append(next(replacements[piece]) if piece in replacements else piece)
        new_bounds.append(new_bounds[-1] + len(pieces[-1]))
        old_bounds.append(old_bounds[-1] + len(piece))
    return "".join(pieces), new_bounds, old_bounds


def _variables(template: str) -> set[str]:
    """The names that a chat template takes from its caller."""
    # transformers' own tag, which jinja does not know; it changes no variable.
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))


def _clean(messages: Sequence[dict[str, Any]], whose: str) -> list[dict[str, Any]]:
    """A copy of a conversation without keys that hold None (tables fill them in) and with OpenAI's picture blocks.

    Raises ValueError for what would become an empty turn: no messages, no content, a text block without text. `whose`
    is the end of the name of a message in errors.
    """
    if len(messages) == 0:
        raise ValueError(f"there are 0 messages{whose}")
    copies = []
    for number, message in enumerate(messages):
        name = f"message {number}{whose}"
        if not isinstance(message, dict):
            raise TypeError(f"{name} is a {type(message).__name__}, not a dictionary with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if not isinstance(content, str | list | tuple):
            raise ValueError(f"{name} has content {content!r}; content is a string or a list of blocks")
        if _is_list(content):
            blocks = []
            for place, block in enumerate(content):
                if not isinstance(block, dict):
                    raise TypeError(f"block {place} of {name} is a {type(block).__name__}, not a dictionary")
                block = {key: value for key, value in block.items() if value is not None}
                if block.get("type") == "image_url":
                    url = block["image_url"]
                    block = {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
                if block.get("type") == "text" and not isinstance(block.get("text"), str):
                    raise ValueError(f"block {place} of {name} is of type text and has text {block.get('text')!r}")
                blocks.append(block)
            message["content"] = blocks
        copies.append(message)
    return copies


def _payloads(messages: list[dict[str, Any]], kind: str, keys: tuple[str, ...]) -> list[Any]:
    """The pictures or videos in the blocks of a conversation, in their order."""
    blocks = [block for message in messages if _is_list(message.get("content")) for block in message["content"]]
    return [
        next(block[key] for key in keys if key in block)
        for block in blocks
        if block.get("type") == kind and any(key in block for key in keys)
    ]


def _mask(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """(L,) 1 at tokens whose positions (L, 2) overlap a span; padding has none."""
    mask = np.zeros(len(offsets), dtype=np.int64)
    for start, end in spans:
        mask[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = 1
    return mask


# Saving writes this file and its name in the configuration, so that AutoProcessor finds the class on the Hub.
LongLlavaProcessor.register_for_auto_class("AutoProcessor")
