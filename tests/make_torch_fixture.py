"""Writes `data/torch_*.bin`: files as PyTorch itself saves them, with the values they hold.

Development only: needs torch 2.13 (`python tests/make_torch_fixture.py`). The tests read the
files without it.
"""

from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "data"


def values(rows: int, columns: int) -> torch.Tensor:
    """Element (i, j) is (i * columns + j) / 8: exact in each type used here."""
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) / 8


def main() -> None:
    module = torch.nn.Linear(4, 3)
    module.weight.data, module.bias.data = values(3, 4), values(1, 3)[0]
    torch.save(module.state_dict(), FOLDER / "torch_module.bin")
    whole = values(6, 5)
    views = {
        "f32": whole,
        "rows": whole[2:4],
        "columns": whole[:, 1:3],
        "transposed": whole.t(),
        "f16": whole.half(),
        "bf16": values(4, 4).bfloat16(),
        "parameter": torch.nn.Parameter(whole[:2].clone()),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
    }
    torch.save({"model": views, "step": 7}, FOLDER / "torch_views.bin")
    legacy = FOLDER / "torch_legacy.bin"
    torch.save({"f32": whole}, legacy, _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
