"""Results as JSON and as a table in Markdown. Knows nothing about how they came about."""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PACKAGES = (
    *("edgellama", "numpy", "numba", "torch", "transformers", "onnx"),
    *("onnxruntime", "onnxruntime-gpu", "llama-cpp-python"),
)
COLUMNS = {  # of each part's table
    "goldens": ("model", "device", "driver", "known_product_error", "second_opinion_nmse"),
    "operators": ("op", "dtype", "bits", "level", "fpa", "cases", "nmse", "cache_nmse", "bound"),
    "parity": (
        *("model", "type", "runtime", "cases", "nmse", "kl_mean", "kl_max", "same_top", "bound"),
        "first_node",
    ),
    "capture": ("model", "type", "check", "tokens"),
    "speed": (
        *("shape", "type", "subject", "decode", "generate", "steps", "fed", "prefill"),
        *("gb_per_second", "of_copy"),
        *("weights_gb", "load_seconds", "memory_gb", "note"),
    ),
}
WORST = {  # parts with many rows: rows alike in these are shown as the worst of them
    "operators": (("op", "dtype", "bits", "level", "fpa"), "nmse"),
    "parity": (("kind", "type", "runtime"), "nmse"),
}


def header(device: str, quick: bool) -> dict[str, Any]:
    return {
        "device": device,
        "quick": quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "parts": {},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def good(results: dict[str, Any]) -> bool:
    """Everything that ran is within its bounds, and nothing failed."""
    for part in results["parts"].values():
        if part["error"] or not part["rows"]:
            return False
        if any(not row.get("ok", True) for row in part["rows"]):
            return False
    return True


def write(out: Path, results: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (out / "table.md").write_text(table(results), "utf-8")


def table(results: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in results["packages"].items() if v)
    lines = [f"# {results['device']}, {results['date']}", "", packages, ""]
    for name, part in results["parts"].items():
        lines += [f"## {name} ({part['seconds']} s)", ""]
        if part["error"]:
            lines += ["The part failed:", "", "```", part["error"].strip(), "```", ""]
        rows = _worst(part["rows"], *WORST[name]) if name in WORST else part["rows"]
        lines += _rows(COLUMNS[name], rows)
    return "\n".join(lines)


def _worst(rows: list[Row], alike: tuple[str, ...], figure: str) -> list[Row]:
    """Of rows that are alike the one with the largest figure; all that went wrong."""
    shown: dict[tuple[Any, ...], Row] = {}
    for i, row in enumerate(rows):
        key: tuple[Any, ...] = tuple(row.get(name) for name in alike)
        if "error" in row or "skipped" in row:
            key = (row.get("error"), row.get("skipped"), *key[-1:])
        elif not row.get("ok", True):
            key += (i,)
        before = shown.get(key, {"cases": 0})
        worse = row if row.get(figure, 0) >= before.get(figure, 0) else before
        shown[key] = worse | {"cases": before["cases"] + 1}
    return list(shown.values())


def _rows(columns: tuple[str, ...], rows: list[Row]) -> list[str]:
    used = [c for c in columns if any(row.get(c) is not None for row in rows)]
    if not used:
        return ["No rows.", ""]
    lines = ["| " + " | ".join([*used, "result"]) + " |", "|---" * (len(used) + 1) + "|"]
    for row in rows:
        cells = [_cell(row.get(column)) for column in used]
        lines.append("| " + " | ".join([*cells, _verdict(row)]) + " |")
    return [*lines, ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def _verdict(row: Row) -> str:
    if "error" in row:
        return _cell(row["error"])
    if "skipped" in row:
        return "skipped: " + _cell(row["skipped"])
    return "ok" if row.get("ok", True) else "**out of bounds**"
