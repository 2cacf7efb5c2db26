"""`.metadata` of torch's distributed checkpoints, read by the machine that knows no code.

Objects become a `Record`: the name of their class and their attributes. No class is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvfast.checkpoint import unpickling
from tvfast.checkpoint.unpickling import Global, described

_METADATA = "torch.distributed.checkpoint.metadata."
_CLASSES = frozenset(
    {
        *(
            _METADATA + name
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
    }
)
_NEWOBJ = 0x81
_GETATTR = "builtins.getattr"
"""What the first releases of Python 3.11 take members of enumerations by."""


class Record:
    """An object of one of the classes of a distributed checkpoint's metadata.

    Attributes:
        kind: its class, without the module.
        state: its attributes, or what else stands for them.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = {}

    def get(self, name: str) -> Any:
        """An attribute; None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load_metadata(raw: bytes, where: str) -> Any:
    """The object in a pickle of `.metadata`: records, containers, numbers and strings.

    Raises:
        CheckpointError: a class or function that no such file needs, an unknown opcode, or anything malformed
            or huge.
    """
    return _Machine(raw, where).run()


class _Machine(unpickling.Machine):
    """Knows the classes of `torch.distributed.checkpoint` by name."""

    most_opcodes = 32_000_000  # 68 a piece: 470 000 pieces, as of 70 B with its optimizer over 200 processes

    def named(self, name: str) -> Global:
        known = name in _CLASSES or name in _VALUES or name == _GETATTR
        return Global(name) if known else super().named(name)

    def call(self, function: object, arguments: object) -> Any:
        match function, arguments:
            case Global(name), tuple() if name in _VALUES:
                return _VALUES[name](arguments)
            case Global(name), (Global(of), str(member)) if name == _GETATTR and of in _VALUES:
                return (member,)
        return super().call(function, arguments)

    def is_key(self, key: object) -> bool:
        return isinstance(key, Record) or super().is_key(key)

    def make(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Global) or kind.name not in _CLASSES or arguments != ():
            raise self.malformed(f"makes an object of {described(kind)}")
        self.stack.append(Record(kind.name.rpartition(".")[2]))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        else:
            self.top(dict)

    def action_of(self, opcode: int) -> Callable[[Any], None] | None:
        if opcode == _NEWOBJ:
            return _Machine.make
        if opcode == b"b"[0]:
            return _Machine.build
        return super().action_of(opcode)


_VALUES: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    _METADATA + "_MEM_FORMAT_ENCODING": lambda arguments: arguments,
    "torch.serialization._get_layout": lambda arguments: arguments,
    "pathlib.PosixPath": lambda arguments: arguments,
    "pathlib.WindowsPath": lambda arguments: arguments,
    "pathlib.Path": lambda arguments: arguments,
    "pathlib._local.PosixPath": lambda arguments: arguments,
}
"""What is called with plain values that say nothing about where tensors are."""
