"""The measurement of the scan: its figures are there, and what it compares computes the same."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longllava.evaluation.efficiency import app


def test_scan_measures_both_and_they_agree(tmp_path: Path) -> None:
    output = tmp_path / "scan.json"
    small = ["--channels", "32", "--length", "64", "--train-length", "32", "--states", "4", "--repeats", "1"]
    result = CliRunner().invoke(app, ["scan", *small, "--output", str(output)])
    assert result.exit_code == 0, result.output
    figures = json.loads(output.read_text())
    for mode in ("forward", "training"):
        found = figures[mode]
        assert found["largest_relative_difference"] < 1e-5
        assert set(found["seconds"]) == {"longllava", "transformers"} and min(found["seconds"].values()) > 0
        assert found["times_faster"] == pytest.approx(
            found["seconds"]["transformers"] / found["seconds"]["longllava"], rel=1e-6
        )
        assert mode in result.stdout and f"{found['times_faster']:.1f} times faster" in result.stdout
