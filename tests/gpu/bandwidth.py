"""How fast a device copies its memory: what decoding is measured against."""

import time
from collections.abc import Callable

import torch

BYTES = {"cuda": 2**32, "cpu": 2**28}
TIMES = 10


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by one large copy, the median of TIMES."""
    source = torch.ones(BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median(lambda: target.copy_(source), device)
    return 2 * BYTES[device] / seconds


def median(action: Callable[[], object], device: str, times: int = TIMES, warm: int = 3) -> float:
    """Seconds that an action takes, the median; on CUDA until the device has done it."""
    for _ in range(warm):
        action()
    taken = []
    for _ in range(times):
        settle(device)
        began = time.perf_counter()
        action()
        settle(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
