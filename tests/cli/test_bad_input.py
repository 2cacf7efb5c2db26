"""Every kind of bad input through the command: one message, its status, and nothing that looks complete."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.families import INDEX, Family, digest, load, make_family, recipe, tvfast
from tvfast.cli.main import main
from tvfast.engine.device import no_driver

SHARD = "model-00001-of-00002.safetensors"
NAME = "model.layers.0.input_layernorm.weight"  # in the first shard
LAST = "lm_head.weight"
ONE_SCREEN = 24
PWNED = Path(tempfile.gettempdir()) / f"tvfast-{os.getpid()}-pwned"


@dataclass(frozen=True, slots=True)
class Case:
    """What is broken before the merge, and what the message must say."""

    name: str
    break_: Callable[[Family, Path], None]
    status: int
    says: tuple[str, ...]


@pytest.fixture
def own(tmp_path: Path) -> Family:
    """A family that a test may break."""
    return make_family(tmp_path / "family")


def shard(family: Family) -> Path:
    return family.path("ft1") / SHARD


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write_header(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def change_header(change: Callable[[dict[str, object], int], None]) -> Callable[[Family, Path], None]:
    """Rewrites the entry of the tensor `NAME`; the second argument is the length of the file's data."""

    def apply(family: Family, config: Path) -> None:
        header, data = header_of(shard(family))
        change(header[NAME], len(data))
        write_header(shard(family), json.dumps(header), data)

    return apply


def set_to(key: str, value: object) -> Callable[[Family, Path], None]:
    return change_header(lambda entry, n_data: entry.update({key: value}))


def shift(start: int, end: int) -> Callable[[Family, Path], None]:
    def change(entry: dict[str, object], n_data: int) -> None:
        offsets = entry["data_offsets"]
        assert isinstance(offsets, list)
        entry["data_offsets"] = [offsets[0] + start, offsets[1] + end]

    return change_header(change)


def make_hole(family: Family, config: Path) -> None:
    """All tensors behind the first one move by 8 bytes."""
    header, data = header_of(shard(family))
    first = min(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda e: e["data_offsets"][0],
    )
    for name, entry in header.items():
        if name != "__metadata__" and entry is not first:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    end = first["data_offsets"][1]
    write_header(shard(family), json.dumps(header), data[:end] + bytes(8) + data[end:])


def duplicate_key(family: Family, config: Path) -> None:
    header, data = header_of(shard(family))
    text = json.dumps(header)
    write_header(shard(family), text[:-1] + f', "{NAME}": {json.dumps(header[NAME])}}}', data)


def no_json(family: Family, config: Path) -> None:
    _, data = header_of(shard(family))
    write_header(shard(family), "{not json" + " " * 7, data)


def replace_by(make: Callable[[Path], object]) -> Callable[[Family, Path], None]:
    """Something else where a shard should be."""

    def apply(family: Family, config: Path) -> None:
        shard(family).unlink()
        make(shard(family))

    return apply


def truncate(family: Family, config: Path) -> None:
    shard(family).write_bytes(shard(family).read_bytes()[:-100])


def change_index(change: Callable[[dict[str, str]], None]) -> Callable[[Family, Path], None]:
    def apply(family: Family, config: Path) -> None:
        path = family.path("ft1") / INDEX
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def change_tensors(
    change: Callable[[dict[str, torch.Tensor]], None], file: str = SHARD
) -> Callable[[Family, Path], None]:
    """Rewrites one shard of the first fine-tune, and its index to fit."""

    def apply(family: Family, config: Path) -> None:
        path = family.path("ft1") / file
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index_path = family.path("ft1") / INDEX
        index = json.loads(index_path.read_text())
        others = {name: where for name, where in index["weight_map"].items() if where != file}
        index["weight_map"] = {**others, **dict.fromkeys(tensors, file)}
        index_path.write_text(json.dumps(index))

    return apply


def poison(value: float) -> Callable[[Family, Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAST][3, 5] = value

    return change_tensors(change, "model-00002-of-00002.safetensors")


def write_config(text: str) -> Callable[[Family, Path], None]:
    return lambda family, config: config.write_text(text)


def change_config(method: str = "ties", **keys: object) -> Callable[[Family, Path], None]:
    return lambda family, config: config.write_text(recipe(family, method, **keys))


CASES = [
    Case("truncated shard", truncate, 1, (SHARD,)),
    Case("overlap", shift(-8, -8), 1, (SHARD, NAME)),
    Case("hole", make_hole, 1, (SHARD,)),
    Case("offsets beyond the file", shift(10**9, 10**9), 1, (SHARD, "offsets")),
    Case("offsets that overflow", set_to("data_offsets", [0, 2**64]), 1, (SHARD, NAME)),
    Case("a negative size", set_to("shape", [-16]), 1, (SHARD, NAME)),
    Case("a wrong size", set_to("shape", [17]), 1, (SHARD, NAME)),
    Case("a shape whose product overflows", set_to("shape", [2**32, 2**32]), 1, (SHARD, NAME)),
    Case("an unknown dtype", set_to("dtype", "BF17"), 1, (SHARD, NAME, "BF17")),
    Case("a duplicate key", duplicate_key, 1, (SHARD, NAME)),
    Case(
        "a header of 2^60 bytes",
        lambda f, c: write_header(shard(f), "{}", b"", length=2**60),
        1,
        (SHARD, str(2**60)),
    ),
    Case("a header that is no JSON", no_json, 1, (SHARD,)),
    Case("an empty file", replace_by(Path.touch), 1, (SHARD,)),
    Case("a FIFO", replace_by(os.mkfifo), 1, (SHARD, "named pipe")),
    Case("a directory", replace_by(Path.mkdir), 1, (SHARD, "directory")),
    Case("a device", replace_by(lambda p: p.symlink_to("/dev/zero")), 1, (SHARD, "device")),
    Case("a missing shard", replace_by(lambda p: None), 1, (SHARD, "missing")),
    Case(
        "an index that names an absent tensor",
        change_index(lambda where: where.update({"ghost.weight": SHARD})),
        1,
        (INDEX, "ghost.weight"),
    ),
    Case(
        "an index that leaves its directory",
        change_index(lambda where: where.update({NAME: "../base/" + SHARD})),
        1,
        (INDEX, ".."),
    ),
    Case("an index that is no JSON", lambda f, c: (f.path("ft1") / INDEX).write_text("{"), 1, (INDEX,)),
    Case(
        "another shape",
        change_tensors(lambda tensors: tensors.update({NAME: torch.ones(17, dtype=torch.bfloat16)})),
        1,
        (NAME, "[17]", "[16]", "ft1"),
    ),
    Case("a tensor too few", change_tensors(lambda tensors: tensors.pop(NAME)), 1, (NAME, "ft1")),
    Case(
        "a tensor too many",
        change_tensors(lambda tensors: tensors.update({"extra.weight": torch.ones(2)})),
        1,
        ("extra.weight", "ft1"),
    ),
    Case("no such model", lambda f, c: shutil.rmtree(f.path("ft1")), 1, ("ft1", "no such file")),
    Case(
        "a model directory without weights",
        lambda f, c: [p.unlink() for p in f.path("ft1").glob("m*")],
        1,
        ("ft1",),
    ),
    Case("a NaN", poison(float("nan")), 1, (LAST, "ft1", "NaN")),
    Case("an infinity", poison(float("-inf")), 1, (LAST, "ft1", "inf")),
    Case("no base", change_config(base=None), 2, ("ties", "base")),
    Case("an unknown method", change_config("tise"), 2, ("tise", "'ties'")),
    Case("an unknown key", change_config(merge_metod="ties"), 2, ("merge_metod", "merge_method")),
    Case("an unknown parameter", change_config(parameters={"densty": 0.5}), 2, ("densty", "density")),
    Case("a density above 1", change_config(parameters={"density": 1.5}), 2, ("density", "1.5")),
    Case("a density that is no number", change_config(parameters={"density": float("nan")}), 2, ("density",)),
    Case("an unknown dtype of the output", change_config(dtype="bfloat17"), 2, ("bfloat17", "bfloat16")),
    Case("broken YAML", write_config("merge_method: [ties\nmodels: {"), 2, ("config.yaml", "line")),
    Case("empty YAML", write_config(""), 2, ("config.yaml",)),
    Case("YAML that is a list", write_config("- ties\n- models\n"), 2, ("config.yaml", "list")),
    Case(
        "YAML with a tag",
        write_config(f"merge_method: !!python/object/apply:os.system ['touch {PWNED}']\n"),
        2,
        ("config.yaml", "python/object/apply:os.system"),
    ),
    Case("YAML that is no text", lambda f, c: c.write_bytes(b"\xff\xfe\x00merge"), 2, ("config.yaml",)),
    Case("no recipe", lambda f, c: c.unlink(), 2, ("config.yaml",)),
    Case("a recipe that is a directory", lambda f, c: (c.unlink(), c.mkdir()), 2, ("config.yaml",)),
    Case(
        "a generation config that is a FIFO",
        lambda f, c: (
            (f.path("base") / "generation_config.json").unlink(),
            os.mkfifo(f.path("base") / "generation_config.json"),
        ),
        1,
        ("generation_config.json", "named pipe"),
    ),
]


def assert_one_message(status: int, stdout: str, stderr: str, expected: int) -> None:
    assert status == expected, stderr
    assert stdout == ""
    assert stderr.startswith("tvfast: error: ")
    assert stderr.count("tvfast: error: ") == 1
    assert "Traceback" not in stderr
    assert "internal error" not in stderr
    assert len(stderr.splitlines()) <= ONE_SCREEN
    assert len(stderr) < 2000


def assert_nothing_looks_complete(out: Path) -> None:
    """Neither weights nor an index nor a config, where a loader would look."""
    if out.is_dir():
        assert [path.name for path in out.iterdir() if path.name != ".tvfast"] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_message(case: Case, own: Family, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}))
    case.break_(own, config)
    before = digest(own.root)
    done = tvfast("merge", config, out)
    assert_one_message(done.returncode, done.stdout, done.stderr, case.status)
    for part in case.says:
        assert part in done.stderr
    assert_nothing_looks_complete(out)
    assert digest(own.root) == before
    assert not PWNED.exists()


@pytest.mark.parametrize(
    "case", [c for c in CASES if "NaN" not in c.says and "inf" not in c.says], ids=lambda c: c.name
)
def test_what_is_known_before_reading_data_is_refused_by_a_dry_run(
    case: Case, own: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}))
    case.break_(own, config)
    status = main(["merge", str(config), str(out), "--dry-run"])
    shown = capsys.readouterr()
    assert_one_message(status, shown.out, shown.err, case.status)
    assert not out.exists()


def test_an_output_directory_that_is_not_empty_is_left_alone(own: Family, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties"))
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    done = tvfast("merge", config, out)
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert str(out) in done.stderr
    assert "--overwrite" in done.stderr
    assert digest(out) == digest_of({"precious.txt": b"mine"}, tmp_path)


def digest_of(files: dict[str, bytes], tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "expected"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return digest(folder)


def test_an_output_that_is_a_file_is_left_alone(own: Family, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties"))
    out.write_text("mine")
    done = tvfast("merge", config, out)
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert out.read_text() == "mine"


def test_an_output_that_is_an_input_is_refused(own: Family, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(recipe(own, "ties"))
    before = digest(own.root)
    done = tvfast("merge", config, own.path("ft2"), "--overwrite")
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert digest(own.root) == before


def test_no_space_is_an_error_and_resume_gives_the_same_bytes(own: Family, tmp_path: Path) -> None:
    """A limit of the file size stands in for a full disk; it too fails in the middle of writing."""
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}))
    assert tvfast("merge", config, tmp_path / "whole").returncode == 0

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    done = tvfast("merge", config, out, limit=limit)
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert "File too large" in done.stderr
    assert_nothing_looks_complete(out)
    again = tvfast("merge", config, out, "--resume")
    assert (again.returncode, again.stderr) == (0, "")
    assert digest(out) == digest(tmp_path / "whole")


def test_an_input_that_changed_since_is_refused_by_resume(own: Family, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}))
    poison(float("nan"))(own, config)
    assert tvfast("merge", config, out).returncode == 1
    assert (out / ".tvfast").is_dir()
    poison(0.0)(own, config)
    done = tvfast("merge", config, out, "--resume")
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert "ft1" in done.stderr
    assert "changed" in done.stderr
    assert_nothing_looks_complete(out)
    assert tvfast("merge", config, out, "--overwrite").returncode == 0
    assert bool(load(out)[LAST].isfinite().all())


def test_nan_goes_through_where_that_is_asked_for(own: Family, tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}))
    poison(float("nan"))(own, config)
    done = tvfast("merge", config, out, "--nonfinite", "propagate")
    assert (done.returncode, done.stderr) == (0, "")
    config.write_text(recipe(own, "ties", parameters={"density": 0.5}, tvfast={"nonfinite": "propagate"}))
    assert tvfast("merge", config, tmp_path / "by recipe").returncode == 0
    assert tvfast("merge", config, tmp_path / "not", "--nonfinite", "error").returncode == 1
    merged = load(out)
    assert merged.keys() == load(tmp_path / "by recipe").keys()
    assert bool(merged[LAST][3, 5].isnan())
    assert sum(int(t.isnan().sum()) for t in merged.values()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume", "--overwrite"], "not allowed with"),
        (["--memory", "lots"], "no size"),
        (["--memory", "-3"], "no size"),
        (["--threads", "-1"], "not a whole number"),
        (["--threads", "two"], "not a whole number"),
        (["--device", "tpu"], "no device"),
        (["--nonfinite", "ignore"], "invalid choice"),
        (["--seed", "-1"], "2^62"),
        (["--no-such-option"], "unrecognized"),
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], says: str, family: Family, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(recipe(family, "ties"))
    done = tvfast("merge", config, tmp_path / "out", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(no_driver() is None, reason="there is a GPU")
@pytest.mark.parametrize("command", [["merge", "CONFIG", "OUT"], ["plan", "CONFIG"]], ids=["merge", "plan"])
def test_a_device_that_is_not_here_is_a_failed_job(
    command: list[str], family: Family, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(recipe(family, "ties"))
    names = {"CONFIG": config, "OUT": tmp_path / "out"}
    done = tvfast(*(names.get(word, word) for word in command), "--device", "cuda:0")
    assert_one_message(done.returncode, done.stdout, done.stderr, 1)
    assert "device 'cuda:0': " in done.stderr
    assert "driver" in done.stderr
    assert "--device cpu" in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_device_memory_names_the_least(family: Family, tmp_path: Path) -> None:
    """Of a card that need not be here; a merge on one says the same."""
    config = tmp_path / "config.yaml"
    config.write_text(recipe(family, "ties"))
    done = tvfast("plan", config, "--device", "h100", "--device-memory", "1M")
    assert_one_message(done.returncode, done.stdout, done.stderr, 2)
    assert "h100: a device memory of 1000000 bytes" in done.stderr
    assert "at least" in done.stderr


def test_too_little_memory_names_the_least(family: Family, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(recipe(family, "ties"))
    done = tvfast("merge", config, tmp_path / "out", "--memory", "1M")
    assert_one_message(done.returncode, done.stdout, done.stderr, 2)
    assert "at least" in done.stderr
    assert not (tmp_path / "out").exists()
