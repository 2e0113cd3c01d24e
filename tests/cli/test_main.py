"""The `longllava` command: quick help, one-line errors, and that each command reaches the function it stands for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
