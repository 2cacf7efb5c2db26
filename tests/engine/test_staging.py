"""Staging: fresh, resumed, finished and overwritten outputs, and every refusal to use a directory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.engine.staged import (
    COMPANIONS,
    IDENTITY,
    Memory,
    begin,
    changed_identity,
    contents,
    expected,
    files_in,
    folder_in_memory,
    is_model,
    large_layout,
    merge,
    recut,
    small_layout,
    units_of,
    write_units,
)
from tvfast.checkpoint.layout import Layout, make_layout
from tvfast.engine.staging import Staging
from tvfast.errors import ArgumentError, MergeError, OutputError
from tvfast.ops.host import crc32c


def reopen(out: Path, layout: Layout, **options: Any) -> Staging:
    settings = {"resume": True, "overwrite": False, **options}
    return Staging.open(str(out), layout, settings.pop("identity", IDENTITY), **settings)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as folder:
        yield folder / "out"


@pytest.mark.parametrize("layout", [small_layout(), small_layout(1), large_layout(), make_layout([], 1, {})])
@pytest.mark.parametrize("skew", [0, 8])
def test_a_run_leaves_the_model_and_nothing_else(out: Path, layout: Layout, skew: int) -> None:
    merge(out, layout, skew=skew)
    found = files_in(out)
    manifest = json.loads(found.pop("tvfast_manifest.json"))
    assert found == expected(layout)
    assert sorted(os.listdir(out)) == sorted(
        {*(name.split("/")[0] for name in found), "tvfast_manifest.json"}
    )
    for shard, data in zip(manifest["shards"], contents(layout), strict=True):
        memory = Memory(data, 0)
        assert shard["n_bytes"] == len(data)
        assert shard["crc32c"] == f"{crc32c(memory.address, len(data)):08x}"
        load_file(out / shard["name"])


def test_nothing_shows_before_the_commit(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, contents(layout), units_of(layout))
        staging.add_file("config.json", b"{}")
        assert os.listdir(out) == [".tvfast"]
        staged = out / ".tvfast" / "files"
        assert [(staged / shard.name).stat().st_size for shard in layout.shards] == [
            shard.n_bytes for shard in layout.shards
        ]
        staging.commit()
        assert staging.finished
        staging.commit()


def test_the_manifest_names_neither_time_nor_place(tmp_path: Path) -> None:
    layout = small_layout()
    elsewhere = changed_identity(
        inputs={
            f"/mnt/{name}": [{**file, "mtime_ns": 5} for file in files]
            for name, files in IDENTITY["inputs"].items()
        }
    )
    merge(tmp_path / "a", layout)
    merge(tmp_path / "b" / "c", layout, identity=elsewhere, units=recut(layout, 1))
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b" / "c")
    manifest = json.loads((tmp_path / "a" / "tvfast_manifest.json").read_text())
    assert manifest["identity"]["inputs"] == [
        [{"name": "model.safetensors", "size": 100, "crc32": 7}],
        [{"name": "model.safetensors", "size": 100, "crc32": 8}],
    ]
    assert {"recipe": "5f1d", "seed": 0, "version": "0.1.0"}.items() <= manifest["identity"].items()


def test_many_threads_write(out: Path) -> None:
    layout, failures = small_layout(5), []
    data = contents(layout)
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:

        def work(mine: list[Any]) -> None:
            try:
                write_units(staging, data, mine)
            except BaseException as error:
                failures.append(error)

        units = recut(layout, 2)
        threads = [threading.Thread(target=work, args=(units[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        for name, content in COMPANIONS.items():
            staging.add_file(name, content)
        staging.commit()
    assert files_in(out).items() >= expected(layout).items()


# Resuming.


def test_resume_starts_where_nothing_is(out: Path) -> None:
    layout = small_layout()
    assert merge(out, layout, resume=True) == [unit for unit in units_of(layout) if unit[2]]
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("skew", [0, 8])
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("n_units", [0, 1, 7, 15])
def test_resume_writes_only_what_is_missing(out: Path, n_units: int, seed: int | None, skew: int) -> None:
    layout = small_layout()
    done = begin(out, layout, n_units)
    units = units_of(layout) if seed is None else recut(layout, seed)
    with reopen(out, layout) as staging:
        assert not staging.finished
        assert staging.n_resumed_bytes == sum(n for _, _, n in done)
    written = merge(out, layout, resume=True, units=units, skew=skew)
    if seed is None:
        assert written == [unit for unit in units if unit not in done and unit[2]]
    finished = {(shard, at) for shard, start, n in done for at in range(start, start + n)}
    for shard, start, n in units:
        covered = all((shard, at) in finished for at in range(start, start + n))
        assert covered == ((shard, start, n) not in written)
    merge(out.parent / "other", layout)
    assert files_in(out) == files_in(out.parent / "other")


def test_resume_of_a_finished_output_writes_nothing(out: Path) -> None:
    layout = small_layout()
    merge(out, layout)
    out.chmod(0o555)

    def states() -> dict[Path, tuple[int, ...]]:
        found = {path: path.stat() for path in [out, *out.rglob("*")]}
        return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}

    before = states()
    with reopen(out, layout) as staging:
        assert staging.finished
        assert staging.warnings == []
        assert staging.n_resumed_bytes == sum(n for _, _, n in units_of(layout))
        assert all(staging.is_done(*unit) for unit in units_of(layout))
        staging.commit()
        with pytest.raises(MergeError, match="closed already"):
            staging.done(*units_of(layout)[0], 0)
    assert states() == before


def test_a_finished_output_survives_other_dates_places_and_versions(out: Path) -> None:
    layout = small_layout()
    merge(out, layout)
    moved = {f"/mnt/{k}": [{**f, "mtime_ns": 1} for f in v] for k, v in IDENTITY["inputs"].items()}
    with reopen(out, layout, identity=changed_identity(inputs=moved, version="0.2.0")) as staging:
        assert staging.finished
        assert staging.warnings == [f"{out} was made by tvfast 0.1.0; this is 0.2.0. It is left as it is."]


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("offset", [3, 5000, -1])
def test_a_damaged_finished_shard_is_found(out: Path, offset: int) -> None:
    layout = small_layout()
    merge(out, layout)
    path = out / layout.shards[1].name
    flip(path, offset)
    with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors: has crc32c .*--overwrite"):
        reopen(out, layout)
    assert not (out / ".tvfast").exists()


def test_damaged_finished_files_are_found(out: Path) -> None:
    layout = small_layout()
    merge(out, layout)
    shard, index = out / layout.shards[2].name, out / "model.safetensors.index.json"
    good = shard.read_bytes()
    for damage, message in [
        (lambda: shard.write_bytes(good + b"!"), r"00003-of-00003\.safetensors: has \d+ bytes, the manifest"),
        (lambda: shard.unlink(), r"00003-of-00003\.safetensors: No such file.*--overwrite"),
        (lambda: (shard.write_bytes(good), flip(index, 20)), r"index\.json: does not list"),
        (lambda: index.unlink(), r"index\.json: No such file.*--overwrite"),
        (lambda: (out / "tvfast_manifest.json").write_text("{"), "is not a manifest of tvfast"),
        (lambda: (out / "tvfast_manifest.json").write_text('{"format": 2}'), "has format 2, .*reads 1"),
        (lambda: (out / "tvfast_manifest.json").write_text('{"format": 1}'), "is not a manifest of tvfast"),
    ]:
        damage()
        with pytest.raises(OutputError, match=message):
            reopen(out, layout)
    merge(out, layout, overwrite=True)
    assert files_in(out).items() >= expected(layout).items()


def other_file(key: str, value: Any) -> dict[str, Any]:
    identity = changed_identity()
    identity["inputs"]["models/math"][0][key] = value
    return identity


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (changed_identity(recipe="77"), "the recipe is another one"),
        (changed_identity(seed=3), "seed was 0, is 3"),
        (changed_identity(nonfinite="error"), 'nonfinite was null, is "error"'),
        (other_file("size", 101), r"models/math/model\.safetensors: size was 100, is 101"),
        (other_file("crc32", 1), r"models/math/model\.safetensors: has another header"),
        (other_file("name", "x"), r"models/math/model\.safetensors: is not part of the input any more"),
        (changed_identity(inputs={"models/base": []}), "inputs?"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_names_what_changed(out: Path, identity: dict[str, Any], message: str, finished: bool) -> None:
    layout = small_layout()
    if finished:
        merge(out, layout)
    else:
        begin(out, layout, 4)
    before = files_in(out)
    with pytest.raises(OutputError, match=message) as caught:
        reopen(out, layout, identity=identity)
    text = str(caught.value)
    assert text.startswith(
        f"{out} holds {'a finished' if finished else 'an unfinished'} merge of something else:\n"
    )
    assert "--overwrite" in text
    assert len(text.splitlines()) < 12
    assert {k: v for k, v in files_in(out).items() if k != ".tvfast/lock"} == {
        k: v for k, v in before.items() if k != ".tvfast/lock"
    }
    merge(out, layout, resume=True)  # with what it began with
    assert files_in(out).items() >= expected(layout).items()


def test_an_unfinished_merge_minds_versions_dates_and_the_layout(out: Path) -> None:
    begin(out, small_layout(), 4)
    for layout, identity, message in [
        (small_layout(), changed_identity(version="0.2.0"), r"begun by tvfast 0\.1\.0; this is 0\.2\.0"),
        (
            small_layout(),
            other_file("mtime_ns", 10**18 + 2),
            r"math/model\.safetensors: was last changed 2001-09-09 01:46:40\.0+1 UTC, now .*\.0+2 UTC",
        ),
        (small_layout(4), IDENTITY, "laid out otherwise"),
        (small_layout(tag="v"), IDENTITY, "laid out otherwise"),
    ]:
        with pytest.raises(OutputError, match=message):
            reopen(out, layout, identity=identity)


def test_many_changes_fit_on_a_screen(out: Path) -> None:
    begin(out, small_layout(), 1)
    many = {f"models/{i}": [{"name": "a", "size": 1}] for i in range(50)}
    with pytest.raises(OutputError, match="and 47 more differences") as caught:
        reopen(out, small_layout(), identity=changed_identity(inputs=many, seed=1))
    assert len(str(caught.value).splitlines()) < 12


def test_files_of_another_set_of_companions_do_not_stay(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        staging.add_file("old.json", b"{}")
        staging.add_file("deep/er/old.json", b"{}")
    merge(out, layout, resume=True)
    assert set(files_in(out)) == {*expected(layout), "tvfast_manifest.json"}


def test_resume_needs_something_to_continue(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, but no merge that could be continued"):
        reopen(out, small_layout())
    assert os.listdir(out) == ["notes.txt"]


def test_a_damaged_manifest_is_an_error(out: Path) -> None:
    layout = small_layout()
    begin(out, layout, 3)
    (out / ".tvfast" / "manifest.json").write_text("[]")
    with pytest.raises(OutputError, match=r"manifest\.json: is not a manifest of tvfast"):
        reopen(out, layout)
    merge(out, layout, overwrite=True)
    assert files_in(out).items() >= expected(layout).items()


# Misuse.


def test_a_commit_needs_every_byte(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, contents(layout), [u for u in units_of(layout) if u != units_of(layout)[8]])
        with pytest.raises(MergeError, match=r"model-00002-of-00003\.safetensors: byte 13192 "):
            staging.commit()
        assert os.listdir(out) == [".tvfast"]
        write_units(staging, contents(layout), units_of(layout))
        staging.commit()
    assert is_model(out)


def test_ranges_outside_of_the_data_are_refused(out: Path) -> None:
    layout = small_layout()
    memory = Memory(bytes(10), 0)
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        n_bytes = layout.shards[0].n_bytes
        for shard, offset in [(0, 4095), (0, n_bytes - 9), (3, 4096)]:
            with pytest.raises(ArgumentError, match="are no data of shard"):
                staging.write(shard, offset, memory.view, memory.address)
            with pytest.raises(ArgumentError, match="are no data of shard"):
                staging.done(shard, offset, 10, 0)


def test_names_of_companions_stay_inside(out: Path) -> None:
    layout = small_layout()
    names = ["", "/etc/x", "../x", "a/../../x", "a//b", ".tvfast/manifest.json", "tvfast_manifest.json"]
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        for name in [*names, "model.safetensors", "model.safetensors.index.json", layout.shards[0].name]:
            with pytest.raises(ArgumentError, match="cannot be the name of a file beside the weights"):
                staging.add_file(name, b"")


@pytest.mark.parametrize("name", ["config.json", "templates", "model-00002-of-00003.safetensors"])
def test_what_appears_during_the_run_is_not_replaced(out: Path, name: str) -> None:
    layout = small_layout()
    begin(out, layout, 15)
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{name}: .*Move it away, then run again with --resume"):
        merge(out, layout, resume=True)
    assert (out / name).read_text() == "mine"
    (out / name).unlink()
    assert merge(out, layout, resume=True) == []
    assert files_in(out).items() >= expected(layout).items()


def test_a_directory_in_the_way_is_not_replaced(out: Path) -> None:
    (out / "config.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"config\.json: a directory is where a file"):
        merge(out, small_layout(), overwrite=True)
    assert not is_model(out)
    (out / "config.json").rmdir()
    assert merge(out, small_layout(), resume=True) == []
    assert is_model(out)
