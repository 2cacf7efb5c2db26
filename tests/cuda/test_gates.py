"""The gates of compiled kernels, on the texts of cuobjdump."""

from __future__ import annotations

import pytest

from tests.cuda.gates import Usage, code_faults, short, usages

_FIXED = (
    "void tvfast::gpu::(anonymous namespace)::combine_kernel<tvfast::gpu::Fixed<"
    "tvfast::Program{(tvfast::Keep)1, (tvfast::Reduce)0}, (tvfast::gpu::Ends)0>, 3, true>"
    "(tvfast::gpu::DeviceTable, tvfast::gpu::DeviceScalars, tvfast::Program)"
)
_REPORT = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {_FIXED}:
  REG:72 STACK:16 SHARED:304 LOCAL:8 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function probe():
  REG:4 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usages_are_read() -> None:
    first, second = usages(_REPORT)
    assert first == Usage("sm_90", _FIXED, 72, 24, 304)
    assert second.name == "probe()"
    assert list(second.faults()) == []


def test_stack_and_low_occupancy_are_faults() -> None:
    first, _ = usages(_REPORT)
    assert list(first.faults()) == ["24 bytes of stack", "occupancy 37.5%, expected at least 50.0%"]
    on_80 = Usage("sm_80", _FIXED, 72, 0, 304)
    assert list(on_80.faults()) == []


def test_merges_by_score_have_an_occupancy_of_their_own() -> None:
    scored = _FIXED.replace("(tvfast::Keep)1", "(tvfast::Keep)2")
    assert scored != _FIXED
    assert list(Usage("sm_90", scored, 128, 0, 0).faults()) == []
    assert list(Usage("sm_90", scored, 136, 0, 0).faults()) == ["occupancy 12.5%, expected at least 25.0%"]


@pytest.mark.parametrize(
    ("registers", "occupancy"), [(4, 1.0), (32, 1.0), (33, 0.75), (64, 0.5), (65, 0.375), (255, 0.125)]
)
def test_occupancy_counts_blocks_of_256(registers: int, occupancy: float) -> None:
    assert Usage("sm_90", "f", registers, 0, 0).occupancy == occupancy


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("mul.ftz.f32 %f1, %f2, %f3;", "flushes"),
        ("div.full.f32 %f1, %f2, %f3;", "approximates"),
        ("rcp.approx.f32 %f1, %f2;", "approximates"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "contracts"),
    ],
)
def test_code_is_read_kernel_by_kernel(code: str, fault: str) -> None:
    good = ".visible .entry sound(\n) { div.rn.f32 %f1, %f2, %f3; fma.rn.f64 %d1, %d2, %d3, %d4; }"
    (found,) = code_faults(f"{good}\n.visible .entry merge(\n) {{ {code} }}\n{good}")
    assert found.startswith("merge: ")
    assert fault in found


def test_a_stage_that_fuses_may_fuse() -> None:
    fused = ".entry kernel<(tvfast::Reduce)2>(\n) { fma.rn.f32 %f1, %f2, %f3, %f4; }"
    assert list(code_faults(fused)) == []


def test_names_are_shortened() -> None:
    assert short(_FIXED) == "combine_kernel<Fixed<Program{(Keep)1, (Reduce)0}, (Ends)0>, 3, true>"
