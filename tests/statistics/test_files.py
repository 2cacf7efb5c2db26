"""Statistics files: round trips, adding up, and named refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tvfast.errors import ArgumentError, OutputError, StatisticsError
from tvfast.statistics import (
    Array,
    Document,
    Model,
    Record,
    Shared,
    StatisticsWriter,
    merge_statistics,
    open_statistics,
)
from tvfast.statistics.tensors import array_of, model_identity, read_mean, read_sum, tensor_of

DOCUMENT = Document(Model("tiny", "aa", "bb", "F32"), ({"path": "a.txt"},), {"loss": "cross entropy"})


def importance(name: str, sums: torch.Tensor, samples: float = 4, **options: object) -> Record:
    return Record(
        name, "weight", tuple(sums.shape), {"sum": array_of(sums, name)}, {"samples": samples}, options
    )


def factors(name: str, a: torch.Tensor | str, b: torch.Tensor, root: torch.Tensor) -> Record:
    first = Shared(a, "tokens") if isinstance(a, str) else array_of(a, name, count="tokens")
    tensors = {
        "A": first,
        "B": array_of(b, name, dtype="BF16", count="probes"),
        "root": array_of(root, name, concatenate=1),
    }
    counts = {"samples": 2, "tokens": 7, "probes": 3}
    return Record(name, "kfac", (len(b), 3), tensors, counts, {"block": 64})


def write(path: Path, *records: Record, document: Document = DOCUMENT, n_records: int = 0) -> Path:
    with StatisticsWriter(path, document, n_records=n_records) as writer:
        for record in records:
            writer.add(record)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sums = torch.arange(15.0).reshape(5, 3)
    a, b, root = torch.eye(3), torch.full((5, 5), 0.5), torch.randn(3, 2)
    path = write(
        tmp_path / "s.safetensors",
        importance("w", sums),
        factors("q", a, b, root),
        factors("k", "q", b, root),
    )
    file = open_statistics(path)
    assert file.document == DOCUMENT
    assert file.kinds == ("weight", "kfac")
    assert file.parameters("kfac") == ["q", "k"]
    assert torch.equal(read_sum(file, "w", "weight", "sum"), sums)
    assert torch.equal(read_mean(file, "w", "weight", "sum"), sums / 4)
    assert torch.equal(read_mean(file, "k", "kfac", "A"), a / 7)
    assert torch.equal(read_mean(file, "k", "kfac", "B"), b / 3)
    record = file.read("k", "kfac")
    assert isinstance(record.tensors["root"], Array)
    assert record.tensors["root"].concatenate == 1
    assert record.options == {"block": 64}
    assert [found.key for found in file.records()] == [("w", "weight"), ("q", "kfac"), ("k", "kfac")]
    with safe_open(path, "pt") as reader:
        assert torch.equal(reader.get_tensor("w:weight:sum"), sums)
    assert path.parent.joinpath("s.safetensors.unfinished").exists() is False


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40),
    st.sampled_from(["F64", "F32", "BF16", "F16"]),
    st.integers(0, 50),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], dtype: str, n: int
) -> None:
    """Any number of records of any shape; the header may outgrow the room that was left for it."""
    path = tmp_path_factory.mktemp("s") / "s"
    tensors = [torch.randint(-8, 8, shape).float() for shape in shapes]
    records = [
        Record(f"layer.{k}.é", "weight", shape, {"sum": array_of(t, "", dtype=dtype)}, {"samples": k})
        for k, (shape, t) in enumerate(zip(shapes, tensors, strict=True))
    ]
    file = open_statistics(write(path, *records, n_records=n))
    assert sorted(file.parameters("weight")) == sorted(record.parameter for record in records)
    for record, tensor in zip(records, tensors, strict=True):
        assert torch.equal(read_sum(file, record.parameter, "weight", "sum"), tensor)
        assert file.entry(record.parameter, "weight").counts == record.counts


def test_bytes_depend_on_records_only(tmp_path: Path) -> None:
    record = importance("w", torch.ones(2), note="x", block=2)
    same = importance("w", torch.ones(2), block=2, note="x")
    assert write(tmp_path / "a", record).read_bytes() == write(tmp_path / "b", same).read_bytes()


def test_two_files_add_up(tmp_path: Path) -> None:
    sums, a, b = torch.arange(6.0).reshape(2, 3), torch.eye(3), torch.ones(5, 5)
    roots = torch.randn(3, 2), torch.randn(3, 4)
    one = write(
        tmp_path / "1", importance("w", sums, 4), factors("q", a, b, roots[0]), factors("k", "q", b, roots[0])
    )
    other = write(
        tmp_path / "2",
        importance("w", 3 * sums, 2),
        factors("q", 2 * a, b, roots[1]),
        factors("k", "q", b, roots[1]),
        document=replace(DOCUMENT, data=({"path": "b.txt"},), model=Model("tiny", "aa")),
    )
    merge_statistics([one, other], one)
    file = open_statistics(one)
    assert torch.equal(read_sum(file, "w", "weight", "sum"), 4 * sums)
    assert file.divisor("w", "weight", "sum") == 6
    assert torch.equal(read_sum(file, "k", "kfac", "A"), 3 * a)
    assert torch.equal(read_sum(file, "q", "kfac", "root"), torch.cat(roots, 1))
    assert file.entry("q", "kfac").counts == {"samples": 4, "tokens": 14, "probes": 6}
    assert file.document.data == ({"path": "a.txt"}, {"path": "b.txt"})
    assert file.document.model == DOCUMENT.model


@pytest.mark.parametrize(
    ("records", "document", "words"),
    [
        ([importance("w", torch.ones(3))], DOCUMENT, ["shape", "[3]", "[2]"]),
        ([importance("v", torch.ones(2))], DOCUMENT, ["parameter 'v'", "same records"]),
        ([importance("w", torch.ones(2), block=2)], DOCUMENT, ["block", "convention"]),
        ([importance("w", torch.ones(2))], replace(DOCUMENT, collection={"loss": "l2"}), ["loss", "'l2'"]),
        ([importance("w", torch.ones(2))], replace(DOCUMENT, model=Model("m", "cc")), ["structure", "tiny"]),
    ],
)
def test_other_files_are_not_added(
    tmp_path: Path, records: list[Record], document: Document, words: list[str]
) -> None:
    one = write(tmp_path / "1", importance("w", torch.ones(2)))
    other = write(tmp_path / "2", *records, document=document)
    with pytest.raises(StatisticsError) as found:
        merge_statistics([one, other], tmp_path / "3")
    assert all(word in str(found.value) for word in [str(other) if "same" not in words[-1] else "2", *words])
    assert not (tmp_path / "3").exists()


def test_questions_without_answer(tmp_path: Path) -> None:
    file = open_statistics(write(tmp_path / "s", importance("w", torch.ones(2), 0)))
    for ask, words in [
        (lambda: file.entry("v", "weight"), ["'v'", "another model"]),
        (lambda: file.entry("w", "kfac"), ["holds weight", "kfac"]),
        (lambda: file.entry("w", "weight", (3,)), ["[2]", "[3]", "tiny"]),
        (lambda: file.place("w", "weight", "A"), ["'A'", "sum"]),
        (lambda: file.divisor("w", "weight", "sum"), ["0 samples", "at least one"]),
    ]:
        with pytest.raises(StatisticsError) as found:
            ask()
        assert all(word in str(found.value) for word in [str(tmp_path / "s"), *words])


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=r"w holds NaN or infinity at element 1 \(shape \[2\]\)"):
        array_of(torch.tensor([1.0, float("nan")]), "w")
    with pytest.raises(StatisticsError, match="infinity"):
        array_of(torch.tensor([1e30]), "w", dtype="F16")
    assert tensor_of(array_of(torch.full((4,), 3e38), "w")).isfinite().all()
    broken = Array("F32", (1,), torch.tensor([torch.inf]).numpy().tobytes())
    record = Record("w", "weight", (1,), {"sum": broken}, {"samples": 1})
    file = open_statistics(write(tmp_path / "s", record))
    with pytest.raises(StatisticsError, match="parameter 'w': weight 'sum' holds NaN"):
        read_sum(file, "w", "weight", "sum")


GOOD = Array("F32", (1,), b"\0" * 4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Record("w", "weight", (1,), {"sum": GOOD}, {"samples": -1}), "count 'samples' is -1"),
        (Record("w", "weight", (1,), {"sum": GOOD}, {"samples": True}), "count 'samples' is True"),
        (Record("w", "weight", (1,), {"sum": GOOD}, {"tokens": 1}), "one of its counts: tokens"),
        (Record("w", "weight", (1,), {}, {"samples": 1}), "no tensor"),
        (Record("", "weight", (1,), {"sum": GOOD}, {"samples": 1}), "name of a parameter"),
        (Record("w", "a:b", (1,), {"sum": GOOD}, {"samples": 1}), "'a:b' is no name"),
        (Record("w", "weight", (1,), {"sum": replace(GOOD, dtype="I8")}, {"samples": 1}), "'I8'"),
        (
            Record("w", "weight", (2,), {"sum": replace(GOOD, shape=(2,))}, {"samples": 1}),
            "4 bytes; expected 8",
        ),
        (Record("w", "weight", (1,), {"sum": replace(GOOD, concatenate=1)}, {"samples": 1}), "axis 1"),
        (Record("w", "weight", (1,), {"sum": GOOD}, {"samples": 1}, {"x": {1}}), "finite numbers, lists"),
        (Record("w", "weight", (1,), {"sum": Shared("v")}, {"samples": 1}), "shared with 'v'"),
    ],
)
def test_records_that_are_refused(tmp_path: Path, record: Record, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        write(tmp_path / "s", record)
    assert list(tmp_path.iterdir()) == []


def test_second_record(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="already written"):
        write(tmp_path / "s", importance("w", torch.ones(1)), importance("w", torch.ones(1)))


def test_failed_writes_leave_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "s", importance("w", torch.ones(1)))
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="no tensor"):
        write(path, importance("v", torch.ones(1)), Record("w", "weight", (1,), {}, {}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "no" / "s")


def edited(path: Path, change: Callable[[dict[str, str]], object]) -> Path:
    """The file with other metadata."""
    with safe_open(path, "pt") as reader:
        metadata = dict(reader.metadata())
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    change(metadata)
    save_file(tensors, path, metadata)
    return path


RECORD = "record:w:weight"


def field(name: str, value: object) -> Callable[[dict[str, str]], object]:
    return lambda m: m.update({RECORD: json.dumps({**json.loads(m[RECORD]), name: value})})


def head(name: str, value: object) -> Callable[[dict[str, str]], object]:
    key = "tvfast.statistics"
    return lambda m: m.update({key: json.dumps({**json.loads(m[key]), name: value})})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("tvfast.statistics"), "without statistics"),
        (lambda m: m.update({"tvfast.statistics": "{"}), "no JSON object"),
        (head("schema", 2), "has schema 2; expected 1"),
        (head("data", {}), "lack model, data"),
        (head("state", {"batch": 3}), "has not ended"),
        (lambda m: m.pop(RECORD), "belongs to no record"),
        (lambda m: m.update({RECORD: "[]"}), "no JSON object"),
        (field("counts", {"samples": -1}), "is none"),
        (field("counts", {"samples": "1"}), "is none"),
        (field("counts", {}), "is none"),
        (field("shape", ["x"]), "is none"),
        (field("shape", 1), "lack fields"),
        (field("roles", []), "lack fields"),
        (field("roles", {}), "is none"),
        (field("parameter", "v"), "not there"),
        (field("roles", {"sum": {"count": "samples", "shared": "v"}}), "not there"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Callable[[dict[str, str]], object], words: str) -> None:
    path = edited(write(tmp_path / "s", importance("w", torch.ones(2))), change)
    with pytest.raises(StatisticsError, match=words) as found:
        open_statistics(path)
    assert str(path) in str(found.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="no such file"):
        open_statistics(tmp_path / "s")
    path = write(tmp_path / "s", importance("w", torch.ones(2)))
    file = open_statistics(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StatisticsError, match="changed since"):
        file.read("w", "weight")
    with pytest.raises(StatisticsError, match="bytes"):
        open_statistics(path)
    with pytest.raises(ArgumentError, match="1 files"):
        merge_statistics([path], path)


def test_identity() -> None:
    model = torch.nn.Linear(3, 2)
    plain = model_identity(model)
    assert plain.name == "Linear"
    assert plain.content == ""
    assert plain.dtype == "F32"
    full = model_identity(model, "m", content=True)
    assert full.structure == plain.structure != model_identity(torch.nn.Linear(2, 3)).structure
    with torch.no_grad():
        model.bias[0] += 1
    assert model_identity(model, content=True).content not in ("", full.content)
    wrapped = torch.nn.Module()
    wrapped._orig_mod = model
    assert model_identity(wrapped).structure == plain.structure


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "s", importance("w", torch.ones(2)))
    code = (
        "import sys; from tvfast.statistics import open_statistics; "
        f"open_statistics({str(path)!r}).read('w', 'weight'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
