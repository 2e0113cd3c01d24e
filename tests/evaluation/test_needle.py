"""The needle in a haystack: what a session is shown in each cell, what is kept, and what is drawn."""

import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from longllava.evaluation import needle
from longllava.evaluation.needle import (
    Cell,
    Needle,
    by_place,
    draw_frames,
    draw_needle,
    evaluate_needle,
    is_right,
    pictures_read,
    read_frames,
    read_needles,
    resume,
    run_trial,
    table,
)
from longllava.evaluation.plots import RED_TO_GREEN, heat_map
from longllava.evaluation.pocket_tasks import COLOURS

RED = COLOURS["red"]


class Recorder:
    """Has the methods of a session, and answers with what it was shown: `asked(seen)` stands for the model."""

    def __init__(self, seen: list[Any] | None = None, shared: dict[str, list[Any]] | None = None):
        self.seen = seen or []
        self.shared = shared or {"reads": [], "haystacks": []}
        self.turns = 0
        self.forks: WeakSet[Recorder] = WeakSet()

    def watch(self, images: list[Any]) -> None:
        assert self.turns == 0, "a question was left in the conversation"
        assert not self.forks, "a fork is alive, so that this session has to copy its cache"
        self.seen += images
        self.shared["reads"] += images

    def fork(self) -> "Recorder":
        fork = Recorder(list(self.seen), self.shared)
        self.forks.add(fork)
        return fork

    def ask(self, question: str, max_new_tokens: int) -> str:
        self.turns += 1
        self.shared["haystacks"].append(list(self.seen))
        return f" Seen by {question}. "

    def rewind(self) -> None:
        self.turns -= 1


def run(cells: list[Cell], length: int) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Answers, and what a recorder saw, of a trial whose frames are the numbers 0, 1, ... and whose needles are N."""
    session = Recorder()
    answers = run_trial(
        session, list(range(length)), lambda place: Needle("N", f"place {place}", "?"), cells, tqdm(disable=True)
    )
    return list(answers), session.shared


def grid(lengths: list[int], depths: list[float]) -> list[Cell]:
    return [Cell(length, depth) for length in lengths for depth in depths]


def test_every_cell_sees_its_haystack_with_one_needle_at_its_depth() -> None:
    """Against the definition, written out: the first `length` frames, and the needle put in by `list.insert`."""
    cells = grid([7, 10, 40, 130], [0, 10, 33.3, 50, 90, 100])
    answers, shared = run(cells, 130)
    assert sorted((a["length"], a["depth"]) for a in answers) == sorted(cells)
    for answer, seen in zip(answers, shared["haystacks"], strict=True):
        expected: list[Any] = list(range(answer["length"]))
        expected.insert(round(answer["length"] * answer["depth"] / 100), "N")
        assert seen == expected
    by_cell = {(a["length"], a["depth"]): seen for a, seen in zip(answers, shared["haystacks"], strict=True)}
    assert by_cell[40, 0][0] == "N" and by_cell[40, 100][-1] == "N" and len(by_cell[40, 100]) == 41


def test_the_needle_is_the_one_of_its_place() -> None:
    answers, _ = run(grid([10, 20], [0, 50, 100]), 20)
    asked = {(a["length"], a["depth"]): a["question"] for a in answers}
    assert asked == {
        (10, 0): "place 0", (20, 0): "place 0", (10, 50): "place 5",
        (10, 100): "place 10", (20, 50): "place 10", (20, 100): "place 20",
    }  # fmt: skip


def test_nothing_is_read_twice_that_can_be_shared() -> None:
    """The haystack once; for each place the needle, and the frames up to the longest haystack that has it there."""
    cells = grid([10, 20], [0, 50, 100])
    _, shared = run(cells, 20)
    # Places 0, 5, 10 and 20: 20 frames before them, 4 needles, and 20, 5, 10 and 0 frames behind them.
    assert len(shared["reads"]) == pictures_read(cells) == 20 + 4 + 20 + 5 + 10 + 0
    assert pictures_read([]) == 0


def test_the_defaults_of_the_command_cost_what_its_plan_says() -> None:
    cells = grid([*range(100, 1001, 100), 2000], list(range(0, 101, 10)))
    alone = sum(cell.length + 1 for cell in cells)
    assert len(cells) == 121 and len(by_place(cells)) == 48
    assert (pictures_read(cells), alone) == (28_628, 82_621)


def test_drawn_frames_are_functions_of_seed_trial_and_number() -> None:
    def pixels(frames: list[Image.Image]) -> list[bytes]:
        return [np.asarray(frame).tobytes() for frame in frames]

    long, short = pixels(draw_frames(1, 0, 130)), pixels(draw_frames(1, 0, 30))
    assert long[:30] == short and len(long) == 130 and len(set(long)) == 130
    assert short != pixels(draw_frames(1, 1, 30)) and short != pixels(draw_frames(2, 0, 30))
    first, again = draw_needle(1, 0, 5), draw_needle(1, 0, 5)
    assert pixels([first.picture]) == pixels([again.picture]) and first[1:] == again[1:]
    assert pixels([first.picture]) != pixels([draw_needle(1, 0, 6).picture])


def test_only_the_drawn_needle_is_red() -> None:
    assert all(frame.getpixel((0, 0)) != RED for frame in draw_frames(0, 0, 200))
    drawn = [draw_needle(0, trial, place) for trial in range(10) for place in range(8)]
    assert all(red.picture.getpixel((0, 0)) == RED and "red" in red.question for red in drawn)
    assert {red.answer for red in drawn} == set("0123456789")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("7", "7", True),
        (" 7\n", "7", True),
        ("A  red Panda.", "a red panda", True),
        ("17", "7", False),
        ("a panda", "a red panda", False),
        ("(b)", "B", True),
        ("B. a cat", "B", True),
        ("A. a cat", "B", False),
        ("A cat", "A", False),
        ("", "7", False),
    ],
)
def test_answers_are_compared_after_normalisation(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right


def test_frames_of_a_folder_come_in_the_order_of_their_numbers_evenly_spaced(tiny_processor, tmp_path: Path) -> None:
    for number in range(12):
        Image.new("L", (300, 100), 20 * number).save(tmp_path / f"frame{number}.png")
    frames = read_frames(tmp_path, 4, tiny_processor())
    assert [frame.getpixel((3, 28)) for frame in frames] == [(20 * n,) * 3 for n in (0, 4, 7, 11)]
    assert {frame.size for frame in frames} == {(56, 56)}
    with pytest.raises(ValueError, match="12 frames.* 13"):
        read_frames(tmp_path, 13, tiny_processor())


def test_frames_of_a_video_are_evenly_spaced(tiny_processor, video_file: Path) -> None:
    frames = read_frames(video_file, 3, tiny_processor())
    assert [frame.getpixel((28, 28))[0] for frame in frames] == pytest.approx([0, 120, 220], abs=8)
    assert {frame.size for frame in frames} == {(56, 56)}
    with pytest.raises(ValueError, match="12 frames.* 100"):
        read_frames(video_file, 100, tiny_processor())


def test_a_haystack_is_one_thing(tiny_processor, video_file: Path, tmp_path: Path) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "frame.png")
    with pytest.raises(ValueError, match="1 videos and 1 pictures"):
        read_frames(tmp_path, 1, tiny_processor())
    with pytest.raises(FileNotFoundError, match="gone"):
        read_frames(tmp_path / "gone", 1, tiny_processor())


def test_needles_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "needles.json"
    path.write_text(json.dumps([{"picture": "cat.png", "question": "What is in the box?", "answer": "A cat"}]))
    assert read_needles(path) == [Needle(str(tmp_path / "cat.png"), "What is in the box?", "A cat")]
    for content, says in (("[]", "0 needles"), ('[{"picture": "cat.png"}]', "needle 0"), ("[{", "not JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=says):
            read_needles(path)


def test_answers_are_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "needle.jsonl"
    settings = {"lengths": (10,), "trials": 2}
    assert resume(path, settings) == []
    whole = path.read_text() + '{"trial": 0}\n'
    path.write_text(whole + '{"trial": 1, "le')  # stopped in the middle of a line
    assert resume(path, settings) == [{"trial": 0}]
    assert path.read_text() == whole
    with pytest.raises(ValueError, match="trials 2.* 3"):
        resume(path, {**settings, "trials": 3})
    assert path.read_text() == whole
    path.write_text(whole.splitlines()[0])  # not one answer: nothing would be lost
    assert resume(path, {**settings, "trials": 3}) == []


class Seer(Recorder):
    """A session that reads the needles of `painted`, but not the first picture among more than 20."""

    def __init__(self, model: Any = None, processor: Any = None, tokens_per_image: int = 0):
        super().__init__()
        Seer.tokens = tokens_per_image

    def fork(self) -> "Seer":
        copy = Seer(tokens_per_image=Seer.tokens)
        copy.seen = list(self.seen)
        return copy

    def ask(self, question: str, max_new_tokens: int) -> str:
        self.turns += 1
        assert question == "Which red?"
        (place,) = [n for n, picture in enumerate(self.seen) if picture.getpixel((0, 0))[:2] == RED[:2]]
        return "none" if place == 0 and len(self.seen) > 21 else f"{self.seen[place].getpixel((0, 0))[2]}."


def painted(count: int) -> list[Needle]:
    """Red pictures, with the number of the needle in their blue."""
    return [Needle(Image.new("RGB", (56, 56), (*RED[:2], n)), "Which red?", str(n)) for n in range(count)]


@pytest.fixture
def tiny(tiny_model, tiny_processor) -> tuple:
    return tiny_model(), tiny_processor()


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "LongLlavaSession", Seer)


def test_the_report_holds_what_was_asked_and_its_shares(seer, tiny: tuple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = evaluate_needle(*tiny, output, [40, 10], [0, 100, 50], needles=painted(3))
    assert json.loads((output / "needle.json").read_text()) == report
    assert report["accuracy"] == {
        "all": pytest.approx(5 / 6),
        "by_length": [1, pytest.approx(2 / 3)],
        "up_to_length": [1, pytest.approx(5 / 6)],
        "cells": [[1, 0], [1, 1], [1, 1]],
    }
    assert len(report["answers"]) == 3 * 6 and report["settings"]["trials"] == 3
    assert report["seconds"] == pytest.approx(sum(answer["seconds"] for answer in report["answers"]), abs=0.1)
    assert {**report["answers"][0], "seconds": 0} == {
        "trial": 0, "length": 10, "depth": 0, "question": "Which red?", "expected": "0", "answer": "0.", "right": True,
        "seconds": 0,
    }  # fmt: skip
    assert {answer["expected"] for answer in report["answers"]} == {"0", "1", "2"}
    assert report["settings"]["tokens_per_frame"] == Seer.tokens == 4
    assert "| 0 % | 100.0 | 0.0 |" in table(report) and "83.3 % of 18" in table(report)
    width, height = Image.open(output / "needle.png").size
    assert width > 500 and height > 300


def test_a_stopped_run_goes_on_and_asks_nothing_twice(seer, tiny: tuple, tmp_path: Path, monkeypatch) -> None:
    settings = {"lengths": [10, 30], "depths": [0, 30, 100], "needles": painted(2)}
    whole = evaluate_needle(*tiny, tmp_path / "whole", **settings)

    asked = []
    ask = Seer.ask

    def ask_seven(self: Seer, question: str, **options: Any) -> str:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(question)
        return ask(self, question, **options)

    monkeypatch.setattr(Seer, "ask", ask_seven)
    with pytest.raises(KeyboardInterrupt):
        evaluate_needle(*tiny, tmp_path / "parts", **settings)
    asked.clear()
    again = evaluate_needle(*tiny, tmp_path / "parts", **settings)
    assert again["accuracy"] == whole["accuracy"]
    for one, other in zip(again["answers"], whole["answers"], strict=True):
        assert {**one, "seconds": other["seconds"]} == other
    assert len(asked) == 2 * 6 - 7
    with pytest.raises(ValueError, match=r"lengths \[10, 30\].* \[10\]"):
        evaluate_needle(*tiny, tmp_path / "parts", **{**settings, "lengths": [10]})


def test_trials_in_two_processes_answer_the_same(tiny: tuple, tmp_path: Path) -> None:
    """Without the stand-in, whose class the other processes would not know: the tiny model and real sessions."""
    settings = {"lengths": [3, 5], "depths": [0, 100], "trials": 2}
    one = evaluate_needle(*tiny, tmp_path / "one", **settings)
    two = evaluate_needle(*tiny, tmp_path / "two", **settings, jobs=2)
    assert len(two["answers"]) == 8
    assert [{**a, "seconds": 0} for a in one["answers"]] == [{**a, "seconds": 0} for a in two["answers"]]


def test_a_model_trained_further_is_another_model(seer, tiny: tuple, tmp_path: Path) -> None:
    settings = {"lengths": [2], "depths": [0], "needles": painted(1)}
    model, processor = tiny
    evaluate_needle(model, processor, tmp_path / "out", **settings)
    with torch.no_grad():
        model.lm_head.weight += 0.01
    with pytest.raises(ValueError, match="weights"):
        evaluate_needle(model, processor, tmp_path / "out", **settings)


def test_answers_are_those_of_a_fresh_reading(tiny: tuple, tmp_path: Path) -> None:
    """With a real session, whose answers stand for whatever the random model saw."""
    model, processor = tiny
    report = evaluate_needle(model, processor, tmp_path / "out", [3, 6], [0, 100], trials=1, seed=5)
    for answer in report["answers"]:
        place = round(answer["length"] * answer["depth"] / 100)
        pictures = draw_frames(5, 0, answer["length"])
        pictures.insert(place, draw_needle(5, 0, place).picture)
        blocks = [{"type": "image", "image": picture} for picture in pictures]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*blocks, {"type": "text", "text": answer["question"]}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        tokens = model.generate(**inputs, max_new_tokens=needle.MAX_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(tokens, skip_special_tokens=True) == [answer["answer"]]
    assert len({answer["answer"] for answer in report["answers"]}) > 1


def test_impossible_settings_are_refused(tiny: tuple, video_file: Path, tmp_path: Path) -> None:
    for settings, says in (
        ({"lengths": [0, 5], "depths": [0]}, r"\[0, 5\]"),
        ({"lengths": [5], "depths": [0, 101]}, r"\[0, 101\]"),
        ({"lengths": [5], "depths": [0], "haystack": video_file, "needles": painted(2), "trials": 3}, "2 needles.* 3"),
        ({"lengths": [13], "depths": [0], "haystack": video_file, "needles": painted(2)}, "12 frames.* 13"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate_needle(*tiny, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_cells_have_their_colours_in_their_places(tmp_path: Path) -> None:
    """0 % above, lengths to the right; green for right, red for wrong, white where nothing was measured."""
    path = tmp_path / "map.png"
    values = np.array([[1, 0], [1, np.nan]])
    heat_map(path, values, ["0 %", "100 %"], ["10", "1,000"], "model\nfound", "depth", "frames")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # The colour bar at the right has all colours; the cells are left of it.
    left = pixels[:, : pixels.shape[1] * 3 // 4]

    def middle(colour: str) -> tuple[float, float]:
        rgb = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
        found = np.argwhere(np.abs(left - rgb).max(-1) < 8)
        assert len(found) > 1000, colour
        return tuple(found.mean(0))

    red, green = middle(RED_TO_GREEN[0]), middle(RED_TO_GREEN[2])
    assert red[0] < green[0] and red[1] > green[1]  # upper right; the left column
    with pytest.raises(ValueError, match="1 labels of rows and 2"):
        heat_map(path, values, ["0 %"], ["10", "20"], "", "", "")


def test_the_shipped_model_finds_its_needles(tmp_path: Path) -> None:
    """Among 400 frames, more than it was trained on, in both ends and the middle; always the same nine needles."""
    from longllava.modeling_longllava import LongLlavaForConditionalGeneration
    from longllava.processing import LongLlavaProcessor

    pocket = Path(__file__).parents[2] / "spaces_demo" / "pocket"
    model = LongLlavaForConditionalGeneration.from_pretrained(pocket).eval()
    processor = LongLlavaProcessor.from_pretrained(pocket)
    report = evaluate_needle(model, processor, tmp_path, lengths=[400], depths=[0, 50, 100], trials=3)
    right = [answer["right"] for answer in report["answers"]]
    assert len(right) == 9 and sum(right) >= 8
