"""What a loop leaves on the disk: the weights of its last round, and the experts of the one under way."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvfast.checkpoint.header import read_header
from tvfast.checkpoint.layout import file_header
from tvfast.engine.durable import sync_folder, write_fully
from tvfast.errors import ArgumentError, CheckpointError, OutputError
from tvfast.loops.live import State

_KEY = "tvfast.loop"
_PIECE_BYTES = 2**24
_UNFINISHED = ".unfinished"
_ROUND = re.compile(r"round-(\d{4,})\.safetensors")
_OWN = re.compile(rf"round-(\d{{4,}})(?:-task-\d{{4,}})?\.safetensors(?:{re.escape(_UNFINISHED)})?")

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class LoopState:
    """A folder with `round-0002.safetensors` and, while round 3 is under way, its experts beside it.

    Every file is written beside its place, synced and renamed, so that it is whole or absent.

    Args:
        folder: made if it does not exist.
        settings: plain data that every run of one loop shares.
        scales: λ of every round; runs of one loop share those of the rounds that are done.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], scales: Sequence[float]
    ) -> None:
        self.folder = Path(folder)
        self._settings = dict(settings)
        self._scales = list(scales)

    def last_round(self) -> int | None:
        """The last round that is whole, whose settings are this loop's; None: nothing is there.

        Raises:
            ArgumentError: the folder holds another loop.
            CheckpointError: the file is damaged.
        """
        if not self.folder.is_dir():
            return None
        found = [int(match[1]) for path in self.folder.iterdir() if (match := _ROUND.fullmatch(path.name))]
        if not found:
            return None
        number = max(found)
        path = self.round_path(number)
        document = self._document(path)
        kept = {**document["settings"], "scale": document["scales"][: len(self._scales)]}
        wanted = {**self._settings, "scale": self._scales[:number]}
        for key, value in json.loads(json.dumps(wanted)).items():
            if kept.get(key) != value:
                raise ArgumentError(
                    f"{path}: holds a loop with {key} {kept.get(key)!r}, this one has {value!r}; expected "
                    "the same. Name another state folder, or remove this one to start anew."
                )
        return number

    def round_path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    def expert_path(self, number: int, task: int) -> Path:
        return self.folder / f"round-{number:04d}-task-{task:04d}.safetensors"

    def has_expert(self, number: int, task: int) -> bool:
        return self.expert_path(number, task).exists()

    def save_expert(self, number: int, task: int, state: State) -> None:
        self._write(self.expert_path(number, task), state, {"round": number, "task": task})

    def save_round(self, number: int, state: State) -> None:
        """The weights after a round; what led to them is removed."""
        self._write(self.round_path(number), state, {"round": number, "scales": self._scales[:number]})
        self._remove(number, through=math.inf)

    def tidy(self, number: int) -> None:
        """Remove what led to a round, where the run that made it was stopped before it could."""
        self._remove(number, through=number)

    def _remove(self, number: int, *, through: float) -> None:
        """Everything of rounds up to `through` but the weights after round `number`."""
        for path in list(self.folder.iterdir()):
            own = _OWN.fullmatch(path.name)
            if own and int(own[1]) <= through and path != self.round_path(number):
                path.unlink()

    def read_round(self, number: int) -> State:
        """The weights after a round, mapped: pages are private once they are written to."""
        return mapped(self.round_path(number))

    def read_expert(self, number: int, task: int) -> State:
        return mapped(self.expert_path(number, task))

    def _write(self, path: Path, state: State, document: Mapping[str, Any]) -> None:
        """
        Raises:
            ArgumentError: a tensor of a type that the format has not.
            OutputError: the file cannot be written.
        """
        # The widest types first, so that every tensor is aligned to its own.
        order = sorted(state, key=lambda name: -state[name].element_size())
        described = [(name, _name_of(name, state[name]), tuple(state[name].shape)) for name in order]
        text = json.dumps({**document, "settings": self._settings})
        header = file_header(str(path), described, {_KEY: text})
        unfinished = f"{path}{_UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                write_fully(descriptor, memoryview(header), 0, _PIECE_BYTES)
                offset = len(header)
                for name in order:
                    data = _bytes_of(state[name])
                    write_fully(descriptor, data, offset, _PIECE_BYTES)
                    offset += len(data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(unfinished, path)
            sync_folder(str(self.folder))
        except OSError as error:
            raise OutputError(
                f"{path}: the state of the loop cannot be written: {error.strerror or error}. What is "
                "finished is kept: remove the cause, then call again."
            ) from None

    @staticmethod
    def _document(path: Path) -> dict[str, Any]:
        text = read_header(str(path)).metadata.get(_KEY)
        if text is None:
            raise CheckpointError(
                f"{path}: no state of a loop; expected a file that tvfast.loops wrote. Name another folder."
            )
        found: dict[str, Any] = json.loads(text)
        return found


def mapped(path: Path) -> State:
    """The tensors of a safetensors file, mapped from it.

    Raises:
        CheckpointError: the file is damaged, or has a type that torch has not.
    """
    header = read_header(str(path))
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found: State = {}
    for stored in header.tensors:
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {stored.name!r} is stored as {stored.dtype}; expected {', '.join(DTYPES)}."
            )
        if stored.n_bytes == 0:
            found[stored.name] = torch.empty(stored.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(pages, dtype=torch.uint8, count=stored.n_bytes, offset=stored.offset)
        found[stored.name] = flat.view(dtype).reshape(stored.shape)
    return found


def _name_of(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _NAMES:
        raise ArgumentError(
            f"tensor {name!r} has dtype {tensor.dtype}, which the state of a loop cannot hold."
        )
    return _NAMES[tensor.dtype]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, which shares its memory where it can."""
    host = tensor.to("cpu").contiguous().reshape(-1)
    return memoryview(host.view(torch.uint8).numpy().data)
