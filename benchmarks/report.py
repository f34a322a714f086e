"""A run of the matrix as Markdown tables. Reads the JSON document alone; measures nothing."""

from collections.abc import Sequence
from typing import Any

Figures = dict[str, Any]
NONE = "-"


def markdown(document: Figures) -> str:
    """Everything that the document holds, ready for a page."""
    parts = [introduction(document), files(document), shares(document), batches(document)]
    parts += [by_threads(document), by_context(document), missing(document)]
    return "\n\n".join(part for part in parts if part)


def introduction(document: Figures) -> str:
    machine, bounds = document["machine"], document["limits"]
    cache = machine.get("last_cache_bytes")
    facts = [
        f"{machine['processor']}, {machine['cores']} cores",
        *([f"last cache {cache / 2**20:.0f} MiB"] if cache else []),
        machine["system"],
        *(f"{name} {version}" for name, version in document["versions"].items()),
    ]
    read = bounds["read"]
    limits = [f"reading {read['median']:.1f} GB/s (best {read['high']:.1f})"]
    for figure, spread in bounds.items():
        if figure != "read":
            level = figure.removeprefix("dots ")
            text = f"integer products at level {level} {spread['median']:.2f} TOP/s"
            limits.append(f"{text} (best {spread['high']:.2f})")
    quick = "\nA quick run: it shows that everything works, not how fast." * document["quick"]
    return (
        f"Machine: {', '.join(facts)}. {document['threads']} threads.\n"
        f"Its limits: {'; '.join(limits)}.{quick}"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, so that it reads well as plain text too."""
    if not rows:
        return ""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def spread(figures: Figures, name: str, unit: float = 1.0, form: str = ",.0f") -> str:
    """Median (least to most)."""
    found = figures.get(name)
    if found is None:
        return NONE
    median, low, high = (format(found[k] / unit, form) for k in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def middle(figures: Figures, name: str, unit: float = 1.0, form: str = ",.2f") -> str:
    found = figures.get(name)
    return NONE if found is None else format(found["median"] / unit, form)


def measured(document: Figures, part: str) -> list[tuple[Figures, str, Figures]]:
    """(cell, subject's name, its figures) of everything that was measured."""
    return [
        (cell, name, figures)
        for cell in document[part].values()
        for name, figures in cell.get("subjects", {}).items()
        if "unavailable" not in figures
    ]


def _names(cell: Figures, subject: str) -> list[str]:
    return [cell["model"], cell["type"], subject]


def files(document: Figures) -> str:
    """Medians with their spreads; ratios are edgellama over the row's subject."""
    heads = ["model", "type", "runtime", "prefill, tokens/s", "ratio", "decode, tokens/s", "ratio"]
    heads += ["load, ms", "first token, ms", "first use, s", "peak memory, MB"]
    rows = []
    for cell, name, figures in measured(document, "files"):
        ratio = cell["ratios"].get(name, {})
        first_use = figures.get("first_use_seconds")
        rows.append(
            [
                *_names(cell, name),
                spread(figures, "prefill"),
                middle(ratio, "prefill"),
                spread(figures, "decode", form=",.1f"),
                middle(ratio, "decode"),
                spread(figures, "load_seconds", 1e-3),
                spread(figures, "first_token_seconds", 1e-3),
                NONE if first_use is None else f"{first_use:.1f}",
                spread(figures, "peak_bytes", 1e6),
            ]
        )
    return table(heads, rows)


def shares(document: Figures) -> str:
    """What is reached of the machine's limits, and what memory is over the unavoidable."""
    heads = ["model", "type", "runtime", "prefill, tokens", "TOP/s", "of the dot peak"]
    heads += ["read a token, MB", "GB/s", "of the bandwidth", "peak over weights and cache, MB"]
    rows = []
    for cell, name, figures in measured(document, "files"):
        cache = 2 * cell["cost"]["key_value_numbers"] * cell["effort"]["prefill"]
        least = cell["cost"]["weight_bytes"] + cache
        peak = figures.get("peak_bytes")
        rows.append(
            [
                *_names(cell, name),
                str(cell["effort"]["prefill"]),
                middle(figures, "prefill_top_per_s"),
                middle(figures, "share_of_dots", form=".0%"),
                f"{cell['cost']['read_bytes'] / 1e6:,.0f}",
                middle(figures, "decode_gb_per_s", form=".1f"),
                middle(figures, "share_of_read", form=".0%"),
                NONE if peak is None else f"{(peak['median'] - least) / 1e6:,.0f}",
            ]
        )
    return table(heads, rows)


def batches(document: Figures) -> str:
    """Cost of one call for n tokens over that of one token's."""
    found = measured(document, "files")
    sizes = list(dict.fromkeys(size for _, _, figures in found for size in figures["batch"]))
    rows = [
        [*_names(cell, name), *(spread(figures["batch"], n, form=".2f") for n in sizes)]
        for cell, name, figures in found
    ]
    return table(["model", "type", "runtime", *(f"{n} tokens" for n in sizes)], rows)


def by_threads(document: Figures) -> str:
    """A subject's name ends with its threads."""
    rows = []
    for cell, name, figures in measured(document, "by_threads"):
        runtime, _, threads = name.rpartition(" ")
        alone = cell["subjects"].get(f"{runtime} {cell['threads'][0]}", {})
        row = [cell["model"], cell["type"], runtime, threads]
        for figure in ("prefill", "decode"):
            gain = figures[figure]["median"] / alone[figure]["median"]
            row += [spread(figures, figure, form=",.1f"), f"{gain:.2f}"]
        rows.append(row)
    heads = ["model", "type", "runtime", "threads", "prefill, tokens/s", "over 1 thread"]
    return table([*heads, "decode, tokens/s", "over 1 thread"], rows)


def by_context(document: Figures) -> str:
    rows, positions = [], []
    for cell, name, figures in measured(document, "by_context"):
        positions = [str(p) for p in cell["positions"]]
        cells = [
            f"{spread(figures['decode'], p, form=',.1f')}; "
            f"{middle(figures['share_of_empty'], p, form='.0%')}"
            for p in positions
        ]
        rows.append([*_names(cell, name), *cells])
    heads = ["model", "type", "runtime, cache"]
    return table([*heads, *(f"decode after {p}, tokens/s" for p in positions)], rows)


def missing(document: Figures) -> str:
    """What could not be measured, each reason once."""
    lines = []
    reasons: dict[str, dict[str, None]] = {}
    for part in ("files", "by_threads", "by_context"):
        for label, cell in document[part].items():
            if "error" in cell:
                lines.append(f"- {label}, {part}: not measured: {cell['error']}")
            for name, figures in cell.get("subjects", {}).items():
                if "unavailable" in figures:
                    subject = name if part != "by_threads" else name.rpartition(" ")[0]
                    reasons.setdefault(figures["unavailable"], {})[subject] = None
    lines += [f"- {', '.join(names)}: not available: {why}" for why, names in reasons.items()]
    return "\n".join(lines)
