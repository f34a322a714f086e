"""A run of the matrix as a picture: speeds beside the machine's limits. Needs matplotlib.

Reads the JSON document alone; measures nothing.
"""

import sys
from pathlib import Path
from typing import Any

INSTALL = "pip install 'edgellama[bench]'"
PANELS = (  # figure, what it is, its unit in the document's
    ("prefill_top_per_s", "prefill, TOP/s", 1.0),
    ("decode_gb_per_s", "decode, GB/s of weights read", 1.0),
    ("first_token_seconds", "first token of a process, s", 1.0),
    ("peak_bytes", "peak memory, GB", 1e9),
)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write a .png or .svg file: four panels of bars, one group a file, one bar a subject."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"a plot needs matplotlib: {INSTALL}")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {label: cell for label, cell in document["files"].items() if "subjects" in cell}
    names = list(dict.fromkeys(name for cell in cells.values() for name in available(cell)))
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axis, (key, title, unit) in zip(axes.flat, PANELS, strict=True):
        _bars(axis, cells, names, key, unit)
        axis.set_title(title)
        axis.set_xlim(-0.6, max(1, len(cells)) - 0.4)
        axis.set_xticks(range(len(cells)), cells, rotation=20, ha="right")
    bounds = document["limits"]
    level = document["level"]
    _limit(axes[0, 0], bounds[f"dots {level}"]["median"], f"integer products, {level}")
    _limit(axes[0, 1], bounds["read"]["median"], "read bandwidth")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    machine = document["machine"]
    figure.suptitle(f"{machine['processor']}, {document['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def available(cell: dict[str, Any]) -> list[str]:
    return [name for name, found in cell["subjects"].items() if "unavailable" not in found]


def _bars(axis: Any, cells: dict[str, Any], names: list[str], key: str, unit: float) -> None:
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        for at, cell in enumerate(cells.values()):
            spread = cell["subjects"].get(name, {}).get(key)
            if spread is None:
                continue
            middle, low, high = (spread[k] / unit for k in ("median", "low", "high"))
            place = at + (i - (len(names) - 1) / 2) * width
            error = [[middle - low], [high - middle]]
            axis.bar(place, middle, width, yerr=error, color=f"C{i}", capsize=2)
        axis.bar(0, 0, 0, color=f"C{i}", label=name)  # for the legend, once


def _limit(axis: Any, value: float, text: str) -> None:
    axis.axhline(value, color="black", linestyle="--", linewidth=1)
    axis.annotate(text, (0.01, value), xycoords=("axes fraction", "data"), va="bottom")
