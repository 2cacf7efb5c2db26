"""The output directory: which are refused, and what overwriting removes, replaces and leaves alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.engine.staged import (
    COMPANIONS,
    IDENTITY,
    begin,
    contents,
    expected,
    files_in,
    folder_in_memory,
    is_model,
    merge,
    small_layout,
    units_of,
    write_units,
)
from tvfast.engine.journal import Journal
from tvfast.engine.locking import FolderLock
from tvfast.engine.staging import Staging
from tvfast.errors import ArgumentError, OutputError


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as folder:
        yield folder / "out"


def test_a_directory_that_holds_something_is_refused(out: Path) -> None:
    out.mkdir()
    for i in range(8):
        (out / f"f{i}").write_text("")
    with pytest.raises(OutputError, match=r"it holds f0, f1, f2, f3, f4 and 3 more\. --resume .*--overwrite"):
        merge(out, small_layout())
    assert len(os.listdir(out)) == 8


def test_an_unfinished_merge_is_not_started_over_by_accident(out: Path) -> None:
    begin(out, small_layout(), 3)
    with pytest.raises(OutputError, match=r"an unfinished merge \(\.tvfast\).*--resume"):
        merge(out, small_layout())


def test_resume_and_overwrite_exclude_each_other(out: Path) -> None:
    with pytest.raises(ArgumentError, match=r"--resume.*--overwrite"):
        merge(out, small_layout(), resume=True, overwrite=True)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    layout = small_layout()
    file, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    file.write_text("")
    (tmp_path / "real").mkdir()
    link.symlink_to(tmp_path / "real")
    dangling.symlink_to(tmp_path / "nowhere")
    for out, message in [
        ("", "empty"),
        (str(file), "is a file"),
        (f"{file}/below", "Not a directory"),
        (str(link), "symbolic link to .*real"),
        (f"{link}/", "symbolic link to .*real"),
        (str(dangling), "symbolic link to .*nowhere"),
        ("/proc/no/such", "cannot make the output directory"),
    ]:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=message):
                merge(out, layout, **options)
    assert os.listdir(tmp_path / "real") == []
    assert not (tmp_path / "nowhere").exists()


def test_a_linked_parent_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge(tmp_path / "link" / "out", small_layout())
    assert is_model(tmp_path / "real" / "out")


def test_a_staging_directory_that_is_none_is_refused(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / ".tvfast").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"\.tvfast: cannot make and lock"):
        merge(out, small_layout(), overwrite=True)
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_inputs_are_never_written_to(tmp_path: Path, options: dict[str, bool]) -> None:
    source = tmp_path / "base"
    (source / "sub").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"precious")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(source / "model.safetensors")
    layout = small_layout()
    for out, given, message in [
        (source, str(source), "is the input"),
        (source, str(tmp_path / "alias"), "is the input"),
        (tmp_path / "alias" / "sub", str(source), "lies inside the input"),
        (source / "new" / "deep", str(tmp_path / "alias"), "lies inside the input"),
        (source, str(source / "model.safetensors"), r"holds model\.safetensors, which the input"),
        (source, str(tmp_path / "linked"), r"holds model\.safetensors, which the input"),
    ]:
        with pytest.raises(OutputError, match=message):
            merge(out, layout, inputs=["nowhere", given], **options)
    assert files_in(source) == {"model.safetensors": b"precious"}
    assert not (source / "new").exists()


def test_outputs_beside_inputs_are_fine(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base.safetensors").write_bytes(b"one file")
    inputs = [str(tmp_path / "base"), str(tmp_path / "base.safetensors")]
    merge(tmp_path / "base2", small_layout(), inputs=inputs)
    assert is_model(tmp_path / "base2")


def test_a_second_process_is_turned_away(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=f"process {os.getpid()} is writing a merge here"):
                merge(out, layout, **options)
        write_units(staging, contents(layout), units_of(layout))
        staging.commit()
    assert files_in(out)[layout.shards[0].name] == contents(layout)[0]


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_process_that_comes_and_goes_before_the_lock(
    out: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    layout, other = small_layout(), small_layout(2, "other")
    acquire = FolderLock.acquire

    def late(folder: str) -> FolderLock:
        monkeypatch.undo()
        merge(out, other)
        return acquire(folder)

    monkeypatch.setattr(FolderLock, "acquire", late)
    with pytest.raises(OutputError, match=r"is not empty|finished merge of something else"):
        merge(out, layout, **options)
    assert files_in(out).items() >= expected(other).items()
    assert not (out / ".tvfast").exists()


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"

    def after_the_owner_left(fd: int, operation: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(folder)
        fcntl.flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_owner_left)
    lock = FolderLock.acquire(str(folder))
    with pytest.raises(OutputError, match="is writing a merge here"):
        FolderLock.acquire(str(folder))
    lock.release()
    FolderLock.acquire(str(folder)).release()


def test_a_filesystem_without_locks_is_warned_about(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        assert staging.warnings == [f"{out}: this filesystem has no locks; let no other merge write there."]
    merge(out, layout, resume=True)
    assert is_model(out)


# Overwriting.


@pytest.mark.parametrize("n_old", [1, 2, 3, 5])
@pytest.mark.parametrize("n_new", [1, 2, 3])
def test_overwriting_leaves_no_old_weights(out: Path, n_old: int, n_new: int) -> None:
    old, new = small_layout(n_old, "old"), small_layout(n_new)
    merge(out, old, seed=1)
    before = files_in(out)
    assert begin(out, new, 4, overwrite=True)
    assert {k: v for k, v in files_in(out).items() if not k.startswith(".tvfast")} == before
    merge(out, new, resume=True)
    merge(out.parent / "fresh", new)
    assert files_in(out) == files_in(out.parent / "fresh")


def test_overwriting_keeps_foreign_files_and_says_so(out: Path) -> None:
    layout = small_layout()
    out.mkdir()
    foreign = {"notes.txt": b"1", "adapter_model.safetensors": b"2", "sub/model.safetensors": b"3"}
    old = {
        "model.safetensors.index.json": json.dumps(
            {
                "weight_map": {
                    "a": "part-a.safetensors",
                    "b": "sub/model.safetensors",
                    "c": "notes.txt",
                    "d": 3,
                }
            }
        ).encode(),
        "part-a.safetensors": b"x",
        "model-00007-of-00009.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "pytorch_model-00001-of-00002.bin": b"x",
        "pytorch_model.bin.index.json": b"not JSON",
        "config.json": b"old",
    }
    for name, data in {**foreign, **old}.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=True) as staging:
        write_units(staging, contents(layout), units_of(layout))
        for name, data in COMPANIONS.items():
            staging.add_file(name, data)
        staging.commit()
        listing = "adapter_model.safetensors, notes.txt, sub"
        assert staging.warnings == [f"{out} also holds files that this merge has not written: {listing}."]
    found = files_in(out)
    assert found.pop("tvfast_manifest.json")
    # An index names only files beside it that are weights; the others are not believed.
    assert found == {**foreign, **expected(layout)}


def test_overwriting_replaces_links_not_their_targets(out: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    out.mkdir()
    for name in ("model.safetensors", "model-00001-of-00003.safetensors", "config.json"):
        (out / name).symlink_to(blob)
    merge(out, small_layout(), overwrite=True)
    assert blob.read_bytes() == b"shared"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert files_in(out).items() >= expected(small_layout()).items()


def test_overwriting_starts_anew(out: Path) -> None:
    layout = small_layout()
    begin(out, layout, 9)
    assert merge(out, layout, seed=2, overwrite=True) == [unit for unit in units_of(layout) if unit[2]]
    assert files_in(out).items() >= expected(layout, 2).items()


def test_overwriting_works_without_anything_to_overwrite(out: Path) -> None:
    merge(out, small_layout(), overwrite=True)
    assert files_in(out).items() >= expected(small_layout()).items()


def test_overwriting_waits_for_ranks_of_an_earlier_run(out: Path) -> None:
    """They open files by name, and would write into the new ones."""
    layout = small_layout()
    begin(out, layout, 4)
    rank = Journal(str(out / ".tvfast" / "journal-1"))
    before = files_in(out)
    with pytest.raises(OutputError, match=r"journal-1: a process of .* again with --overwrite"):
        merge(out, layout, seed=2, overwrite=True)
    assert files_in(out) == before
    rank.close()
    merge(out, layout, seed=2, overwrite=True)
    assert files_in(out).items() >= expected(layout, 2).items()
    assert not (out / ".tvfast").exists()


# -- what NFS keeps ---------------------------------------------------------------------------------------


def open_files() -> set[str]:
    """Paths of the files that this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


@pytest.fixture
def as_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is deleted while it is open gets another name in its directory until it is closed."""
    unlink, close = os.unlink, os.close
    renamed: set[str] = set()

    def unlink_there(path: str, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = os.path.realpath(os.path.join(folder, path))
        if os.path.basename(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if whole not in open_files():
            unlink(path, dir_fd=dir_fd)
            return
        kept = os.path.join(os.path.dirname(whole), f".nfs{len(renamed):08}")
        os.rename(whole, kept)
        renamed.add(kept)

    def close_there(descriptor: int) -> None:
        close(descriptor)
        for path in list(renamed - open_files()):
            renamed.remove(path)
            unlink(path)

    monkeypatch.setattr(os, "unlink", unlink_there)
    monkeypatch.setattr(os, "close", close_there)


def test_a_lock_that_nfs_keeps_is_in_nobodys_way(out: Path, as_nfs: None) -> None:
    merge(out, small_layout())
    assert is_model(out)
    assert not (out / ".tvfast").exists()


@pytest.mark.parametrize("name", ["journal-1", "files/note", "lock.old"])
def test_a_file_that_another_process_has_open_does_not_fail_a_finished_merge(
    out: Path, as_nfs: None, name: str
) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, contents(layout), units_of(layout))
        with (out / ".tvfast" / name).open("wb"):
            staging.commit()
    assert files_in(out)[layout.shards[0].name] == contents(layout)[0]
    assert [path.name[:4] for path in (out / ".tvfast").rglob("*") if path.is_file()] in ([], [".nfs"])
    merge(out, layout, resume=True)
    assert is_model(out)


def test_what_cannot_be_deleted_is_an_error_still(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, contents(layout), units_of(layout))
        (out / ".tvfast" / "files" / "note").touch()
        monkeypatch.setattr(os, "unlink", refuse)
        with pytest.raises(OutputError, match="cannot delete the staging directory's content"):
            staging.commit()
    monkeypatch.undo()
    merge(out, layout, resume=True)
    assert is_model(out)
    assert not (out / ".tvfast").exists()


# -- what can be told without a change --------------------------------------------------------------------


def check(out: Path | str, *, inputs: Sequence[str] = (), **options: Any) -> None:
    flags = {"resume": False, "overwrite": False, "identity": IDENTITY, **options}
    Staging.check(str(out), small_layout(), flags.pop("identity"), inputs=inputs, **flags)


def test_a_check_refuses_what_a_run_would_and_changes_nothing(tmp_path: Path) -> None:
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "precious").write_text("mine")
    file.write_text("")
    link.symlink_to(full)
    cases: list[tuple[Path | str, dict[str, Any], str]] = [
        (full, {}, "is not empty: it holds precious"),
        (full, {"resume": True}, "no merge that could be continued"),
        (file, {}, "is a file"),
        (file / "below", {}, "Not a directory"),
        (link, {}, "symbolic link"),
        ("", {}, "empty"),
        (full, {"overwrite": True, "inputs": [str(full)]}, "is the input"),
        (full / "new" / "deep", {"inputs": [str(full)]}, "lies inside the input"),
    ]
    for out, options, message in cases:
        with pytest.raises(OutputError, match=message):
            check(out, **options)
    with pytest.raises(ArgumentError):
        check(tmp_path / "new", resume=True, overwrite=True)
    check(tmp_path / "new" / "deep")
    check(tmp_path / "new", resume=True)
    check(full, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link"]
    assert files_in(full) == {"precious": b"mine"}


def test_a_check_knows_what_was_begun_and_what_is_finished(out: Path) -> None:
    other = {**IDENTITY, "seed": "another"}
    for make, message in (
        (lambda: begin(out, small_layout(), 3), "an unfinished merge of something else"),
        (lambda: merge(out, small_layout(), resume=True), "a finished merge of something else"),
    ):
        make()
        before = files_in(out)
        check(out, resume=True)
        check(out, overwrite=True, identity=other)
        with pytest.raises(OutputError, match=message):
            check(out, resume=True, identity=other)
        with pytest.raises(OutputError, match="is not empty"):
            check(out)
        assert files_in(out) == before


def test_a_check_looks_for_room_and_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"the merge needs \d+ bytes"):
        Staging.check(
            str(tmp_path / "out"), small_layout(), IDENTITY, resume=False, overwrite=False, spare_bytes=2**62
        )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=f"{tmp_path}: cannot make or write .* writable for this user"):
        check(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_not_one_that_vanished() -> None:
    with pytest.raises(OutputError, match="cannot make the output directory") as caught:
        merge("/proc/no/such", small_layout())
    assert "--resume" not in str(caught.value)
