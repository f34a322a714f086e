"""What a pickle of tensors describes, found without running it.

Interprets the opcodes that state dicts of PyTorch need and refuses the others. Nothing is ever
imported or called: a global is an inert name, and only names on a short list are accepted. Every
length is checked against the bytes left; the memo is a dictionary, not a table that a 9-byte file
can make gigabytes long. Source: CPython's `pickletools`. Knows nothing about zip files.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from edgellama.errors import (
    EdgeLlamaError,
    ModelFormatError,
    UnsafeModelError,
    UnsupportedModelError,
    shown,
)
from edgellama.quantize.pickled_values import (
    ALLOWED,
    CLASSES,
    MOST_DIMENSIONS,
    REBUILD,
    STORAGES,
    Global,
    PickledDict,
    Storage,
    View,
    kind_of,
    view_or_problem,
)

MOST_STEPS = 500_000  # opcodes; the largest LLaMA needs 60,000
MOST_STACKED = 100_000
LONGEST_INTEGER = 16  # bytes
SAFETENSORS_HINT = "Get the model's safetensors files, or save it as safetensors"

_MARK = object()


def read_pickle(data: bytes, path: Path, where: str) -> Any:
    """The object a pickle describes: PickledDict, list, tuple, str, numbers, None, Global, View.

    Raises UnsafeModelError naming what the file asks to run; ModelFormatError with the byte at
    which it is damaged; UnsupportedModelError for tensors that are not plain ones.
    """
    return _Interpreter(data, path, where).run()


class _Interpreter:
    def __init__(self, data: bytes, path: Path, where: str) -> None:
        self.data, self.path, self.where = data, path, where
        self.at = self.step_at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, problem: str, kind: type[EdgeLlamaError] = ModelFormatError) -> NoReturn:
        hint = None if kind is ModelFormatError else SAFETENSORS_HINT
        raise kind(f"byte {self.step_at}: {problem}", path=self.path, where=self.where, hint=hint)

    def run(self) -> Any:
        if self.data[:1] != b"\x80" or len(self.data) < 2:
            self.refuse("not a pickle of protocol 2 or later", UnsupportedModelError)
        if not 2 <= self.data[1] <= 5:
            self.refuse(f"pickle protocol {self.data[1]}; allowed: 2..5", UnsupportedModelError)
        self.at = 2
        for _ in range(MOST_STEPS):
            self.step_at = self.at
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.result()
            step = _STEPS.get(code)
            if step is None:
                name = _REFUSED.get(code)
                if name is not None:
                    self.refuse(f"the opcode {name} could run code", UnsafeModelError)
                self.refuse(f"opcode {code:#04x} has no place in a state dict")
            step(self)
            if len(self.stack) > MOST_STACKED:
                self.refuse(f"more than {MOST_STACKED} values on the stack")
        self.refuse(f"more than {MOST_STEPS} opcodes")

    def result(self) -> Any:
        if self.at != len(self.data):
            self.refuse(f"{len(self.data) - self.at} bytes follow the end of the pickle")
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            self.refuse(f"{len(self.stack)} values are left at the end; expected one")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            left = len(self.data) - self.at
            self.refuse(f"{count} bytes needed, {left} left")
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        """Text up to a newline, as the opcode GLOBAL holds it."""
        end = self.data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            self.refuse("a name has no end")
        text = self.take(end + 1 - self.at)[:-1]
        return self.decoded(text)

    def decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{shown(raw)} is not UTF-8 text")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.refuse("the stack is empty")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """The values above the topmost mark; takes the mark too."""
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self.refuse("there is no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def name(self, module: object, name: object) -> None:
        """A global: accepted by name, refused before anything else can happen."""
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full in ALLOWED:
            self.push(Global(full))
        elif full.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
            problem = f"{shown(full)}: only plain dense tensors are read"
            self.refuse(problem, UnsupportedModelError)
        else:
            self.refuse(f"the file asks to run or create {shown(full)}", UnsafeModelError)

    def remember(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            self.refuse("the stack is empty")
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            self.refuse(f"memo {key} was never set")
        self.push(self.memo[key])

    def append(self, values: list[Any]) -> None:
        target = self.pop()
        if type(target) is not list:
            self.refuse(f"appends to {kind_of(target)}, not a list", UnsafeModelError)
        target.extend(values)
        self.push(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop()
        if type(target) is not PickledDict:
            self.refuse(f"sets an item of {kind_of(target)}, not of a dict", UnsafeModelError)
        if len(values) % 2:
            self.refuse("a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                self.refuse(f"a key is {kind_of(key)}; expected a string or a small integer")
            if key in target:
                self.refuse(f"the key {shown(key)} occurs twice")
            target[key] = value
        self.push(target)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append_one(self) -> None:
        self.append([self.pop()])

    def build(self) -> None:
        """State dicts of modules carry `_metadata`, which nothing here needs."""
        state, target = self.pop(), self.pop()
        plain = type(target) is PickledDict and target.ordered and type(state) is PickledDict
        if not plain or len(state) != 1 or "_metadata" not in state:
            self.refuse(f"BUILD would set attributes of {kind_of(target)}", UnsafeModelError)
        self.push(target)

    def storage(self) -> None:
        """A persistent id: ('storage', class, key, location, count)."""
        match self.pop():
            case ("storage", Global(name=name), str(key), str(), int(count)) if (
                name.removeprefix("torch.") in STORAGES and type(count) is int and count >= 0
            ):
                self.push(Storage(key, STORAGES[name.removeprefix("torch.")], count))
            case _:
                self.refuse("a persistent id does not describe a storage")

    def view(self, arguments: tuple[Any, ...]) -> View:
        view = view_or_problem(arguments)
        if isinstance(view, str):
            self.refuse(view)
        return view

    def reduce(self) -> None:
        """A call, of the four that only describe: rebuilt here as data."""
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global:
            self.refuse(f"calls {kind_of(function)}", UnsafeModelError)
        if type(arguments) is not tuple:
            self.refuse(f"calls {function.name} with {kind_of(arguments)}, not a tuple")
        if len(arguments) > MOST_DIMENSIONS:  # a match below would copy them all
            self.refuse(f"calls {function.name} with {len(arguments)} arguments")
        match function.name, arguments:
            case ("collections.OrderedDict", ()):
                made = PickledDict()
                made.ordered = True
                self.push(made)
            case ("torch._utils._rebuild_tensor_v2", _):
                self.push(self.view(arguments))
            case ("torch._utils._rebuild_parameter", (View() as view, bool(), PickledDict())):
                self.push(view)
            case (
                "torch._tensor._rebuild_from_type_v2",
                (Global(name=_t), Global(name=kind), tuple(inner), PickledDict() | None | tuple()),
            ) if _t == REBUILD and kind in CLASSES:
                self.push(self.view(inner))
            case _:
                self.refuse(f"calls {function.name} with arguments it does not take")


def _sized(read: Callable[[_Interpreter, bytes], Any], size: int) -> Callable[[_Interpreter], None]:
    """An opcode followed by a length of `size` bytes and that many bytes."""
    return lambda self: self.push(read(self, self.take(self.integer(size))))


def _text(self: _Interpreter, raw: bytes) -> str:
    return self.decoded(raw)


def _raw(self: _Interpreter, raw: bytes) -> bytes:
    return raw


def _long(self: _Interpreter, raw: bytes) -> int:
    if len(raw) > LONGEST_INTEGER:
        self.refuse(f"an integer of {len(raw)} bytes; at most {LONGEST_INTEGER}")
    return int.from_bytes(raw, "little", signed=True)


def _frame(self: _Interpreter) -> None:
    length = self.integer(8)
    if length > len(self.data) - self.at:
        self.refuse(f"a frame of {length} bytes; {len(self.data) - self.at} left")


def _tuple(count: int) -> Callable[[_Interpreter], None]:
    def step(self: _Interpreter) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    return step


def _stack_global(self: _Interpreter) -> None:
    name, module = self.pop(), self.pop()
    self.name(module, name)


_STEPS: dict[int, Callable[[_Interpreter], None]] = {
    0x28: lambda self: self.push(_MARK),  # MARK
    0x29: lambda self: self.push(()),  # EMPTY_TUPLE
    0x42: _sized(_raw, 4),  # BINBYTES
    0x43: _sized(_raw, 1),  # SHORT_BINBYTES
    0x47: lambda self: self.push(struct.unpack(">d", self.take(8))[0]),  # BINFLOAT
    0x4A: lambda self: self.push(self.integer(4, signed=True)),  # BININT
    0x4B: lambda self: self.push(self.integer(1)),  # BININT1
    0x4D: lambda self: self.push(self.integer(2)),  # BININT2
    0x4E: lambda self: self.push(None),  # NONE
    0x51: _Interpreter.storage,  # BINPERSID
    0x52: _Interpreter.reduce,  # REDUCE
    0x58: _sized(_text, 4),  # BINUNICODE
    0x5D: lambda self: self.push([]),  # EMPTY_LIST
    0x61: _Interpreter.append_one,  # APPEND
    0x62: _Interpreter.build,  # BUILD
    0x63: lambda self: self.name(self.line(), self.line()),  # GLOBAL
    0x65: lambda self: self.append(self.marked()),  # APPENDS
    0x68: lambda self: self.recall(self.integer(1)),  # BINGET
    0x6A: lambda self: self.recall(self.integer(4)),  # LONG_BINGET
    0x71: lambda self: self.remember(self.integer(1)),  # BINPUT
    0x72: lambda self: self.remember(self.integer(4)),  # LONG_BINPUT
    0x73: _Interpreter.set_item,  # SETITEM
    0x74: lambda self: self.push(tuple(self.marked())),  # TUPLE
    0x75: lambda self: self.set_items(self.marked()),  # SETITEMS
    0x7D: lambda self: self.push(PickledDict()),  # EMPTY_DICT
    0x85: _tuple(1),  # TUPLE1
    0x86: _tuple(2),  # TUPLE2
    0x87: _tuple(3),  # TUPLE3
    0x88: lambda self: self.push(True),  # NEWTRUE
    0x89: lambda self: self.push(False),  # NEWFALSE
    0x8A: _sized(_long, 1),  # LONG1
    0x8B: _sized(_long, 4),  # LONG4
    0x8C: _sized(_text, 1),  # SHORT_BINUNICODE
    0x8D: _sized(_text, 8),  # BINUNICODE8
    0x8E: _sized(_raw, 8),  # BINBYTES8
    0x93: _stack_global,  # STACK_GLOBAL
    0x94: lambda self: self.remember(len(self.memo)),  # MEMOIZE
    0x95: _frame,  # FRAME
}
_REFUSED = {  # they create objects, or reach for what is not in the file
    0x50: "PERSID",
    0x69: "INST",
    0x6F: "OBJ",
    0x81: "NEWOBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
