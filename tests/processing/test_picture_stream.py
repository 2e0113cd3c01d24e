"""Pictures as a stream: equal to all at once, decoded when needed and a little ahead, stopped early, errors in place.

And what goes with it: the processor's two halves, the progress bar, JPEGs decoded at a part of their size.
"""

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil
from transformers.utils import logging

from longllava.processing import PictureStream, picture_reading_longllava, picture_stream_longllava
from longllava.processing.picture_reading_longllava import TowerInput, picture_size, read_picture
from longllava.processing.video_reading_longllava import VideoFile

RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    """Neither black nor white, no hard edge: what may be drafted."""
    small = RNG.integers(40, 216, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **{"quality": 90, "subsampling": 0, **options})
    return buffer.getvalue()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures read so far."""
    names: list[str] = []

    def count(source: Any, name: str, **options: Any) -> Image.Image:
        names.append(name)
        return read_picture(source, name, **options)

    monkeypatch.setattr(picture_stream_longllava, "read_picture", count)
    return names


@pytest.fixture
def everything(picture_files: list[Path], video_file: Path) -> dict[str, Any]:
    """Two prompts: files, a picture with tiles, a video of a file, one of arrays; mixed."""
    frames = [np.asarray(noise(30, 40)) for _ in range(3)]
    return {
        "text": ["<image>a<video><image>", "<video>b<image><image>"],
        "images": [[picture_files[0], noise(120, 100)], [picture_files[2], jpeg(noise(60, 113))]],
        "videos": [[video_file], [frames]],
        "sub_images": [True, False],
        "num_frames": 5,
    }


def settled(value: Callable[[], Any]) -> Any:
    """A value that has stayed the same for a while."""
    last = value()
    for _ in range(100):
        time.sleep(0.05)
        if (now := value()) == last:
            return now
        last = now
    raise AssertionError("it never stays the same")


# ---- the same pictures


@pytest.mark.parametrize("threads", [1, 3])
def test_stream_equals_all_at_once(threads: int, everything: dict[str, Any], tiny_processor: Callable) -> None:
    """To the bit: in order, by slice, by list with repeats and backwards, twice, and whatever else the batch holds."""
    processor = tiny_processor()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = processor(**everything)
        inputs = processor(**everything, stream_pictures=True)
        stream = inputs["pixel_values"]
        assert isinstance(stream, PictureStream)
        assert len(stream) == len(inputs["image_grid_hw"]) == (1 + 4) + 5 + (1 + 6) + 3 + 2
        for _ in range(2):
            assert torch.stack(list(stream)).equal(whole["pixel_values"])
        assert stream.tensor().equal(whole["pixel_values"])
        for chosen in (slice(3, 11), slice(None, None, -1), [6, 6, 1, 9, 4, 4, 12, 5, 0], [], slice(5, 5)):
            part = stream[chosen]
            assert isinstance(part, PictureStream)
            numbers = list(range(len(stream)))[chosen] if isinstance(chosen, slice) else chosen
            assert part.tensor().equal(whole["pixel_values"][numbers])
            assert part[::2].tensor().equal(whole["pixel_values"][numbers[::2]])
    finally:
        torch.set_num_threads(before)
    for name in set(whole) - {"pixel_values"}:
        assert inputs[name].equal(whole[name])


def test_stream_goes_through_batch_and_chat(everything: dict[str, Any], tiny_processor: Callable) -> None:
    processor = tiny_processor()
    content = [{"type": "image", "image": noise(40, 30)}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    whole = processor.apply_chat_template(messages, **options)
    inputs = processor.apply_chat_template(messages, **options, stream_pictures=True)
    stream = inputs["pixel_values"]
    assert inputs.to("cpu")["pixel_values"] is stream
    assert inputs.to("cpu", dtype=torch.bfloat16)["pixel_values"] is stream
    assert stream.tensor().equal(whole["pixel_values"])
    assert inputs["assistant_masks"].equal(whole["assistant_masks"])
    assert "pixel_values" not in processor(text="none", stream_pictures=True)


def test_expand_and_tokenize_are_the_call(everything: dict[str, Any], tiny_processor: Callable) -> None:
    """The two halves give what the whole gives; so do the two parts of a text that is cut behind its last picture."""
    processor = tiny_processor()
    whole = processor(**everything, tokens_per_frame=1, padding=False, return_tensors=None)
    expanded = processor.expand(**everything, tokens_per_frame=1)
    for number, (text, sides) in enumerate(zip(expanded.texts, expanded.sides, strict=True)):
        assert text.count("<image>") == len(sides)
        ids, offsets = processor.tokenize(text, sides)
        assert ids.tolist() == whole["input_ids"][number]
        assert offsets.shape == (len(ids), 2)
        cut = text.rindex("<image>") + len("<image>")
        parts = [processor.tokenize(text[:cut], sides)[0], processor.tokenize(text[cut:], [])[0]]
        assert np.concatenate(parts).tolist() == whole["input_ids"][number]
    assert [[side, side] for sides in expanded.sides for side in sides] == np.asarray(whole["image_grid_hw"]).tolist()
    assert expanded.pictures.tensor().numpy().tolist() == np.asarray(whole["pixel_values"]).tolist()
    assert [info["total_num_frames"] for info in expanded.video_metadata] == [12, 3]
    with pytest.raises(ValueError, match="the text has 2 <image>, but 1 sides are given"):
        processor.tokenize("<image><image>", [2])


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_narrow_padding_equals_the_library(resample: int) -> None:
    """A wide picture is resized before it is padded: every filter, sizes around the tower's, against the library."""
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "resample": resample}
    library = LlavaImageProcessorPil(do_pad=True, **settings)
    tower = TowerInput(library)
    for width, height in ((200, 113), (113, 200), (57, 3), (56, 9), (9, 56), (55, 54), (300, 1), (120, 120)):
        picture = noise(height, width)
        assert tower(picture).equal(library(picture, return_tensors="pt")["pixel_values"][0]), (width, height)


# ---- when they are read


def test_nothing_is_read_before_its_turn(
    picture_files: list[Path], opened: list[str], tiny_processor: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file at first; then those asked for and at most READ_AHEAD more; each once."""
    monkeypatch.setattr(picture_stream_longllava, "READ_AHEAD", 5)
    stream = tiny_processor()(text="<image>" * 40, images=picture_files * 10, stream_pictures=True)["pixel_values"]
    assert opened == []
    pictures = iter(stream)
    assert opened == []
    for taken in (1, 2, 3):
        next(pictures)
        assert settled(lambda: len(opened)) == taken + 4
    list(pictures)
    assert len(opened) == 40
    list(stream[7:9])
    assert len(opened) == 42


def test_tiles_share_one_reading(opened: list[str], tiny_processor: Callable) -> None:
    big = jpeg(noise(200, 170))
    inputs = tiny_processor()(text="<image>" * 2, images=[big, big], sub_images=True, stream_pictures=True)
    assert len(list(inputs["pixel_values"])) == 2 * (1 + 4 * 4)
    assert opened == ["picture 0", "picture 17"]


def test_size_of_a_jpeg_is_read_from_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eight orientations, also of formats that may be turned in decoding, agree with the picture itself."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("JPEG", "PNG", "TIFF", "WEBP"):
            buffer = io.BytesIO()
            noise(20, 30).save(buffer, format, exif=exif)
            assert picture_size(buffer.getvalue(), "it") == read_picture(buffer.getvalue(), "it").size
    content = jpeg(noise(20, 30))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    assert picture_size(content, "it") == (30, 20)


def test_early_stop_ends_the_threads(picture_files: list[Path], video_file: Path, tiny_processor: Callable) -> None:
    processor = tiny_processor()
    before = threading.active_count()
    for options in (
        {"images": picture_files * 50, "text": "<image>" * 200},
        {"videos": video_file, "text": "<video>"},
    ):
        pictures = iter(processor(**options, stream_pictures=True)["pixel_values"])
        next(pictures)
        assert threading.active_count() > before
        del pictures
        assert settled(threading.active_count) == before


def test_video_is_read_once_and_frame_by_frame(
    video_file: Path, picture_files: list[Path], tiny_processor: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opening for all packets and one for all frames, although a picture stands between two videos."""
    monkeypatch.setattr(picture_stream_longllava, "READ_AHEAD", 2)
    openings: list[Any] = []
    decoded: list[int] = []
    av_open, decode = av.open, VideoFile._decode

    def count(self: VideoFile, container: Any, wanted: list[int]) -> Iterator[Image.Image]:
        for frame in decode(self, container, wanted):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(av, "open", lambda file: openings.append(file) or av_open(file))
    monkeypatch.setattr(VideoFile, "_decode", count)
    prompt = {"text": "<video><image>", "videos": video_file, "images": picture_files[:1]}
    stream = tiny_processor()(**prompt, stream_pictures=True)["pixel_values"]
    assert len(openings) == 1 and decoded == []
    order = [0, 12, 1, 2, 3, 12, 4, 5, 6, 7, 8, 9, 10, 11]
    pictures = iter(stream[order])
    next(pictures)
    assert settled(lambda: len(decoded)) <= 2
    list(pictures)
    assert len(openings) == 2 and len(decoded) == 12


def test_one_picture_given_many_times(tmp_path: Path, tiny_processor: Callable) -> None:
    """Pillow's own lazy loading of one file from several threads, turned by its orientation, never mixes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(300, 400).save(tmp_path / "turned.png", exif=exif)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = tiny_processor()(images=tmp_path / "turned.png")["pixel_values"][0]
        for _ in range(5):
            lazy = Image.open(tmp_path / "turned.png")
            found = tiny_processor()(images=[lazy, noise(5, 5)] * 8)["pixel_values"]
            assert all(picture.equal(expected) for picture in found[::2])
    finally:
        torch.set_num_threads(before)


# ---- errors


def test_unreadable_picture_in_the_middle(picture_files: list[Path], tmp_path: Path, tiny_processor: Callable) -> None:
    """The pictures before it come, then the error with its name; the stream ends there and a part without it works."""
    broken = tmp_path / "half.png"
    broken.write_bytes(picture_files[1].read_bytes()[:100])
    files = [*picture_files[:2], broken, *picture_files[2:]]
    stream = tiny_processor()(text="<image>" * 5, images=files, stream_pictures=True)["pixel_values"]
    pictures = iter(stream)
    good = [next(pictures), next(pictures)]
    with pytest.raises(ValueError, match=r"half\.png' cannot be read as a picture"):
        next(pictures)
    assert list(pictures) == []
    assert torch.stack(good).equal(stream[:2].tensor())
    assert len(list(stream[[0, 3, 4]])) == 3
    with pytest.raises(ValueError, match="picture 1 cannot be read as a picture"):
        list(tiny_processor().expand("<image><image>", [picture_files[0], b"nothing"]).pictures)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "<image>", "images": "no/such.png"}, FileNotFoundError, r"no/such\.png"),
        ({"text": "<image>", "images": [5]}, TypeError, "picture 0 is a int"),
        ({"text": "<video>", "videos": "no/such.mp4"}, FileNotFoundError, r"no/such\.mp4"),
        ({"text": "<video>", "videos": b"nothing"}, ValueError, "video 0 cannot be read as a video"),
        ({"text": "<video>", "videos": [["no/such.png"]]}, FileNotFoundError, r"no/such\.png"),
    ],
)
def test_what_can_be_known_early(
    options: dict[str, Any], error: type[Exception], message: str, tiny_processor: Callable
) -> None:
    with pytest.raises(error, match=message):
        tiny_processor().expand(**options)


def test_cut_video_ends_with_its_name(tmp_path: Path, tiny_processor: Callable) -> None:
    """The frames before the damage come first."""
    path = tmp_path / "cut.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(noise(48, 64)), format="rgb24")))
        container.mux(stream.encode())
    video = tiny_processor().expand("<video>", videos=path).pictures
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = iter(video)
    assert len(list(itertools.islice(frames, 4))) == 4
    with pytest.raises(ValueError, match=r"cut\.ts' cannot be read as a video: 12 frames were chosen, only \d can be"):
        list(frames)


# ---- progress


@pytest.mark.parametrize(("count", "terminal", "shown"), [(65, True, True), (64, True, False), (65, False, False)])
def test_progress_bar(
    count: int, terminal: bool, shown: bool, tiny_processor: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, above 64 pictures, unless transformers' bars are switched off."""
    written = io.StringIO()
    written.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", written)
    pictures = [noise(5, 5)] * count
    tiny_processor()(images=pictures)
    assert (f"{count}/{count}" in written.getvalue()) == shown
    if shown:
        written.truncate(0)
        logging.disable_progress_bar()
        try:
            tiny_processor()(images=pictures)
        finally:
            logging.enable_progress_bar()
        assert written.getvalue().strip("\0") == ""


# ---- JPEGs far larger than the tower needs


def drafted(content: bytes, side: int = 28) -> tuple[float, float, bool]:
    """Largest and mean difference of the tower's input to that of a full decode, of 255, and whether they differ."""
    crop = {"height": side, "width": side}
    tower = TowerInput(LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size=crop))
    full, found = (tower.square(read_picture(content, "it", side=part)) for part in (None, side))
    difference = np.abs(np.asarray(full, dtype=int) - np.asarray(found))
    size = read_picture(content, "it", side=side).size
    return difference.max(), difference.mean(), size != read_picture(content, "it").size


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("make", "size"), [(smooth, (504, 672)), (noise, (672, 672)), (smooth, (1344, 1008))])
@pytest.mark.parametrize("quality", [75, 95])
def test_draft_stays_close(mode: str, make: Callable, size: tuple[int, int], quality: int) -> None:
    largest, mean, is_draft = drafted(jpeg(make(*size).convert(mode), quality=quality))
    assert is_draft
    assert largest <= 2 and mean < 0.3


@pytest.mark.parametrize(
    "content",
    [
        lambda: jpeg(smooth(504, 668)),  # too small
        lambda: jpeg(smooth(502, 672)),  # no even half
        lambda: jpeg(smooth(504, 672), subsampling=2),
        lambda: jpeg(smooth(504, 672).convert("CMYK")),
        lambda: jpeg(smooth(504, 672).point(lambda value: 255 * (value > 128))),
    ],
    ids=["small", "odd", "4:2:0", "CMYK", "black and white"],
)
def test_no_draft(content: Callable) -> None:
    assert drafted(content()) == (0, 0, False)


def test_draft_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(smooth(504, 672), exif=exif)
    assert read_picture(content, "it", side=28).size == (252, 336)
    assert drafted(content)[0] <= 2


def test_tiles_are_never_drafted(tiny_processor: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and their whole picture come from the full decode; without tiles the same file is drafted."""
    content = jpeg(smooth(1008, 1344))
    drafts: list[int] = []
    original = picture_reading_longllava._draft_part
    monkeypatch.setattr(picture_reading_longllava, "_draft_part", lambda *args: drafts.append(1) or original(*args))
    full = Image.open(io.BytesIO(content))
    tiled = tiny_processor()(text="<image>", images=content, sub_images=True)["pixel_values"]
    assert tiled.equal(tiny_processor()(text="<image>", images=full, sub_images=True)["pixel_values"])
    assert drafts == []
    whole = tiny_processor()(text="<image>", images=content)["pixel_values"]
    assert drafts == [1] and not whole[0].equal(tiled[0])
