"""`longllava chat`: questions about pictures and videos, answered in the terminal."""

import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from longllava.modeling_longllava import LongLlavaSession

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class Medium(NamedTuple):
    """A picture or a video of a conversation: `kind` is `image` or `video`, `source` a path or URL."""

    kind: str
    source: str


class Cost(NamedTuple):
    """What a medium takes of the window: `views` are its frames, or the picture itself and its tiles.

    `tokens` are those of the views; the text around them is not counted.
    """

    medium: Medium
    views: int
    tokens: int


def by_number(path: Path) -> list[str | int]:
    """Sort key under which picture 2 comes before picture 10: text and numbers in turn."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", path.name))]


def find_media(arguments: list[str]) -> list[Medium]:
    """Files, folders and URLs in the order given; a folder stands for the pictures and videos in it, by name.

    Raises:
        FileNotFoundError: nothing is at a path, or a folder holds neither pictures nor videos.
    """
    media = []
    for argument in arguments:
        path = Path(argument)
        if argument.startswith(("http://", "https://")):
            suffix = Path(argument.partition("?")[0]).suffix.lower()
            media.append(Medium("video" if suffix in VIDEOS else "image", argument))
            continue
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES | VIDEOS]
            # Some systems keep a hidden file beside each picture, with its suffix.
            files = sorted((file for file in files if not file.name.startswith(".")), key=by_number)
            if not files:
                raise FileNotFoundError(f"the folder {argument} holds neither pictures nor videos")
        elif path.is_file():
            files = [path]
        else:
            raise FileNotFoundError(f"there is no file or folder {argument}")
        media += [Medium("video" if file.suffix.lower() in VIDEOS else "image", str(file)) for file in files]
    return media


def read_media(session: LongLlavaSession, media: list[Medium]) -> list[Cost]:
    """Let the session read the media in their order; the costs of each."""
    costs = []
    for kind, same in groupby(media, key=lambda medium: medium.kind):
        group = list(same)
        sources = [medium.source for medium in group]
        if kind == "image":
            watched = session.watch(images=sources)
        else:
            watched = [seen for source in sources for seen in session.watch(video=source)]
        costs += [Cost(medium, *seen) for medium, seen in zip(group, watched, strict=True)]
    return costs


def describe_costs(costs: list[Cost]) -> list[str]:
    """One line per medium, or per stretch of media that cost the same."""
    lines = []
    for (kind, views, tokens), same in groupby(costs, key=lambda cost: (cost.medium.kind, cost.views, cost.tokens)):
        names = [cost.medium.source for cost in same]
        parts = f"{views} frames, " if kind == "video" else f"whole and {views - 1} tiles, " if views > 1 else ""
        if len(names) > 3:
            noun = "videos" if kind == "video" else "pictures"
            lines.append(
                f"{names[0]} ... {names[-1]}: {len(names)} {noun}, {parts}{tokens} tokens each, "
                f"{len(names) * tokens} together"
            )
        else:
            lines += [f"{name}: {parts}{tokens} tokens" for name in names]
    return lines


def describe_window(total: int, window: int) -> str:
    """How much of the window that the model was made for is taken."""
    over = " (longer than the window: answers may be poor)" if total > window else ""
    return f"{total} of the window's {window} tokens{over}"
