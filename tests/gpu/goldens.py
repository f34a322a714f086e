"""Making golden logits on a device, in full float32, with a second opinion and their provenance."""

import datetime
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import TEXT, kept
from make_llamacpp_fixture import sha256

from edgellama.distance import log_probabilities
from gpu import fixtures, models, precision
from gpu.decoder import Decoder
from gpu.parts import Given, Row, Skip, Task

AGREE = 1e-9  # NMSE of the second opinion: float32 arithmetic in another order


def tasks(given: Given) -> Iterator[Task]:
    """Write tiny.npz and default.npz to the folder `golden` of the results."""
    golden, models_at = Path(given.out) / "golden", Path(given.scratch)

    def tiny() -> Row:
        return _tiny(golden, models_at, given.device)

    def default() -> Row:
        if not given.model:
            raise Skip("the default model is not here: `edgellama pull` fetches it")
        return _default(golden, given.device, Path(given.model))

    yield {"model": "six tiny ones"}, tiny
    yield {"model": "the default one"}, default


def _tiny(folder: Path, models_at: Path, device: str) -> Row:
    about = provenance(device) | precision.prove(device)
    arrays, hashes, second = {}, {}, Opinions()
    for name in models.TINY:
        ids = models.ids(name)
        arrays[f"{name}.ids"] = np.array(ids, np.uint16)
        for kind in models.KINDS:
            path = models.write(models_at, name, kind)
            source = Decoder(path, device)
            logits = source.logits(ids)
            second.ask(f"{name}.{kind}", source, ids, logits)
            arrays[f"{name}.{kind}"] = logits[list(models.rows(kind))]
            hashes[f"{name}.{kind}"] = models.weights_sha256(path)
    about = about | {"seed": models.SEED, "length": models.LENGTH, "weights_sha256": hashes}
    about |= second.summary()
    fixtures.write(folder / fixtures.TINY_FILE, about, arrays)
    return about


def _default(folder: Path, device: str, path: Path) -> Row:
    about = provenance(device) | precision.prove(device)
    ids, second = models.text_ids(path), Opinions()
    source = Decoder(path, device)
    logits = source.logits(ids)
    second.ask("default", source, ids, logits)
    assert logits.shape[-1] <= 2**16, "ids are kept as uint16"
    likeliest, logprobs = kept(log_probabilities(logits))
    arrays = {"tokens": np.array(ids, np.uint16), "ids": likeliest.astype(np.uint16)}
    arrays["logprobs"] = logprobs
    about = about | {"model_sha256": sha256(path), "text_sha256": sha256(TEXT)}
    about |= second.summary()
    fixtures.write(folder / fixtures.DEFAULT_FILE, about, arrays)
    return about


class Opinions:
    """What `transformers` says, where it is installed; a dissent stops the making of goldens."""

    def __init__(self) -> None:
        self.missing, self.version = "", ""
        self.nmse: dict[str, float] = {}
        self.logits: Callable[..., np.ndarray]
        try:
            import transformers
        except ImportError as error:
            self.missing = f"not asked: {error}"
            return
        from gpu import second

        self.logits = second.logits
        self.version = transformers.__version__

    def ask(self, name: str, source: Decoder, ids: list[int], logits: np.ndarray) -> None:
        if self.missing:
            return
        self.nmse[name] = fixtures.from_logits(logits, self.logits(source, ids))["nmse"]
        if not self.nmse[name] <= AGREE:
            raise RuntimeError(f"{name}: transformers differs by NMSE {self.nmse[name]:.1e}")

    def summary(self) -> dict[str, Any]:
        if self.missing:
            return {"second_opinion": self.missing}
        largest = max(self.nmse.values())
        return {"second_opinion": f"transformers {self.version}", "second_opinion_nmse": largest}


def provenance(device: str) -> dict[str, Any]:
    """What the figures were made on."""
    about: dict[str, Any] = {
        "made_by": "tests/gpu/decoder.py, torch float32",
        "device": "cpu",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cpu":
        return about | {"instructions": torch.backends.cpu.get_cpu_capability()}
    major, minor = torch.cuda.get_device_capability()
    return about | {
        "device": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver() -> str:
    """The NVIDIA driver's version, as its own tool gives it."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip().splitlines()[0]
