"""Time and memory, ours next to peers and to the limits of the machine in the same run.

Each command prints its table and, with --output FOLDER, writes NAME.json and a plot, NAME.png.
"""

# Everything heavy is imported inside the commands: `longllava --help` lists them and answers at once.
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from longllava.evaluation.measure import Report

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback(help=__doc__)
def _measuring() -> None:
    # Read when torch loads its threads, which each command does itself. If they spin for long while they wait, as by
    # default, they take the cores from each other as soon as anything else runs on the machine; if they sleep at once,
    # as the other commands let them, small operations wait for them.
    os.environ.setdefault("GOMP_SPINCOUNT", "500")


Output = Annotated[Path | None, typer.Option(help="Folder for the figures as JSON and their plot.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16.")]
Repeats = Annotated[int, typer.Option(help="Timed runs of each, in turn; the median is shown.", min=1)]
Limit = Annotated[float, typer.Option(help="Seconds; what is slower runs once and no longer size after it.")]
Size = Annotated[str | None, typer.Option("--config", help="small, pocket, 9b or 53b. By default 9b on a GPU.")]


def numbers(option: str, text: str) -> list[int]:
    """The numbers of an option such as `100,200,300`; none for an empty text."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise typer.BadParameter(f"--{option} takes numbers above 0 with commas between them, not {text!r}")
    return found


def chosen(text: str | None, names: tuple[str, ...]) -> list[str]:
    """Those who take part, in the order of `names`; all without an option."""
    wanted = list(names) if text is None else text.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        raise typer.BadParameter(f"--who takes {', '.join(names)}, not {', '.join(unknown)}")
    return [name for name in names if name in wanted]


def place(device: str, dtype: str) -> tuple["torch.device", "torch.dtype"]:
    from longllava.evaluation.measure import choose_device, choose_dtype

    where = choose_device(device)
    return where, choose_dtype(dtype, where)


def show(report: "Report") -> None:
    report.save()
    typer.echo(report.text())
    typer.echo(report.draw())


@app.command()
def scan(
    context: typer.Context,
    lengths: Annotated[str | None, typer.Option(help="Tokens, forward.")] = None,
    train_lengths: Annotated[str | None, typer.Option(help="Tokens, forward and backward; '' leaves it out.")] = None,
    channels: Annotated[int | None, typer.Option(help="Inner channels of the Mamba layer.", min=1)] = None,
    states: Annotated[int, typer.Option(help="States per channel.", min=1)] = 16,
    who: Annotated[
        str | None,
        typer.Option(help="Of torch, compile, triton (backends of ours), reference, mamba_ssm, transformers."),
    ] = None,
    repeats: Repeats = 5,
    limit: Limit = 30,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
) -> None:
    """The selective scan: backends of ours, the plain loop, transformers' function and mamba_ssm's kernel."""
    from longllava.evaluation import measurements, workloads

    where, kind = place(device, dtype)
    large = where.type == "cuda"
    # Backward in transformers takes time with the square of the length.
    forward = numbers("lengths", ("1024,8192,32768,131072" if large else "1024,8192") if lengths is None else lengths)
    both = numbers("train-lengths", ("256,8192" if large else "256") if train_lengths is None else train_lengths)
    names = chosen(who, workloads.scan_names(where))
    width = channels or (8192 if large else 1024)
    show(measurements.measure_scan(where, kind, width, states, forward, both, names, repeats, limit, output))


@app.command()
def prefill(
    context: typer.Context,
    size: Size = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of the text.")] = None,
    repeats: Repeats = 3,
    limit: Limit = 60,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
) -> None:
    """Reading a text: our language model against transformers' JambaForCausalLM with the same weights."""
    from longllava.evaluation import measurements

    where, kind = place(device, dtype)
    large = where.type == "cuda"
    usual = "1024,4096,16384,65536,100000,144000,288000" if large else "1024,2048,4096,8192,16384"
    tokens = numbers("lengths", lengths or usual)
    show(measurements.measure_prefill(where, kind, size or _size(large), tokens, repeats, limit, output))


@app.command()
def images(
    context: typer.Context,
    size: Size = None,
    counts: Annotated[str, typer.Option(help="Pictures read in full, each number by itself.")] = "10,100,1000",
    tail: Annotated[
        str, typer.Option(help="Pictures shown by the last pieces on a cache that is already that long.")
    ] = "",
    tokens_per_image: Annotated[int | None, typer.Option(help="By default the model's.")] = None,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(help="Tokens of a piece. By default 512 for small models, else 8192.", min=1)
    ] = None,
    budget_gb: Annotated[
        float | None, typer.Option(help="Take no more of the GPU, and find the largest number that fits.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
) -> None:
    """Pictures from their files to the first token: seconds, and memory beyond weights and cache."""
    from longllava.evaluation import measurements

    where, kind = place(device, dtype)
    name = size or _size(where.type == "cuda")
    piece = prefill_chunk_size or (8192 if name in ("9b", "53b") else 512)
    whole, last = numbers("counts", counts), numbers("tail", tail)
    show(measurements.measure_images(where, kind, name, whole, last, tokens_per_image, piece, budget_gb, output))


@app.command()
def pictures(
    context: typer.Context,
    count: Annotated[int, typer.Option(help="JPEG files of 1280 x 720.", min=1)] = 200,
    repeats: Repeats = 3,
    limit: Limit = 120,
    output: Output = None,
) -> None:
    """Preparing picture files on the CPU: our processor against transformers' LlavaImageProcessor in one call."""
    from longllava.evaluation import measurements

    show(measurements.measure_pictures(count, repeats, limit, output))


@app.command()
def decode(
    context: typer.Context,
    size: Size = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens of the cache, which is filled, not read.")] = None,
    who: Annotated[str | None, typer.Option(help="Of longllava, transformers, longllava static.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of a run.", min=1)] = 32,
    repeats: Repeats = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
) -> None:
    """New tokens behind a long context, next to what reading weights and cache once would take."""
    from longllava.evaluation import measurements

    where, kind = place(device, dtype)
    large = where.type == "cuda"
    lengths = numbers("contexts", contexts or ("1024,100000,1000000,2900000" if large else "1024,32768,150000"))
    names = chosen(who, ("longllava", "transformers", "longllava static"))
    name = size or _size(large)
    show(measurements.measure_decode(where, kind, name, lengths, names, tokens, repeats, output))


@app.command()
def session(
    context: typer.Context,
    size: Annotated[str, typer.Option("--config", help="pocket (the shipped weights), small, 9b or 53b.")] = "pocket",
    pictures: Annotated[int, typer.Option(help="Pictures of the conversation.", min=1)] = 1000,
    questions: Annotated[int, typer.Option(help="Questions, one after the other.", min=2)] = 100,
    scratch: Annotated[int, typer.Option(help="How many of them are asked from scratch as well.", min=1)] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 16,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    output: Output = None,
) -> None:
    """Questions on the same pictures in a session and from scratch; the answers have to be equal."""
    from longllava.evaluation import measurements

    where, kind = place(device, dtype)
    report = measurements.measure_session(where, kind, size, pictures, questions, scratch, max_new_tokens, output)
    show(report)
    if not report.summary["answers_equal"]:
        raise ValueError("answers in the session and from scratch differ; the table shows where")


def _size(large: bool) -> str:
    return "9b" if large else "small"


if __name__ == "__main__":
    app()
