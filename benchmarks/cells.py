"""The matrix's cells: one model file measured in every subject, paired in turns.

Each function returns what goes into the JSON document; docs/benchmarks.md tells its keys. Knows
nothing about which files are measured, or about tables.
"""

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limits import Limits
from subject import RUNTIMES, Spec, Subject, Unavailable

from edgellama.errors import EdgeLlamaError
from edgellama.gguf import open_gguf
from edgellama.measure import (
    FIGURES,
    SMALL_CONTEXT,
    Samples,
    Spread,
    Step,
    fresh_process,
    in_turns,
    timed_program,
)
from edgellama.weights import model_config

BATCHES = (2, 4, 8)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Effort:
    """How much is computed, and how often."""

    prefill: int  # tokens
    decode: int
    rounds: int
    cold_rounds: int
    batches: int = 9  # repetitions


@dataclass(frozen=True)
class Cost:
    """What a model's tokens cost at least, and what the model is."""

    parameters: int
    context_length: int
    weight_bytes: int
    read_bytes: int  # weights read for one token
    token_operations: int  # multiplications and additions of one token, but for the head
    head_operations: int
    key_value_numbers: int  # of one token
    types: dict[str, int]  # tensors by type

    @classmethod
    def of(cls, path: Path) -> "Cost":
        with open_gguf(path) as file:
            config, tensors = model_config(file), dict(file.tensors)
        matrices = {name: t for name, t in tensors.items() if len(t.shape) == 2}
        head = EMBEDDING if config.tied_output else HEAD
        products = [t for name, t in matrices.items() if name not in (EMBEDDING, HEAD)]
        total = sum(t.n_bytes for t in tensors.values())
        types: dict[str, int] = {}
        for tensor in tensors.values():
            types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
        return cls(
            config.n_parameters,
            config.context_length,
            total,
            total - (0 if config.tied_output else tensors[EMBEDDING].n_bytes),
            sum(2 * math.prod(t.shape) for t in products),
            2 * math.prod(matrices[head].shape),
            2 * config.n_layers * config.kv_dim,
            types,
        )

    def operations(self, tokens: int) -> int:
        """Of a prefill: the head runs once. Attention is left out."""
        return tokens * self.token_operations + self.head_operations


def speed(spec: Spec, cost: Cost, effort: Effort, given: "Given") -> dict[str, Any]:
    """One file: prefill, decode and batches of loaded models; then fresh processes."""
    specs = {name: replace(spec, runtime=name) for name in given.runtimes}
    specs |= {f"edgellama ({x})": replace(spec, level=x) for x in given.levels}
    with contextlib.ExitStack() as stack:
        subjects, missing = opened(specs, stack)
        if not subjects:
            raise Unavailable("; ".join(missing.values()))
        steps = {name: _round(subject, effort) for name, subject in subjects.items()}
        samples = paired(steps | {"limits": given.limits.step}, effort.rounds)
        batches = {name: _batches(subject, effort) for name, subject in subjects.items()}
        devices = {name: subject.device for name, subject in subjects.items()}
    fresh = [name for name in subjects if not specs[name].level]
    cold = paired({n: _cold(specs[n], effort) for n in fresh}, effort.cold_rounds, uncounted=0)
    bounds = samples.pop("limits")
    figures: dict[str, Any] = {name: {"unavailable": why} for name, why in missing.items()}
    for name in subjects:
        samples[name] |= cold.get(name, {})
        level = specs[name].level or given.limits.levels[0]
        samples[name] |= _derived(samples[name], bounds, level, cost, effort)
        figures[name] = {"device": devices[name], **spreads(samples[name]), "batch": batches[name]}
    if given.first_use and "edgellama" in subjects:
        figures["edgellama"]["first_use_seconds"] = first_use(specs["edgellama"])
    return {
        "cost": dataclasses.asdict(cost),
        "effort": dataclasses.asdict(effort),
        "limits": spreads(bounds),
        "subjects": {name: figures[name] for name in specs},
        "ratios": ratios(samples),
    }


@dataclass(frozen=True)
class Given:
    """What all cells share."""

    runtimes: Sequence[str]
    levels: Sequence[str]  # forced ones, besides the best
    limits: Limits
    first_use: bool


def opened(
    specs: Mapping[str, Spec], stack: contextlib.ExitStack
) -> tuple[dict[str, Subject], dict[str, str]]:
    """(the subjects that could be loaded, why the others could not)."""
    subjects, missing = {}, {}
    for name, spec in specs.items():
        try:
            subjects[name] = stack.enter_context(Subject(spec))
        except Unavailable as error:
            missing[name] = str(error)
    return subjects, missing


def paired(steps: Mapping[str, Step], rounds: int, uncounted: int = 1) -> dict[str, Samples]:
    """Values by subject and figure, measured in turns; the first rounds may not count."""
    in_turns(list(steps.values()), uncounted)
    return dict(zip(steps, in_turns(list(steps.values()), rounds), strict=True))


def spreads(samples: Samples) -> dict[str, dict[str, float]]:
    return {figure: dataclasses.asdict(Spread.of(v)) for figure, v in samples.items()}


def ratios(samples: Mapping[str, Samples]) -> dict[str, dict[str, dict[str, float]]]:
    """By subject and figure: what the first subject has over it, round by round."""
    own, *_ = samples.values()
    return {
        name: spreads(
            {
                figure: [x / y for x, y in zip(own[figure], theirs[figure], strict=True)]
                for figure in FIGURES
                if figure in own and figure in theirs
            }
        )
        for name, theirs in list(samples.items())[1:]
    }


def _round(subject: Subject, effort: Effort) -> Step:
    def run() -> dict[str, float | None]:
        prefill = subject.ask("prefill", tokens=effort.prefill)
        decode = subject.ask("decode", at=SMALL_CONTEXT, tokens=effort.decode)
        return {"prefill": effort.prefill / prefill, "decode": effort.decode / decode}

    return run


def _batches(subject: Subject, effort: Effort) -> dict[str, dict[str, float]]:
    """By number of tokens: the seconds of one call for all over those of one token's."""
    measured = {n: subject.ask("batch", tokens=n, times=effort.batches) for n in BATCHES}
    return spreads({str(n): [many / one for one, many in m] for n, m in measured.items()})


def _derived(
    own: Samples, bounds: Samples, level: str, cost: Cost, effort: Effort
) -> dict[str, list[float]]:
    """Bytes and operations per second, and their shares of the limits, round by round."""
    read = [speed * cost.read_bytes / 1e9 for speed in own["decode"]]
    work = cost.operations(effort.prefill) / effort.prefill / 1e12
    done = [speed * work for speed in own["prefill"]]
    return {
        "decode_gb_per_s": read,
        "share_of_read": [x / y for x, y in zip(read, bounds["read"], strict=True)],
        "prefill_top_per_s": done,
        "share_of_dots": [x / y for x, y in zip(done, bounds[f"dots {level}"], strict=True)],
    }


def _cold(spec: Spec, effort: Effort) -> Step:
    """A fresh process; llama.cpp's is one without edgellama."""
    decode = min(effort.decode, 8)  # peak memory does not grow with it

    def run() -> dict[str, float | None]:
        if spec.runtime == "llama.cpp":
            work = {
                "path": str(spec.path),
                "threads": spec.threads,
                "context": spec.context,
                "prefill": effort.prefill,
                "decode": decode,
            }
            program = [sys.executable, str(Path(__file__).with_name("peer.py").resolve())]
            return timed_program(program, work, spec.runtime)
        runtime = RUNTIMES[spec.runtime]
        how = {"device": "cpu"} if runtime == "onnx" else {}
        return fresh_process(
            *(spec.path, runtime, spec.threads, spec.context),
            **how,
            prefill=effort.prefill,
            decode=decode,
        )

    return run


def first_use(spec: Spec) -> float | None:
    """Seconds to the first token with an empty cache of kernels: they are compiled first."""
    with tempfile.TemporaryDirectory() as folder:
        found = fresh_process(
            *(spec.path, "cpu", spec.threads, spec.context), prefill=1, decode=1, cache=Path(folder)
        )
    return found["first_token_seconds"]


def with_context(
    spec: Spec, cost: Cost, effort: Effort, positions: Sequence[int], runtimes: Sequence[str]
) -> dict[str, Any]:
    """Decode after so many tokens, keys and values as f16 and as q8_0."""
    positions = [p for p in positions if p + effort.decode <= cost.context_length]
    spec = replace(spec, context=max(positions) + effort.decode)
    specs = {
        f"{name} {kind}": replace(spec, runtime=name, kv_type=kind)
        for name in runtimes
        for kind in ("f16", "q8_0")
    }
    with contextlib.ExitStack() as stack:
        subjects, missing = opened(specs, stack)
        decode: dict[str, Samples] = {name: {} for name in subjects}
        for position in positions:
            for subject in subjects.values():
                subject.ask("reach", at=position)
            steps = {n: _decode_at(s, position, effort.decode) for n, s in subjects.items()}
            for name, found in paired(steps, effort.rounds).items():
                decode[name][str(position)] = found["decode"]
    figures: dict[str, Any] = {name: {"unavailable": why} for name, why in missing.items()}
    for name, samples in decode.items():
        empty = samples[str(positions[0])]
        share = {p: [x / y for x, y in zip(v, empty, strict=True)] for p, v in samples.items()}
        figures[name] = {"decode": spreads(samples), "share_of_empty": spreads(share)}
    return {
        "effort": dataclasses.asdict(effort),
        "positions": positions,
        "subjects": {name: figures[name] for name in specs},
    }


def _decode_at(subject: Subject, at: int, tokens: int) -> Step:
    def run() -> dict[str, float | None]:
        return {"decode": tokens / subject.ask("decode", at=at, tokens=tokens)}

    return run


def with_threads(
    spec: Spec, effort: Effort, threads: Sequence[int], runtimes: Sequence[str]
) -> dict[str, Any]:
    """Prefill and decode with so many threads."""
    specs = {
        f"{name} {n}": replace(spec, runtime=name, threads=n) for name in runtimes for n in threads
    }
    with contextlib.ExitStack() as stack:
        subjects, missing = opened(specs, stack)
        steps = {name: _round(subject, effort) for name, subject in subjects.items()}
        samples = paired(steps, effort.rounds)
    figures: dict[str, Any] = {name: {"unavailable": why} for name, why in missing.items()}
    figures |= {name: spreads(found) for name, found in samples.items()}
    return {
        "effort": dataclasses.asdict(effort),
        "threads": list(threads),
        "subjects": {name: figures[name] for name in specs},
    }


FAILURES = (EdgeLlamaError, Unavailable, OSError)  # what costs a cell, not the run
