"""How things are measured: a clock that takes contenders in turn, memory, the limits of the machine, and what is
written down."""

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` or one such as `cuda:1`; `auto` is a GPU where there is one.

    Raises:
        ValueError: for another device, or if a GPU is asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device is auto, cpu or cuda, not {name}")
    if kind == "cpu":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no GPU here")
    return torch.device(kind, int(index or torch.cuda.current_device()))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: if the name is none of auto, float32, bfloat16, float16.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype is auto, {', '.join(dtypes)}, not {name}")
    return dtypes[name]


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that a figure depends on besides the code."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The model of the processor, where Linux says it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


# ---------------------------------------------------------------------------------------------------------------------
# Time


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and the seconds until the device had done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """How many times faster ours is: the median over pairs that ran one after the other; None without a pair."""
    pairs = [their / our for our, their in zip(ours, theirs, strict=False)]
    return statistics.median(pairs) if pairs else None


@dataclass
class Outcome:
    """What became of one contender at one size; `note` says why there is nothing, or why there is only one time."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


class Contest:
    """Contenders that run in turn, at one size after the other, so that all of them see the same machine.

    The first run of each is not timed: it loads and compiles. One that takes longer than `limit` seconds for it is
    not run again. Whoever fails (out of memory, say) or is that slow leaves out all sizes that follow; notes say so.
    """

    def __init__(self, device: torch.device, repeats: int, limit: float):
        self.device, self.repeats, self.limit = device, repeats, limit
        self.left: dict[str, str] = {}  # who has dropped out, and why

    def run(self, size: str, contenders: Mapping[str, Callable[[], Any]]) -> dict[str, Outcome]:
        """Outcomes by name; `result` is what the first run returned."""
        outcomes = {name: self._first(name, size, function) for name, function in contenders.items()}
        for _ in tqdm(range(self.repeats), desc=size, file=sys.stderr, leave=False):
            for name, function in contenders.items():
                if name in self.left:
                    continue
                try:
                    outcomes[name].seconds.append(timed(self.device, function)[1])
                except Exception as error:
                    self._drop(name, size, outcomes[name], error)
        return outcomes

    def _first(self, name: str, size: str, function: Callable[[], Any]) -> Outcome:
        if name in self.left:
            return Outcome(note=self.left[name])
        outcome = Outcome()
        try:
            outcome.result, seconds = timed(self.device, function)
        except Exception as error:  # a peer that fails is a finding; the others go on
            self._drop(name, size, outcome, error)
            return outcome
        if seconds > self.limit:
            outcome.seconds, outcome.note = [seconds], "one run, the first"
            self.left[name] = f"left out: {seconds:.0f} s at {size}"
        return outcome

    def _drop(self, name: str, size: str, outcome: Outcome, error: Exception) -> None:
        reason = why(error)
        outcome.note = reason
        self.left[name] = f"left out: {reason} at {size}"
        release(self.device)


def why(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:120]}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory


M_MMAP_THRESHOLD = -3  # of mallopt(3)


def release(device: torch.device) -> None:
    """Give memory that nobody uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # The allocator keeps freed memory resident, where a later peak could hide.
        ctypes.CDLL(None).malloc_trim(0)


def keep_nothing_freed() -> None:
    """From now on every block of 128 KB or more goes back to the system when it is freed (Linux; slower).

    Else the allocator keeps blocks for the next of that size, more of them the longer threads take and free them, and
    the resident memory says what was kept, not what was in use.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def peak_memory(device: torch.device, function: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `function` returns, and the most bytes that were held at one time beyond those held before.

    On a GPU these are PyTorch's allocations; on a CPU the resident memory of this process, read from Linux (elsewhere
    None). What a library loads once counts too, so `function` should have run before.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not CLEAR.exists():
        return function(), None
    CLEAR.write_text("5")  # the peak is from now on that since now
    before = _peak_resident()
    result = function()
    return result, max(_peak_resident() - before, 0)


def _peak_resident() -> int:
    """Largest resident memory since the counter was last reset, in bytes; the line reads `VmHWM:   1234 kB`."""
    return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def budget(device: torch.device, gigabytes: float | None) -> Iterator[None]:
    """Let PyTorch take no more than so many gigabytes (1e9 bytes) of the GPU.

    Raises:
        ValueError: on a CPU, where nothing keeps a process to an amount of resident memory, or for more than there is.
    """
    if gigabytes is None:
        yield
        return
    if device.type != "cuda":
        raise ValueError(f"--budget-gb {gigabytes:g} needs a GPU: on a CPU nothing holds a process to a budget")
    total = torch.cuda.get_device_properties(device).total_memory
    if gigabytes * 1e9 > total:
        raise ValueError(f"--budget-gb {gigabytes:g}: the GPU has {total / 1e9:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# ---------------------------------------------------------------------------------------------------------------------
# The limits of the machine


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured rates: floating point operations per second of a large matrix product, and bytes per second of a copy.

    A copy counts bytes read and bytes written.
    """
    side, size = (8192, 4 * 10**9) if device.type == "cuda" else (1024, 128 * 10**6)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    product, copy = (
        statistics.median(timed(device, function)[1] for _ in range(7))
        for function in (lambda: left @ right, lambda: target.copy_(source))
    )
    return {"flops_per_second": 2 * side**3 / product, "bytes_per_second": 2 * size / copy}


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Least squares: how much y grows with x; None for fewer than two points."""
    return statistics.linear_regression(x, y).slope if len(x) > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# What is written down


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text; `columns` maps a key, which is also the heading, to the format of its values."""
    lines = [[key.replace("_", " ") for key in columns]]
    for row in rows:
        values = [(row.get(key), style) for key, style in columns.items()]
        lines.append(["-" if value is None else format(value, style) for value, style in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [style.endswith("s") for style in columns.values()]  # text to the left, numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


@dataclass
class Report:
    """What a measurement found: conditions, one row per figure, and how they are shown.

    Every row is written to `folder/name.json` as soon as it is there, so that what stops a later one loses none.
    `columns` are those of the table (see [`table`]), `lines` the sentences under it, and `plot` the arguments of
    [`longllava.evaluation.plots.line_plot`] besides the path; empty where there is nothing to draw.
    """

    name: str
    folder: Path | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    columns: dict[str, str]
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    plot: dict[str, Any] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the figures so far, if there is a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        figures = {
            "machine": self.machine,
            "settings": self.settings,
            "limits": self.limits,
            "rows": self.rows,
            "summary": self.summary,
        }
        (self.folder / f"{self.name}.json").write_text(json.dumps(figures, indent=2) + "\n")

    def draw(self) -> str:
        """Write `folder/name.png`, if there is a folder, something to draw and matplotlib; returns what is there."""
        if self.folder is None:
            return ""
        written = f"written: {self.folder / self.name}.json"
        if not self.plot:
            return written
        try:
            from longllava.evaluation.plots import line_plot

            line_plot(self.folder / f"{self.name}.png", **self.plot)
        except ModuleNotFoundError as error:
            return f"{written}; no plot: {error}"
        return f"{written} and .png"

    def text(self) -> str:
        """Everything a reader needs to repeat it, the table, and what follows from it."""
        here = self.machine
        lines = [
            f"{self.name}: {here['name']}, {here['dtype']}, threads {here['threads']}, torch {here['torch']}, "
            f"transformers {here['transformers']}, {here['date']}",
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()),
        ]
        if self.limits:
            lines.append(
                f"measured limits: matrix product {self.limits['flops_per_second'] / 1e12:.2f} TFLOP/s, "
                f"copy {self.limits['bytes_per_second'] / 1e9:.1f} GB/s read and written"
            )
        # A column in which nothing stands is left out.
        shown = {key for row in self.rows for key, value in row.items() if value not in (None, "")}
        columns = {key: style for key, style in self.columns.items() if key in shown}
        return "\n".join([*lines, "", table(self.rows, columns), "", *self.lines])
