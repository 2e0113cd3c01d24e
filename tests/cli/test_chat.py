"""`longllava chat`: which files it finds, what it says about tokens, and that a kept cache changes no answer."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longllava.cli import app
from longllava.cli.chat import Cost, Medium, describe_costs, describe_window, find_media, read_media
from longllava.modeling_longllava import LongLlavaSession

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


def test_media_are_read_in_their_order(
    tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any], picture_files: list[Path], video_file: Path
) -> None:
    """Two pictures, a video, a picture, with a different number of tokens for frames and pictures."""
    media = [Medium("image", str(path)) for path in picture_files[:3]]
    media.insert(2, Medium("video", str(video_file)))
    session = LongLlavaSession(tiny_model(), tiny_processor(), tokens_per_image=16, tokens_per_frame=4, num_frames=3)
    costs = read_media(session, media)
    assert [cost.medium for cost in costs] == media
    assert [(cost.views, cost.tokens) for cost in costs] == [(1, 16), (1, 16), (3, 12), (1, 16)]
    paths = [block["path"] for block in session.messages[0]["content"]]
    assert paths == [medium.source for medium in media]


def test_description_groups_equal_costs() -> None:
    costs = [Cost(Medium("image", f"{index}.png"), 1, 36) for index in range(5)]
    costs += [Cost(Medium("video", "v.mp4"), 8, 288), Cost(Medium("image", "big.png"), 13, 468)]
    assert describe_costs(costs) == [
        "0.png ... 4.png: 5 pictures, 36 tokens each, 180 together",
        "v.mp4: 8 frames, 288 tokens",
        "big.png: whole and 12 tiles, 468 tokens",
    ]
    assert describe_window(1000, 4096) == "1000 of the window's 4096 tokens"
    assert "longer than the window" in describe_window(5000, 4096)


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


def test_a_session_goes_on_another_day(tiny_folder: Path, picture_files: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.session"
    read = runner.invoke(
        app, ["chat", str(picture_files[0]), "-m", str(tiny_folder), "--session", str(kept)], input=""
    )
    assert read.exit_code == 0 and kept.exists()  # what was read is kept without a question too
    kept.unlink()
    arguments = ["--model", str(tiny_folder), "--max-new-tokens", "3", "--session", str(kept)]
    first = runner.invoke(app, ["chat", *map(str, picture_files), "-q", "First?", *arguments])
    assert first.exit_code == 0, first.output
    second = runner.invoke(app, ["chat", "-q", "Second?", *arguments])
    assert second.exit_code == 0, second.output
    assert "picture" not in second.stderr  # nothing was read again
    tokens = [int(re.search(r"(\d+) of the window's", result.stderr)[1]) for result in (first, second)]
    assert tokens[1] > tokens[0] > 16


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
