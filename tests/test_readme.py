"""The README: its Python runs, its commands exist, its tree names what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longllava.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def shell_lines(command: str) -> list[str]:
    """The lines of all shell blocks that start with `command`, without comments."""
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    lines = [line.split("  #")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line.startswith(command)]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_block_runs(index: int) -> None:
    """Each block by itself in a clean process, from the root of the repository, as a reader would paste it.

    Where its last line promises an output (`print(...)  # 8`), that is what it prints.
    """
    result = subprocess.run(
        [sys.executable, "-c", blocks("python")[index]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "the block prints nothing"
    _, comment, promised = blocks("python")[index].splitlines()[-1].partition("  # ")
    if comment:
        assert result.stdout.strip() == promised


def test_there_is_python_and_shell() -> None:
    assert blocks("python") and shell_lines("make") and shell_lines("longllava")


def test_make_targets_exist() -> None:
    for line in shell_lines("make"):
        result = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}: {result.stderr}"


@pytest.mark.parametrize("line", sorted(set(shell_lines("longllava"))))
def test_command_and_its_options_exist(line: str) -> None:
    """Every `--option` of a `longllava` line is in the help of that command, and a named recipe is there."""
    words = line.split()
    # The command is what stands before the first argument; `evaluate` has commands of its own, and one of them too.
    command = words[1:4] if words[1:3] == ["evaluate", "efficiency"] else words[1:3]
    command = command if words[1] == "evaluate" else words[1:2]
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for option in re.findall(r"(?<!\S)--[a-z_-]+", line):
        # The trainers' parser reads --config before it knows the other options.
        assert option in result.output or option == "--config", f"{option} of {line!r} is not in the help"
    for recipe in re.findall(r"recipes/\S+", line):
        assert (ROOT / recipe).is_file()


def test_tree_names_what_is_there() -> None:
    """Every file and folder in the annotated tree exists, and every Python file of the packages is in the tree."""
    tree = next(block for block in blocks("text") if "modeling_longllava/" in block)
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            named.add(name.rstrip("/"))
        else:
            named.add(folder + name.rstrip("/"))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"in the tree and not in the repository: {missing}"
    packages = ("modeling_longllava", "processing", "trainers", "evaluation", "cli")
    files = {f"{package}/{path.name}" for package in packages for path in (ROOT / package).glob("*.py")}
    unnamed = sorted(name for name in files - named if not name.endswith("__init__.py"))
    assert not unnamed, f"in the repository and not in the tree: {unnamed}"
