"""The penalty on parameters that are split over two processes, against the whole one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from tvfast.curvature import Gaussian, KroneckerPenalty, Statistics, collect

pytestmark = pytest.mark.slow

WORLD = 2


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 8, bias=False), nn.Linear(8, 3))


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def statistics(form: str, block: int) -> Statistics:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    return collect(network(), Gaussian(lambda m, b: m(b)), [x], form=form, block=block, rank=9)


def check(rank: int, place: str, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    try:
        for form, block in (("dense", 4), ("block", 4), ("block", 3), ("root", 4)):
            found = statistics(form, block)
            whole = moved(network())
            expected = KroneckerPenalty(found, network(), scale=2.0).add_gradients(whole)
            for base_is_whole in (True, False):
                base, model = network(), moved(network())
                mesh = init_device_mesh("cpu", (WORLD,))
                for one in [model] if base_is_whole else [model, base]:
                    if kind == "fsdp":
                        fully_shard(one, mesh=mesh)
                    else:
                        for name, parameter in list(one.named_parameters()):
                            module, _, last = name.rpartition(".")
                            place_at = Shard(parameter.dim() - 1)
                            split = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [place_at]))
                            setattr(one.get_submodule(module), last, split)
                penalty = KroneckerPenalty(found, base, scale=2.0)
                value = penalty.add_gradients(model)
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
                gradients = {}
                for (name, one), (_, other) in zip(
                    model.named_parameters(), whole.named_parameters(), strict=True
                ):
                    assert isinstance(one.grad, DTensor)
                    assert one.grad.placements == one.placements
                    gradients[name] = one.grad.full_tensor()
                    torch.testing.assert_close(gradients[name], other.grad, rtol=1e-5, atol=1e-7)
                model.zero_grad()
                term = penalty(model)
                torch.testing.assert_close(term.detach(), expected, rtol=1e-5, atol=0)
                term.backward()
                for name, one in model.named_parameters():
                    assert isinstance(one.grad, DTensor)
                    torch.testing.assert_close(one.grad.full_tensor(), gradients[name], rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["fsdp", "columns"])
def test_split_parameters_are_the_whole_ones(tmp_path: Path, kind: str) -> None:
    """FSDP2 splits rows (7 over 2: unevenly); the last dimension split is what is gathered."""
    multiprocessing.start_processes(
        check, args=(str(tmp_path / "store"), kind), nprocs=WORLD, start_method="spawn"
    )
