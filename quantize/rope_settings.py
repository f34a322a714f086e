"""A Hugging Face model's rope settings, in GGUF's terms.

`rope_scaling` (or `rope_parameters`, the newer spelling) becomes `llama.rope.*` keys, a context
length, and for Llama 3.1's scaling the divisors that GGUF carries as a tensor. Sources: the rope
functions of `transformers`; for dynamic NTK and Giraffe's truncated basis the papers' own rules.
Knows nothing about files and tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgellama.config import MOST_CONTEXT, Rope
from edgellama.quantize.fields import Fields, spelled
from edgellama.rope import inverse_frequencies, llama3_factors

LARGEST_BASE = 1e15
LARGEST_FACTOR = 1e6
STILL = 1e30  # divides the frequency of a pair that does not turn at all
LEAST_TRAINED = 2048  # tokens; no LLaMA was trained with a shorter context


@dataclass
class RopeSettings:
    """What the scaling means: keys without their `llama.rope.` prefix, and the context."""

    freq_base: float
    context: int
    keys: dict[str, Any] = field(default_factory=dict)
    factors: list[float] | None = None  # `rope_freqs.weight`, (head_dim / 2,)
    notes: list[str] = field(default_factory=list)


def rope_settings(config: Fields, head_dim: int, context: int) -> RopeSettings:
    """The rope settings of a `config.json` whose `max_position_embeddings` is `context`.

    Raises ModelConfigError naming the key, UnsupportedModelError for a scaling not listed here.
    """
    empty = config.get("rope_scaling") in (None, {})
    key = "rope_parameters" if empty and "rope_parameters" in config else "rope_scaling"
    scaling = config.section(key)
    _refuse_part_of_a_head(_holder(config, scaling, "partial_rotary_factor"))
    base = _holder(config, scaling, "rope_theta")
    settings = RopeSettings(base.number("rope_theta", 1.0, LARGEST_BASE, 10_000.0), context)
    if scaling is None:
        return _private_scale(config, settings)
    if scaling.values.keys() and all(isinstance(v, dict) for v in scaling.values.values()):
        raise config.unsupported(key, "rope settings that differ by layer are not supported")
    kind = scaling.text("rope_type") or scaling.text("type") or "default"
    convert = _KINDS.get(kind)
    if convert is None:
        supported = ", ".join(_KINDS)
        problem = f"rope scaling {spelled(kind)} is not supported; supported: {supported}"
        name = "rope_type" if "rope_type" in scaling else "type"
        raise scaling.unsupported(name, problem, supported)
    convert(_with_trained_length(config, scaling), settings, head_dim)
    return settings


def _holder(config: Fields, scaling: Fields | None, key: str) -> Fields:
    """Where `transformers` takes `key` from: the section, else the top level."""
    return scaling if scaling is not None and key in scaling else config


def _refuse_part_of_a_head(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        problem = "only a part of each head turns; supported: all of it"
        raise fields.unsupported("partial_rotary_factor", problem, allowed="1.0")


def _with_trained_length(config: Fields, scaling: Fields) -> Fields:
    """The section, with the length that stands beside it: `transformers` lets that one win."""
    key = "original_max_position_embeddings"
    if key not in config:
        return scaling
    config.integer(key, 1, MOST_CONTEXT)  # so that a refusal names the place
    return Fields({**scaling.values, key: config.get(key)}, scaling.path, scaling.prefix)


def _private_scale(config: Fields, settings: RopeSettings) -> RopeSettings:
    """Some Giraffe releases name their linear factor so, and have no `rope_scaling`."""
    if "abacus_scale" in config:
        factor = config.number("abacus_scale", 0.0, LARGEST_FACTOR)
        settings.notes.append(f"abacus_scale = {factor:g} taken as linear rope scaling")
        _stretch(config, "abacus_scale", settings, factor)
    return settings


def _default(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    """No scaling."""


def _factor(scaling: Fields) -> float:
    return scaling.number("factor", 0.0, LARGEST_FACTOR)


def _linear(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    _stretch(scaling, "factor", settings, _factor(scaling))


def _stretch(fields: Fields, key: str, settings: RopeSettings, factor: float) -> None:
    """Linear interpolation (arXiv:2306.15595). Releases disagree on what their context means.

    Some give the stretched length, some the original one: a length that would leave fewer than
    2,048 tokens before stretching is the original.
    """
    settings.keys |= {"scaling.type": "linear", "scaling.factor": factor}
    if factor > 1.0 and settings.context / factor < LEAST_TRAINED:
        trained = settings.context
        settings.context = _tokens(fields, key, settings.context * factor)
        settings.notes.append(
            f"context length {settings.context}: {trained} tokens, stretched {factor:g} times"
        )


def _tokens(fields: Fields, key: str, count: float) -> int:
    """A stretched context's length, which `key` may not make too long."""
    if not 1 <= round(count) <= MOST_CONTEXT:
        raise fields.error(key, f"a factor that leaves a context of 1..{MOST_CONTEXT} tokens")
    return round(count)


def _dynamic(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    """Dynamic NTK grows the base with the text; GGUF has one base, the one at full length."""
    factor = scaling.number("factor", math.nextafter(1.0, 0.0), LARGEST_FACTOR)
    full = _tokens(scaling, "factor", settings.context * factor)
    growth = factor * full / settings.context - (factor - 1.0)
    grown = settings.freq_base * growth ** (head_dim / (head_dim - 2)) if head_dim > 2 else 0.0
    if not 1.0 < grown <= LARGEST_BASE:
        raise scaling.error("factor", f"a factor that leaves the base at most {LARGEST_BASE:g}")
    settings.notes.append(
        f"dynamic NTK rope scaling made fixed for {full} tokens: freq_base {grown:.8g} instead of "
        f"{settings.freq_base:g}; short texts differ a little from the original's"
    )
    settings.freq_base, settings.context = grown, full


def _llama3(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    low = scaling.number("low_freq_factor", 0.0, LARGEST_FACTOR)
    high = scaling.number("high_freq_factor", 0.0, LARGEST_FACTOR)
    if low >= high:
        raise scaling.error("low_freq_factor", f"a number below high_freq_factor = {high:g}")
    original = scaling.integer("original_max_position_embeddings", 1, MOST_CONTEXT)
    rope = Rope(head_dim, settings.freq_base)
    settings.factors = llama3_factors(rope, _factor(scaling), low, high, original)


def _yarn(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    original = scaling.integer(
        "original_max_position_embeddings", 1, MOST_CONTEXT, settings.context
    )
    factor = _factor(scaling)
    if not scaling.flag("truncate", True):
        raise scaling.unsupported("truncate", "yarn without rounding is not supported", "true")
    own = _temperature(factor, 1.0)
    wanted = scaling.number("attention_factor", 0.0, 1e3, _attention_factor(scaling, factor))
    settings.keys |= {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": original,
        "scaling.attn_factor": wanted / own,
    }
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = scaling.number(key, 0.0, 1e6, usual)
        if value != usual:
            settings.keys[f"scaling.yarn_{key}"] = value
            settings.notes.append(f"yarn's {key} is {value:g}, a key that llama.cpp ignores")
    settings.context = max(settings.context, _tokens(scaling, "factor", original * factor))


def _attention_factor(scaling: Fields, factor: float) -> float:
    """What yarn multiplies cos and sin by, unless the config names a number."""
    mscale = scaling.number("mscale", -1e-9, 1e3, 0.0)
    all_dims = scaling.number("mscale_all_dim", -1e-9, 1e3, 0.0)
    if mscale and all_dims:
        return _temperature(factor, mscale) / _temperature(factor, all_dims)
    return _temperature(factor, 1.0)


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _truncate(scaling: Fields, settings: RopeSettings, head_dim: int) -> None:
    """Giraffe's truncated basis (arXiv:2308.10882): slow pairs share one frequency or stand still.

    No published config has a key for it; `t` is the length that its paper cuts at.
    """
    cut = scaling.number("t", 0.0, float(MOST_CONTEXT))
    cutoff, shared = 2.0 * math.pi / cut, 2.0 * math.pi / (16.0 * cut)
    factors = []
    for frequency in inverse_frequencies(Rope(head_dim, settings.freq_base)):
        if frequency >= cutoff:
            factors.append(1.0)
        elif frequency >= cutoff / 8.0:
            factors.append(frequency / shared)
        else:
            factors.append(STILL)
    settings.factors = factors


_KINDS: dict[str, Callable[[Fields, RopeSettings, int], None]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "truncate": _truncate,
}
