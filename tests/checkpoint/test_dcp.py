"""Distributed checkpoints of torch: written by its own library in processes, read in pieces, merged."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import pickletools
import shutil
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tvfast
from tests.cli.families import load, write_checkpoint
from tests.distributed.ranks import free_port, merged
from tvfast.checkpoint import dcp_pickle
from tvfast.checkpoint.dcp import read_dcp
from tvfast.checkpoint.dcp_pickle import load_metadata
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.checkpoint.stored import Piece, Stored
from tvfast.engine.assembly import Assembly
from tvfast.engine.reading import tensor_in_memory
from tvfast.errors import ArgumentError, CheckpointError

SHAPES = {
    "embed.weight": (37, 24),
    "layers.0.up.weight": (16, 24),
    "experts": (3, 10, 8),
    "norm.weight": (24,),
}


def state(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def _save(rank: int, mesh_shape: tuple[int, ...], port: int, out: str, seed: int, wrapped: bool) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(math.prod(mesh_shape)), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", mesh_shape)
    sharded = {}
    for name, tensor in state(seed).items():
        by_row = [Shard(0), Shard(1) if tensor.ndim > 1 else Replicate()]
        sharded[name] = distribute_tensor(tensor, mesh, by_row[: len(mesh_shape)])
    moments = {name: {"exp_avg": torch.zeros(4)} for name in sharded}
    found: dict[str, Any] = {"model": sharded, "optim": {"state": moments}, "step": 7} if wrapped else sharded
    dcp.save(found, checkpoint_id=out)
    dist.destroy_process_group()


def save_sharded(out: Path, mesh_shape: tuple[int, ...], seed: int, *, wrapped: bool = True) -> Path:
    """What a training run of so many processes leaves."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    ranks = [
        context.Process(target=_save, args=(rank, mesh_shape, port, str(out), seed, wrapped))
        for rank in range(math.prod(mesh_shape))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, rows: 37 are 19 and 18."""
    return save_sharded(tmp_path_factory.mktemp("rows") / "dcp", (2,), 1)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two by two processes: rows and columns, as FSDP with tensor parallelism; no wrapper."""
    return save_sharded(tmp_path_factory.mktemp("grid") / "dcp", (2, 2), 2, wrapped=False)


def tensor_of(stored: Stored) -> Tensor:
    with tensor_in_memory(stored) as view:
        return torch.frombuffer(bytearray(view), dtype=torch.bfloat16).view(stored.shape)


@pytest.mark.parametrize(("where", "seed"), [("rows", 1), ("grid", 2)])
def test_every_tensor_is_read_from_its_pieces(where: str, seed: int, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(where))
    assert set(checkpoint.tensors) == set(SHAPES)
    for name, expected in state(seed).items():
        assert checkpoint.tensors[name].shape == tuple(expected.shape)
        assert torch.equal(tensor_of(checkpoint.tensors[name]), expected), name
    assert len(checkpoint.tensors["embed.weight"].pieces) == (2 if where == "rows" else 4)
    assert any(entry["name"] == ".metadata" for entry in checkpoint.identity())


def recipe(folder: Path, base: Path, models: Sequence[Path], method: str, **keys: Any) -> Path:
    path = folder / f"{method}.yaml"
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    found = {"merge_method": method, "base_model": str(base), "models": listed, "dtype": "bfloat16", **keys}
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_training_checkpoint_is_merged_into_another(
    method: str, rows: Path, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded in one way, in another, and not at all; in small units, so that pieces are cut anywhere."""
    from tvfast.engine import assembly, plan

    monkeypatch.setattr(plan, "UNIT_BYTES", 2**16)
    monkeypatch.setattr(assembly, "_PIECE_BYTES", 100)
    base = write_checkpoint(tmp_path / "base", state(0))
    config = recipe(tmp_path, base, [rows, grid], method)
    report = tvfast.merge_checkpoints(config, tmp_path / "out")
    expected = tvfast.merge(state(0), [state(1), state(2)], method=method, weights=[0.5, 0.5])
    found = load(tmp_path / "out")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert report.read_bytes == 3 * sum(t.numel() * t.element_size() for t in expected.values())


def test_ranks_merge_sharded_checkpoints(rows: Path, grid: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, rows, [grid, rows], "ties")
    merged(tmp_path / "logs", ["merge", config, tmp_path / "out"], 2)
    expected = tvfast.merge(state(1), [state(2), state(1)], method="ties", weights=[0.5, 0.5])
    found = load(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_missing_file_is_named_with_a_tensor(rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "dcp")
    (tmp_path / "dcp" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: is missing; .*tensor '.*' has a piece there"):
        open_checkpoint(tmp_path / "dcp")


def test_a_cut_file_is_named(rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "dcp")
    path = tmp_path / "dcp" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has \d+ bytes"):
        open_checkpoint(tmp_path / "dcp")


def _without_a_piece(metadata: Any) -> None:
    metadata.state_dict_metadata["model.embed.weight"].chunks.pop()


def _twice_the_same_piece(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["model.experts"].chunks
    found = {tuple(chunk.sizes): chunk for chunk in chunks}
    chunks[:] = [found[2, 10, 8], found[2, 10, 8], *chunks[2:]] if len(found) > 1 else chunks[:1] * 2


def _beyond(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata["model.norm.weight"].chunks[0]
    metadata.state_dict_metadata["model.norm.weight"].size = torch.Size([5])
    assert chunk.sizes[0] > 5


def _elsewhere(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path


def _nowhere(metadata: Any) -> None:
    metadata.storage_data.clear()


def _transformed(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]


def _two_of_a_name(metadata: Any) -> None:
    metadata.planner_data["model.norm.weight"] = ("model", "embed.weight")


def _without_a_name(metadata: Any) -> None:
    metadata.planner_data["model.norm.weight"] = ("model", "")


def _led_to_by(step: object) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        metadata.planner_data["model.norm.weight"] = step

    return change


def _of_another_type(metadata: Any) -> None:
    metadata.state_dict_metadata["model.norm.weight"].properties.dtype = torch.float32


def _of_many_dimensions(metadata: Any) -> None:
    """Whose product would take minutes."""
    sizes = (2**120,) * 150_000
    metadata.state_dict_metadata["model.norm.weight"].size = sizes


def _with_control_characters(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "\x1b[31m"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_two_of_a_name, "has two tensors 'embed.weight'"),
        (_without_a_name, "has no name"),
        (_led_to_by(7), "expected a tuple of keys"),
        (_led_to_by({"model": 1}), "expected a tuple of keys"),
        (_led_to_by(("model", [[]])), "expected a tuple of keys"),
        (_of_another_type, "is said to be of type F32; its pieces are BF16"),
        (_of_many_dimensions, "has a shape or place that is none"),
        (_with_control_characters, "expected one beside .metadata"),
        (_without_a_piece, "Some are missing"),
        (_twice_the_same_piece, "pieces"),
        (_beyond, "beyond its shape"),
        (_elsewhere, "expected one beside .metadata"),
        (_nowhere, "has no place in storage_data"),
        (_transformed, "without extensions"),
    ],
)
def test_metadata_that_contradicts_itself(
    change: Callable[[Any], None], says: str, rows: Path, tmp_path: Path
) -> None:
    shutil.copytree(rows, tmp_path / "dcp")
    path = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "dcp")


def test_hundreds_of_thousands_of_pieces_are_taken(rows: Path) -> None:
    """70 B over 128 processes, with its optimizer, are 280 000."""
    raw = (rows / ".metadata").read_bytes()
    metadata = pickle.loads(raw)
    chunks = metadata.state_dict_metadata["model.embed.weight"].chunks
    n = 1000
    chunks[:] = [type(chunks[0])(torch.Size([k, 0]), torch.Size([1, 24])) for k in range(n)]
    index, info = next(iter(metadata.storage_data.items()))
    for k in range(n):
        own = type(info)(info.relative_path, k, info.length)
        metadata.storage_data[type(index)("model.embed.weight", torch.Size([k, 0]), k)] = own
    more = sum(1 for _ in pickletools.genops(pickle.dumps(metadata))) - sum(
        1 for _ in pickletools.genops(raw)
    )
    assert 280_000 * more / n < dcp_pickle._Machine.most_opcodes


def test_more_files_than_may_be_open(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvfast.checkpoint import dcp

    expected = read_dcp(str(grid))
    monkeypatch.setattr(dcp, "MAX_OPEN", 1)
    assert read_dcp(str(grid)) == expected
    assert len(expected[0]) == 5


def test_other_files_of_a_trainer_do_not_hide_it(rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "dcp")
    (tmp_path / "dcp" / "training_args.bin").write_bytes(b"")
    assert set(open_checkpoint(tmp_path / "dcp").tensors) == set(SHAPES)


def test_a_path_that_no_shell_has_expanded(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(rows, tmp_path / "dcp")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = open_checkpoint("~/dcp")
    assert set(found.tensors) == set(SHAPES)
    assert found.directory == str(tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"holds \*\.distcp without \.metadata"):
        open_checkpoint("~/dcp")


def test_metadata_runs_no_code(rows: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    shutil.copytree(rows, tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    metadata.planner_data = Harmful()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"asks to run 'posix\.system'"):
        open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match="holds no Metadata"):
        open_checkpoint(tmp_path / "dcp")


def test_members_of_enumerations_are_taken_by_name_and_nothing_else_is(tmp_path: Path) -> None:
    """Python before 3.11.4 writes a member as a call of getattr, which reaches anything else too."""

    def taken(module: str, name: str, member: str) -> bytes:
        text = f"cbuiltins\ngetattr\nc{module}\n{name}\nX".encode()
        return b"\x80\x02" + text + len(member).to_bytes(4, "little") + member.encode() + b"\x86R."

    encoding = taken(
        "torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT"
    )
    assert load_metadata(encoding, "file") == ("TORCH_CONTIGUOUS_FORMAT",)
    assert pickle.loads(encoding).name == "TORCH_CONTIGUOUS_FORMAT"
    with pytest.raises(CheckpointError, match=r"asks to run 'os\.environ'"):
        load_metadata(taken("os", "environ", "clear"), "file")
    with pytest.raises(CheckpointError, match=r"calls 'builtins\.getattr'"):
        load_metadata(taken("torch", "Size", "__init__"), "file")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
def test_any_range_of_any_grid_of_pieces(
    data: st.DataObject, shape: tuple[int, ...], tmp_path_factory: Any
) -> None:
    """Boxes of a grid, cut at random in every dimension, in one file in random order."""
    tensor = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    edges = [
        sorted({0, extent, *data.draw(st.lists(st.integers(0, extent), max_size=2))}) for extent in shape
    ]
    boxes: list[tuple[slice, ...]] = [()]
    for cuts in edges:
        spans = [slice(a, b) for a, b in pairwise(cuts)]
        boxes = [(*box, span) for box in boxes for span in spans]
    boxes = data.draw(st.permutations(boxes))
    path = tmp_path_factory.mktemp("grid") / "data"
    pieces, raw = [], b""
    for box in boxes:
        piece = tensor[box].contiguous()
        pieces.append(Piece(str(path), len(raw), tuple(s.start for s in box), tuple(piece.shape)))
        raw += piece.numpy().tobytes() + b"between"
    path.write_bytes(raw)
    stored = Stored("t", "none", 0, 4 * tensor.numel(), "I32", shape, pieces=tuple(pieces))
    start = data.draw(st.integers(0, tensor.numel() - 1))
    n = data.draw(st.integers(1, tensor.numel() - start))
    block = bytearray(4 * n + 8)
    from tvfast.engine.reading import descriptor_of

    for part in Assembly(stored, start, n, 4).pieces():
        part.fill(memoryview(block), descriptor_of)
    assert block[4 : 4 + 4 * n] == tensor.view(-1)[start : start + n].numpy().tobytes()
    assert block[:4] == block[4 + 4 * n :] == bytes(4)


def test_the_files_of_a_checkpoint_are_its_headers(rows: Path) -> None:
    headers, tensors = read_dcp(str(rows))
    assert [os.path.basename(header.path) for header in headers] == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    assert {Path(piece.path).name for t in tensors.values() for piece in t.pieces} <= {
        "__0_0.distcp",
        "__1_0.distcp",
    }


# -- writing --------------------------------------------------------------------------------------------


def _load(rank: int, port: int, folder: str, n: int) -> None:
    """Into DTensors of two processes, and compare with the safetensors beside."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (n,))
    expected = load(Path(folder) / "safe")
    found = {name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(0)]) for name, t in expected.items()}
    dcp.load(found, checkpoint_id=f"{folder}/dcp")
    for name, tensor in expected.items():
        assert torch.equal(found[name].full_tensor(), tensor), name
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge as safetensors and as a distributed checkpoint of several files."""
    folder = tmp_path_factory.mktemp("written")
    for seed in range(3):
        write_checkpoint(folder / f"{seed}", state(seed))
    models = [folder / "1", folder / "2"]
    plain = recipe(folder, folder / "0", models, "ties", out_shard_size="1KB")
    tvfast.merge_checkpoints(plain, folder / "safe")
    own = recipe(folder, folder / "0", models, "ties", tvfast={"out_format": "dcp", "out_shard_size": "1KB"})
    tvfast.merge_checkpoints(own, folder / "dcp")
    return folder


def test_torch_loads_what_is_written(written: Path) -> None:
    import torch.distributed.checkpoint as dcp

    expected = load(written / "safe")
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.load(found, checkpoint_id=written / "dcp")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    files = {path.name for path in (written / "dcp").iterdir()}
    assert {".metadata", "__0_0.distcp", "__0_1.distcp", "tvfast_manifest.json", "config.json"} <= files
    assert not any(name.endswith((".safetensors", ".index.json")) for name in files)
    context, port = multiprocessing.get_context("forkserver"), free_port()
    ranks = [context.Process(target=_load, args=(rank, port, str(written), 2)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_torch_converts_what_is_written_to_one_file(written: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(written / "dcp", tmp_path / "model.pt")
    found, expected = torch.load(tmp_path / "model.pt"), load(written / "safe")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_written_is_read_verified_and_replaced(written: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written / "dcp")
    for name, tensor in load(written / "safe").items():
        assert torch.equal(tensor_of(checkpoint.tensors[name]), tensor), name
    own = written / "ties.yaml"
    assert tvfast.merge_checkpoints(own, written / "dcp", resume=True).finished_before
    shutil.copytree(written / "dcp", tmp_path / "out")
    plain = recipe(tmp_path, written / "0", [written / "1"], "linear", base_model=None)
    tvfast.merge_checkpoints(plain, tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").glob("*.distcp"))
    assert not (tmp_path / "out" / ".metadata").exists()


def test_ranks_write_the_same_bytes(written: Path, tmp_path: Path) -> None:
    merged(tmp_path / "logs", ["merge", written / "ties.yaml", tmp_path / "out"], 2)
    for path in (written / "dcp").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("large", [False, True], ids=["sizes-of-32-bits", "zip64"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_an_entry_is_a_file_of_torch(
    dtype: torch.dtype, shape: tuple[int, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from tvfast.checkpoint import dcp_entry
    from tvfast.checkpoint.pytorch import TORCH_NAMES

    if large:
        monkeypatch.setattr(dcp_entry, "_ZIP64_FROM", 0)
    tensor = (torch.randn(shape) * 3).to(dtype)
    data = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    entry = dcp_entry.make_entry(TORCH_NAMES[str(dtype)], shape, len(data), 128)
    assert (128 + len(entry.before)) % 64 == 0
    found = torch.load(io.BytesIO(entry.before + data + entry.after), weights_only=True)
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_type_that_torch_does_not_know_is_refused() -> None:
    from tvfast.checkpoint.dcp_layout import make_dcp_layout

    with pytest.raises(ArgumentError, match="'t' has storage type 'F4', which torch does not know"):
        make_dcp_layout([("t", "F4", (4,))], 100)
