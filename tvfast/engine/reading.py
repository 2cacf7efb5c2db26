"""One tensor of a checkpoint in memory, with the factors of its codes and its adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from tvfast import dtypes
from tvfast.checkpoint.files import OpenFile, open_regular
from tvfast.checkpoint.stored import Stored
from tvfast.engine.arrange import Part, arrange
from tvfast.engine.conversions import widen_inputs
from tvfast.engine.memory import Arena
from tvfast.engine.tasks import Task
from tvfast.errors import CheckpointError

_REQUEST = 2**24


@contextmanager
def tensor_in_memory(stored: Stored, n_threads: int = 0) -> Iterator[memoryview]:
    """The numbers of a tensor, of type `stored.operand`; the memory is gone afterwards.

    Raises:
        CheckpointError: a file is shorter than its header says, or cannot be read.
    """
    task = Task(stored.name, stored.name, stored.dtype, stored.shape, None, None, (stored,))
    part = Part(task, 0, task.n_elements)
    arrangement = arrange([part], None)
    arena = Arena(arrangement.n_bytes)
    try:
        with ExitStack() as files:
            opened: dict[str, OpenFile] = {}
            for extent in arrangement.extents:
                if extent.path not in opened:
                    opened[extent.path] = files.enter_context(open_regular(extent.path))
                view = arena.view[extent.at : extent.at + extent.n_bytes]
                fill(opened[extent.path], extent.offset, view)
            for assembly in arrangement.assemblies:
                assembly.fill(arena.view, descriptor_of)
        widen_inputs([part], arrangement, arena.address, n_threads)
        at = arrangement.inputs[0][0]
        yield arena.view[at : at + dtypes.n_bytes(stored.operand, task.n_elements)]
    finally:
        arena.close()


def bytes_of(stored: Stored) -> Iterator[bytes]:
    """The bytes of a tensor as they are stored, in pieces."""
    plain = replace(stored, blocks=None, update=None)
    if plain.pieces:
        with tensor_in_memory(plain) as view:
            for begin in range(0, plain.n_bytes, _REQUEST):
                yield bytes(view[begin : begin + _REQUEST])
        return
    with open_regular(plain.path) as file:
        for begin in range(0, plain.n_bytes, _REQUEST):
            yield file.read(min(_REQUEST, plain.n_bytes - begin), plain.offset + begin)


@contextmanager
def descriptor_of(path: str) -> Iterator[int]:
    """A descriptor of a regular file, closed afterwards."""
    with open_regular(path) as file:
        yield file.descriptor


def fill(file: OpenFile, offset: int, view: memoryview) -> None:
    """Read consecutive bytes of a file.

    Raises:
        CheckpointError: the file ends before.
    """
    done = 0
    while done < len(view):
        n = os.preadv(file.descriptor, [view[done : done + _REQUEST]], offset + done)
        if not n:
            raise CheckpointError(
                f"{file.path}: ends at byte {offset + done}; expected {file.n_bytes} bytes. Something "
                "changes the file; wait until it is done."
            )
        done += n
