"""Who may import whom: one row per layer, in Python and in C++."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Layer:
    """What a layer may import besides itself and the standard library.

    A name in `inside` covers what is below it, one in `exactly` does not.
    """

    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    exactly: tuple[str, ...] = ()


# Names that these modules export themselves; what lies below them is not public.
PUBLIC = ("tvfast", "tvfast.errors", "tvfast.methods", "tvfast.ops", "tvfast.ops.raw")

# Its files are in `kernels/`, which `setup.py` maps to this name.
KERNELS = "tvfast.kernels"

# The longest matching name is a module's layer. A new package needs a row here before its tests pass.
LAYERS = {
    "tvfast": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.methods",
            "tvfast.ops",
            "tvfast.merging",
            "tvfast.comparing",
            "tvfast.localizing",
            "tvfast.live",
            "tvfast.checkpoints",
            "tvfast.curvature",
            "tvfast.extraction",
            "tvfast.integrations",
            "tvfast.loops",
        )
    ),
    "tvfast.errors": Layer(),
    "tvfast._pictures": Layer(),
    "tvfast.dtypes": Layer(),
    "tvfast.program": Layer(),
    "tvfast.factored": Layer(inside=("tvfast.program",)),
    "tvfast.checkpoint": Layer(inside=("tvfast.errors", "tvfast.dtypes", "tvfast.checkpoint.hub")),
    "tvfast.checkpoint.hub": Layer(inside=("tvfast.errors",), outside=("huggingface_hub",)),
    "tvfast.statistics": Layer(
        inside=("tvfast.errors", "tvfast.dtypes", "tvfast.checkpoint", "tvfast.statistics.tensors")
    ),
    "tvfast.statistics.tensors": Layer(
        inside=("tvfast.errors", "tvfast.ops", "tvfast.statistics", "tvfast._leaves"), outside=("torch",)
    ),
    "tvfast.ops.raw": Layer(inside=("tvfast.errors", "tvfast.program", "tvfast.factored")),
    "tvfast.ops": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.factored", "tvfast.ops"),
        outside=("torch", "numpy"),
    ),
    "tvfast.ops.cpp": Layer(inside=("tvfast.errors", "tvfast.program", "tvfast.ops", "tvfast._C_cpu")),
    "tvfast.ops.cpp_products": Layer(inside=("tvfast.factored", "tvfast.ops", "tvfast._C_cpu")),
    "tvfast.ops.cuda": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops", "tvfast._C_cuda", "tvfast._C_simt"),
        outside=("torch",),
    ),
    "tvfast.ops.host": Layer(inside=("tvfast.program", "tvfast._C_cpu")),
    "tvfast.ops.pages": Layer(inside=("tvfast._C_cpu",)),
    "tvfast.ops.storage": Layer(inside=("tvfast.program", "tvfast._C_cpu")),
    "tvfast.kernels": Layer(inside=("tvfast.program", "tvfast.factored"), outside=("torch", "triton")),
    "tvfast.ops.triton": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops", "tvfast.kernels"),
        outside=("torch", "triton"),
    ),
    "tvfast.ops.triton_products": Layer(
        inside=("tvfast.program", "tvfast.factored", "tvfast.kernels"), outside=("torch",)
    ),
    "tvfast.factors": Layer(
        inside=("tvfast.errors", "tvfast.ops", "tvfast.statistics", "tvfast.statistics.tensors"),
        outside=("torch",),
    ),
    "tvfast.matrices": Layer(inside=("tvfast.errors", "tvfast.ops", "tvfast.program"), outside=("torch",)),
    "tvfast.methods": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops.raw",
            "tvfast.methods.kronecker",
            "tvfast.methods.whole",
        )
    ),
    # The method modules that call torch: when they merge, and not before.
    "tvfast.methods.whole": Layer(
        inside=("tvfast.errors", "tvfast.methods", "tvfast.matrices", "tvfast.program"), outside=("torch",)
    ),
    "tvfast.methods.kronecker": Layer(
        inside=("tvfast.errors", "tvfast.methods", "tvfast.factors"), outside=("torch",)
    ),
    "tvfast._scores": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops",
            "tvfast.methods",
            "tvfast._leaves",
            "tvfast.statistics",
        ),
        outside=("torch",),
    ),
    # `tvfast collect`: YAML is read as recipes are, models come from transformers.
    "tvfast.collection": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.curvature",
            "tvfast.importance",
            "tvfast.recipe",
            "tvfast.statistics",
        ),
        outside=("torch", "transformers"),
    ),
    "tvfast.importance": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.methods",
            "tvfast.ops",
            "tvfast.merging",
            "tvfast.statistics",
            "tvfast._leaves",
            "tvfast._scores",
        ),
        outside=("torch",),
    ),
    "tvfast._leaves": Layer(inside=("tvfast.errors", "tvfast.program", "tvfast.ops"), outside=("torch",)),
    "tvfast.merging": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops",
            "tvfast.methods",
            "tvfast.merging_tensors",
            "tvfast.sharded",
            "tvfast._leaves",
            "tvfast._scores",
        ),
        outside=("torch",),
    ),
    "tvfast.merging_tensors": Layer(
        inside=("tvfast.errors", "tvfast.methods", "tvfast.factors", "tvfast._leaves"), outside=("torch",)
    ),
    # DTensors: loaded by `merging`, `comparing` and `live` where there are any.
    "tvfast.sharded": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops",
            "tvfast.methods",
            "tvfast.factors",
            "tvfast.statistics",
            "tvfast.merging",
            "tvfast.merging_tensors",
            "tvfast._leaves",
            "tvfast._scores",
        ),
        outside=("torch",),
    ),
    "tvfast.curvature": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.factors",
            "tvfast.methods",
            "tvfast.statistics",
            "tvfast.merging",
            "tvfast._leaves",
        ),
        outside=("torch",),
    ),
    "tvfast.localizing": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops", "tvfast.methods", "tvfast._leaves"),
        outside=("torch",),
    ),
    "tvfast.comparing": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops",
            "tvfast.merging",
            "tvfast.sharded",
            "tvfast._leaves",
        ),
        outside=("torch",),
    ),
    "tvfast.live": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.program",
            "tvfast.ops",
            "tvfast.methods",
            "tvfast.merging",
            "tvfast.comparing",
            "tvfast.sharded",
            "tvfast._leaves",
            "tvfast._scores",
        ),
        outside=("torch",),
    ),
    # Loops call the public merges; what they leave on the disk is written and read as checkpoints are.
    "tvfast.loops": Layer(
        inside=(
            "tvfast.errors",
            "tvfast._leaves",
            "tvfast.checkpoint",
            "tvfast.engine.durable",
            "tvfast.engine.reading",
            "tvfast.ops.host",
        ),
        exactly=("tvfast",),
        outside=("torch", "transformers"),
    ),
    "tvfast.analysis": Layer(
        inside=("tvfast.errors", "tvfast.live", "tvfast._pictures"),
        outside=("torch", "numpy", "fairlearn", "pandas", "matplotlib"),
    ),
    # `tvfast sweep`: recipes are read as merges read them, and merged live or as files.
    "tvfast.sweeping": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.recipe",
            "tvfast.search",
            "tvfast.live",
            "tvfast.methods",
            "tvfast._pictures",
        ),
        exactly=("tvfast", "tvfast.checkpoint.reading", "tvfast.engine.reading"),
        outside=("torch", "transformers", "matplotlib"),
    ),
    # Coefficients are searched by numbers alone, and learned through live weights.
    "tvfast.search": Layer(
        inside=("tvfast.errors",), outside=("cma", "numpy"), exactly=("tvfast.search.learning",)
    ),
    "tvfast.search.learning": Layer(inside=("tvfast.errors", "tvfast.live"), outside=("torch",)),
    "tvfast.demo": Layer(exactly=PUBLIC, outside=("torch", "numpy", "sklearn", "matplotlib", "safetensors")),
    "tvfast.recipe": Layer(inside=("tvfast.errors", "tvfast.dtypes", "tvfast.methods"), outside=("yaml",)),
    "tvfast.engine": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.dtypes",
            "tvfast.program",
            "tvfast.methods",
            "tvfast.ops.raw",
            "tvfast.ops.host",
            "tvfast.ops.pages",
            "tvfast.ops.storage",
            "tvfast.checkpoint",
            "tvfast.recipe",
            "tvfast.statistics",
            "tvfast.engine.tensors",
            "tvfast.engine.device",
            "tvfast.engine.tokenizer_conversion",
        )
    ),
    "tvfast.engine.tensors": Layer(
        inside=("tvfast.errors", "tvfast.methods", "tvfast.factors", "tvfast.engine"), outside=("torch",)
    ),
    # Loaded where a tokenizer is to be changed that has no file of its own for all of it.
    "tvfast.engine.tokenizer_conversion": Layer(inside=("tvfast.errors",), outside=("transformers",)),
    # It loads the next where a GPU is chosen.
    "tvfast.engine.device": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops.raw"), exactly=("tvfast.engine.torch_device",)
    ),
    "tvfast.engine.torch_device": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops.raw", "tvfast.engine"), outside=("torch",)
    ),
    "tvfast._preparing": Layer(
        inside=("tvfast.errors", "tvfast.checkpoint", "tvfast.recipe", "tvfast.engine"),
        exactly=("tvfast",),
    ),
    "tvfast.checkpoints": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.checkpoint",
            "tvfast.recipe",
            "tvfast.engine",
            "tvfast._preparing",
            "tvfast.inspection",
        ),
        # It loads the latter where a merge has several ranks.
        exactly=("tvfast.distributed",),
    ),
    # Implements the engine's `Communicator`; no tensor goes through it.
    "tvfast.distributed": Layer(inside=("tvfast.errors", "tvfast.engine"), outside=("torch",)),
    # Single matrices through torch; files as merges read them.
    "tvfast.extraction": Layer(
        inside=("tvfast.errors", "tvfast.dtypes", "tvfast.checkpoint", "tvfast.engine"), outside=("torch",)
    ),
    # Other libraries on tvfast's kernels. `install()` imports them, and what it put in their place.
    "tvfast.integrations": Layer(
        inside=("tvfast.errors", "tvfast.program", "tvfast.ops", "tvfast.methods"),
        exactly=("tvfast", "tvfast.dtypes", "tvfast.recipe"),
        outside=("torch", "peft", "fusion_bench"),
    ),
    # What pages and pictures show of checkpoints and merges; matplotlib is imported where a picture is drawn.
    "tvfast.inspection": Layer(
        inside=(
            "tvfast.errors",
            "tvfast.dtypes",
            "tvfast.program",
            "tvfast.ops.raw",
            "tvfast.checkpoint",
            "tvfast.engine",
            "tvfast._pictures",
        ),
        outside=("matplotlib",),
    ),
    "tvfast.__main__": Layer(inside=("tvfast.cli",)),
    # `inspect` shows what is in files, which is what two modules of the checkpoint layer tell.
    # `bench` times torch tensors.
    "tvfast.cli": Layer(
        inside=("tvfast.demo", "tvfast.inspection"),
        exactly=(
            *PUBLIC,
            "tvfast.dtypes",
            "tvfast.recipe",
            "tvfast.checkpoint.factors",
            "tvfast.checkpoint.reading",
            "tvfast.collection",
            "tvfast.sweeping",
        ),
        outside=("torch",),
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with the names taken from it."""

    module: str
    names: tuple[str, ...]
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("tvfast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Imports at any depth, functions included; those under `if TYPE_CHECKING` never run and are left out."""

    def walk(node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if is_package else module.rpartition(".")[0]
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield Import(base, tuple(alias.name for alias in node.names), node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                Import(str(a.value), (), a.lineno) for a in node.args[:1] if isinstance(a, ast.Constant)
            )
        children: Iterator[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            children = iter(node.orelse)
        for child in children:
            yield from walk(child)

    yield from walk(ast.parse(source))


def covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer_name(module: str) -> str:
    rows = (name for name in LAYERS if module == name or (name != "tvfast" and covers(name, module)))
    return max(rows, key=len, default="")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(
        *name.removeprefix("tvfast.").split(".") if covers(KERNELS, name) else name.split(".")
    )
    return path.with_suffix(".py").exists() or path.is_dir() or name.startswith("tvfast._C_")


def targets_of(found: Import) -> list[str]:
    """The modules imported: of `from tvfast import errors, merge` they are `tvfast.errors` and `tvfast`."""
    if not found.names:
        return [found.module]
    return [
        f"{found.module}.{name}" if is_module(f"{found.module}.{name}") else found.module
        for name in found.names
    ]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every import of `module` that its layer does not allow."""
    layer = layer_name(module)
    rule = LAYERS.get(layer)
    if rule is None:
        return [f"{module} belongs to no layer; add a row to LAYERS"]
    found = []
    for item in imports_of(source, module, is_package=is_package):
        for target in targets_of(item):
            root = target.split(".")[0]
            if root == "tvfast":
                own = covers(layer, target) and layer_name(target) == layer
                listed = target in rule.exactly or any(covers(name, target) for name in rule.inside)
                allowed = own or listed
            else:
                allowed = root in sys.stdlib_module_names or root in rule.outside
            if not allowed:
                found.append(f"{module}, line {item.line}: layer {layer!r} must not import {target}")
    return found


PYTHON_FILES = sorted([*(ROOT / "tvfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", PYTHON_FILES, ids=module_name)
def test_python_imports_follow_the_layers(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=module_name)
def test_every_python_file_is_in_a_package(path: Path) -> None:
    assert (path.parent / "__init__.py").exists(), "find_packages would leave it out of the wheel"


def test_every_layer_exists() -> None:
    modules = {module_name(path) for path in PYTHON_FILES}
    assert sorted(set(LAYERS) - modules) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tvfast.errors", "import torch"),
        ("tvfast.program", "from tvfast import errors"),
        ("tvfast.program", "from .errors import ArgumentError"),
        ("tvfast.methods.ties", "import torch"),
        ("tvfast.methods.ties", "def f():\n    from torch import Tensor"),
        ("tvfast.methods.ties", "import importlib\ntorch = importlib.import_module('torch')"),
        ("tvfast.methods.ties", "from tvfast.ops import combine"),
        ("tvfast.methods.ties", "from ..ops.reference import backend"),
        ("tvfast.ops.reference", "from tvfast import _C_cpu"),
        ("tvfast.ops.reference", "import tvfast._C_cpu"),
        ("tvfast.ops.reference", "from tvfast.kernels import launch"),
        ("tvfast.kernels.stages", "from tvfast.ops.raw import Wants"),
        ("tvfast.ops.reference", "from tvfast.methods import base"),
        ("tvfast.ops.raw", "from tvfast.ops import _views"),
        ("tvfast.cli.main", "from tvfast.ops import reference"),
        ("tvfast.cli.main", "import tvfast.program"),
        ("tvfast.cli.main", "from tvfast import _C_cpu"),
        ("tvfast.merging", "from tvfast import _C_cpu"),
        ("tvfast.unheard_of", ""),
    ],
)
def test_forbidden_imports_are_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tvfast.methods.ties", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("tvfast.methods.ties", "from tvfast.methods._scalars import gains"),
        ("tvfast.methods.ties", "from tvfast.ops import raw"),
        ("tvfast.ops.cpp", "from tvfast import _C_cpu"),
        ("tvfast.ops.triton", "from tvfast.kernels import launch"),
        ("tvfast.cli.main", "from tvfast import merge_, methods"),
        ("tvfast.cli.main", "from tvfast.ops.raw import backend_statuses"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


INCLUDE = re.compile(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', re.MULTILINE)
STANDARD_HEADER = re.compile(r"[a-z_]+")  # <vector>, <cstdint>; never <immintrin.h> or <pybind11/...>
FOREIGN = re.compile(r"(pybind11|torch|ATen|c10|cuda|Python\.h|numpy)")

# Per folder of csrc: which quoted files may be included, which angled ones.
CPP_LAYERS = {
    "core": (re.compile(r"core/.*"), STANDARD_HEADER),
    "cpu": (re.compile(r"(core|cpu)/.*"), re.compile(rf"(?!{FOREIGN.pattern}).*")),
    "cuda": (
        re.compile(r"(core|cuda)/.*"),
        re.compile(r"([a-z_]+|cuda_\w+\.h|cuda_fp16\.h|cub/.*|ucontext\.h)"),
    ),
    "bindings": (
        re.compile(r"(core/.*|bindings/.*|cpu/api\.hpp|cuda/api\.hpp)"),
        re.compile(r"([a-z_]+|pybind11/.*)"),
    ),
}
CPP_FILES = sorted(
    p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".hpp", ".inl", ".cu", ".cuh")
)


def csrc_name(path: Path) -> str:
    return path.relative_to(ROOT / "csrc").as_posix()


def include_violations(source: str, path: Path) -> list[str]:
    """Every `#include` of the file at `path` that its folder does not allow."""
    quoted_rule, angled_rule = CPP_LAYERS[csrc_name(path).split("/")[0]]
    found = []
    for angled, quoted in INCLUDE.findall(source):
        if angled:
            allowed = angled_rule.fullmatch(angled) is not None
        else:
            candidates = [(path.parent / quoted).resolve(), (ROOT / "csrc" / quoted).resolve()]
            file = next((c for c in candidates if c.is_file() and c.is_relative_to(ROOT / "csrc")), None)
            allowed = file is not None and quoted_rule.fullmatch(csrc_name(file)) is not None
        if not allowed:
            found.append(f"{csrc_name(path)} must not include {angled or quoted}")
    return found


@pytest.mark.parametrize("path", CPP_FILES, ids=csrc_name)
def test_cpp_includes_follow_the_layers(path: Path) -> None:
    assert include_violations(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/x.hpp", "#include <immintrin.h>"),
        ("core/x.hpp", '#include "cpu/api.hpp"'),
        ("core/x.hpp", "#include <torch/extension.h>"),
        ("cpu/x.cpp", "#include <pybind11/pybind11.h>"),
        ("cpu/x.cpp", "#  include <cuda_runtime.h>"),
        ("cpu/x.cpp", '#include "core/no_such_file.hpp"'),
        ("cuda/x.cu", '#include "cpu/api.hpp"'),
        ("cuda/x.cu", "#include <pybind11/pybind11.h>"),
        ("core/x.hpp", '#include "cuda/api.hpp"'),
        ("bindings/x.cpp", '#include "../cpu/parallel.hpp"'),
        ("bindings/x.cpp", "#include <ATen/ATen.h>"),
    ],
)
def test_forbidden_includes_are_found(path: str, line: str) -> None:
    assert len(include_violations(line, ROOT / "csrc" / path)) == 1


@pytest.mark.parametrize(
    "module",
    [
        "tvfast",
        "tvfast.cli.main",
        "tvfast.methods",
        "tvfast.ops",
        "tvfast.ops.raw",
        "tvfast.search",
        "tvfast.sweeping",
    ],
)
def test_import_is_light(module: str) -> None:
    """The import starts no framework and loads no native code."""
    heavy = ("torch", "triton", "numpy", "tvfast._C_cpu")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
