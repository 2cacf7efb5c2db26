"""The pickles of PyTorch state dicts, read by a machine that knows no code.

It executes the opcodes that build containers, numbers and strings, and calls nothing: a global is a name, a
tensor's constructor makes a `View`. Any other global ends the reading, with its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any, ClassVar, TypeGuard

from tvfast.checkpoint.files import damaged, shown
from tvfast.errors import CheckpointError

MOST_BYTES = 2**26
"""Length of a pickle; 100 000 tensors take about 20 MiB."""

_MOST_DIMENSIONS = 64
_MOST_STACK = 200_000  # pickle flushes containers every 1000 items


@dataclass(frozen=True, slots=True)
class Global:
    """A name such as `torch.FloatStorage`. It is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id: one member of the archive.

    Attributes:
        kind: `FloatStorage`, `UntypedStorage` and so on.
        key: the member's name below `data/`.
        n_items: of the kind's type; bytes of an untyped one.
    """

    kind: str
    key: str
    n_items: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor over a storage.

    Attributes:
        storage: its memory.
        first: index of its first element.
        shape, stride: in elements.
        dtype: torch's name where the storage is untyped, else None.
        flags: names of lazy operations that torch would still apply (`conj`, `neg`).
    """

    storage: Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None
    flags: tuple[str, ...]


def load_pickle(raw: bytes, where: str) -> Any:
    """The object in a pickle: containers, numbers, strings, `Global`, `Storage` and `View`.

    Args:
        raw: the pickle, protocol 2 to 5.
        where: file and member, for messages.

    Raises:
        CheckpointError: a global that no state dict needs, an unknown opcode, or anything malformed or huge.

    Notes:
        0.3 us an opcode, 40 opcodes a tensor. At most 4 million opcodes; each makes at most one object.
    """
    return Machine(raw, where).run()


class Machine:
    """Stack, marks and memo of one pickle. What names, calls and keys it takes is for subclasses to widen."""

    most_opcodes: ClassVar[int] = 4_000_000
    __slots__ = ("marks", "memo", "position", "raw", "stack", "where")

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw = raw
        self.where = where
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        raw, action_of = self.raw, self.action_of
        n_steps = 0
        try:
            while True:
                opcode = raw[self.position]
                self.position += 1
                if opcode == _STOP:
                    return self.stack.pop()
                action = action_of(opcode)
                if action is None:
                    raise self._unknown(opcode)
                action(self)
                n_steps += 1
                if not n_steps % 4096:
                    self._check_size(n_steps)
        except (IndexError, KeyError):
            # every access beyond the stack, the marks, the memo or the end of the pickle
            raise damaged(
                self.where, f"the pickle breaks off or refers to nothing at byte {self.position}"
            ) from None
        except UnicodeDecodeError:
            raise damaged(self.where, f"a string before byte {self.position} is not UTF-8") from None

    def action_of(self, opcode: int) -> Callable[[Any], None] | None:
        return _ACTIONS.get(opcode)

    def take(self, n_bytes: int) -> bytes:
        start = self.position
        self.position = start + n_bytes
        if self.position > len(self.raw):
            raise IndexError
        return self.raw[start : self.position]

    def line(self) -> str:
        end = self.raw.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise IndexError
        text = self.raw[self.position : end].decode()
        self.position = end + 1
        return text

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise IndexError
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        found = self.stack[-1]
        if type(found) is not kind:
            raise self.malformed(f"adds items to {described(found)}; expected a {kind.__name__}")
        return found

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not self.is_key(key):
                raise self.malformed(f"a mapping has {described(key)} as a key; expected strings")
            target[key] = value

    def is_key(self, key: object) -> bool:
        """Nothing else, for a nested tuple can take forever to hash."""
        return type(key) is str or (type(key) is int and 0 <= key < 2**31)

    def named(self, name: str) -> Global:
        if name not in _CALLS and name not in _TYPES and not _MARKERS.fullmatch(name):
            raise CheckpointError(
                f"{self.where}: asks to run {shown(name)}; expected only dense tensors and names. Refused: "
                "tvfast runs no code from a checkpoint, and has run none of this one. If you trust the file, "
                "load it with torch and save its state dict with safetensors.torch.save_file."
            )
        return Global(name)

    def call(self, function: object, arguments: object) -> Any:
        action = _CALLS.get(function.name) if isinstance(function, Global) else None
        if action is None or not isinstance(arguments, tuple):
            raise self.malformed(f"calls {described(function)} with {described(arguments)}")
        return action(self, arguments)

    def malformed(self, found: str) -> CheckpointError:
        return damaged(self.where, f"at byte {self.position} of the pickle: {found}")

    def _unknown(self, opcode: int) -> CheckpointError:
        if opcode in _CONSTRUCTORS:
            if opcode == b"i"[0]:
                self.named(f"{self.line()}.{self.line()}")
            return CheckpointError(
                f"{self.where}: asks to make an object (opcode {opcode:#04x}); expected only dense tensors "
                "and names. Refused: tvfast runs no code from a checkpoint."
            )
        return self.malformed(f"opcode {opcode:#04x}; expected those of a state dict, in protocol 2 to 5")

    def _check_size(self, n_steps: int) -> None:
        if n_steps > self.most_opcodes or len(self.stack) > _MOST_STACK or len(self.marks) > _MOST_STACK:
            raise damaged(
                self.where,
                f"the pickle takes more than {self.most_opcodes} steps or {_MOST_STACK} places; "
                "expected fewer",
            )


def described(value: object) -> str:
    """What kind of thing the pickle has made, for a message."""
    if isinstance(value, Global):
        return shown(value.name)
    if isinstance(value, View):
        return "a tensor"
    if isinstance(value, str | int | float | None):
        return shown(value)
    return f"a {type(value).__name__.lower()}"


def is_size(found: object) -> TypeGuard[tuple[int, ...]]:
    """Whether this can be a tensor's shape, strides or first indices."""
    return (
        type(found) is tuple
        and len(found) <= _MOST_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in found)
    )


def _size(machine: Machine, found: object) -> tuple[int, ...]:
    if not is_size(found):
        raise machine.malformed(
            f"a shape or stride is {described(found)}; "
            f"expected a tuple of at most {_MOST_DIMENSIONS} non-negative integers"
        )
    return found


def _tensor(machine: Machine, arguments: tuple[Any, ...], dtype: str | None, extra: object) -> View:
    storage, first, shape, stride = (arguments[k] for k in range(4))
    if not isinstance(storage, Storage) or type(first) is not int or not 0 <= first < 2**63:
        raise machine.malformed(f"a tensor is made of {described(storage)} from {described(first)} on")
    shape, stride = _size(machine, shape), _size(machine, stride)
    if len(shape) != len(stride):
        raise machine.malformed(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    flags = tuple(str(key) for key, value in extra.items() if value) if isinstance(extra, dict) else ()
    return View(storage, first, shape, stride, dtype, flags)


def _tensor_v2(machine: Machine, arguments: tuple[Any, ...]) -> View:
    return _tensor(machine, arguments, None, arguments[6] if len(arguments) > 6 else None)


def _tensor_v3(machine: Machine, arguments: tuple[Any, ...]) -> View:
    dtype = arguments[6]
    if not isinstance(dtype, Global):
        raise machine.malformed(f"a tensor's dtype is {described(dtype)}")
    return _tensor(machine, arguments, dtype.name, arguments[7] if len(arguments) > 7 else None)


def _parameter(machine: Machine, arguments: tuple[Any, ...]) -> View:
    if not isinstance(arguments[0], View):
        raise machine.malformed(f"a parameter is made of {described(arguments[0])}; expected a tensor")
    return arguments[0]


def _from_type(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    function, kind, inner = (arguments[k] for k in range(3))
    if not isinstance(kind, Global) or kind.name not in _TYPES:
        raise machine.malformed(f"a tensor is of the type {described(kind)}; expected a plain one")
    return machine.call(function, inner)


def _ordered_dict(machine: Machine, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise machine.malformed("an OrderedDict is made from arguments; expected an empty one")
    return {}


def _shape(machine: Machine, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return _size(machine, arguments[0])


_CALLS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _shape,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
_MARKERS = re.compile(
    r"torch\.(?:storage\.UntypedStorage|[A-Z]\w*Storage|bool|b?float\w+|q?u?int\w+|complex\w+)"
)


def _global(machine: Machine) -> None:
    module = machine.line()
    machine.stack.append(machine.named(f"{module}.{machine.line()}"))


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise machine.malformed("a global's name is not a string")
    machine.stack.append(machine.named(f"{module}.{name}"))


def _reduce(machine: Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _build(machine: Machine) -> None:
    machine.stack.pop()  # attributes such as `_metadata`, which say nothing about the tensors
    machine.top(dict)


def _persistent_id(machine: Machine) -> None:
    match machine.stack.pop():
        case ("storage", Global(name), str(key), str(), int(n_items)) if n_items >= 0:
            machine.stack.append(Storage(name.rpartition(".")[2], key, n_items))
        case found:
            raise machine.malformed(f"a persistent id is {described(found)}; expected a storage's")


def _tuple(machine: Machine, n_items: int) -> None:
    if len(machine.stack) < n_items:
        raise IndexError
    items = tuple(machine.stack[-n_items:])
    machine.stack[-n_items:] = [items]


def _append(machine: Machine) -> None:
    item = machine.stack.pop()
    machine.top(list).append(item)


def _extend(machine: Machine) -> None:
    items = machine.since_mark()
    machine.top(list).extend(items)


def _set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _set_items(machine: Machine) -> None:
    items = machine.since_mark()
    if len(items) % 2:
        raise machine.malformed("a mapping has a key without a value")
    machine.set_items(items)


def _text(machine: Machine, n_prefix: int) -> None:
    n_bytes = int.from_bytes(machine.take(n_prefix), "little")
    machine.stack.append(machine.take(n_bytes).decode())


def _binary(machine: Machine, n_prefix: int) -> None:
    n_bytes = int.from_bytes(machine.take(n_prefix), "little")
    machine.stack.append(machine.take(n_bytes))


def _long(machine: Machine, n_prefix: int) -> None:
    n_bytes = int.from_bytes(machine.take(n_prefix), "little")
    if n_bytes > 16:
        raise machine.malformed(f"an integer of {n_bytes} bytes")
    machine.stack.append(int.from_bytes(machine.take(n_bytes), "little", signed=True))


def _integer(machine: Machine, n_bytes: int) -> None:
    machine.stack.append(int.from_bytes(machine.take(n_bytes), "little", signed=n_bytes == 4))


def _put(machine: Machine, n_bytes: int) -> None:
    machine.memo[int.from_bytes(machine.take(n_bytes), "little")] = machine.stack[-1]


def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: Machine, n_bytes: int) -> None:
    machine.stack.append(machine.memo[int.from_bytes(machine.take(n_bytes), "little")])


def _float(machine: Machine) -> None:
    machine.stack.append(_DOUBLE.unpack(machine.take(8))[0])


def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))


def _skip(machine: Machine, n_bytes: int) -> None:
    machine.take(n_bytes)


def _push(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(make())


def _with(action: Callable[[Machine, int], None], n: int) -> Callable[[Machine], None]:
    return lambda machine: action(machine, n)


_STOP = b"."[0]
_DOUBLE = Struct(">d")
_CONSTRUCTORS = frozenset(b"io\x81\x92\x82\x83\x84")  # INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1, EXT2, EXT4
_ACTIONS: dict[int, Callable[[Machine], None]] = {
    opcode[0]: action
    for opcode, action in (
        (b"\x80", _with(_skip, 1)),  # PROTO
        (b"\x95", _with(_skip, 8)),  # FRAME
        (b"(", _mark),
        (b"N", _push(lambda: None)),
        (b"\x88", _push(lambda: True)),
        (b"\x89", _push(lambda: False)),
        (b"J", _with(_integer, 4)),
        (b"K", _with(_integer, 1)),
        (b"M", _with(_integer, 2)),
        (b"\x8a", _with(_long, 1)),
        (b"\x8b", _with(_long, 4)),
        (b"G", _float),
        (b"X", _with(_text, 4)),
        (b"\x8c", _with(_text, 1)),
        (b"\x8d", _with(_text, 8)),
        (b"U", _with(_text, 1)),
        (b"B", _with(_binary, 4)),
        (b"C", _with(_binary, 1)),
        (b"\x8e", _with(_binary, 8)),
        (b")", _push(tuple)),
        (b"\x85", _with(_tuple, 1)),
        (b"\x86", _with(_tuple, 2)),
        (b"\x87", _with(_tuple, 3)),
        (b"t", lambda machine: machine.stack.append(tuple(machine.since_mark()))),
        (b"]", _push(list)),
        (b"a", _append),
        (b"e", _extend),
        (b"\x8f", _push(list)),  # EMPTY_SET: a list serves, for only attributes have sets
        (b"\x90", _extend),
        (b"}", _push(dict)),
        (b"s", _set_item),
        (b"u", _set_items),
        (b"q", _with(_put, 1)),
        (b"r", _with(_put, 4)),
        (b"\x94", _memoize),
        (b"h", _with(_get, 1)),
        (b"j", _with(_get, 4)),
        (b"c", _global),
        (b"\x93", _stack_global),
        (b"Q", _persistent_id),
        (b"R", _reduce),
        (b"b", _build),
    )
}
