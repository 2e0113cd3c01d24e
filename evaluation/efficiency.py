"""Time and memory, ours next to a peer in the same run: `python -m longllava.evaluation.efficiency scan`."""

# ruff: noqa: E402
import os

# Read when torch loads its threads, so it comes first. Threads of libgomp spin while they wait, by default for so long
# that they take the cores from each other as soon as anything else runs on the machine. This is much shorter.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """One command per measurement; a callback keeps the name of a single command on the command line."""


def scan_inputs(channels: int, length: int, states: int) -> dict[str, Tensor]:
    """Random inputs of one scan as a trained Mamba layer sees them: A = -1 .. -states, time steps near 0.05."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(1, length, channels, generator=generator),
        "dt": torch.randn(1, length, channels, generator=generator) - 3,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(1, length, states, generator=generator),
        "C": torch.randn(1, length, states, generator=generator),
        "D": torch.ones(channels),
        "z": torch.randn(1, length, channels, generator=generator),
        "dt_bias": torch.zeros(channels),
    }


def _ours(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    from longllava.modeling_longllava import selective_scan

    return selective_scan(**inputs)


def _transformers(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, B, C, z = (inputs[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z"))
    y, state = mamba_selective_scan(
        x,
        dt,
        inputs["A"],
        B,
        C,
        D=inputs["D"],
        z=z,
        delta_bias=inputs["dt_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    return y.transpose(1, 2), state


SCANS: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "longllava": _ours,
    "transformers": _transformers,
}


def _run(name: str, inputs: dict[str, Tensor], train: bool) -> tuple[Tensor, ...]:
    """Outputs of one scan, and with `train` also the gradients of all inputs."""
    if not train:
        with torch.no_grad():
            return SCANS[name](inputs)
    inputs = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
    y, state = SCANS[name](inputs)
    return y.detach(), state.detach(), *torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()))


def _peak_bytes() -> int:
    """Largest resident memory of this process since the counter was last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # the line reads "VmHWM:   1234 kB"


@app.command("scan-memory", hidden=True)
def scan_memory(name: str, channels: int, length: int, states: int, train: bool = False) -> None:
    """Print the bytes that one scan needs beyond its inputs and outputs; run in a process of its own by `scan`."""
    _run(name, scan_inputs(channels, 8, states), train)  # what the libraries load once is not the scan's
    inputs = scan_inputs(channels, length, states)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    before = _peak_bytes()
    outputs = _run(name, inputs, train)
    after = _peak_bytes()
    typer.echo(after - before - sum(tensor.nbytes for tensor in outputs))


@app.command()
def scan(
    channels: Annotated[int, typer.Option(help="Inner channels of the Mamba layer.")] = 1024,
    length: Annotated[int, typer.Option(help="Tokens of the row.")] = 8192,
    states: Annotated[int, typer.Option(help="States per channel.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed pairs; the median is shown.")] = 5,
    train_length: Annotated[
        int,
        typer.Option(help="Tokens for forward and backward; the peer takes quadratic time. 0: leave out."),
    ] = 256,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Our selective scan next to the one of transformers, float32 on the CPU: time in pairs, and peak memory."""
    figures = {"channels": channels, "states": states, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for mode, tokens in {"forward": length, "training": train_length}.items():
        if tokens == 0:
            continue
        for name in SCANS:
            _run(name, scan_inputs(channels, 64, states), train=mode == "training")  # warms up
        inputs = scan_inputs(channels, tokens, states)
        seconds: dict[str, list[float]] = {name: [] for name in SCANS}
        error = 0.0
        # Ours and theirs in turn, so that both see the same machine.
        for _ in tqdm(range(repeats), desc=mode, file=sys.stderr):
            results = {}
            for name in SCANS:
                start = time.perf_counter()
                results[name] = _run(name, inputs, train=mode == "training")
                seconds[name].append(time.perf_counter() - start)
            for ours, theirs in zip(*results.values(), strict=True):
                error = max(error, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        memory = {}
        for name in SCANS:
            command = [sys.executable, "-m", "longllava.evaluation.efficiency", "scan-memory", name]
            command += [str(channels), str(tokens), str(states)] + (["--train"] if mode == "training" else [])
            memory[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = statistics.median(t / o for o, t in zip(seconds["longllava"], seconds["transformers"], strict=True))
        figures[mode] = {
            "length": tokens,
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "megabytes_beyond_inputs_and_outputs": {name: value / 1e6 for name, value in memory.items()},
            "times_faster": ratio,
            "largest_relative_difference": error,
        }
        typer.echo(f"{mode}, 1 x {channels} channels x {tokens} tokens x {states} states, float32, CPU")
        for name in SCANS:
            typer.echo(f"  {name:<14}{statistics.median(seconds[name]):9.3f} s{memory[name] / 1e6:10.0f} MB")
        typer.echo(f"  {ratio:.1f} times faster; largest relative difference {error:.1e}")
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
