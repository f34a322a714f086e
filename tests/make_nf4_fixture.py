"""Writes `data/bnb_4bit.safetensors`: weights packed by bitsandbytes, with what it unpacks them to.

Development only: needs bitsandbytes 0.50, torch 2.13 and safetensors
(`python tests/make_nf4_fixture.py`). For each weight `W` the file also holds `W.expected`, float32,
from bitsandbytes' own CPU code.
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

FILE = Path(__file__).parent / "data" / "bnb_4bit.safetensors"
CASES = {  # name -> shape, type, block size, statistics quantized too, type of the storage
    "nf4_nested": ((40, 448), "nf4", 64, True, torch.uint8),
    "nf4": ((12, 64), "nf4", 64, False, torch.uint8),
    "fp4": ((12, 64), "fp4", 64, False, torch.uint8),
    "fp4_nested": ((33, 128), "fp4", 128, True, torch.uint8),
    "odd": ((7, 33), "nf4", 64, False, torch.uint8),  # rows begin inside bytes and blocks
    "in_bf16": ((8, 64), "nf4", 64, False, torch.bfloat16),  # bytes stored as another type
}


def main() -> None:
    torch.manual_seed(4)
    stored: dict[str, torch.Tensor] = {}
    for name, (shape, kind, block, nested, storage) in CASES.items():
        packed, state = functional.quantize_4bit(
            torch.randn(shape) / 16,
            blocksize=block,
            compress_statistics=nested,
            quant_type=kind,
            quant_storage=storage,
        )
        name = f"{name}.weight"
        stored[name] = packed
        for part, value in state.as_dict(packed=True).items():
            stored[f"{name}.{part}"] = value
        stored[f"{name}.expected"] = functional.dequantize_4bit(packed, state)
    save_file({key: value.contiguous() for key, value in stored.items()}, FILE)


if __name__ == "__main__":
    main()
