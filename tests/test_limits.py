"""Statements about tensors of 16 Mi elements: kept share under ties, and extra memory of every method."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tvfast
from tests.conftest import load
from tvfast import ops
from tvfast.methods import staged_methods

N = 16 * 2**20
EXTRA_MIB = 64

PEAK = """
import sys
import torch
import tvfast
from tvfast.methods import METHODS

def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def normal(std, dtype=torch.bfloat16):
    out = torch.empty(n // 4096, 4096, dtype=dtype)
    for part in out.view(-1).split(2**20):
        part.normal_(0, std)
    return out

n, method = int(sys.argv[1]), sys.argv[2]
models = [normal(0.02) for _ in range(min(3, METHODS[method].n_models[1] or 3))]
base = normal(0.02)
own = [p.name for p in METHODS[method].parameters]
keywords = {name: 0.5 for name in ("density", "select_topk") if name in own}
scores = [normal(1.0, torch.float32).abs_() for _ in models] if METHODS[method].needs_scores else None
first = scores and [score[:1] for score in scores]
instruct = None
if METHODS[method].needs_instruct:
    instruct, keywords["outside"] = models.pop(), "ranked"
tvfast.merge(
    base[:1],
    [model[:1] for model in models],
    method=method,
    stats=first,
    instruct=None if instruct is None else instruct[:1],
    **keywords,
)
before = peak_kib()
tvfast.merge_(base, models, method=method, stats=scores, instruct=instruct, **keywords)
print(peak_kib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("method", staged_methods())
def test_extra_memory_of_a_merge_in_place(method: str) -> None:
    """A copy of one tensor in float32 would be 64 MiB."""
    load("cpp")
    command = [sys.executable, "-c", PEAK, str(N), method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= EXTRA_MIB * 1024


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_hashed_ties_keep_the_density_in_every_quarter(density: float) -> None:
    """bfloat16 task vectors of standard deviation 1e-4: up to 60,000 entries share a magnitude."""
    load("cpp")
    delta = torch.randn(N, generator=torch.Generator().manual_seed(7)).mul_(1e-4).bfloat16()
    mask = ops.topk_mask(delta, density, tie="hash")
    for quarter in mask.view(4, -1).count_nonzero(dim=1).tolist():
        assert abs(quarter / (N / 4) - density) < 1e-3
    merged = tvfast.merge(torch.zeros_like(delta), [delta], method="ties", density=density, tie="hash")
    assert merged.ne(0).equal(mask)
