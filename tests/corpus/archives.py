"""Broken PyTorch files."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

REBUILD = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
FLOATS = torch.FloatStorage


@dataclass(frozen=True)
class Call:
    """Pickled as a call of `function`."""

    function: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Persistent:
    """Pickled as a persistent id."""

    identity: Any


class _Pickler(pickle.Pickler):
    def persistent_id(self, found: object) -> Any:
        return found.identity if isinstance(found, Persistent) else None

    def reducer_override(self, found: object) -> Any:
        return (found.function, found.arguments) if isinstance(found, Call) else NotImplemented


def pickled(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def storage(n: int = 2, *, kind: Any = FLOATS, key: str = "0") -> Persistent:
    return Persistent(("storage", kind, key, "cpu", n))


def tensor(
    shape: Any = (2,), stride: Any = (1,), first: Any = 0, memory: Any = None, extra: tuple[Any, ...] = ()
) -> Call:
    """A tensor over the storage `0`, which `saved` makes 8 bytes long."""
    arguments = (memory or storage(), first, shape, stride, False, collections.OrderedDict(), *extra)
    return Call(REBUILD, arguments)


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def saved(value: object, protocol: int = 2, **members: bytes) -> bytes:
    """A file as torch.save writes it, around a pickle of `value`; bytes are the pickle itself."""
    pickle_bytes = value if isinstance(value, bytes) else pickled(value, protocol)
    found = {"x/data.pkl": pickle_bytes, "x/byteorder": b"little", "x/data/0": bytes(8), "x/version": b"3\n"}
    return zipped(found | {f"x/{name.replace('__', '/')}": content for name, content in members.items()})


def torch_saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    return buffer.getvalue()


def changed(raw: bytes, before: bytes, after: bytes, occurrence: int = 0) -> bytes:
    """`raw` with one occurrence of some bytes replaced; the last for -1."""
    parts = raw.split(before)
    cut = occurrence + 1 if occurrence >= 0 else len(parts) + occurrence
    assert 0 < cut < len(parts)
    return before.join(parts[:cut]) + after + before.join(parts[cut:])


def patched(raw: bytes, magic: bytes, offset: int, value: bytes, occurrence: int = 0) -> bytes:
    """`raw` with bytes of one zip record replaced."""
    start = -1
    for _ in range(occurrence + 1):
        start = raw.index(magic, start + 1)
    return raw[: start + offset] + value + raw[start + offset + len(value) :]


def wide_end(raw: bytes, *, magic: bytes = b"PK\x06\x06", shift: int = 0) -> bytes:
    """`raw` with a zip64 end record; `shift` moves where its locator says that it is."""
    start = raw.index(END)
    n_members, n_bytes, place = struct.unpack_from("<H2I", raw, start + 10)
    record = struct.pack("<4sQ2H2I4Q", magic, 44, 45, 45, 0, 0, n_members, n_members, n_bytes, place)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + shift, 1)
    end = struct.pack("<4s4H2IH", END, 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    return raw[:start] + record + locator + end


class Plain:
    """An object of a class of one's own."""


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
GOOD = saved({"w": tensor()})
DATA = 2  # the place of `data/0` among the members
TENSOR_BYTES = pickled(tensor())[2:-1]  # without its protocol and stop


@dataclass(frozen=True)
class Broken:
    """One file with one defect, made when it is needed, and parts of the error's message."""

    make: Callable[[], bytes]
    says: tuple[str, ...]


def _broken(raw: bytes | Callable[[], bytes], *says: str) -> Broken:
    return Broken(raw if callable(raw) else lambda: raw, says)


def _state(value: object, *says: str, protocol: int = 2, **members: bytes) -> Broken:
    return Broken(lambda: saved(value, protocol, **members), says)


def _opcodes(raw: bytes, *says: str) -> Broken:
    return Broken(lambda: saved(raw), says)


BROKEN: dict[str, Broken] = {
    # no zip file
    "empty": _broken(b"", "is empty"),
    "text": _broken(b"hello world", "begins with 'hello wo'", "zip file from torch.save"),
    "git_lfs": _broken(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html": _broken(b"<!DOCTYPE html>", "HTML page"),
    "safetensors": _broken(
        b"\x02" + bytes(7) + b"{}" + bytes(8), "a safetensors file", "suffix .safetensors"
    ),
    "bare_pickle": _broken(pickle.dumps({"a": 1}), "a bare pickle"),
    "legacy_pickle": _broken(
        lambda: torch_saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False),
        *("legacy pickle", "before 1.6", "weights_only=True"),
    ),
    "legacy_tar": _broken(tar, "legacy tar", "weights_only=True"),
    # the archive
    "cut": _broken(GOOD[:-100], "without its end", "was cut"),
    "cut_in_half": _broken(GOOD[: len(GOOD) // 2], "without its end"),
    "cut_to_magic": _broken(GOOD[:4], "without its end"),
    "end_cut": _broken(GOOD[:-1], "without its end"),
    "directory_beyond": _broken(
        patched(GOOD, END, 16, b"\xff\xff\x00\x00"), "zip directory", "after the file"
    ),
    "directory_elsewhere": _broken(patched(GOOD, END, 16, b"\x01\x00\x00\x00"), "no member at byte 0"),
    "directory_damaged": _broken(patched(GOOD, CENTRAL, 0, b"PK\x01\x03", 1), "no member at byte"),
    "directory_name_too_long": _broken(patched(GOOD, CENTRAL, 28, b"\xff\xff", 3), "ends within a member"),
    "directory_name_not_utf8": _broken(
        changed(GOOD, b"x/version", b"x/v\xffrsion", -1), "name that is not UTF-8"
    ),
    "directory_count": _broken(patched(GOOD, END, 10, b"\x07\x00"), "has 4 members; expected 7"),
    "directory_count_zero": _broken(patched(GOOD, END, 8, bytes(4)), "has 4 members; expected 0"),
    "directory_huge": _broken(
        lambda: LOCAL + bytes(2**26) + patched(GOOD[GOOD.index(END) :], END, 12, b"\x01\0\0\x04\0\0\0\0"),
        "67108865 bytes; expected 67108864 at most",
    ),
    "wide_end_beyond": _broken(wide_end(GOOD, shift=1), "zip64 end record", "beyond the file's end"),
    "wide_end_damaged": _broken(wide_end(GOOD, magic=b"PK\x06\x05"), "no zip64 end record at byte"),
    "wide_end_elsewhere": _broken(wide_end(GOOD, shift=-4), "no zip64 end record at byte"),
    "wide_end_missing": _broken(patched(GOOD, END, 10, b"\xff" * 10), "after the file"),
    "several_disks": _broken(patched(GOOD, END, 4, b"\x01\x00"), "a part of a zip file"),
    "member_on_other_disk": _broken(patched(GOOD, CENTRAL, 34, b"\x01\x00"), "another part"),
    "member_twice": _broken(
        zipped({"x/data.pkl": b"", "y/data.pkl": b""}).replace(b"y/", b"x/"), "'x/data.pkl' twice"
    ),
    "member_lengths_differ": _broken(patched(GOOD, CENTRAL, 20, b"\x09", DATA), "9 bytes stored for 8"),
    "member_beyond": _broken(
        patched(GOOD, CENTRAL, 42, b"\xff\xff\x00\x00", DATA), "'x/data/0'", "beyond the members"
    ),
    "member_too_long": _broken(
        patched(GOOD, CENTRAL, 20, b"\xff\xff\x00\x00\xff\xff\x00\x00"), "'x/data.pkl'", "beyond the members"
    ),
    "member_elsewhere": _broken(patched(GOOD, CENTRAL, 42, b"\x01\x00", DATA), "'x/data/0'", "no zip header"),
    "member_without_zip64": _broken(
        patched(GOOD, CENTRAL, 42, b"\xff" * 4, DATA), "'x/data/0'", "no 64-bit sizes"
    ),
    "encrypted": _broken(patched(GOOD, CENTRAL, 8, b"\x01", DATA), "'x/data/0'", "encrypted"),
    "encrypted_pickle": _broken(patched(GOOD, CENTRAL, 8, b"\x01"), "'x/data.pkl'", "encrypted"),
    "compressed": _broken(
        zipped({"x/data.pkl": pickled({}) + bytes(100)}, zipfile.ZIP_DEFLATED),
        "compressed",
        "weights_only=True",
    ),
    "no_pickle": _broken(zipped({"x/version": b"3"}), "no */data.pkl", "'x/version'"),
    "no_members": _broken(lambda: b"PK\x03\x04" + zipped({}), "no */data.pkl"),
    "two_roots": _broken(zipped({"x/data.pkl": b"", "y/data.pkl": b""}), "2 */data.pkl"),
    "torchscript": _broken(
        saved({}, constants__pkl=b"").replace(b"constants/pkl", b"constants.pkl"), "TorchScript"
    ),
    "big_endian": _state({"w": tensor()}, "byte order is 'big'", byteorder=b"big"),
    "strange_endian": _state({"w": tensor()}, "byte order is", byteorder=b"\xff\n"),
    "long_endian": _state({"w": tensor()}, "17 bytes; expected 16 at most", byteorder=b"l" * 17),
    "large_pickle": _broken(lambda: saved(bytes(2**26 + 1)), "67108865 bytes; expected 67108864 at most"),
    # code
    "system": _state({"w": Call(os.system, ("exit 1",))}, "asks to run 'posix.system'", "runs no code"),
    "eval": _state({"w": Call(eval, ("1",))}, "asks to run '__builtin__.eval'", "runs no code"),
    "eval_protocol_4": _state({"w": Call(eval, ("1",))}, "asks to run 'builtins.eval'", protocol=4),
    "getattr": _state({"w": Call(getattr, ("a", "b"))}, "asks to run '__builtin__.getattr'"),
    "partial": _state(Call(functools.partial, (len,)), "asks to run 'functools.partial'"),
    "torch_function": _state({"w": Call(torch.load, ("x",))}, "asks to run 'torch.serialization.load'"),
    "own_class": _state({"w": Plain()}, "asks to run", "Plain"),
    "own_class_protocol_4": _state({"w": Plain()}, "asks to run", "Plain", protocol=4),
    "instance": _opcodes(b"(ios\nsystem\n.", "asks to run 'os.system'"),
    "instance_of_known": _opcodes(b"(itorch\nSize\n.", "asks to make an object", "runs no code"),
    "object": _opcodes(b"(ctorch\nSize\no.", "asks to make an object"),
    "new_object": _opcodes(b"ctorch\nSize\n)\x81.", "asks to make an object"),
    "extension": _opcodes(b"\x82\x01.", "asks to make an object"),
    "module": _broken(
        lambda: torch_saved(torch.nn.Linear(2, 2)), "asks to run 'torch.nn.modules.linear.Linear'"
    ),
    "numpy_scalar": _broken(lambda: torch_saved({"w": np.float64(1)}), "asks to run 'numpy"),
    "long_global": _opcodes(b"c" + b"a" * 999 + b"\n" + b"b" * 999 + b"\n.", "asks to run 'aaa"),
    "call_of_a_marker": _state({"w": Call(FLOATS, (1,))}, "calls 'torch.FloatStorage' with a tuple"),
    "call_of_a_string": _opcodes(b"U\x01a)R.", "calls 'a'"),
    "call_without_tuple": _opcodes(
        b"ccollections\nOrderedDict\n]R.", "calls 'collections.OrderedDict' with a list"
    ),
    "subclass": _state(
        {"w": Call(torch._tensor._rebuild_from_type_v2, (REBUILD, torch.Size, tensor().arguments, {}))},  # type: ignore[attr-defined]
        "of the type 'torch.Size'",
    ),
    # state dicts
    "one_tensor": _state(tensor(), "holds a tensor; expected a state dict"),
    "list": _state([tensor()], "holds a list; expected a state dict"),
    "number": _state({"w": tensor(), "step": 3}, "key 'step' holds 3", "['w', 'step']"),
    "nested": _state(
        {"epoch": {}, "state_dict": {"w": tensor()}}, "key 'epoch' holds a dict", "'state_dict'"
    ),
    "other_wrapper": _state({"ema": {"w": tensor()}}, "key 'ema' holds a dict", "'state_dict' or 'model'"),
    "wrapper_of_a_list": _state({"model": [tensor()]}, "key 'model' holds a list"),
    "wrapper_in_wrapper": _state({"model": {"state_dict": {"w": tensor()}}}, "key 'state_dict' holds a dict"),
    "number_as_name": _state({0: tensor()}, "its key 0 holds a tensor"),
    "tuple_as_name": _state({(1, 2): tensor()}, "a tuple as a key"),
    "huge_number_as_name": _state({2**31: tensor()}, "2147483648 as a key"),
    "empty_name": _state({"": tensor()}, "name is empty"),
    "nul_in_name": _state({"a\0": tensor()}, "has a NUL"),
    "no_tensors": _state({}, "holds no tensor"),
    # tensors
    "transposed": _state(
        {"w": tensor((1, 2, 1, 2), (9, 1, 9, 2), memory=storage(2))}, "'w'", "strides [9, 1, 9, 2]"
    ),
    "expanded": _state({"w": tensor((4, 2), (0, 1))}, "'w'", "strides [0, 1]", "contiguous()"),
    "every_second": _state({"w": tensor((2,), (2,))}, "'w'", "strides [2]"),
    "conjugate": _broken(
        lambda: torch_saved({"w": torch.ones(2, dtype=torch.complex64).conj()}),
        "'w'",
        "'conj'",
        "resolve_conj",
    ),
    "complex128": _broken(
        lambda: torch_saved({"w": torch.ones(2, dtype=torch.complex128)}), "'w'", "ComplexDouble"
    ),
    "no_name_for_dtype": _broken(
        lambda: saved(
            pickled(
                {
                    "w": Call(
                        torch._utils._rebuild_tensor_v3,
                        (*tensor(memory=storage(kind=torch.UntypedStorage)).arguments, torch.bits8),
                    )
                }
            )  # type: ignore[attr-defined]
        ),
        "asks to run 'torch.bits8'",
    ),
    "untyped": _state(
        {"w": tensor(memory=storage(8, kind=torch.UntypedStorage))}, "'w'", "type is 'untyped'"
    ),
    "no_dtype": _state(
        {"w": Call(torch._utils._rebuild_tensor_v3, (*tensor().arguments, "torch.float32"))},  # type: ignore[attr-defined]
        "dtype is 'torch.float32'",
    ),
    "beyond_storage": _state({"w": tensor(first=1)}, "'w'", "bytes 4 to 12", "that has 8"),
    "far_beyond_storage": _state({"w": tensor(first=2**62)}, "'w'", "that has 8"),
    "storage_missing": _state(
        {"w": tensor(memory=storage(key="1"))}, "'w'", "'x/data/1' is not in the archive"
    ),
    "storage_outside": _state(
        {"w": tensor(memory=storage(key="../data.pkl"))}, "'w'", "is not in the archive"
    ),
    "storage_short": _state({"w": tensor(memory=storage(3))}, "'w'", "has 8 bytes; expected 12"),
    "storage_long": _state({"w": tensor((1,), memory=storage(1))}, "'w'", "has 8 bytes; expected 4"),
    "shape_negative": _state({"w": tensor((-2,))}, "a shape or stride"),
    "shape_float": _state({"w": tensor((2.0,))}, "a shape or stride"),
    "shape_boolean": _state({"w": tensor((True,))}, "a shape or stride"),
    "shape_list": _state({"w": tensor([2])}, "a shape or stride is a list"),
    "shape_huge": _state({"w": tensor((2**63,))}, "a shape or stride"),
    "shape_overflow": _state({"w": tensor((2**62, 2), (2, 1))}, "'w'", "that has 8"),
    "shape_long": _state({"w": tensor((1,) * 65, (1,) * 65)}, "at most 64"),
    "shape_and_stride": _state({"w": tensor((2,), (1, 1))}, "1 dimensions and 2 strides"),
    "first_negative": _state({"w": tensor(first=-1)}, "from -1 on"),
    "first_none": _state({"w": tensor(first=None)}, "from None on"),
    "memory_missing": _state({"w": Call(REBUILD, (3, 0, (2,), (1,), False, {}))}, "made of 3"),
    "arguments_missing": _state({"w": Call(REBUILD, (storage(),))}, "breaks off"),
    "parameter_of_nothing": _state(
        {"w": Call(torch._utils._rebuild_parameter, (3, False, {}))},  # type: ignore[attr-defined]
        "a parameter is made of 3",
    ),
    "persistent_number": _state({"w": tensor(memory=Persistent(3))}, "a persistent id is 3"),
    "persistent_module": _state(
        {"w": tensor(memory=Persistent(("module", FLOATS, "0", "cpu", 2)))}, "a persistent id"
    ),
    "persistent_negative": _state({"w": tensor(memory=storage(-1))}, "a persistent id"),
    "persistent_text": _opcodes(b"P0\n.", "opcode 0x50"),
    # pickles
    "pickle_empty": _opcodes(b"", "breaks off"),
    "pickle_cut": _broken(lambda: saved(pickled({"w": tensor()})[:-20]), "breaks off"),
    "pickle_without_stop": _opcodes(b"}", "breaks off"),
    "pickle_nothing_on_stack": _opcodes(b".", "breaks off"),
    "pickle_no_mark": _opcodes(b"}u.", "breaks off"),
    "pickle_popped_mark": _opcodes(b"}U\x01aN(su.", "breaks off"),
    "pickle_no_memo": _opcodes(b"h\x00.", "breaks off"),
    "pickle_short_tuple": _opcodes(b"N\x87.", "breaks off"),
    "pickle_odd_items": _opcodes(b"}(Nu.", "a key without a value"),
    "pickle_item_of_a_list": _opcodes(b"]NNs.", "adds items to a list; expected a dict"),
    "pickle_append_to_a_dict": _opcodes(b"}Na.", "adds items to a dict; expected a list"),
    "pickle_state_of_a_tensor": _opcodes(TENSOR_BYTES + b"}b.", "adds items to a tensor"),
    "pickle_unknown_opcode": _opcodes(b"\xff.", "opcode 0xff"),
    "pickle_integer_text": _opcodes(b"L" + b"9" * 100000 + b"L\n.", "opcode 0x4c"),
    "pickle_long": _opcodes(b"\x8b\x00\x00\x00\x01.", "an integer of 16777216 bytes"),
    "pickle_string_beyond": _opcodes(b"X\xff\xff\xff\xff.", "breaks off"),
    "pickle_string_far_beyond": _opcodes(b"\x8d" + b"\xff" * 8, "breaks off"),
    "pickle_not_utf8": _opcodes(b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
    "pickle_surrogate": _opcodes(b"X\x03\x00\x00\x00\xed\xa0\x80.", "not UTF-8"),
    "pickle_global_of_numbers": _opcodes(b"K\x01K\x01\x93.", "not a string"),
    "pickle_global_cut": _opcodes(b"cos", "breaks off"),
    "ordered_dict_of_items": _state(
        Call(collections.OrderedDict, ([("w", tensor())],)), "OrderedDict is made from arguments"
    ),
    # bombs
    "bomb_stack": _opcodes(b"N" * 300_000 + b".", "200000 places"),
    "bomb_marks": _opcodes(b"(" * 300_000 + b".", "200000 places"),
    "bomb_steps": _opcodes(b"]" + b"]a" * 2_100_000 + b".", "4000000 steps"),
    "bomb_hash": _opcodes(b")q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns.", "a tuple as a key"),
    "bomb_memo": _opcodes(b"Nr\xff\xff\xff\xff0.", "opcode 0x30"),
    "bomb_nesting": _opcodes(b"})" + b"\x85" * 200_000 + b"Ns.", "a tuple as a key"),
    "bomb_nested_lists": _opcodes(b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
}
"""Every way for a PyTorch file to be wrong, by name."""
