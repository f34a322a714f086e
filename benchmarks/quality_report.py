"""Sizes and qualities as a Markdown table and a picture. Reads the JSON document; measures nothing.

The picture needs matplotlib.
"""

import sys
from pathlib import Path
from typing import Any

INSTALL = "pip install 'edgellama[bench]'"
OURS, THEIRS = "edgellama", "llama.cpp"
BOTH = "both"
WITH = " with importance"
FLOATS = 12  # bits per weight that only types of floats have
HEAD = ("type", "made by", "MB", "bits/weight", "perplexity", "KL mean", "KL median", "KL p99")
LAST = ("same top, %", "RMS Δp, %")


def markdown(document: dict[str, Any]) -> str:
    lines = ["| " + " | ".join((*HEAD, *LAST)) + " |", "|---|---|" + "---:|" * 8]
    for label, by in sorted(document["types"].items(), key=lambda item: bits(item[1])):
        for maker, found in rows(by):
            lines.append("| " + " | ".join((label, maker, *cells(found))) + " |")
    return "\n".join([introduction(document), "", *lines])


def bits(by: dict[str, Any]) -> float:
    return float(by[OURS]["bits_per_weight"])


def rows(by: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Who made what: one row for both where their tensors are the same."""
    theirs = by.get(THEIRS)
    if theirs is None:
        return [(OURS, by[OURS])]
    if theirs.get("same_tensors"):
        return [(BOTH, by[OURS])]
    return [(OURS, by[OURS]), (THEIRS, theirs)]


def cells(found: dict[str, Any]) -> list[str]:
    figures = found["quality"]["figures"]
    return [
        f"{found['bytes'] / 1e6:.1f}",
        f"{found['bits_per_weight']:.2f}",
        estimate(figures["perplexity"], 2),
        estimate(figures["kl_mean"], 4),
        estimate(figures["kl_median"], 4),
        estimate(figures["kl_p99"], 3),
        estimate(figures["same_top"], 1, 100),
        estimate(figures["delta_p_rms"], 2, 100),
    ]


def estimate(given: dict[str, float], digits: int, scale: float = 1) -> str:
    text = f"{given['value'] * scale:.{digits}f}"
    return text if given["error"] is None else f"{text} ± {given['error'] * scale:.{digits}f}"


def introduction(document: dict[str, Any]) -> str:
    first = next(iter(document["types"].values()), None)
    if first is None:
        return "Nothing was measured."
    quality = first[OURS]["quality"]
    figures = quality["figures"]
    perplexity = estimate(figures["base_perplexity"], 2)
    return (
        f"{document['source']} as F16 (perplexity {perplexity}) against the types below; "
        f"{document['text']}, {quality['chunks']} chunks of {quality['context']} tokens, "
        f"{figures['tokens']} tokens scored; ± is one standard error."
    )


def draw(document: dict[str, Any], path: Path) -> None:
    """KL divergence over bits per weight, as .svg or .png; types of floats are left out."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"a plot needs matplotlib: {INSTALL}")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "edgellama"  # the same figures, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    axis.set(yscale="log", xlabel="bits per weight", ylabel="KL divergence from F16, mean, nats")
    axis.grid(alpha=0.3)
    axis.set_title(document["source"])
    for weighted, color, name in ((False, "C0", "without"), (True, "C1", "with")):
        points = _points(document, weighted)
        for x, y, error, _ in points:
            axis.errorbar(x, y, error, fmt="o", color=color, capsize=2, linewidth=1)
        if points:
            axis.scatter([], [], color=color, label=f"{name} importance matrix")
    axis.margins(x=0.15)
    axis.legend(loc="upper right")
    figure.draw_without_rendering()
    for weighted, color in ((False, "C0"), (True, "C1")):
        _label(axis, _points(document, weighted), color, -1 if weighted else 1)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _points(document: dict[str, Any], weighted: bool) -> list[tuple[float, float, float, str]]:
    """Bits per weight, KL, its error, types: our files; equal ones are one point."""
    found: dict[tuple[float, float, float], list[str]] = {}
    for label, by in document["types"].items():
        kl = by[OURS]["quality"]["figures"]["kl_mean"]
        if label.endswith(WITH) == weighted and bits(by) < FLOATS and kl["value"] > 0:
            point = bits(by), kl["value"], kl["error"] or 0.0
            found.setdefault(point, []).append(label.removesuffix(WITH))
    return [(*point, ", ".join(names)) for point, names in found.items()]


def _label(axis: Any, points: list[tuple[float, float, float, str]], color: str, side: int) -> None:
    """Names beside the points, moved down where they would lie upon each other."""
    height, lowest = 14.0, float("inf")
    for x, y, _, text in sorted(points, key=lambda point: -point[1]):
        place = axis.transData.transform((x, y))
        at = min(place[1], lowest - height)
        lowest = at
        axis.annotate(
            text,
            (x, y),
            xytext=(side * 14, (at - place[1]) * 72 / axis.figure.dpi),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkB": 3},
        )
