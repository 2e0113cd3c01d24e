"""Pictures and videos: equality with the original, all that can be given as one and what cannot, tiles, frames."""

import base64
import io
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import LlavaImageProcessorPil

from longllava.processing.picture_reading_longllava import best_grid, cut_tiles, read_picture, to_rgb
from longllava.processing.video_reading_longllava import find_video, frame_indices

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def colors() -> np.ndarray:
    """(4, 6, 3) uint8: no two pixels alike, not square, so that a swap of axes or channels shows."""
    return np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


# ---- the tower's input


def test_pixel_values_of_the_reference(reference: Path, tiny_tokenizer: Any) -> None:
    from longllava.processing import LongLlavaProcessor

    folder = reference / "moe"
    image_processor = LlavaImageProcessorPil.from_pretrained(folder / "clip", do_pad=True)
    processor = LongLlavaProcessor(image_processor, tiny_tokenizer)
    pixels = processor(images=[folder / f"img{index}.png" for index in range(3)])["pixel_values"]
    expected = load_file(folder / "expected.safetensors")["pixel_values_every_12th"]
    assert pixels[:, :, ::12, ::12].equal(expected)


@pytest.mark.parametrize("size", [(56, 56), (64, 64), (90, 40), (37, 81), (5, 9), (1, 300), (57, 56)])
def test_pixel_values_equal_the_library_to_the_bit(size: tuple[int, int], tiny_processor: Callable) -> None:
    processor = tiny_processor()
    settings = {"do_pad": True, "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    picture = Image.fromarray(noise(size[1], size[0]))
    expected = LlavaImageProcessorPil(**settings)(picture, return_tensors="pt")["pixel_values"]
    assert processor(images=picture)["pixel_values"].equal(expected)


def test_thousand_small_pictures_are_fast(tiny_processor: Callable) -> None:
    """Measured 0.04 to 0.06 s on one core."""
    processor = tiny_processor()
    pictures = [Image.fromarray(noise(56, 56)) for _ in range(1000)]
    start = time.perf_counter()
    processor(text="<img><image></img>" * 1000, images=pictures)
    assert time.perf_counter() - start < 2


# ---- what a picture can be


def test_sources_of_one_picture(colors: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(colors)
    path = saved(picture, tmp_path / "colors.png")
    content = path.read_bytes()
    encoded = base64.b64encode(content).decode()
    sources = {
        "path": path,
        "string": str(path),
        "bytes": content,
        "base64": encoded,
        "data URL": f"data:image/png;base64,{encoded}",
        "column with bytes": {"bytes": content, "path": None},
        "column with path": {"bytes": None, "path": str(path)},
        "PIL": picture,
        "last": colors,
        "first": colors.transpose(2, 0, 1),
        "floats": colors / np.float32(255),
        "16 bits": colors.astype(np.uint16) * 257,
        "int64": colors.astype(np.int64),
        "tensor": torch.from_numpy(colors).permute(2, 0, 1),
        "half tensor": torch.from_numpy(colors).half() / 255,
    }
    for name, source in sources.items():
        found = read_picture(source, name)
        assert found.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(found), colors, err_msg=name)


def test_url(colors: np.ndarray, tmp_path: Path, video_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    saved(Image.fromarray(colors), tmp_path / "colors.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(read_picture(f"{address}/colors.png", "it")), colors)
        frames, _ = read_video(f"{address}/video.mp4")
        assert len(frames) == 12
        with pytest.raises(ValueError, match=r"missing\.png' cannot be read as a picture: .*404"):
            read_picture(f"{address}/missing.png", "it")
        server.shutdown()


def test_modes_come_out_as_seen(tmp_path: Path) -> None:
    """Grey, palette, transparency on white, 16 bits, CMYK, floats: one pixel of each and what a person sees."""
    red = Image.new("P", (2, 2), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    clear = red.copy()
    clear.info["transparency"] = 1
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 51)])
    pictures = {
        "L": (Image.new("L", (2, 2), 99), (99, 99, 99)),
        "1": (Image.new("1", (2, 2), 1), (255, 255, 255)),
        "P": (red, (255, 0, 0)),
        "P with a transparent colour": (clear, (255, 255, 255)),
        "RGBA": (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        "RGBA, half": (Image.new("RGBA", (2, 2), (0, 0, 255, 51)), (204, 204, 255)),
        "LA": (grey_alpha, (204, 204, 204)),
        "I;16": (Image.fromarray(np.full((2, 2), 0x8080, dtype=np.uint16)), (128, 128, 128)),
        "I": (Image.fromarray(np.full((2, 2), 65535, dtype=np.int32)), (255, 255, 255)),
        "F": (Image.fromarray(np.full((2, 2), 0.2, dtype=np.float32)), (51, 51, 51)),
        "CMYK": (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
    }
    for name, (picture, expected) in pictures.items():
        assert to_rgb(picture).mode == "RGB", name
        assert to_rgb(picture).getpixel((0, 0)) == expected, name

    files = {
        "16.png": (pictures["I;16"][0], (128, 128, 128)),
        "palette.png": (clear, (255, 255, 255)),
        "palette.gif": (red, (255, 0, 0)),
        "cmyk.tif": (pictures["CMYK"][0], (255, 0, 0)),
    }
    for name, (picture, expected) in files.items():
        assert read_picture(saved(picture, tmp_path / name), name).getpixel((0, 0)) == expected, name
    jpeg = read_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "cmyk.jpg"), "cmyk.jpg")
    assert np.abs(np.array(jpeg.getpixel((4, 4))) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int, colors: np.ndarray, tmp_path: Path) -> None:
    """All eight orientations of the standard, against Pillow, from a file and from a picture in memory."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(colors), tmp_path / "turned.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert expected.shape == ((4, 6, 3) if orientation < 5 else (6, 4, 3))
    for source in (path, Image.open(path)):
        assert np.array_equal(np.asarray(read_picture(source, "it")), expected)


def test_callers_picture_stays_as_it_is(tiny_processor: Callable) -> None:
    picture = Image.fromarray(noise(56, 56))
    before = np.array(picture)
    tiny_processor()(images=picture)["pixel_values"].zero_()
    assert np.array_equal(np.asarray(picture), before)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such.png", FileNotFoundError, "there is no file 'no/such.png'"),
        (Path("no/such.png"), FileNotFoundError, "there is no file 'no/such.png'"),
        (b"not a picture", ValueError, "number 3 cannot be read as a picture"),
        (b"", ValueError, "number 3 cannot be read as a picture"),
        (np.zeros((5, 7, 5)), ValueError, r"number 3 .*shape \(5, 7, 5\)"),
        (np.zeros((0, 4, 3)), ValueError, r"number 3 .*shape \(0, 4, 3\)"),
        (np.full((4, 4, 3), 255.0), ValueError, r"number 3 .*lie in 0..1, these in 255.0..255.0"),
        (np.full((4, 4), np.nan), ValueError, "number 3 .*nan"),
        (np.full((4, 4), 300), ValueError, r"number 3 .*0..255, these in 300..300"),
        (None, TypeError, "number 3 is a NoneType"),
    ],
)
def test_unreadable_pictures_are_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_picture(source, "number 3")


def test_truncated_file_is_named(tmp_path: Path, tiny_processor: Callable) -> None:
    path = saved(Image.fromarray(noise(64, 64)), tmp_path / "half.png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png' cannot be read as a picture: .*truncated"):
        tiny_processor()(text="<image>", images=[path])
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="picture 0 cannot be read as a picture"):
        tiny_processor()(text="<image>", images=[buffer.getvalue()[:500]])


def test_more_pixels_than_pillow_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, its 200 pixels and the limit, twice Pillow's setting, are named; a higher setting reads it."""
    path = saved(Image.new("RGB", (20, 10)), tmp_path / "poster.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    for source, name in ((path, r"poster\.png'"), (path.read_bytes(), "number 3")):
        with pytest.raises(ValueError, match=rf"{name} is too large: .*\(200 pixels\).* 198 pixels.*MAX_IMAGE_PIXELS"):
            read_picture(source, "number 3")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert read_picture(path, "it").size == (20, 10)


# ---- tiles


@pytest.mark.parametrize(
    ("height", "width", "max_tiles", "expected"),
    [
        (336, 336, 30, (1, 1)),
        (100, 50, 30, (1, 1)),
        (672, 1008, 30, (2, 3)),
        (673, 1008, 30, (3, 3)),  # one pixel row more needs a row of tiles, as in the released code
        (2000, 1000, 30, (6, 3)),
        (1000, 2000, 6, (2, 3)),
        (4000, 4000, 4, (2, 2)),
        (4000, 4000, 5, (2, 2)),
        (100, 10000, 4, (1, 4)),
        (5000, 5000, 1, (1, 1)),
    ],
)
def test_best_grid(height: int, width: int, max_tiles: int, expected: tuple[int, int]) -> None:
    assert best_grid(height, width, 336, max_tiles) == expected


def test_tiles_put_together_are_the_picture() -> None:
    picture = Image.fromarray(noise(100, 150))
    tiles = cut_tiles(picture, 56, 30)
    assert [len(row) for row in tiles] == [3, 3]
    whole = np.concatenate([np.concatenate([np.asarray(tile) for tile in row], axis=1) for row in tiles])
    top, left = (112 - 100) // 2, (168 - 150) // 2
    assert np.array_equal(whole[top : top + 100, left : left + 150], np.asarray(picture))
    whole[top : top + 100, left : left + 150] = 255
    assert (whole == 255).all()


def test_too_big_a_picture_is_made_smaller() -> None:
    tiles = cut_tiles(Image.new("RGB", (1000, 500), "red"), 56, 8)
    assert [len(row) for row in tiles] == [4, 4]
    assert all(tile.size == (56, 56) for row in tiles for tile in row)
    assert {tile.getpixel((28, 28)) for row in tiles for tile in row} == {(255, 0, 0)}


def test_picture_of_one_tile_gets_none(tiny_processor: Callable) -> None:
    assert cut_tiles(Image.new("RGB", (56, 40)), 56, 30) == []
    assert len(tiny_processor()(images=Image.new("RGB", (56, 40)), sub_images=True)["pixel_values"]) == 1


def test_tiles_follow_their_picture(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    big, small = Image.fromarray(noise(56, 112)), Image.fromarray(noise(30, 20))
    left, right = big.crop((0, 0, 56, 56)), big.crop((56, 0, 112, 56))
    inputs = processor(text="<image> <image>", images=[big, small], sub_images=True)
    assert inputs["pixel_values"].equal(processor(images=[big, left, right, small])["pixel_values"])
    assert inputs["image_grid_hw"].tolist() == [[2, 2]] * 4


# ---- video


def read_video(path: Any, **options: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """All chosen frames as arrays, and where they came from; all frames without options."""
    choose = partial(frame_indices, **{"num_frames": None, "fps": None, "max_frames": 1000, **options})
    video, info = find_video(path, "it", choose)
    return [np.asarray(frame) for frame in video.frames(range(len(video.stamps)))], info


def levels(frames: list[np.ndarray]) -> list[int]:
    """Number of each frame of `video_file`, whose grey rises by 20 a frame."""
    return [round(float(frame.mean()) / 20) for frame in frames]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(12))),
        ({"num_frames": 4}, [0, 4, 7, 11]),
        ({"num_frames": 1}, [0]),
        ({"num_frames": 100}, list(range(12))),
        ({"max_frames": 3}, [0, 6, 11]),
        ({"num_frames": 4, "max_frames": 2}, [0, 11]),
        ({"fps": 2.0}, [0, 3, 6, 9]),
        ({"fps": 1}, [0, 6]),
        ({"fps": 0.1}, [0]),
        ({"fps": 60.0}, list(range(12))),
        ({"fps": 6.0, "max_frames": 3}, [0, 6, 11]),
    ],
)
def test_frames_of_a_file(options: dict[str, Any], expected: list[int], video_file: Path) -> None:
    frames, info = read_video(video_file, **options)
    assert levels(frames) == expected == info["frames_indices"]
    assert info["timestamps"] == pytest.approx([index / 6 for index in expected], abs=1e-3)
    assert (info["total_num_frames"], info["fps"]) == (12, 6.0)
    assert info["duration"] == pytest.approx(2.0, abs=1e-3)
    assert frames[0].shape == (48, 64, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif", ".m4v"])
def test_jumping_equals_reading_all(suffix: str, tmp_path: Path) -> None:
    """Sparse frames of a long video, with and without key frames, times and a known length, against a full decode."""
    path = tmp_path / f"long{suffix}"
    codecs = {".gif": ("gif", "rgb8"), ".webm": ("libvpx", "yuv420p"), ".mov": ("libx264", "yuv420p")}
    codec = codecs.get(suffix, ("mpeg4", "yuv420p"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec[0], rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, codec[1]
        stream.gop_size = 10
        for index in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 4 * index, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=codec[1])))
        container.mux(stream.encode())
    everything, info = read_video(path)
    assert len(everything) == info["total_num_frames"] >= 60
    sparse, info = read_video(path, num_frames=5)
    assert len(sparse) == 5
    for frame, index in zip(sparse, info["frames_indices"], strict=True):
        assert np.array_equal(frame, everything[index])


def test_sequences_of_frames(video_file: Path, tmp_path: Path, tiny_processor: Callable) -> None:
    """Lists of pictures, paths and arrays, arrays and tensors with four axes in both layouts: one video each."""
    processor = tiny_processor()
    array = noise(5 * 20, 30).reshape(5, 20, 30, 3)
    pictures = [Image.fromarray(frame) for frame in array]
    paths = [saved(picture, tmp_path / f"{index}.png") for index, picture in enumerate(pictures)]
    expected = processor(images=pictures)["pixel_values"]
    for videos in (
        pictures,
        [pictures],
        [[pictures]],
        [paths],
        [list(map(str, paths))],
        [[paths]],
        array,
        [array],
        [[array]],
        list(array),
        array.transpose(0, 3, 1, 2),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255,
    ):
        inputs = processor(text="<video>", videos=videos, return_metadata=True)
        assert inputs["pixel_values"].equal(expected)
        assert inputs["video_metadata"][0]["total_num_frames"] == 5
        assert inputs["video_metadata"][0]["timestamps"] is None
    two = processor(text=["<video>", "<video>"], videos=[paths, str(video_file)], num_frames=2, return_metadata=True)
    assert [info["frames_indices"] for info in two["video_metadata"]] == [[0, 4], [0, 11]]
    nested = processor(text=["<video><video>"], videos=[[video_file, str(video_file)]], num_frames=2)
    assert len(nested["pixel_values"]) == 4

    batch = np.stack([array, array[::-1]])
    expected = processor(images=[*pictures, *pictures[::-1]])["pixel_values"]
    for videos in (batch, torch.from_numpy(batch), list(batch)):
        assert processor(text=["<video>", "<video>"], videos=videos)["pixel_values"].equal(expected)
        assert processor(text="<video><video>", videos=videos)["pixel_values"].equal(expected)
    with pytest.raises(ValueError, match="the prompt has 1 <video> placeholders, but 2 videos are given"):
        processor(text="<video>", videos=batch)


def test_limits_of_the_checkpoint_and_of_the_call(video_file: Path, tiny_processor: Callable) -> None:
    processor = tiny_processor(max_frames=3)
    for options, count in (
        ({}, 3),
        ({"num_frames": 5}, 5),
        ({"max_frames": 7}, 7),
        ({"num_frames": 5, "max_frames": 4}, 4),
        ({"fps": 6}, 3),
    ):
        assert len(processor(text="<video>", videos=video_file, **options)["pixel_values"]) == count


def test_video_in_messages(video_file: Path, tiny_processor: Callable) -> None:
    content = [{"type": "video", "path": str(video_file)}, {"type": "text", "text": "What?"}]
    inputs = tiny_processor().apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        fps=1,
        return_metadata=True,
    )
    assert inputs["pixel_values"].shape == (2, 3, 56, 56)
    assert inputs["video_metadata"][0]["timestamps"] == [0.0, 1.0]


def test_turned_video(tmp_path: Path, video_file: Path) -> None:
    """A phone writes its position into the file: the frame comes out as it was seen."""
    path = tmp_path / "turned.mp4"
    with av.open(str(video_file)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    content = path.read_bytes()
    start = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags, times and ids, reserved, layer and volume
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    assert content[start : start + 36] == identity
    quarter = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()  # clockwise
    path.write_bytes(content[:start] + quarter + content[start + 36 :])

    upright, _ = read_video(video_file)
    turned, _ = read_video(path)
    assert turned[0].shape == (64, 48, 3)
    assert np.array_equal(turned[5], np.rot90(upright[5], -1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "none.mp4", FileNotFoundError, r"there is no video file .*none\.mp4"),
        (lambda folder: folder / "text.mp4", ValueError, r"text\.mp4' cannot be read as a video"),
        (lambda folder: folder / "empty.mp4", ValueError, r"empty\.mp4' cannot be read as a video"),
        (lambda folder: folder / "sound.wav", ValueError, r"sound\.wav' .* it has no video stream"),
        (lambda folder: folder / "cut.mp4", ValueError, r"cut\.mp4' cannot be read as a video"),
        (lambda folder: b"nothing", ValueError, "video 0 cannot be read as a video"),
        (lambda folder: np.zeros((0, 4, 4, 3), dtype=np.uint8), ValueError, "video 0 has 0 frames"),
        (lambda folder: [[]], ValueError, "video 0 has 0 frames"),
        (lambda folder: [[Image.new("RGB", (4, 4)), b"x"]], ValueError, "frame 1 of video 0 cannot be read"),
    ],
)
def test_unreadable_videos_are_named(
    make: Callable, error: type[Exception], message: str, tmp_path: Path, video_file: Path, tiny_processor: Callable
) -> None:
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(video_file.read_bytes()[:600])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(error, match=message):
        tiny_processor()(text="<video>", videos=make(tmp_path))


def test_seconds_need_times(tiny_processor: Callable) -> None:
    with pytest.raises(ValueError, match="video 0: fps needs the times of a video file"):
        tiny_processor()(text="<video>", videos=[Image.new("RGB", (4, 4))] * 3, fps=1)
