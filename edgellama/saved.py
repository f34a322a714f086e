"""A conversation on the disk: its ids, and the keys and values computed of them, in one file.

All integers little-endian, all sizes follow from the header:

    header    8 bytes "edgesess", u32 version, u32 tokens, 32 bytes fingerprint of the model,
              32 ASCII characters each (padded with spaces) how keys and values lie and what
              computed them, 32 bytes SHA-256 of the header so far
    ids       u32 each
    keys and values of these tokens, as the runtime keeps them
    32 bytes  SHA-256 of everything before

A file is input like any other: nothing in it is believed before it is compared with the model and
the file's own size, and nothing is executed. Knows nothing about text.
"""

import hashlib
import os
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.control import CancelToken
from edgellama.errors import (
    ContextOverflow,
    EdgeLlamaError,
    ModelFormatError,
    ParameterError,
    UnsupportedModelError,
    shown,
)
from edgellama.output import atomic_output
from edgellama.regular_file import open_regular, unreadable
from edgellama.runtimes.base import SavableSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC, VERSION = b"edgesess", 1
HEADER = struct.Struct("<8sII32s32s32s")
DIGEST = 32  # bytes of a SHA-256
NAME = 32  # characters of a name in the header; longer ones are cut
PIECE = 2**20  # bytes read or written between two looks at the cancel token
DAMAGED = "The file is damaged: start the conversation anew"


def save_session(
    path: Path,
    session: SavableSession,
    ids: Sequence[int],
    fingerprint: bytes,
    cancel: CancelToken | None,
) -> None:
    """Write a session that nobody uses meanwhile; an existing file is replaced whole or not at all.

    Raises OutputError, Cancelled.
    """
    kind, origin = session.cache_kind[:NAME].ljust(NAME), session.cache_origin[:NAME].ljust(NAME)
    names = kind.encode("ascii"), origin.encode("ascii")
    header = HEADER.pack(MAGIC, VERSION, len(ids), fingerprint, *names)
    header += hashlib.sha256(header).digest()
    digest = hashlib.sha256()
    with atomic_output(path, private=True) as file:
        for piece in _pieces([header, _id_bytes(ids), *session.export()]):
            if cancel:
                cancel.check("save")
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())


def _pieces(parts: "Iterable[bytes | NDArray[np.uint8]]") -> Iterable[memoryview]:
    for part in parts:
        view = _view(part)
        for start in range(0, len(view), PIECE):
            yield view[start : start + PIECE]


def _id_bytes(ids: Sequence[int]) -> bytes:
    return _native(array("I", ids)).tobytes()


def _native(words: "array[int]") -> "array[int]":
    assert words.itemsize == 4
    if sys.byteorder == "big":
        words.byteswap()
    return words


def restore_session(
    path: Path,
    session: SavableSession,
    *,
    fingerprint: bytes,
    context: int,
    vocab_size: int,
    exact: bool,
    cancel: CancelToken | None,
) -> list[int]:
    """Fill an empty session with what `save_session` wrote; the ids in its cache.

    `exact` asks for keys and values of the same bits as this runtime would compute. If this
    raises, close the session. Raises ModelFormatError for a damaged file, UnsupportedModelError
    for another version, ParameterError for another model, runtime or kv_type, ContextOverflow,
    Cancelled, EdgeLlamaError if the system cannot read it.
    """
    try:
        with open_regular(path, wanted="a session file") as file:
            reader = _Reader(file, path, cancel)
            count = reader.header(session, fingerprint, exact)
            if count > context:
                raise ContextOverflow(count, context, "Load the model with a larger context")
            return reader.content(session, count, vocab_size)
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        raise unreadable(path, error) from error


class _Reader:
    """Reads a session file once, from the front, summing up what it has seen."""

    def __init__(self, file: FileIO, path: Path, cancel: CancelToken | None) -> None:
        self._file, self._path, self._cancel = file, path, cancel
        self._size = os.fstat(file.fileno()).st_size
        self._digest = hashlib.sha256()

    def content(self, session: SavableSession, count: int, vocab_size: int) -> list[int]:
        """The ids; the session takes over the keys and values."""
        expected = HEADER.size + DIGEST + 4 * count + session.cache_bytes(count) + DIGEST
        if self._size != expected:
            raise self._damaged(
                "size", self._size, f"{expected} bytes for a session of {count} tokens"
            )
        ids = self._ids(count, vocab_size)
        session.adopt(count, self._fill)
        digest, found = self._digest.digest(), bytearray(DIGEST)
        self._fill(found)
        if found != digest:
            raise self._damaged("checksum", bytes(found).hex(), digest.hex())
        return ids

    def header(self, session: SavableSession, fingerprint: bytes, exact: bool) -> int:
        """How many tokens follow, once the rest of the header is found to fit the session."""
        if self._size < HEADER.size + 2 * DIGEST:
            raise self._damaged("size", self._size, f"at least {HEADER.size + 2 * DIGEST} bytes")
        header, digest = bytearray(HEADER.size), bytearray(DIGEST)
        self._fill(header)
        magic, version, count, model, kind, origin = HEADER.unpack(header)
        if magic != MAGIC:
            hint = "It begins otherwise than those that Session.save writes"
            raise ModelFormatError(
                "this is not a session file", path=self._path, field="magic", value=magic, hint=hint
            )
        if version != VERSION:
            raise UnsupportedModelError(
                f"session files of version {version} are not known; expected {VERSION}",
                path=self._path,
                field="version",
                value=version,
                allowed=str(VERSION),
            )
        self._fill(digest)
        if hashlib.sha256(header).digest() != digest:
            raise self._damaged("header", "its checksum differs", "the one written")
        if model != fingerprint:
            raise self._unfit("model", model.hex()[:16], fingerprint.hex()[:16])
        self._compare(session, _text(kind), _text(origin), exact)
        return int(count)

    def _compare(self, session: SavableSession, kind: str, origin: str, exact: bool) -> None:
        own_kind, own_origin = session.cache_kind[:NAME], session.cache_origin[:NAME]
        if kind != own_kind:
            same_runtime = kind.split(" ")[0] == own_kind.split(" ")[0]
            raise self._unfit("kv_type" if same_runtime else "runtime", kind, own_kind)
        if exact and origin != own_origin:
            raise self._unfit("deterministic", origin, own_origin)

    def _unfit(self, field: str, found: str, wanted: str) -> ParameterError:
        problem, hint = {
            "model": ("was saved from another model", "Restore it with the model it is of"),
            "runtime": ("was saved by another runtime", "Load the model with that runtime"),
            "kv_type": (
                "keeps keys and values in another type",
                "Load the model with the kv_type (reference: dtype) that it was saved with",
            ),
            "deterministic": (
                "was computed by other code, whose last bits differ",
                "Load the model with deterministic=False, or start the conversation anew",
            ),
        }[field]
        return ParameterError(
            f"the session {problem}: {shown(found)}, here it is {shown(wanted)}",
            path=self._path,
            field=field,
            value=found,
            allowed=wanted,
            hint=hint,
        )

    def _ids(self, count: int, vocab_size: int) -> list[int]:
        raw = bytearray(4 * count)
        self._fill(raw)
        ids = _native(array("I", bytes(raw))).tolist()
        for place, token in enumerate(ids):
            if token >= vocab_size:
                raise self._damaged(f"ids[{place}]", token, f"0..{vocab_size - 1}")
        return ids

    def _fill(self, buffer: "bytearray | NDArray[np.uint8]") -> None:
        """Read the next bytes into all of a buffer."""
        view = _view(buffer)
        done = 0
        while done < len(view):
            if self._cancel:
                self._cancel.check("restore")
            got = self._file.readinto(view[done : done + PIECE])
            if not got:
                raise self._damaged("size", "it ends early", "it changed since it was opened")
            self._digest.update(view[done : done + got])
            done += got

    def _damaged(self, field: str, value: Any, allowed: str) -> ModelFormatError:
        problem = f"{field} is {shown(value)}; expected {allowed}"
        return ModelFormatError(
            problem, path=self._path, field=field, value=value, allowed=allowed, hint=DAMAGED
        )


def _view(buffer: Any) -> memoryview:
    return memoryview(buffer).cast("B") if len(buffer) else memoryview(b"")


def _text(padded: bytes) -> str:
    return padded.decode("ascii", errors="backslashreplace").rstrip(" ")
