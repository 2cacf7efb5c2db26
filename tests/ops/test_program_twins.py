"""`csrc/core/program.hpp` and `tvfast/program.py` state the same algebra."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from enum import IntEnum
from pathlib import Path

import pytest

from tvfast import factored, program

CORE = Path(__file__).resolve().parents[2] / "csrc" / "core"
COMMENT = re.compile(r"//[^\n]*")
ENUM = re.compile(r"enum class (\w+)\s*:\s*[\w:]+\s*\{([^}]*)\}")
ENUMERATOR = re.compile(r"(\w+)\s*=\s*(\d+)")
FIELD = re.compile(r"^\s*[\w:]+ (\w+) = ([^;]+);", re.MULTILINE)

CPP_VALUES = {
    "std::numeric_limits<float>::infinity()": math.inf,
    "std::numeric_limits<float>::denorm_min()": 2.0**-149,
    "std::numeric_limits<std::int64_t>::max()": 2**63 - 1,
    "std::numeric_limits<std::uint64_t>::max()": 2**64 - 1,
    "std::uint64_t{1} << 32": 2**32,
}


def cpp_text(name: str) -> str:
    return COMMENT.sub("", (CORE / name).read_text())


def cpp_enums() -> dict[str, dict[str, int]]:
    text = cpp_text("dtype.hpp") + cpp_text("program.hpp")
    enums = {}
    for name, body in ENUM.findall(text):
        values = {key: int(value) for key, value in ENUMERATOR.findall(body)}
        assert len(values) == body.strip().strip(",").count(",") + 1, (
            f"{name}: an enumerator has no explicit value"
        )
        enums[name] = values
    return enums


def python_enums() -> dict[str, dict[str, int]]:
    found = [
        value for value in vars(program).values() if isinstance(value, type) and issubclass(value, IntEnum)
    ]
    return {
        e.__name__: {name: int(member) for name, member in e.__members__.items()}
        for e in found
        if e is not IntEnum
    }


def cpp_constants() -> dict[str, float]:
    declared = re.findall(r"constexpr std::uint64_t (\w+) = ([^;]+);", cpp_text("program.hpp"))
    return {name: CPP_VALUES[value] for name, value in declared}


def cpp_struct(name: str) -> dict[str, float]:
    """Fields of a struct in order, with their defaults."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", cpp_text("program.hpp"), re.DOTALL)
    assert body is not None, f"program.hpp has no struct {name}"
    known = CPP_VALUES | cpp_constants()
    enums = cpp_enums()

    def value(text: str) -> float:
        if text in known:
            return known[text]
        enum, _, member = text.partition("::")
        return enums[enum][member] if member else float(text.rstrip("f"))

    return {field: value(default.strip()) for field, default in FIELD.findall(body.group(1))}


def python_struct(cls: type) -> dict[str, float]:
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def test_enums_have_equal_names_and_values() -> None:
    assert cpp_enums() == python_enums()


def test_constants_are_equal() -> None:
    assert cpp_constants() == {"kOpenCut": program.OPEN_CUT, "kAlways": program.ALWAYS}


@pytest.mark.parametrize("name", ["Program", "ModelScalars", "TensorScalars", "ScoreMap"])
def test_structs_have_equal_fields_in_equal_order_with_equal_defaults(name: str) -> None:
    assert list(cpp_struct(name).items()) == list(python_struct(getattr(program, name)).items())


def cpp_members(struct: str) -> set[str]:
    (body,) = re.findall(rf"struct {struct} {{(.*?)\n}};", cpp_text("factored.hpp"), re.DOTALL)
    declared = [line for line in body.split(";") if "(" not in line and "return" not in line]
    names = set()
    for line in declared:
        names |= {part.split("=")[0].split()[-1] for part in line.split(",") if part.split("=")[0].split()}
    return names - {"}"}


@pytest.mark.parametrize(
    "struct", ["FactoredSample", "FactoredScore", "BlockDiagonal", "KroneckerProduct", "ProductPanel"]
)
def test_factored_forms_have_the_same_members(struct: str) -> None:
    # Names are for messages; a View of Python says its dtype, a pointer of C++ does not.
    python = {one.name for one in fields(getattr(factored, struct))}
    assert cpp_members(struct) - {"out_dtype"} == python - {"name"}


def test_the_largest_block_is_the_same() -> None:
    (largest,) = re.findall(r"kLargestBlock = (\d+);", cpp_text("factored.hpp"))
    assert int(largest) == factored.LARGEST_BLOCK
