"""The `longllava` command: quick help, one-line errors, and that each command reaches the function it stands for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from longllava.cli import app
from longllava.cli import main as command_line

runner = CliRunner()
COMMANDS = ["chat", "convert", "export", "push", "evaluate", "train"]


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    """torch alone takes seconds to import; `--help` must not wait for it."""
    code = (
        "import sys\n"
        "from longllava.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in COMMANDS)
    assert result.stdout.splitlines()[-1] == "[]"


def test_without_a_command_there_is_help() -> None:
    assert "Usage" in runner.invoke(app, []).output


def test_wrong_option_is_an_error_of_usage() -> None:
    result = runner.invoke(app, ["chat", "--no-such-option"])
    assert result.exit_code == 2 and "--no-such-option" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "gone.png", "-q", "What?", "-m", "also-gone"], "gone.png"),
        (["chat", "-q", "What?", "-m", "owner/gone"], "owner/gone"),
        (["evaluate", "pocket", "-m", "owner/gone"], "owner/gone"),
        (["evaluate", "needle", "-m", "owner/gone"], "owner/gone"),
        (["evaluate", "needle", "--needle", "gone.json"], "gone.json"),
        (["convert", "gone", "new"], "gone"),
        (["export", "gone", "new"], "gone"),
        (["push", "gone", "owner/name"], "gone"),
    ],
)
def test_missing_input_is_one_line(arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("longllava: ") and says in result.stderr


def test_message_of_many_lines_becomes_one(tiny_folder: Path, tmp_path: Path) -> None:
    """A tensor too many is listed by `export` on lines of its own; the command prints them in one."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    weights["left.over"] = weights["lm_head.weight"].clone()
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    result = runner.invoke(app, ["export", str(tiny_folder), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "left.over" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_export_writes_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["export", str(tiny_folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert {"config.json", "model.safetensors", "modeling_longllava.py"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_chat_asks_for_a_model_where_none_ships(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command_line, "POCKET", tmp_path / "none")
    result = runner.invoke(app, ["chat", "-q", "What?"])
    assert result.exit_code == 2 and "--model" in result.output


def test_missing_module_names_the_extra_that_brings_it(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "longllava.trainers.sft", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    result = runner.invoke(app, ["train", "--config", "recipe.yaml"])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1 and "longllava[train]" in result.stderr


def test_train_passes_everything_on(monkeypatch) -> None:
    """Options that this command does not know belong to the trainer, `--help` too."""
    from longllava.trainers import sft

    seen: list[list[str]] = []
    monkeypatch.setattr(sft, "main", seen.append)
    arguments = ["--config", "recipe.yaml", "--max_steps", "3", "--bf16", "--help"]
    assert runner.invoke(app, ["train", *arguments]).exit_code == 0
    assert seen == [arguments]


def test_evaluate_pocket_prints_a_table(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """With one task instead of all: the random model's accuracy stands in the table and in the JSON file."""
    from longllava.evaluation import pocket

    monkeypatch.setattr(pocket, "TASKS", (("read", 1),))
    output = tmp_path / "accuracy.json"
    arguments = ["--model", str(tiny_folder), "--rows", "2", "--output", str(output)]
    result = runner.invoke(app, ["evaluate", "pocket", *arguments])
    assert result.exit_code == 0, result.output
    assert "| read | 1 | 0.0% |" in result.stdout
    assert json.loads(output.read_text()) == {"rows": 2, "accuracy": {"read@1": 0.0}}


@pytest.fixture
def needle_settings(monkeypatch) -> dict[str, Any]:
    """What `longllava evaluate needle` asks for: filled instead of a run, whose report has one right answer."""
    from longllava.evaluation import needle

    seen: dict[str, Any] = {}

    def record(model: Any, processor: Any, output: Path, **settings: Any) -> dict[str, Any]:
        seen.update(settings, model=model.name_or_path, output=output)
        answer = {"length": 10, "depth": 0, "right": True, "seconds": 1.0}
        return needle.summarize({"lengths": [10], "depths": [0], "trials": 1}, [answer])

    monkeypatch.setattr(needle, "evaluate_needle", record)
    return seen


def test_evaluate_needle_has_the_grid_of_the_paper_by_default(needle_settings: dict[str, Any]) -> None:
    result = runner.invoke(app, ["evaluate", "needle"])
    assert result.exit_code == 0, result.output
    assert "| 0 % | 100.0 |" in result.stdout
    assert needle_settings.pop("jobs") == torch.get_num_threads()  # the pocket on a CPU
    assert needle_settings == {
        "model": str(command_line.POCKET), "output": Path("runs/needle"), "lengths": [*range(100, 1001, 100), 2000],
        "depths": list(range(0, 101, 10)), "haystack": None, "needles": None, "trials": None,
        "tokens_per_frame": None, "seed": 2024,
    }  # fmt: skip


def test_evaluate_needle_takes_needles_one_by_one_or_from_a_file(
    needle_settings: dict[str, Any], tmp_path: Path
) -> None:
    ones = ["--needle", "a.png", "--question", "Who?", "--answer", "Ann"]
    others = ["--needle", "b.png", "--answer", "Bob", "--question", "And who?"]
    options = ["--lengths", "5,50", "--depths", "0,12.5", "--haystack", "film.mp4", "--tokens-per-frame", "36"]
    assert runner.invoke(app, ["evaluate", "needle", *ones, *others, *options]).exit_code == 0
    assert needle_settings["needles"] == [("a.png", "Who?", "Ann"), ("b.png", "And who?", "Bob")]
    assert needle_settings["lengths"] == [5, 50] and needle_settings["depths"] == [0, 12.5]
    assert needle_settings["haystack"] == "film.mp4" and needle_settings["tokens_per_frame"] == 36

    file = tmp_path / "needles.json"
    file.write_text(json.dumps([{"picture": "a.png", "question": "Who?", "answer": "Ann"}]))
    assert runner.invoke(app, ["evaluate", "needle", "--needle", str(file)]).exit_code == 0
    assert needle_settings["needles"] == [(str(tmp_path / "a.png"), "Who?", "Ann")]


def test_evaluate_needle_looks_into_a_video(tiny_folder: Path, video_file: Path, picture_files: list[Path]) -> None:
    """The whole way with a random model: nothing is found, and everything is written."""
    output = tiny_folder / "needle"
    arguments = ["--model", str(tiny_folder), "--haystack", str(video_file), "--output", str(output)]
    arguments += ["--needle", str(picture_files[0]), "--question", "Which pattern?", "--answer", "Blocks."]
    result = runner.invoke(app, ["evaluate", "needle", *arguments, "--lengths", "4,12", "--depths", "0,100"])
    assert result.exit_code == 0, result.output
    assert "| 100 % | 0.0 | 0.0 |" in result.stdout and "0.0 % of 4 needles" in result.stdout
    assert {path.name for path in output.iterdir()} == {"needle.jsonl", "needle.json", "needle.png"}
    report = json.loads((output / "needle.json").read_text())
    assert report["settings"]["haystack"] == str(video_file) and report["settings"]["model"] == tiny_folder.name
    assert [answer["expected"] for answer in report["answers"]] == ["Blocks."] * 4

    result = runner.invoke(app, ["evaluate", "needle", *arguments, "--lengths", "4,13", "--depths", "0,100"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "12 frames" in result.stderr and "13" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--needle", "a.png", "--needle", "b.png", "--question", "Who?"], "2 --needle, 1 --question and 0 --answer"),
        (["--needle", "needles.json", "--answer", "Ann"], "needles.json"),
        (["--lengths", "100;200"], "'100;200'"),
        (["--depths", "top"], "'top'"),
    ],
)
def test_evaluate_needle_names_what_does_not_fit(arguments: list[str], says: str) -> None:
    result = runner.invoke(app, ["evaluate", "needle", *arguments], terminal_width=200)
    assert result.exit_code == 2 and says in result.output
