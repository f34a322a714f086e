"""What the larger models of the LLaMA 2 family need in memory, as a table.

    python benchmarks/estimates.py

From shapes alone: no file is needed. The last column is published (a total at 4 bits, method and
context not stated), for comparison. Knows nothing about measuring.
"""

from dataclasses import replace

from synthetic import SHAPES

from edgellama.config import ModelConfig
from edgellama.estimate import estimate_shape

COLUMNS = ("model", "Q4_0, 512", "Q4_0, 4,096", "Q4_0, 4,096, q8_0", "GPU, 4,096", "published")
PUBLISHED = {"7B": "5.5", "13B": "8.9", "70B": "37.6"}  # GB


def shape(size: str) -> ModelConfig:
    if size != "70B":
        return SHAPES[f"llama-2-{size.lower()}"]
    return replace(
        SHAPES["llama-2-7b"], n_layers=80, dim=8192, ffn_dim=28672, n_heads=64, n_kv_heads=8
    )


def rows() -> list[list[str]]:
    """One line a model, figures in GB."""
    found = []
    for size, published in PUBLISHED.items():
        config = shape(size)
        on_cpu = [(512, "f16"), (4096, "f16"), (4096, "q8_0")]
        totals = [
            estimate_shape(config, "Q4_0", context=n, kv_type=kind, threads=8).total
            for n, kind in on_cpu
        ]
        totals.append(estimate_shape(config, "Q4_0", context=4096, device="cuda").device_total)
        found.append([f"Llama-2 {size}", *(f"{n / 1e9:.1f}" for n in totals), published])
    return found


def main() -> None:
    for line in [list(COLUMNS), ["---"] * len(COLUMNS), *rows()]:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
