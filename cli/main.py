"""The `longllava` command; every heavy import is inside the command that needs it, so that `--help` is quick."""

import typer

app = typer.Typer(no_args_is_help=True, help="LongLLaVA: questions about many pictures, long videos, big images.")


@app.callback()
def main() -> None:
    """LongLLaVA: questions about many pictures, long videos, big images."""
