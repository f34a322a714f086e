"""Full float32 products in torch: no TF32, no bfloat16 passes; proved by a known product.

cuBLAS reads its own switches when it starts: `run.py` sets them for the part that makes goldens.
"""

from typing import Any

import torch

SIZE = 512
STEP = 2.0**-12  # float32 keeps 1 + STEP, TF32 (10 bits) and bfloat16 (7) do not


def set_full() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")


def product_error(device: str) -> float:
    """How far a product is off whose exact value, 1 + STEP everywhere, float32 can hold.

    Every partial sum is a whole number, at most SIZE, of terms with 13 bits: 22 bits, so no order
    of summing rounds. Operands rounded to TF32 would give 1: off by STEP.
    """
    a = torch.full((SIZE, SIZE), 1 + STEP, dtype=torch.float32, device=device)
    b = torch.full((SIZE, SIZE), 1 / SIZE, dtype=torch.float32, device=device)
    return float((a @ b - (1 + STEP)).abs().max())


def prove(device: str) -> dict[str, Any]:
    """Set full precision and prove it; raises RuntimeError where products are rounded."""
    set_full()
    error = product_error(device)
    if error >= STEP / 4:
        raise RuntimeError(f"float32 products on {device} are rounded: known product off {error}")
    return {"tf32": False, "known_product_error": error, "would_be_off_with_tf32": STEP}
