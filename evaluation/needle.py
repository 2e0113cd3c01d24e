"""A needle in a haystack of pictures: which lengths and depths a model still sees.

    longllava evaluate needle    # the pocket model, 100 to 2,000 pictures, every tenth of the depth

The visual needle of LongVA (arXiv 2406.16852) and of section 5 of the paper (arXiv 2409.02889): one picture, the
needle, is put among the frames of a long haystack, and a question is asked that only the needle answers. A cell of the
heat map is a length (frames of the haystack) and a depth (share of them that comes before the needle: at 0 % the
needle is the first picture, at 100 % the last).

Haystack and needle are the user's, or drawn: handwritten digits that were never trained on, framed in any colour but
red, and one digit in a red frame, which is asked for.

What can be read once is read once. Within a trial a shorter haystack is the beginning of a longer one, so one session
reads the frames before all places of the needle. At each place a fork reads the needle, goes on through the frames
behind it, and is asked at every length that has a depth there: 60 % of 100, 30 % of 200 and 10 % of 600 frames are one
place. Every picture is read as one of its own, `<img>...</img>`, a frame of a video too: a video's tags cannot be
opened in one session and closed in each of its forks.
"""

import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from longllava.cli.chat import find_media
from longllava.evaluation.plots import heat_map
from longllava.evaluation.pocket_tasks import COLOURS, QUESTIONS, draw_pictures, load_scans, split_scans
from longllava.modeling_longllava import LongLlavaForConditionalGeneration, LongLlavaSession
from longllava.processing import LongLlavaProcessor
from longllava.processing.picture_reading_longllava import TowerInput, read_picture
from longllava.processing.video_reading_longllava import find_video, frame_indices

TRIALS = 20  # drawn needles in each cell: one that cannot be read is 5 %
BLOCK = 100  # frames drawn at a time
PIECE = 64  # pictures watched at a time: the progress moves, and the session shows no bar of its own
MAX_NEW_TOKENS = 32


def progress(total: int, unit: str) -> tqdm:
    """A bar on the standard error, where that is a terminal."""
    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())


class Needle(NamedTuple):
    """A picture and what is asked about it. `picture` is a path, URL or anything else that is a picture."""

    picture: Any
    question: str
    answer: str


class Cell(NamedTuple):
    """A haystack of `length` frames with the needle behind `depth` per cent of them."""

    length: int
    depth: float

    @property
    def place(self) -> int:
        """How many frames come before the needle."""
        return round(self.length * self.depth / 100)


# ---------------------------------------------------------------------------------------------------------------------
# Frames and needles


def draw_frames(seed: int, trial: int, count: int) -> list[Image.Image]:
    """The first `count` frames of a trial's haystack: test digits in frames of any colour but red.

    Each frame is a function of seed, trial and its number alone: a longer haystack begins with the shorter one.
    """
    colours = [name for name in COLOURS if name != "red"]
    frames: list[Image.Image] = []
    for block in range(-(-count // BLOCK)):
        rng = np.random.default_rng([seed, trial, 0, block])
        scans = rng.choice(np.concatenate(split_scans("test")), BLOCK)
        pixels = draw_pictures(load_scans()[0][scans], [str(name) for name in rng.choice(colours, BLOCK)], rng, False)
        frames += [Image.fromarray(picture) for picture in pixels]
    return frames[:count]


def draw_needle(seed: int, trial: int, place: int) -> Needle:
    """A test digit in a red frame. Each place has its own, so that one that is hard to read costs few answers."""
    rng = np.random.default_rng([seed, trial, 1, place])
    digit = int(rng.integers(10))
    scan = load_scans()[0][[rng.choice(split_scans("test")[digit])]]
    picture = Image.fromarray(draw_pictures(scan, ["red"], rng, augment=False)[0])
    return Needle(picture, str(rng.choice(QUESTIONS["framed"])).format(colour="red"), str(digit))


def read_frames(source: str | Path, count: int, processor: LongLlavaProcessor) -> list[Image.Image]:
    """`count` frames, evenly spaced, of a video or of a folder of pictures in the order of their names.

    They are made as small as the model sees them at once: all are held, and each is read at several depths.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it has fewer frames, or is neither a video nor a folder of pictures alone.
    """
    media = find_media([str(source)])
    videos = [medium.source for medium in media if medium.kind == "video"]
    if videos and len(media) > 1:
        raise ValueError(
            f"a haystack is one video or a folder of pictures; {source} holds {len(videos)} videos and "
            f"{len(media) - len(videos)} pictures"
        )

    def choose(total: int, times: np.ndarray | None = None) -> np.ndarray:
        return frame_indices(total, None, num_frames=count, fps=None, max_frames=count)

    pictures: Iterator[Image.Image]
    if videos:
        video, info = find_video(videos[0], videos[0], choose)
        total, pictures = info["total_num_frames"], video.frames(range(len(video.stamps)))
    else:
        chosen = [media[index].source for index in choose(len(media))]
        total, pictures = len(media), (read_picture(path, path, side=processor.image_size) for path in chosen)
    if total < count:
        raise ValueError(f"{source} has {total} frames, and the longest haystack is to have {count}")
    prepare = TowerInput(processor.image_processor)
    frames = []
    with progress(count, "frame") as bar:
        bar.set_description("haystack")
        for picture in pictures:
            frames.append(prepare.square(picture))
            bar.update()
    return frames


def read_needles(path: str | Path) -> list[Needle]:
    """The needles of a JSON file: a list of objects with `picture` (relative to the file), `question` and `answer`."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    needles = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(Needle._fields):
            raise ValueError(f"needle {number} of {path} is not an object with {', '.join(Needle._fields)}: {entry}")
        needles.append(Needle(str(path.parent / entry["picture"]), str(entry["question"]), str(entry["answer"])))
    if not needles:
        raise ValueError(f"{path} holds 0 needles")
    return needles


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def is_right(answer: str, expected: str) -> bool:
    """Whether both are the same text, whatever their case, spaces and final dot.

    Where a single letter is expected, the question is taken for multiple choice, and "(b)", "B." and "B: a cat" are
    right as "B" is.
    """
    found, wanted = (" ".join(text.split()).removesuffix(".").rstrip().casefold() for text in (answer, expected))
    if re.fullmatch(r"[a-z]", wanted) and (choice := re.match(r"\(?([a-z])[).:]", found)):
        found = choice[1]
    return found == wanted


def by_place(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    """The cells whose needle stands at the same place, shorter haystacks first; places in rising order."""
    places: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.place, cell.length, cell.depth)):
        places.setdefault(cell.place, []).append(cell)
    return places


def pictures_read(cells: Iterable[Cell]) -> int:
    """How many pictures a trial over these cells reads."""
    places = by_place(cells)
    return max(places, default=0) + sum(1 + same[-1].length - place for place, same in places.items())


def run_trial(
    session: LongLlavaSession,
    frames: list[Image.Image],
    needle_at: Callable[[int], Needle],
    cells: Iterable[Cell],
    bar: tqdm,
) -> Iterator[dict[str, Any]]:
    """Ask for the needle in every cell, each time in front of one haystack with exactly one needle.

    Args:
        session: a new one.
        frames: at least as many as the longest haystack has.
        needle_at: the needle for a place, which is the number of frames before it.
        bar: goes on by one for each picture read.

    Yields:
        For each cell `length`, `depth`, `question`, `expected`, `answer`, `right` and the `seconds` since the last.
    """

    def watch(session: LongLlavaSession, pictures: list[Any]) -> None:
        for start in range(0, len(pictures), PIECE):
            piece = pictures[start : start + PIECE]
            session.watch(images=piece)
            bar.update(len(piece))

    read, start = 0, time.perf_counter()
    for place, same in by_place(cells).items():
        bar.set_postfix_str(f"haystack to frame {place}")
        watch(session, frames[read:place])
        read = reached = place
        needle = needle_at(place)
        behind = session.fork()
        watch(behind, [needle.picture])
        for cell in same:
            bar.set_postfix_str(f"needle behind {place} of {cell.length} frames")
            watch(behind, frames[reached : cell.length])
            reached = cell.length
            answer = behind.ask(needle.question, max_new_tokens=MAX_NEW_TOKENS)
            behind.rewind()
            start, seconds = time.perf_counter(), time.perf_counter() - start
            yield {
                "length": cell.length,
                "depth": cell.depth,
                "question": needle.question,
                "expected": needle.answer,
                "answer": answer,
                "right": is_right(answer, needle.answer),
                "seconds": round(seconds, 3),
            }
        del behind  # before the haystack is read on: no second cache is needed then


class Plan(NamedTuple):
    """What all trials have in common: `frames` are the user's haystack, or None for drawn ones of `longest` frames."""

    model: LongLlavaForConditionalGeneration
    processor: LongLlavaProcessor
    frames: list[Image.Image] | None
    needles: list[Needle]
    longest: int
    tokens: int
    seed: int

    def answers(self, trial: int, cells: list[Cell], bar: tqdm) -> Iterator[dict[str, Any]]:
        """The answers of one trial, as they come."""
        frames = draw_frames(self.seed, trial, self.longest) if self.frames is None else self.frames

        def needle_at(place: int) -> Needle:
            if self.needles:
                return self.needles[trial % len(self.needles)]
            return draw_needle(self.seed, trial, place)

        session = LongLlavaSession(self.model, self.processor, tokens_per_image=self.tokens)
        for answer in run_trial(session, frames, needle_at, cells, bar):
            yield {"trial": trial, **answer}


_plan: list[Plan] = []  # of a process of `answers_in_processes`


def _begin(plan: Plan) -> None:
    torch.set_num_threads(1)
    _plan[:] = [plan]


def _answers(trial: int, cells: list[Cell]) -> list[dict[str, Any]]:
    return list(_plan[0].answers(trial, cells, tqdm(disable=True)))


def answers_in_processes(
    plan: Plan, left: dict[int, list[Cell]], jobs: int, bar: tqdm
) -> Iterator[list[dict[str, Any]]]:
    """The answers of each trial, `jobs` trials at a time, every one in a process of one thread.

    A model so small that its operations take microseconds is not faster with a second thread.
    """
    # Not forked: threads of the parent would be missing in the child, and OpenMP would wait for them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(plan,)) as pool:
        futures = {pool.submit(_answers, trial, cells): trial for trial, cells in left.items()}
        try:
            for future in as_completed(futures):
                bar.update(pictures_read(left[futures[future]]))
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def resume(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers that an earlier run left in a file of JSON lines, whose first line is its settings.

    A last line that was cut off is removed. Where there are no answers yet, the file begins anew.

    Raises:
        ValueError: the file's answers were given with other settings.
    """
    settings = json.loads(json.dumps(settings))  # as the file has them: lists for tuples
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if len(lines) < 2:
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return []
    for name, value in settings.items():
        if lines[0].get(name) != value:
            raise ValueError(
                f"{path.parent} holds answers with {name} {lines[0].get(name)}, and this run has {name} {value}: "
                "choose another output folder, or remove that one"
            )
    os.truncate(path, len(whole))
    return lines[1:]


def summarize(settings: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings, shares of right answers (0..1; `cells` holds a row per depth, a column per length), all answers.

    `up_to_length` is the share over all haystacks of at most each length, `seconds` the time of all answers, summed
    over the processes that ran at the same time.
    """
    lengths, depths = settings["lengths"], settings["depths"]
    right = np.zeros((len(depths), len(lengths)))
    for answer in answers:
        right[depths.index(answer["depth"]), lengths.index(answer["length"])] += answer["right"]
    cells = right / settings["trials"]
    by_length = cells.mean(0)
    return {
        "settings": settings,
        "accuracy": {
            "all": cells.mean(),
            "by_length": by_length.tolist(),
            "up_to_length": (by_length.cumsum() / np.arange(1, len(lengths) + 1)).tolist(),
            "cells": cells.tolist(),
        },
        "seconds": round(sum(answer["seconds"] for answer in answers), 1),
        "answers": answers,
    }


def table(report: dict[str, Any]) -> str:
    """The shares of right answers in per cent as a Markdown table: depths down, lengths across."""
    settings, accuracy = report["settings"], report["accuracy"]

    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    lengths = settings["lengths"]
    rows = {f"{depth:g} %": shares for depth, shares in zip(settings["depths"], accuracy["cells"], strict=True)}
    rows |= {"all depths": accuracy["by_length"], "up to this length": accuracy["up_to_length"]}
    lines = [row("depth \\ frames", (f"{length:,}" for length in lengths)), row("---", ["---:"] * len(lengths))]
    lines += [row(name, (f"{100 * share:.1f}" for share in shares)) for name, shares in rows.items()]
    lowest = min(min(shares) for shares in accuracy["cells"])
    summary = f"{found(report)}, {settings['trials']} in each cell; the lowest cell has {100 * lowest:.1f} %"
    return "\n".join([*lines, "", f"{summary}; {report['seconds']:.0f} s of all processes"])


def found(report: dict[str, Any]) -> str:
    """All cells in one clause, such as "98.5 % of 2,420 needles found"."""
    return f"{100 * report['accuracy']['all']:.1f} % of {len(report['answers']):,} needles found"


def plot(report: dict[str, Any], path: str | Path) -> None:
    """The heat map, lengths x depths, as a PNG."""
    settings, accuracy = report["settings"], report["accuracy"]
    heat_map(
        path,
        np.array(accuracy["cells"], dtype=float),
        rows=[f"{depth:g} %" for depth in settings["depths"]],
        columns=[f"{length:,}" for length in settings["lengths"]],
        title=f"{settings['model']}, {settings['tokens_per_frame']} tokens per frame\n{found(report)}",
        row_label="depth of the needle",
        column_label="frames of the haystack",
    )


def fingerprint(model: LongLlavaForConditionalGeneration) -> str:
    """A short name of a model's weights, from the first values of each: a folder can be trained anew."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def evaluate_needle(
    model: LongLlavaForConditionalGeneration,
    processor: LongLlavaProcessor,
    output: str | Path,
    lengths: Iterable[int],
    depths: Iterable[float],
    haystack: str | Path | None = None,
    needles: list[Needle] | None = None,
    trials: int | None = None,
    tokens_per_frame: int | None = None,
    seed: int = 0,
    jobs: int = 1,
) -> dict[str, Any]:
    """Find needles in haystacks of every length and depth; continue where an earlier run into `output` was stopped.

    Args:
        output: folder for `needle.jsonl` (the settings, then each answer as it comes), `needle.json` and `needle.png`.
        lengths: frames of the haystack; the needle comes in addition.
        depths: per cent of them before the needle.
        haystack: a video or a folder of pictures; drawn digits, others in each trial, where it is None.
        needles: one per trial, in turn; digits in a red frame, others in each trial and place, where they are None.
        trials: answers in each cell; by default as many as there are needles, 20 of drawn ones.
        tokens_per_frame: of frames and needle alike; by default the model's own number.
        jobs: trials at the same time, each in a process of its own with one thread and a copy of the model (CPU).

    Returns:
        What `needle.json` holds, see `summarize`.

    Raises:
        ValueError: the frames are too few, or `output` holds answers with other settings.
    """
    lengths, depths = sorted(set(lengths)), sorted(set(depths))
    if not lengths or lengths[0] < 1:
        raise ValueError(f"lengths are frames of a haystack, at least 1 each, not {lengths}")
    if not depths or depths[0] < 0 or depths[-1] > 100:
        raise ValueError(f"depths lie in 0..100 per cent, not {depths}")
    trials = trials or (len(needles) if needles else TRIALS)
    if haystack is not None and needles is not None and trials > len(needles):
        raise ValueError(f"{len(needles)} needles in one haystack make {len(needles)} different trials, not {trials}")

    tokens = tokens_per_frame or processor.tokens_per_frame or processor.tokens_per_image
    settings = {
        "model": Path(model.name_or_path).resolve().name if Path(model.name_or_path).is_dir() else model.name_or_path,
        "weights": fingerprint(model),
        "haystack": None if haystack is None else str(haystack),
        "needles": [[str(needle.picture), needle.question, needle.answer] for needle in needles or []],
        "lengths": lengths,
        "depths": depths,
        "trials": trials,
        "tokens_per_frame": tokens,
        "seed": seed,
    }
    given = [n._replace(picture=read_picture(n.picture, f"needle {i}")) for i, n in enumerate(needles or [])]
    frames = None if haystack is None else read_frames(haystack, lengths[-1], processor)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    answers = resume(output / "needle.jsonl", settings)
    done = {(answer["trial"], answer["length"], answer["depth"]) for answer in answers}
    cells = [Cell(length, depth) for length in lengths for depth in depths]
    left = {trial: [cell for cell in cells if (trial, *cell) not in done] for trial in range(trials)}
    with (
        progress(sum(map(pictures_read, left.values())), "picture") as bar,
        open(output / "needle.jsonl", "a", encoding="utf-8") as file,
    ):
        left = {trial: wanted for trial, wanted in left.items() if wanted}
        plan = Plan(model, processor, frames, given, lengths[-1], tokens, seed)

        def keep(answer: dict[str, Any]) -> None:
            answers.append(answer)
            file.write(json.dumps(answer) + "\n")
            file.flush()

        if jobs > 1:
            bar.set_description(f"{jobs} trials at a time")
            for found in answers_in_processes(plan, left, jobs, bar):
                for answer in found:
                    keep(answer)
        else:
            for trial, wanted in left.items():
                bar.set_description(f"trial {trial + 1} of {trials}")
                for answer in plan.answers(trial, wanted, bar):
                    keep(answer)
    report = summarize(settings, sorted(answers, key=lambda a: (a["trial"], a["length"], a["depth"])))
    (output / "needle.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, output / "needle.png")
    return report
