"""The measurements: their figures are there and fit together, and what they compare computes the same."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from longllava.cli import app
from longllava.evaluation import measure, measurements, workloads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def run(folder: Path, command: str, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON and the printed text of `longllava evaluate efficiency command`."""
    arguments = ["evaluate", "efficiency", command, *options, "--output", str(folder)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / f"{command}.json").read_text())
    assert {"device", "name", "dtype", "threads", "torch", "transformers", "date"} <= figures["machine"].keys()
    assert not [row for row in figures["rows"] if row.get("note")], "somebody dropped out"
    return figures, result.stdout


def by(figures: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values."""
    return [row for row in figures["rows"] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("device", DEVICES)
def test_scan_compares_what_computes_the_same(device: str, tmp_path: Path) -> None:
    options = ["--channels", "32", "--states", "4", "--lengths", "16,64", "--train-lengths", "16", "--repeats", "1"]
    options += ["--who", "torch,reference,transformers", "--device", device, "--dtype", "float32"]
    figures, printed = run(tmp_path, "scan", *options)
    assert [(row["mode"], row["tokens"], row["who"]) for row in figures["rows"]] == [
        (mode, tokens, who)
        for mode, tokens in (("forward", 16), ("forward", 64), ("forward and backward", 16))
        for who in ("torch", "reference", "transformers")
    ]
    assert all(row["difference"] < 1e-4 and row["milliseconds"] > 0 for row in figures["rows"])
    for tokens in (16, 64):
        (ours,), (theirs,) = (by(figures, mode="forward", tokens=tokens, who=w) for w in ("torch", "transformers"))
        assert ours["times_transformers"] == pytest.approx(theirs["milliseconds"] / ours["milliseconds"])
        assert f"{ours['times_transformers']:.1f}" in printed
    assert (tmp_path / "scan.png").stat().st_size > 1000


def test_scan_gradients_of_a_peer_that_is_wrong_are_seen() -> None:
    """The difference that the test above bounds is one of all outputs and all gradients."""
    inputs = workloads.scan_inputs(8, 5, 4)
    right = workloads.build_scan("reference", inputs, train=True)()
    assert [tensor.shape for tensor in right[2:]] == [tensor.shape for tensor in inputs.values()]
    for index, tensor in enumerate(right):
        wrong = [*right]
        wrong[index] = tensor + 0.5 * tensor.abs().max()
        assert workloads.difference(tuple(wrong), right) == pytest.approx(0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_runs_the_same_weights_in_both(device: str, tmp_path: Path) -> None:
    figures, _ = run(
        tmp_path, "prefill", "--config", "small", "--lengths", "32,96", "--repeats", "1", "--device", device,
        "--dtype", "float32",
    )  # fmt: skip
    for tokens in (32, 96):
        (ours,), (theirs,) = (by(figures, tokens=tokens, who=who) for who in ("longllava", "transformers"))
        assert theirs["difference"] < 1e-4
        assert ours["times_transformers"] == pytest.approx(theirs["seconds"] / ours["seconds"])
        assert ours["tokens_per_second"] == pytest.approx(tokens / ours["seconds"])
        assert ours["of_limit"] == pytest.approx(ours["limit_seconds"] / ours["seconds"])
    first, last = (by(figures, tokens=tokens, who="longllava")[0]["seconds"] for tokens in (32, 96))
    assert figures["summary"]["longllava_milliseconds_per_1000_tokens"] == pytest.approx((last - first) / 64 * 1e6)


@pytest.mark.parametrize("device", DEVICES)
def test_decode_goes_on_from_the_same_cache_in_all(device: str, tmp_path: Path) -> None:
    figures, _ = run(
        tmp_path, "decode", "--config", "small", "--contexts", "20,64", "--tokens", "3", "--repeats", "1",
        "--device", device, "--dtype", "float32",
    )  # fmt: skip
    assert len(figures["rows"]) == 6 and all(row["same_tokens"] == "yes" for row in figures["rows"])
    short, long = (by(figures, context=context, who="longllava")[0] for context in (20, 64))
    assert short["tokens_per_second"] == pytest.approx(1e3 / short["milliseconds"])
    assert short["limit_tokens_per_second"] > long["limit_tokens_per_second"]


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_read_and_their_memory_adds_up(device: str, tmp_path: Path) -> None:
    figures, printed = run(
        tmp_path, "images", "--config", "pocket", "--counts", "2,30", "--tail", "400", "--prefill-chunk-size", "64",
        "--device", device,
    )  # fmt: skip
    two, thirty, tail = figures["rows"]
    assert thirty["tokens"] - two["tokens"] == 28 * (4 + 2) and tail["tokens"] - two["tokens"] == 398 * 6
    for row in figures["rows"]:
        assert row["gigabytes_beside"] == pytest.approx(row["gigabytes"] - row["gigabytes_cache"])
    # One attention layer with two heads of 32 keeps keys and values in float32, or bfloat16 on a GPU.
    bytes_per_token = 2 * 2 * 32 * (2 if device == "cuda" else 4)
    assert tail["gigabytes_cache"] * 1e9 >= tail["tokens"] * bytes_per_token
    assert tail["tokens_per_second"] > 0
    assert "30 against 2 pictures" in printed


def test_a_budget_needs_a_gpu() -> None:
    arguments = ["evaluate", "efficiency", "images", "--device", "cpu", "--budget-gb", "80"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "--budget-gb 80 needs a GPU" in result.stderr


def test_a_budget_is_searched_and_says_what_stopped_it(tmp_path: Path, monkeypatch) -> None:
    """Where more than 1,234 pictures are too many, between 1,222 and 1,234 are found."""

    def end(self: Any, pictures: int) -> dict[str, Any]:
        if pictures > 1234:
            raise torch.OutOfMemoryError("too much")
        return {"tokens": pictures, "cache": 0, "seconds": 1.0}

    monkeypatch.setattr(measurements, "budget", lambda device, gigabytes: nullcontext())
    monkeypatch.setattr(measurements._Reader, "end", end)
    options = ["--config", "pocket", "--counts", "2", "--tail", "3", "--prefill-chunk-size", "16", "--device", "cpu"]
    figures, printed = run(tmp_path, "images", *options, "--budget-gb", "80")
    assert 1222 <= figures["summary"]["largest_number_of_pictures"] <= 1234
    assert "more: out of memory" in printed


def test_one_measurement_that_fails_loses_no_other(tmp_path: Path, monkeypatch) -> None:
    read = measurements._Reader.read

    def fails_at_three(self: Any, pictures: int) -> dict[str, Any]:
        if pictures == 3:
            raise RuntimeError("no such kernel")
        return read(self, pictures)

    monkeypatch.setattr(measurements._Reader, "read", fails_at_three)
    options = ["--config", "pocket", "--counts", "2,3,4", "--prefill-chunk-size", "16", "--device", "cpu"]
    arguments = ["evaluate", "efficiency", "images", *options, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "no such kernel" in result.stdout
    rows = json.loads((tmp_path / "images.json").read_text())["rows"]
    assert ["seconds" in row for row in rows] == [True, False, True]


def test_without_matplotlib_there_is_no_plot_and_a_line_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = measure.Report(
        "name", tmp_path, {}, {}, {}, plot={"title": "", "x_label": "", "y_label": "", "series": {}}
    )
    report.add({"tokens": 1})
    assert "no plot" in report.draw() and [path.name for path in tmp_path.iterdir()] == ["name.json"]


def test_pictures_are_prepared_as_the_peer_prepares_them(tmp_path: Path) -> None:
    figures, _ = run(tmp_path, "pictures", "--count", "2", "--repeats", "1")
    ours, theirs = figures["rows"]
    assert ours["difference"] <= 2.0
    assert ours["times_transformers"] == pytest.approx(theirs["seconds"] / ours["seconds"])


@pytest.mark.parametrize("device", DEVICES)
def test_session_answers_as_from_scratch(device: str, tmp_path: Path) -> None:
    options = ["--pictures", "3", "--questions", "3", "--scratch", "2", "--max-new-tokens", "4", "--device", device]
    figures, printed = run(tmp_path, "session", *options)
    assert [row.get("same_answer") for row in figures["rows"]] == [None, "yes", "yes"]
    assert figures["summary"]["answers_equal"] and "2 of 2 answers equal" in printed
    second = figures["rows"][1]
    assert second["times_faster"] == pytest.approx(second["scratch_seconds"] / second["session_seconds"])
    assert [row["tokens"] for row in figures["rows"]] == sorted({row["tokens"] for row in figures["rows"]})


def test_wrong_options_are_named() -> None:
    for options in (["scan", "--who", "nobody"], ["prefill", "--lengths", "8,many"], ["decode", "--contexts", "-1"]):
        result = CliRunner().invoke(app, ["evaluate", "efficiency", *options])
        assert result.exit_code == 2 and options[1] in result.output
    result = CliRunner().invoke(app, ["evaluate", "efficiency", "images", "--config", "70b"])
    assert result.exit_code == 1 and "70b" in result.stderr


def test_peak_memory_is_that_of_the_call() -> None:
    """Two tensors of 40 MB live at one time during the call, one of which it returns."""
    size = 10_000_000

    def use() -> torch.Tensor:
        return torch.ones(size) + torch.ones(1)

    use()
    _, peak = measure.peak_memory(torch.device("cpu"), use)
    if peak is None:
        pytest.skip("resident memory is read from Linux's /proc")
    assert peak == pytest.approx(8 * size, rel=0.05)


def test_a_contender_that_fails_or_is_slow_leaves_the_others_alone() -> None:
    calls = []

    def fail() -> None:
        raise torch.OutOfMemoryError("too much")

    contest = measure.Contest(torch.device("cpu"), repeats=3, limit=0.05)
    contenders = {"good": lambda: calls.append(1), "fails": fail, "slow": lambda: time.sleep(0.06)}
    first = contest.run("size 1", contenders)
    assert len(first["good"].seconds) == 3 and len(calls) == 4  # the first run is not timed
    assert first["fails"].median is None and first["fails"].note == "out of memory"
    assert len(first["slow"].seconds) == 1 and first["slow"].note
    second = contest.run("size 2", contenders)
    assert len(second["good"].seconds) == 3 and len(calls) == 8
    assert "out of memory at size 1" in second["fails"].note and second["slow"].median is None


def test_ratio_is_the_median_of_pairs() -> None:
    assert measure.ratio([1.0, 2.0, 4.0], [3.0, 4.0, 40.0]) == 3.0
    assert measure.ratio([1.0], []) is None


@pytest.mark.parametrize("most", [0, 1, 7, 999, 1173, 20_345])
def test_largest_number_is_found_to_one_in_a_hundred(most: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= most

    found = measurements.largest(fits)
    assert most * 0.99 - 1 <= found <= most and len(asked) < 30


def test_operations_and_bytes_of_the_released_models() -> None:
    """The paper counts 8.75e9 weights in the 9B's language model, and 16 KB of cache per token in bfloat16."""
    with torch.device("meta"):
        nine = workloads.build_model(workloads.build_config("9b"), torch.device("meta"), torch.bfloat16)
        large = workloads.build_model(workloads.build_config("53b"), torch.device("meta"), torch.bfloat16)
    text = nine.config.text_config
    assert workloads.token_bytes(text, torch.bfloat16) == 16384
    assert sum(workloads.text_parameters(nine)) == pytest.approx(8.75e9, rel=0.05)
    assert sum(workloads.text_parameters(large)) == pytest.approx(12e9, rel=0.1)  # A13B: so many are active
    assert workloads.prefill_flops(nine, 100_000) == pytest.approx(2 * 8.75e9 * 1e5 + 2 * 4 * 4096 * 1e10, rel=0.1)
    assert workloads.decode_bytes(nine, 100_000) - workloads.decode_bytes(nine, 0) == 100_000 * 16384


def test_the_peer_takes_no_memory() -> None:
    model = workloads.build_model(workloads.build_config("small"), torch.device("cpu"), torch.float32)
    ours = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in workloads.build_peer(model).parameters()} <= ours
