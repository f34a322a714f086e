"""What every runtime offers, and what it is opened with.

A runtime holds one model's weights; a session of it holds one conversation's keys and values.
Knows nothing about text: ids in, logits out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgellama.control import CancelToken, Progress as Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Options:
    """How a model is to be run; see `edgellama.load` for each field's meaning."""

    context: int  # tokens a session can hold
    threads: int
    kv_type: str = "f16"
    dtype: str | None = None
    deterministic: bool = False
    accuracy: int | None = None
    device: str = "auto"
    cancel: CancelToken | None = None
    progress: Progress | None = None


class RuntimeSession(Protocol):
    """One conversation's key/value cache."""

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        ...

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> "NDArray[np.float32]":
        """Append `ids` (1 or more, each < vocab_size, checked by the caller) to the cache.

        Returns float32 logits, (vocab_size,) after the last id, or (len(ids), vocab_size).
        Raises Cancelled with `position` as it was before the call.
        """
        ...

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens (0 <= n <= position, checked by the caller)."""
        ...

    def stop(self) -> None:
        """End, soon, a `forward` that another thread is in; the session will only be closed."""
        ...

    def close(self) -> None:
        """Free the cache; calling it twice is harmless."""
        ...


@dataclass(frozen=True)
class Likeliest:
    """The likeliest next tokens: any other's logit is at most the least of theirs."""

    ids: "NDArray[np.int64]"  # (k,), the likeliest first
    logits: "NDArray[np.float32]"  # (k,)
    log_p: float  # natural logarithm of the first one's probability; not finite if a logit is not


@runtime_checkable
class ChoosingSession(RuntimeSession, Protocol):
    """A session that finds the likeliest tokens where it computes, so that few numbers travel."""

    @property
    def choices(self) -> int:
        """How many tokens `step` finds."""
        ...

    def step(self, token: int, *, cancel: CancelToken | None = None) -> Likeliest:
        """Append one id, as `forward` does; quickest for the likeliest of the step before."""
        ...

    def logits(self) -> "NDArray[np.float32]":
        """All logits of the last `step`, (vocab_size,), as `forward` would have given them.

        To be asked for before the session is used otherwise.
        """
        ...


@runtime_checkable
class SavableSession(RuntimeSession, Protocol):
    """A session whose keys and values can leave it as bytes and come back; see `saved.py`."""

    cache_kind: str  # how they lie, such as "cpu f16": only equal kinds fit; ASCII, 1..32 long
    cache_origin: str  # what computed them, to the bit; ASCII, 1..32 long

    def cache_bytes(self, n: int) -> int:
        """How many bytes the first `n` tokens take (0 <= n <= context)."""
        ...

    def export(self) -> Iterator["NDArray[np.uint8]"]:
        """The bytes of all tokens in the cache, in pieces, and none of tokens that were forgotten.

        The pieces are to be used before the session is.
        """
        ...

    def adopt(self, n: int, fill: Callable[["NDArray[np.uint8]"], None]) -> None:
        """Take over `n` tokens into an empty session: `fill` puts in the next bytes of an export.

        If `fill` raises, the session is only to be closed.
        """
        ...


class Runtime(Protocol):
    """One model's weights, ready to run. Sessions of it are independent."""

    warnings: list[str]  # about the weights it read

    def session(self) -> RuntimeSession: ...

    def describe(self) -> dict[str, Any]:
        """For `model.device`: runtime, device, threads, instruction set, and why."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes by purpose: `weights`, `kv_cache` (of one full session), `scratch`."""
        ...

    def close(self) -> None:
        """Free the weights; calling it twice is harmless."""
        ...


@runtime_checkable
class SavingRuntime(Runtime, Protocol):
    """A runtime whose sessions are `SavableSession`s."""

    fingerprint: bytes  # 32 bytes that tell the model from others
