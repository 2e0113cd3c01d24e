"""The pocket tasks: their splits, rows and pictures; and the shipped model, asked a few of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from longllava.evaluation.pocket import answer, evaluate_pocket, measure, write_examples
from longllava.evaluation.pocket_tasks import COLOURS, COUNTED, MAX_COUNT, SHEET, SIDE, SPLITS, make_row, split_scans
from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor

POCKET = Path(__file__).parents[2] / "spaces_demo" / "pocket"
EXAMPLES = POCKET.parent / "examples"
MAKEFILE = (POCKET.parents[1] / "Makefile").read_text()
DEMO = re.findall(r'longllava chat .* -q "(.*)"', MAKEFILE)


@pytest.fixture(scope="module")
def pocket() -> tuple[LongLlavaForConditionalGeneration, LongLlavaProcessor]:
    model = LongLlavaForConditionalGeneration.from_pretrained(POCKET).eval()
    return model, LongLlavaProcessor.from_pretrained(POCKET)


def test_the_splits_share_no_scan_and_leave_none_out() -> None:
    scans = {split: set(np.concatenate(split_scans(split)).tolist()) for split in SPLITS}
    assert sum(map(len, scans.values())) == len(set.union(*scans.values())) == 1797
    assert len(scans["test"]) == 355
    for split in SPLITS:  # every digit in every split
        assert all(len(indices) > 5 for indices in split_scans(split))


@pytest.mark.parametrize("task", ["caption", "read", "framed", "count", "order", "first_last", "sheet"])
def test_rows_are_functions_of_seed_and_number(task: str) -> None:
    def pixels(row):
        return [np.asarray(picture).tobytes() for picture in row["images"]]

    first, again = make_row(task, "train", 1, 5, 4, 2), make_row(task, "train", 1, 5, 4, 2)
    other_index, other_split = make_row(task, "train", 1, 6, 4, 2), make_row(task, "test", 1, 5, 4, 2)
    assert pixels(first) == pixels(again) and first["answer"] == again["answer"]
    assert pixels(first) != pixels(other_index) and pixels(first) != pixels(other_split)


def test_answers_are_right_by_construction() -> None:
    """What the answers say, recounted from the pictures' own colours and from each other."""
    counts = set()
    for index in range(40):
        row = make_row("framed", "test", 0, index, 16)
        corners = [np.asarray(picture)[0, 0].tolist() for picture in row["images"]]
        assert corners.count(list(COLOURS["red"])) == 1
        order = make_row("order", "test", 0, index, 8)
        assert [COLOURS[name] for name in order["answer"].split(", ")] == [
            tuple(np.asarray(frame)[0, 0].tolist()) for frame in order["images"]
        ]
        counts.add(int(make_row("count", "test", 0, index, 16)["answer"]))
        sheet = np.asarray(make_row("sheet", "test", 0, index)["images"][0])
        assert sheet.shape == (*SHEET, 3)
        lit = np.argwhere(sheet[..., 0] > 100) // SIDE  # the scan lies within one tile
        assert len(np.unique(lit, axis=0)) == 1
    assert counts == set(range(MAX_COUNT + 1))


def test_the_counted_digit_is_counted() -> None:
    """In training, where a list of all digits is asked about the same pictures, both answers agree."""
    agreed = 0
    for index in range(60):
        messages = make_row("count", "train", 0, index, 6, 5)["messages"]
        turns = [
            (a["content"][-1]["text"], b["content"][0]["text"])
            for a, b in zip(messages[::2], messages[1::2], strict=True)
        ]
        listed = [answer for question, answer in turns if "digits" in question and answer.count(",") == 5]
        counted = [answer for question, answer in turns if f"{COUNTED}" in question]
        if listed and counted:
            assert listed[0].split(", ").count(str(COUNTED)) == int(counted[0])
            agreed += 1
    assert agreed > 5


def test_wrong_names_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="'tset'"):
        split_scans("tset")
    with pytest.raises(ValueError, match="'sum'"):
        make_row("sum", "test", 0, 0)
    with pytest.raises(ValueError, match="9 frames .* 8"):
        make_row("order", "test", 0, 0, 9)


def test_examples_are_what_their_answers_say(tmp_path: Path) -> None:
    found = write_examples(tmp_path)
    assert set(found) == {"pictures", "video", "sheet"}
    for path in tmp_path.glob("*.png"):  # and they are the files that ship
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(EXAMPLES / path.name))), path.name
    assert Image.open(tmp_path / "sheet.png").size == (SHEET[1], SHEET[0])
    red = [
        number for number in range(1, 5)
        if Image.open(tmp_path / f"picture_{number}.png").getpixel((0, 0)) == COLOURS["red"]
    ]  # fmt: skip
    assert len(red) == 1
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_the_shipped_model_is_as_good_as_its_card_says(pocket) -> None:
    """50 of each, always the same; the card's 1,000 give 93 % for the count and 98 % or more for all others."""
    tasks = [("read", 1), ("framed", 16), ("first_last", 16), ("sheet", 1), ("count", 16)]
    found = measure(*pocket, tasks=tasks, rows=50)
    least = {"read@1": 0.95, "framed@16": 0.95, "first_last@16": 0.95, "sheet@1": 0.9, "count@16": 0.85}
    assert all(found[name] >= share for name, share in least.items()), found


def test_the_demo_gets_the_right_answers(pocket, tmp_path: Path) -> None:
    """The questions of `make demo`, about the files that ship."""
    model, processor = pocket
    right = {name: expected for name, (_, expected) in write_examples(tmp_path).items()}
    asked = {
        "pictures": (
            [{"type": "image", "path": str(p)} for p in sorted(EXAMPLES.glob("picture_*.png"))],
            DEMO[0],
            False,
        ),
        "video": ([{"type": "video", "path": str(EXAMPLES / "video.mp4")}], DEMO[1], False),
        "sheet": ([{"type": "image", "path": str(EXAMPLES / "sheet.png")}], DEMO[2], True),
    }
    for name, (media, question, tiles) in asked.items():
        row = {
            "messages": [{"role": "user", "content": [*media, {"type": "text", "text": question}]}],
            "sub_images": tiles,
            "answer": right[name],
        }
        assert answer(model, processor, [row]) == [right[name]], name


def test_evaluation_writes_its_numbers(pocket, tmp_path: Path) -> None:
    import json

    found = evaluate_pocket(POCKET, rows=2, output=tmp_path / "accuracy.json")
    assert json.loads((tmp_path / "accuracy.json").read_text()) == {"rows": 2, "accuracy": found}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def test_the_shipped_folder_is_small_enough(pocket) -> None:
    assert sum(path.stat().st_size for path in POCKET.iterdir()) < 8_000_000
