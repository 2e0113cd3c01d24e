"""One video: which of its frames to look at, decided from its packets, and those frames, decoded one by one."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .picture_reading_longllava import as_file, fetch, is_url


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


class VideoFile(NamedTuple):
    """The chosen frames of a video file, not yet decoded."""

    file: str | bytes  # path or content
    name: str  # in errors
    stamps: list[int]  # when each chosen frame is shown, in the file's own units, rising; or its number, see `counted`
    keys: list[int]  # the stamps at which decoding can start, rising
    counted: bool  # the file has no times: stamps are numbers of frames, and decoding starts at the first

    def frames(self, parts: Sequence[int]) -> Iterator[Image.Image]:
        """The chosen frames of these numbers, in this order, decoded as they are asked for.

        In rising order the file is read once from front to back. Raises ValueError, with the name, for a frame that
        cannot be decoded.
        """
        import av

        try:
            start = 0
            while start < len(parts):
                stop = start + 1
                while stop < len(parts) and parts[stop] > parts[stop - 1]:
                    stop += 1
                with av.open(as_file(self.file)) as container:
                    yield from self._decode(container, [self.stamps[part] for part in parts[start:stop]])
                start = stop
        except (OSError, ValueError, av.FFmpegError) as error:
            raise ValueError(f"{self.name} cannot be read as a video: {error}") from error

    def _decode(self, container: Any, wanted: list[int]) -> Iterator[Image.Image]:
        """The frames at the stamps `wanted` (rising), or the next that shows something.

        Jumps to the last key frame before a wanted frame where that skips something: 128 frames of an hour of video
        then cost 128 short runs instead of the whole hour.
        """
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoder = enumerate(container.decode(stream))
        position = self.keys[0] if self.keys else wanted[0]
        for stamp in wanted:
            start = self.keys[max(bisect.bisect(self.keys, stamp) - 1, 0)] if self.keys else position
            if start > position:
                container.seek(start, stream=stream)
                decoder = enumerate(container.decode(stream))
            for number, frame in decoder:
                position = number if self.counted else frame.pts
                if position >= stamp:
                    yield frame.to_image().rotate(frame.rotation, expand=True)
                    break
            else:
                chosen = self.stamps.index(stamp)
                raise ValueError(f"{len(self.stamps)} frames were chosen, only {chosen} can be decoded")


def find_video(
    source: str | Path | bytes | bytearray, name: str, choose: Callable[[int, np.ndarray | None], np.ndarray]
) -> tuple[VideoFile, dict[str, Any]]:
    """The chosen frames of a video file (path, URL or bytes), not yet decoded, and where they come from.

    `choose(total, times)` gives the frames' indices. The second result holds `total_num_frames`, `fps` and `duration`
    (s) of the file, and of the chosen frames `frames_indices` and `timestamps` (s).

    Raises FileNotFoundError for a missing file and ValueError, with the name, for what has no frames to give.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video file needs PyAV: pip install av") from error

    if isinstance(source, str | Path):
        source = str(source)
        name = f"{source!r}"
    try:
        if isinstance(source, str) and is_url(source):
            source = fetch(source)
        if isinstance(source, str) and not Path(source).is_file():
            raise FileNotFoundError(f"there is no video file {name}")
        file = bytes(source) if isinstance(source, bytearray) else source

        # The packets alone, which costs no decoding: many formats do not say how many frames they hold, and only the
        # packets say when each frame is shown and where decoding can start.
        container: Any
        with av.open(as_file(file)) as container:
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
    except FileNotFoundError:
        raise
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error

    video = VideoFile(file, name, [stamps[index] for index in indices], keys, counted)
    info = {"total_num_frames": len(stamps), "fps": rate, "duration": float(times[-1]) + (1 / rate if rate else 0.0)}
    return video, {**info, "frames_indices": indices.tolist(), "timestamps": times[indices].round(6).tolist()}
