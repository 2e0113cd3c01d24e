"""PictureStream: many pictures, frames and tiles, each decoded and prepared when its turn comes, a little ahead."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .picture_reading_longllava import TowerInput, cut_tiles, read_picture
from .video_reading_longllava import VideoFile

READ_AHEAD = 32  # pictures that are ready, or about to be, before they are asked for
PROGRESS_ABOVE = 64  # pictures


class StillPicture(NamedTuple):
    """A picture and, with `max_tiles`, its tiles, not yet decoded; see `read_picture` for `source` and `name`."""

    source: Any
    name: str
    max_tiles: int | None = None

    def read(self, side: int) -> list[Image.Image]:
        """The picture and its tiles row by row, for a tower of `side` pixels."""
        if self.max_tiles is None:
            return [read_picture(self.source, self.name, side=side)]
        picture = read_picture(self.source, self.name)
        tiles = cut_tiles(picture, side, self.max_tiles)
        return [picture, *(tile for row in tiles for tile in row)]


class PictureStream:
    """Pictures, frames and tiles in the order of their placeholders, as float32 tensors (3, S, S) for the tower.

    Nothing is opened before its turn. An iteration reads ahead of whoever takes from it, in as many threads as torch
    uses, and forgets what it gave: of however many pictures it holds at most `READ_AHEAD` and the tiles of one more.
    It can be iterated again, and a slice or a list of numbers is a stream of those pictures.

    What cannot be read raises at its turn, with its name; see `read_picture`. To take pictures piece by piece, draw
    from one iterator: each new one starts with nothing read ahead, and looks for its place in a video anew.
    """

    def __init__(self, parts: Sequence[tuple[StillPicture | VideoFile, int]], prepare: TowerInput):
        self._parts = list(parts)  # what holds each picture, and which of its parts it is
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} pictures of {self._prepare.side} pixels"

    @overload
    def __getitem__(self, chosen: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, chosen: slice | Sequence[int]) -> "PictureStream": ...

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "torch.Tensor | PictureStream":
        if isinstance(chosen, int):
            return next(iter(self[[chosen]]))
        parts = self._parts[chosen] if isinstance(chosen, slice) else [self._parts[index] for index in chosen]
        return PictureStream(parts, self._prepare)

    def __iter__(self) -> Iterator[torch.Tensor]:
        threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pictures")
        decoder = ThreadPoolExecutor(1, thread_name_prefix="video")  # frames come one after the other
        jobs = self._jobs(threads, decoder)
        ahead: deque[tuple[Future[list[torch.Tensor]], int]] = deque()
        waiting = 0
        try:
            while True:
                while waiting < READ_AHEAD and (job := next(jobs, None)) is not None:
                    ahead.append(job)
                    waiting += job[1]
                if not ahead:
                    return
                future, count = ahead.popleft()
                yield from future.result()
                waiting -= count
                del future  # not kept while the next one is waited for
        finally:
            # Also where the iterator is dropped early: what runs is finished, nothing else begins.
            threads.shutdown(wait=False, cancel_futures=True)
            decoder.shutdown(wait=False, cancel_futures=True)

    def tensor(self) -> torch.Tensor:
        """All pictures at once, (N, 3, S, S) float32; a progress bar on a terminal where they are many."""
        # Not torch's own copy: its threads would spin between two pictures, on the cores that decode the next.
        out = np.empty((len(self), 3, self._prepare.side, self._prepare.side), dtype=np.float32)
        hidden = True if len(self) <= PROGRESS_ABOVE else None  # None: shown on a terminal
        with logging.tqdm(self, total=len(self), desc="Reading pictures", unit="picture", disable=hidden) as pictures:
            for slot, picture in zip(out, pictures, strict=True):
                slot[...] = picture.numpy()
        return torch.from_numpy(out)

    def _jobs(self, threads: Executor, decoder: Executor) -> Iterator[tuple["Future[list[torch.Tensor]]", int]]:
        """Starts one piece of work after the other: what will be its pictures, and how many."""
        wanted: defaultdict[int, list[int]] = defaultdict(list)
        for holder, number in self._parts:
            wanted[id(holder)].append(number)
        frames: dict[int, Iterator[Image.Image]] = {}  # what is left of each video: one reader, however it is mixed
        for key, run in groupby(self._parts, key=lambda part: id(part[0])):
            parts = list(run)
            holder = parts[0][0]
            if isinstance(holder, StillPicture):
                yield threads.submit(self._read, holder, [number for _, number in parts]), len(parts)
                continue
            if key not in frames:
                frames[key] = holder.frames(wanted[key])
            for _ in parts:
                yield decoder.submit(self._next_frame, frames[key]), 1

    def _read(self, picture: StillPicture, parts: list[int]) -> list[torch.Tensor]:
        everything = picture.read(self._prepare.side)
        prepared = {number: self._prepare(everything[number]) for number in set(parts)}
        return [prepared[number] for number in parts]

    def _next_frame(self, frames: Iterator[Image.Image]) -> list[torch.Tensor]:
        return [self._prepare(next(frames))]
