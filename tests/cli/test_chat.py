"""`longllava chat`: which files it finds, what it says about tokens, and that a kept cache changes no answer."""

import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from longllava.cli import app
from longllava.cli.chat import Conversation, Cost, Medium, describe_costs, find_media

runner = CliRunner()


def test_folders_files_and_urls_keep_their_order(picture_files: list[Path], video_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(picture_files[1], folder / "b10.PNG")
    shutil.copy(picture_files[2], folder / "b9.jpg")
    (folder / "._b9.jpg").write_bytes(b"what a Mac leaves behind")
    shutil.copy(video_file, folder / "a.mp4")
    (folder / "notes.txt").write_text("no picture")
    url = "https://example.org/film.mp4?start=3"
    found = find_media([str(picture_files[0]), str(folder), url])
    assert found == [
        Medium("image", str(picture_files[0])),
        Medium("video", str(folder / "a.mp4")),
        Medium("image", str(folder / "b9.jpg")),
        Medium("image", str(folder / "b10.PNG")),
        Medium("video", url),
    ]


def test_missing_path_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder .*gone.png"):
        find_media([str(tmp_path / "gone.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds neither pictures nor videos"):
        find_media([str(tmp_path / "empty")])


@pytest.fixture
def conversation(
    tiny_model: Callable[..., Any],
    tiny_processor: Callable[..., Any],
    picture_files: list[Path],
    video_file: Path,
) -> Callable[..., Conversation]:
    """A conversation about three pictures and, between the second and the third, a video."""
    media = [Medium("image", str(path)) for path in picture_files[:3]]
    media.insert(2, Medium("video", str(video_file)))

    def build(**options: Any) -> Conversation:
        model, processor = tiny_model(), tiny_processor()
        # A random model writes bytes that are no text; only letters come back from the tokenizer as they were.
        letters = {processor.tokenizer.convert_tokens_to_ids(letter) for letter in string.ascii_letters}
        model.generation_config.suppress_tokens = [
            token for token in range(len(processor.tokenizer)) if token not in letters
        ]
        return Conversation(model, processor, media, max_new_tokens=6, **options)

    return build


def test_costs_are_those_of_the_prompt(conversation: Callable[..., Conversation]) -> None:
    """Each medium's share, in order, with a different number for frames and pictures; they add up to the prompt."""
    talk = conversation(tokens_per_image=16, tokens_per_frame=4, num_frames=3)
    talk.add_question("What?")
    assert [(cost.views, cost.tokens) for cost in talk.costs] == [(1, 16), (1, 16), (3, 12), (1, 16)]
    image_tokens = (talk.inputs["input_ids"] == talk.processor.image_token_id).sum().item()
    assert image_tokens == 60
    assert talk.prompt_length == talk.inputs["input_ids"].shape[1]


def test_tiles_count_for_their_picture(conversation: Callable[..., Conversation]) -> None:
    """90 x 40 and 37 x 81 pixels are each two tiles of 56 and the whole; 64 x 64 is more than one tile can hold."""
    talk = conversation(sub_images=True, max_tiles=2, num_frames=2)
    talk.add_question("What?")
    assert all(cost.tokens == 4 * cost.views for cost in talk.costs)
    assert [cost.views for cost in talk.costs][1:] == [3, 2, 3]


def test_second_turn_reuses_the_cache_and_equals_a_fresh_run(conversation: Callable[..., Conversation]) -> None:
    """The second answer on the kept cache is the one that a run over the whole conversation gives."""
    talk = conversation()
    talk.add_question("First?")
    talk.answer()
    first_prompt = talk.prompt_length
    talk.add_question("Second?")
    second = talk.answer()
    assert talk.reused >= first_prompt, "the pictures were read a second time"

    sources = [medium.source for medium in talk.media]
    whole = talk.processor.apply_chat_template(talk.messages[:-1], add_generation_prompt=True, tokenize=False)
    inputs = talk.processor(text=whole, images=[*sources[:2], sources[3]], videos=[sources[2]])
    assert torch.equal(inputs["input_ids"], talk.inputs["input_ids"])
    fresh = talk.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert talk.processor.tokenizer.decode(fresh, skip_special_tokens=True) == second


def test_an_answer_that_is_spelt_differently_drops_the_cache(conversation: Callable[..., Conversation]) -> None:
    talk = conversation()
    talk.add_question("First?")
    talk.answer()
    talk.messages[-1]["content"][0]["text"] = "something else"
    talk.add_question("Second?")
    talk.answer()
    assert talk.reused == 0


def test_description_groups_equal_costs() -> None:
    costs = [Cost(Medium("image", f"{index}.png"), 1, 36) for index in range(5)]
    costs += [Cost(Medium("video", "v.mp4"), 8, 288), Cost(Medium("image", "big.png"), 13, 468)]
    assert describe_costs(costs, 1000, 4096) == [
        "0.png ... 4.png: 5 pictures, 36 tokens each, 180 together",
        "v.mp4: 8 frames, 288 tokens",
        "big.png: whole and 12 tiles, 468 tokens",
        "1000 of the window's 4096 tokens",
    ]
    assert "longer than the window" in describe_costs([], 5000, 4096)[0]


def test_one_question(tiny_folder: Path, picture_files: list[Path], video_file: Path) -> None:
    arguments = [*map(str, picture_files[:2]), str(video_file), "--frames", "3"]
    result = runner.invoke(
        app,
        ["chat", *arguments, "-q", "What?", "--model", str(tiny_folder), "--max-new-tokens", "4", "--device", "cpu"],
    )
    assert result.exit_code == 0, result.output
    assert f"{picture_files[0]}: 4 tokens" in result.stderr
    assert f"{video_file}: 3 frames, 12 tokens" in result.stderr
    assert re.search(r"^\d+ of the window's 262144 tokens$", result.stderr, flags=re.MULTILINE)
    assert "tokens" not in result.stdout


def test_conversation_reads_lines(tiny_folder: Path, picture_files: list[Path]) -> None:
    """Two questions, an empty line between them that asks nothing, then the end of input."""
    arguments = ["chat", str(picture_files[0]), "--model", str(tiny_folder), "--max-new-tokens", "3"]
    result = runner.invoke(app, arguments, input="First?\n\nSecond?\n")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^\d+ of the window's 262144 tokens$", result.stderr, flags=re.MULTILINE)) == 2
    assert result.stderr.count("picture0.png") == 1


def test_fps_with_a_limit(tiny_folder: Path, video_file: Path) -> None:
    """2 seconds at 3 frames a second are 6 frames or so; 4 are allowed."""
    arguments = [str(video_file), "--fps", "3", "-q", "What?", "-m", str(tiny_folder), "--max-new-tokens", "2"]
    assert "frames, 24 tokens" in runner.invoke(app, ["chat", *arguments]).stderr
    assert ": 4 frames, 16 tokens" in runner.invoke(app, ["chat", *arguments, "--frames", "4"]).stderr


def test_a_question_that_cannot_be_asked_does_not_end_the_conversation(
    tiny_folder: Path, picture_files: list[Path]
) -> None:
    arguments = ["chat", str(picture_files[0]), "--model", str(tiny_folder), "--max-new-tokens", "3"]
    result = runner.invoke(app, arguments, input="First?\nWhat does <image> mean?\nThird?\n")
    assert result.exit_code == 0, result.output
    assert "longllava: a question cannot contain <image>" in result.stderr
    assert len(re.findall(r"^\d+ of the window's", result.stderr, flags=re.MULTILINE)) == 2


def test_unreadable_picture_is_one_line_with_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    arguments = ["chat", str(broken), "-q", "What?", "--model", str(tiny_folder)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("longllava: ") and "broken.png" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.output
    debugged = runner.invoke(app, ["--debug", *arguments])
    assert isinstance(debugged.exception, ValueError), "--debug must let the error through"
