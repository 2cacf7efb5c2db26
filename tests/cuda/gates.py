"""What the compiled CUDA kernels may need: `python -m tests.cuda.gates MODULE`.

Reads the module with cuobjdump, prints a line per kernel and architecture, and fails if one uses the stack
(which is where spilled registers go), leaves too few registers for the occupancy that its kind must have,
flushes subnormals, approximates a division or contracts a product and a sum that no stage fuses; or if there
are more kernels than the budget.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_KERNELS = 200
REGISTERS_OF_MULTIPROCESSOR = 65536
THREADS_OF_MULTIPROCESSOR = {"sm_86": 1536, "sm_89": 1536}  # 2048 of others

_FIXED = r"combine_kernel<tvfast::gpu::(?:Fixed|Guessed)<.*>, (?:\(int\))?{}, "
_SCORED = _FIXED.replace("<.*>", r"<.*(?:\(tvfast::Keep\)2|\(tvfast::Weighting\)1).*>")
OCCUPANCIES = (
    (re.compile(_SCORED.format("1")), 0.5, 0.5),
    (re.compile(_SCORED.format("2")), 0.375, 0.375),
    (re.compile(_SCORED.format("[348]")), 0.25, 0.25),
    (re.compile(_FIXED.format("[12]")), 0.5, 0.5),
    (re.compile(_FIXED.format("3")), 0.375, 0.5),
    (re.compile(_FIXED.format("4")), 0.375, 0.375),
    (re.compile(_FIXED.format("8")), 0.25, 0.375),
    (re.compile(r"\bscore_kernel|count_\w*kernel<\(tvfast::Keep\)[12]>|ranks_kernel"), 0.5, 0.5),
    (re.compile(r"count_\w*kernel<\(tvfast::Keep\)3>"), 0.25, 0.25),  # variances: sums of doubles
)
"""Kernels whose time is that of memory, and the share of a multiprocessor's threads that must fit below sm_90
and from it on. A thread of a merge of K models has 16 (K + 1) bytes on their way: of 4 models, three
eighths of the threads have 60 KiB, more than latency times bandwidth asks for on an H200; a quarter has as
much where each model brings float32 scores. The first kind that fits a name counts."""

FUSING = re.compile(r"\(tvfast::Reduce\)2|AtRunTime|kron|factored")
"""Kernels with a stage that is a fused multiply-add, or may be at run time."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel needs on one architecture."""

    architecture: str
    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that the registers allow, in blocks of 256."""
        allocated = -(-self.registers // 8) * 8
        threads = THREADS_OF_MULTIPROCESSOR.get(self.architecture, 2048)
        blocks = min(REGISTERS_OF_MULTIPROCESSOR // (allocated * 256), threads // 256)
        return 256 * blocks / threads

    def faults(self) -> Iterator[str]:
        if self.stack_bytes:
            yield f"{self.stack_bytes} bytes of stack"
        found = (one for one in OCCUPANCIES if one[0].search(self.name))
        for _, before, later in itertools.islice(found, 1):
            least = before if int(self.architecture.removeprefix("sm_")) < 90 else later
            if self.occupancy < least:
                yield f"occupancy {self.occupancy:.1%}, expected at least {least:.1%}"


def usages(text: str) -> list[Usage]:
    """From the output of `cuobjdump -res-usage`, names demangled."""
    found = []
    architecture = ""
    name = ""
    for line in text.splitlines():
        if of_file := re.search(r"arch = (sm_\w+)", line):
            architecture = of_file[1]
        elif of_kernel := re.match(r"\s*Function (.+):\s*$", line):
            name = of_kernel[1]
        elif numbers := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, numbers.groups())
            if registers:
                found.append(Usage(architecture, name, registers, stack + local, shared))
    return found


def code_faults(ptx: str) -> Iterator[str]:
    """What must not stand in the PTX text of the kernels."""
    for entry in re.split(r"(?=\.entry )", ptx)[1:]:
        name = entry.split("\n", 1)[0].removeprefix(".entry ").rpartition("(")[0]
        if ".ftz" in entry:
            yield f"{name}: flushes subnormals"
        if re.search(r"\b(div\.(full|approx)|rcp\.approx|sqrt\.approx)", entry):
            yield f"{name}: approximates"
        if re.search(r"\bfma\.rn\.f32", entry) and not FUSING.search(name):
            yield f"{name}: contracts a product and a sum"


def tool(name: str) -> str:
    """cuobjdump of the CUDA toolkit, or the one that comes with triton.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    import triton

    return str(getattr(triton.knobs.nvidia, name).path)


def _output(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every kernel's needs; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", type=Path)
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90])
    options = parser.parse_args(arguments)
    cuobjdump = tool("cuobjdump")
    found = usages(_output("c++filt", text=_output(cuobjdump, "-res-usage", options.module)))
    ptx = _output("c++filt", text=_output(cuobjdump, "-ptx", options.module))
    wrong = list(code_faults(ptx))
    for one in found:
        faults = list(one.faults())
        print(
            f"{one.architecture} {one.registers:4} registers {one.occupancy:5.0%} occupancy "
            f"{one.stack_bytes:4} B stack {one.shared_bytes:6} B shared {short(one.name)} "
            f"{'; '.join(faults)}".rstrip()
        )
        wrong += [f"{one.architecture} {short(one.name)}: {fault}" for fault in faults]
    for architecture in options.architectures:
        n_kernels = sum(one.architecture == f"sm_{architecture}" for one in found)
        if not 1 <= n_kernels <= MOST_KERNELS:
            wrong.append(f"sm_{architecture}: {n_kernels} kernels; expected 1 to {MOST_KERNELS}")
    print(f"{len(found)} kernels, {len(wrong)} faults")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def short(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = re.sub(r"tvfast::gpu::|tvfast::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\((?!\w+\)\d)[^<>]*\)$", "", name)


if __name__ == "__main__":
    raise SystemExit(main())
