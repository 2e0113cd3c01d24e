"""The plots of the measurements, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Wrong, half right, right: red over yellow to green, light enough that black figures can be read on all of them.
RED_TO_GREEN = ("#f0616d", "#f5d565", "#46c98b")
MAX_WRITTEN_CELLS = 240  # above this the figures in the cells would be too small to read


def heat_map(
    path: str | Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Write a grid of shares as coloured cells, the first row at the top.

    Args:
        values: (rows, columns) in 0..1; NaN where nothing was measured, which stays white.
        rows, columns: the label of each row and column.
        title: may have several lines.

    Raises:
        ValueError: not as many labels as rows or columns.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"{values.shape} values have {len(rows)} labels of rows and {len(columns)} of columns")
    # A figure without pyplot draws itself with Agg: no window, no state that other plots share.
    size = (max(2.6 + 0.62 * len(columns), 5), 1.8 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("red_to_green", RED_TO_GREEN)
    image = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, edgecolors="white")
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=45 if max(map(len, columns)) > 6 else 0)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.set(xlabel=column_label, ylabel=row_label)
    axes.set_title(title, fontsize=11)
    axes.spines[:].set_visible(False)
    if values.size <= MAX_WRITTEN_CELLS:
        for row, column in np.argwhere(~np.isnan(values)):
            text = f"{100 * values[row, column]:.0f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9)
    figure.colorbar(image, format=lambda share, _: f"{100 * share:.0f} %", pad=0.02)
    figure.savefig(path, dpi=150)


def line_plot(
    path: str | Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Write one line with marks per name, both axes logarithmic: what grows with the length is a straight line.

    Args:
        series: x and y of each line, by its name in the legend; values above 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
