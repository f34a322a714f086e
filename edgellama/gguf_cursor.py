"""A walk over the start of a GGUF file that never trusts a length it has not checked.

Every declared count is compared with the bytes that are left before anything is allocated or
looped over, so a refusal costs no more than the bytes that were really read.

Knows the encoding of numbers and strings; `gguf_parts.py` knows their order.
"""

from io import FileIO
from pathlib import Path
from struct import Struct

from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError, ModelFormatError, shown

LONGEST_HEADER = 2**28  # bytes
LONGEST_STRING = 16 * 2**20  # bytes
WINDOW = 2**20  # bytes read at a time
INCOMPLETE = "The download may be incomplete"

_U32, _U64 = Struct("<I"), Struct("<Q")


class Cursor:
    """Walks the file's start through a window, checking every step against the file's size."""

    def __init__(
        self, file: FileIO, path: Path, size: int, cancel: CancelToken | None = None
    ) -> None:
        self.file, self.path, self.size, self.cancel = file, path, size, cancel
        self.where: str | None = None  # what is being read, for messages
        self.window, self.base, self.at = b"", 0, 0  # window[at] is byte base + at of the file

    @property
    def position(self) -> int:
        return self.base + self.at

    @property
    def left(self) -> int:
        return self.size - self.position

    def error(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: object = None,
        allowed: str | None = None,
        hint: str | None = None,
        kind: type[EdgeLlamaError] = ModelFormatError,
    ) -> EdgeLlamaError:
        return kind(
            problem,
            path=self.path,
            where=self.where,
            field=field,
            value=value,
            allowed=allowed,
            hint=hint,
        )

    def out_of_range(self, field: str, value: object, allowed: str) -> EdgeLlamaError:
        problem = f"{field} = {shown(value)}; allowed: {allowed}"
        return self.error(problem, field=field, value=value, allowed=allowed)

    def too_many(self, what: str, claim: str, fit: int, value: int) -> EdgeLlamaError:
        """The error for a count within the limits whose bytes the file does not have."""
        problem = f"truncated at byte {self.size} while reading {what}: {claim}; at most {fit} fit"
        problem += f" in the {self.left} bytes left"
        return self.error(
            problem, field=what, value=value, allowed=f"at most {fit}", hint=INCOMPLETE
        )

    def need(self, count: int, what: str) -> None:
        """Have `count` more bytes in the window, or refuse."""
        if self.at + count <= len(self.window):
            return
        if count > self.left:
            problem = f"truncated at byte {self.size} while reading {what}"
            raise self.error(problem, field=what, hint=INCOMPLETE)
        if self.position + count > LONGEST_HEADER:
            problem = f"the header goes on after {LONGEST_HEADER} bytes, the most allowed"
            raise self.error(problem, field="header", allowed=f"{LONGEST_HEADER} bytes")
        if self.cancel is not None:
            self.cancel.check("reading the header")
        rest = self.window[self.at :]
        wanted = min(max(count, WINDOW), self.left)
        pieces = [rest]
        self.base, self.at, have = self.position, 0, len(rest)
        while have < wanted:
            piece = self.file.read(wanted - have)
            if not piece:
                raise self.error(f"the file ended early while reading {what}", hint=INCOMPLETE)
            pieces.append(piece)
            have += len(piece)
        self.window = b"".join(pieces)

    def head(self) -> bytes:
        """The next bytes, up to 512, without moving on."""
        self.need(min(self.left, 512), "the first bytes")
        return self.window[self.at : self.at + 512]

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.window[self.at - count : self.at]

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def text(self, what: str, shortest: int, longest: int) -> str:
        """A length and so many bytes of UTF-8."""
        start, field = self.position, f"the length of {what}"
        length = self.u64(field)
        if not shortest <= length <= longest:
            allowed = f"{shortest}..{longest}, and {self.left} bytes are left"
            raise self.out_of_range(field, length, allowed)
        if length > self.left:
            raise self.too_many(what, f"its length is {length} at byte {start}", self.left, length)
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            problem = f"{what} at byte {start} is not UTF-8: {shown(raw)}"
            raise self.error(problem, field=what, value=raw) from error

    def name(self, what: str, longest: int) -> str:
        """A text that is safe to show: no control or invisible characters."""
        name = self.text(what, 1, longest)
        if not name.isprintable():
            problem = f"{what} {shown(name)} holds a character that does not print"
            raise self.error(problem, field=what, value=name)
        return name

    def strings(self, count: int) -> list[str]:
        """The elements of a string array. The common case runs inside the window."""
        found: list[str] = []
        while len(found) < count:
            self._strings_in_window(count - len(found), found)
            if len(found) < count:  # the next one crosses the window's end, or is bad
                found.append(self.text(f"element {len(found)}", 0, LONGEST_STRING))
        return found

    def _strings_in_window(self, count: int, found: list[str]) -> None:
        window, at, length_at = self.window, self.at, _U64.unpack_from
        size = len(window)
        last = size - 8
        try:
            for _ in range(count):
                if at > last:
                    break
                start = at + 8
                end = start + length_at(window, at)[0]
                if end > size:
                    break
                found.append(window[start:end].decode())
                at = end
        except UnicodeDecodeError:
            pass  # read again by `text`, which says where
        self.at = at


def foreign(cursor: Cursor, head: bytes) -> EdgeLlamaError:
    """The error for a file that is no GGUF, naming what it looks like instead."""
    known = _recognise(head)
    magic = head[:4].decode("latin-1")
    problem = f"the first 4 bytes are {shown(magic)}; expected 'GGUF'"
    if known is None:
        return cursor.error(problem, field="magic", value=magic, allowed="GGUF")
    what, hint = known
    problem = f"this is {what} ({cursor.size} bytes), not a GGUF model: {problem}"
    return cursor.error(problem, field="magic", value=magic, allowed="GGUF", hint=hint)


_CONVERT = "Convert the checkpoint to GGUF first, or find a .gguf file of this model"
_FOREIGN = (  # first bytes, what the file is, what to do
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` to fetch the model"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", _CONVERT),
    (b"\x80\x02", "a Python pickle, perhaps a PyTorch checkpoint", _CONVERT),
    (b"\x1f\x8b", "a gzip file", "Unpack it first"),
)
_LEGACY = (b"GGML", b"GGMF", b"GGJT", b"GGLA", b"LMGG", b"FMGG", b"TJGG", b"ALGG")


def _recognise(head: bytes) -> tuple[str, str] | None:
    for start, what, hint in _FOREIGN:
        if head.startswith(start):
            return what, hint
    if head[:4].upper() in _LEGACY:
        return "a model in the old GGML format", "Convert the original checkpoint again"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", "Download the file itself, not the page about it"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "a safetensors file", _CONVERT
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x3a", b"\x42"):
        return "an ONNX model", "Give the folder it is in to `edgellama.load`"
    return None
