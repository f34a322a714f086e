"""Typed, range-checked access to the keys of a checkpoint's configuration.

Every refusal names the file, the key, the value as JSON spells it, and what is expected. Knows
nothing about what the keys mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.errors import LONGEST_SHOWN, ModelConfigError, UnsupportedModelError

SMALLEST = 2.0**-126  # of float32, without losing digits


def spelled(value: object) -> str:
    """A value as JSON writes it, safe to print; what is longer than 200 characters is cut."""
    text = json.dumps(value).replace("\x7f", "\\u007f")  # the one control that JSON leaves
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


class Fields:
    """The keys of one JSON object; `prefix` names the object within the file ("rope_scaling.").

    A key that is null counts as absent, as `transformers` has it.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, allowed: str, hint: str | None = None) -> ModelConfigError:
        """The refusal of a key's value, or of its absence."""
        key_name, value = self.prefix + key, self.get(key)
        found = f"{key_name} = {spelled(value)}" if key in self else f"{key_name} is missing"
        return ModelConfigError(
            f"{found}; expected {allowed}",
            path=self.path,
            where=f"key '{key_name}'",
            field=key_name,
            value=value,
            allowed=allowed,
            hint=hint,
        )

    def unsupported(
        self, key: str, problem: str, allowed: str | None = None, hint: str | None = None
    ) -> UnsupportedModelError:
        """The refusal of something legal that is not converted."""
        return UnsupportedModelError(
            problem,
            path=self.path,
            where=f"key '{self.prefix}{key}'",
            field=self.prefix + key,
            value=self.get(key),
            allowed=allowed,
            hint=hint,
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"integer {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in (low, high], 0 or not lost in a float32, as GGUF files store it."""
        value = self.get(key)
        value = default if value is None else value
        allowed = f"number above {low:g}, up to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, allowed)
        if not low < value <= high or 0.0 < abs(value) < SMALLEST:
            raise self.error(key, allowed)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def section(self, key: str) -> "Fields | None":
        """A nested object, or None without one."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object in braces, or null")
        return Fields(value, self.path, f"{self.prefix}{key}.")
