"""The output directory of one merge: everything is under `.tvfast` until all of it is finished."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from tvfast.checkpoint.layout import INDEX_NAME, SINGLE_NAME, Layout
from tvfast.engine import commit
from tvfast.engine.checksums import Range, checksums, known_coverage, shard_checksum
from tvfast.engine.durable import output_error, sync_file, sync_folder, write_file
from tvfast.engine.journal import Journal, Record, check_left
from tvfast.engine.locking import FolderLock
from tvfast.engine.manifest import (
    FINISHED_NAME,
    RUNNING_NAME,
    Identity,
    Manifest,
    State,
    changed,
    check_finished,
    differences,
    finished_manifest,
    full_identity,
    verify_finished,
)
from tvfast.engine.output import (
    STAGING_NAME,
    check_writable,
    checked_output,
    entries,
    listed,
    old_weights,
)
from tvfast.engine.shards import ShardFiles
from tvfast.errors import ArgumentError, MergeError, OutputError

_JOURNAL_NAME, _OF_RANK = "journal", "-"


class Staging:
    """What one merge writes, from the first byte to the renames; leaving its context keeps what is finished.

    `is_done`, `write` and `done` may be called from any thread, the rest from one while no other is in.

    Attributes:
        out: real path of the output directory.
        finished: the output is complete and undamaged; there is nothing to do.
        n_resumed_bytes: bytes of tensors that an earlier run has finished.
        warnings: sentences for the user.
    """

    def __init__(self, out: str, layout: Layout, identity: Identity) -> None:
        self.out = out
        self.finished = False
        self.n_resumed_bytes = 0
        self.warnings: list[str] = []
        self._layout = layout
        self._manifest = Manifest(identity, overwrite=False)
        self._folder = os.path.join(out, STAGING_NAME)
        self._files = os.path.join(self._folder, commit.FILES_NAME)
        self._shards = ShardFiles(self._files, layout, self._forget)
        self._coverage = [known_coverage(number, shard) for number, shard in enumerate(layout.shards)]
        self._guard = threading.Lock()
        self._lock: FolderLock | None = None
        self._journal: Journal | None = None
        self._fills = frozenset(record for coverage in self._coverage for record in coverage.records)
        self._companions: list[str] = []

    @classmethod
    def open(
        cls,
        out: str,
        layout: Layout,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        spare_bytes: int = 0,
        inputs: Sequence[str] = (),
    ) -> Staging:
        """Locks the output directory and prepares every shard, or finds what an earlier run has left.

        Args:
            identity: what the output's bytes depend on, as JSON values; see `manifest.Identity`.
            resume: continue whatever is in `out`: nothing, a part of this merge, or all of it.
            overwrite: replace the model in `out`, at the end.
            spare_bytes: that must be free beside the shards, for companion files.
            inputs: directories and files that are read.

        Raises:
            ArgumentError: both `resume` and `overwrite`.
            OutputError: `out` cannot be used: no directory, an input, not empty, locked, of another merge,
                damaged, without room. Then nothing in it has changed.
        """
        staging = cls._unopened(out, layout, identity, resume, overwrite, inputs)
        try:
            staging._begin(resume, overwrite, spare_bytes)
        except BaseException:
            staging.abandon()
            raise
        return staging

    @classmethod
    def join(
        cls,
        out: str,
        layout: Layout,
        identity: Mapping[str, Any],
        rank: int,
        found: Sequence[Sequence[int]],
        *,
        finished: bool,
    ) -> Staging:
        """The part of another rank in what rank 0 has opened: a journal of its own, neither lock nor commit.

        Args:
            found: `found_ranges` of rank 0.
            finished: there is nothing to do.

        Raises:
            OutputError: `out` is not what rank 0 has opened, or not to be written to.
        """
        staging = cls(os.path.realpath(out), layout, full_identity(identity, layout))
        for shard, begin, end in found:
            staging._coverage[shard].cover(begin, end)
        staging.finished = finished
        if not finished:
            staging._journal = Journal(os.path.join(staging._folder, f"{_JOURNAL_NAME}{_OF_RANK}{rank}"))
        return staging

    @classmethod
    def check(
        cls,
        out: str,
        layout: Layout,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        spare_bytes: int = 0,
        inputs: Sequence[str] = (),
    ) -> None:
        """Raises what `open` would, as far as it can be told without a change and without reading tensors.

        Arguments and errors are those of `open`. Another process that writes there is not looked for: it may
        have ended before the real run begins.
        """
        staging = cls._unopened(out, layout, identity, resume, overwrite, inputs)
        if resume and staging._is_complete():
            check_finished(staging.out, staging._manifest.identity, layout)
            return
        if not overwrite:
            staging._check_startable(resume)
            found = Manifest.read(staging._folder)
            if found is not None:
                staging._check_same(found)
        check_writable(staging.out)
        staging._shards.check_room(spare_bytes)

    @classmethod
    def _unopened(
        cls,
        out: str,
        layout: Layout,
        identity: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        inputs: Sequence[str],
    ) -> Staging:
        if resume and overwrite:
            raise ArgumentError(
                "resume and overwrite are both set; --resume continues, --overwrite starts anew."
            )
        return cls(checked_output(out, inputs), layout, full_identity(identity, layout))

    def _begin(self, resume: bool, overwrite: bool, spare_bytes: int) -> None:
        if resume and self._is_complete():
            self._accept_finished()
            return
        if not overwrite:
            self._check_startable(resume)
        missing = self._make_out()
        self._lock = FolderLock.acquire(self._folder)
        if not self._lock.is_held:
            self.warnings.append(f"{self.out}: this filesystem has no locks; let no other merge write there.")
        if overwrite:
            self._discard()
        else:
            self._check_again(resume)
        found = None if overwrite else Manifest.read(self._folder)
        if found is None and resume and FINISHED_NAME in entries(self.out):
            self._clean_up()
            self._accept_finished()
        elif found is None:
            self._start(overwrite, spare_bytes, missing)
        else:
            self._continue(found, spare_bytes)

    def _is_complete(self) -> bool:
        return not os.path.lexists(self._folder) and os.path.lexists(os.path.join(self.out, FINISHED_NAME))

    def _accept_finished(self) -> None:
        self.warnings += verify_finished(self.out, self._manifest.identity, self._layout)
        self.finished = True
        self.n_resumed_bytes = sum(shard.data_bytes for shard in self._layout.shards)

    def _check_startable(self, resume: bool) -> None:
        here = entries(self.out)
        begun = os.path.lexists(os.path.join(self._folder, RUNNING_NAME))
        if resume and (begun or FINISHED_NAME in here or not here):
            return
        if resume:
            raise OutputError(
                f"{self.out} holds {listed(here)}, but no merge that could be continued. --overwrite "
                "replaces the model there; or name another directory."
            )
        if begun:
            here = [f"an unfinished merge ({STAGING_NAME})", *here]
        if here:
            raise OutputError(
                f"{self.out} is not empty: it holds {listed(here)}. --resume continues a merge that was "
                "begun there, --overwrite replaces the model there; or name another directory."
            )

    def _check_again(self, resume: bool) -> None:
        """Another process may have come and gone before this one got the lock."""
        try:
            self._check_startable(resume)
        except OutputError:
            if not os.path.lexists(os.path.join(self._folder, RUNNING_NAME)):
                self._clean_up()
            raise

    def _make_out(self) -> list[str]:
        """Makes the output directory; returns what was made, the innermost first."""
        missing = []
        path = self.out
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        try:
            os.makedirs(self.out, exist_ok=True)
            for made in reversed(missing):
                with suppress(PermissionError):  # one may make a directory where one may not list
                    sync_folder(os.path.dirname(made))
        except FileNotFoundError as error:  # as in /proc: nothing was removed, so --resume would not help
            raise OutputError(
                f"{self.out}: cannot make the output directory: {error.strerror}. Name one elsewhere."
            ) from error
        except OSError as error:
            raise output_error(error, "make the output directory", self.out) from error
        return missing

    def _discard(self) -> None:
        """Ends what an earlier run has begun, so that a new one can replace it."""
        check_left(self._folder, _JOURNAL_NAME)  # by its rank: it would write to the new files, too
        with suppress(OutputError):  # what cannot be completed any more is given up
            found = Manifest.read(self._folder)
            if found is not None and found.state is State.COMMITTING:
                commit.publish(self.out, self._folder, found)
        commit.clear(self._folder)

    def _start(self, overwrite: bool, spare_bytes: int, made: Sequence[str]) -> None:
        self._manifest = Manifest(self._manifest.identity, overwrite)
        try:
            commit.clear(self._folder)
            self._make_files_folder()
            self._manifest.write(self._folder)
            self._sync_out()
            self._shards.prepare(spare_bytes)
            self._journal = Journal(os.path.join(self._folder, _JOURNAL_NAME))
        except OutputError:
            with suppress(OutputError):
                self._clean_up()
            commit.remove_empty(made)
            raise

    def _check_same(self, found: Manifest) -> None:
        changes = list(differences(found.identity, self._manifest.identity))
        if changes:
            raise changed(self.out, "an unfinished merge of something else", changes)

    def _continue(self, found: Manifest, spare_bytes: int) -> None:
        self._check_same(found)
        self._manifest = found
        if found.state is State.COMMITTING:
            self._complete()
            self._accept_finished()
            return
        self._make_files_folder()
        self._shards.prepare(spare_bytes)
        self._journal = Journal(os.path.join(self._folder, _JOURNAL_NAME))
        self._journal.take_over(_JOURNAL_NAME + _OF_RANK)
        self._verify(self._journal.records)

    def _make_files_folder(self) -> None:
        try:
            os.makedirs(self._files, exist_ok=True)
        except OSError as error:
            raise output_error(error, "make the staging directory", self._files) from error

    def _verify(self, records: Sequence[Record]) -> None:
        """Counts as finished what the journal says and the files still hold."""
        n_filled = sum(coverage.n_bytes for coverage in self._coverage)
        latest = {(r.shard, r.offset, r.n_bytes): r for r in records if self._is_inside(r)}
        ranges = [Range(self._shards.path(r.shard), r.offset, r.n_bytes) for r in latest.values()]
        for record, crc in zip(latest.values(), checksums(ranges), strict=True):
            if crc == record.crc32c:
                self._coverage[record.shard].add(record)
        self.n_resumed_bytes = sum(coverage.n_bytes for coverage in self._coverage) - n_filled

    def _is_inside(self, record: Record) -> bool:
        if record.shard >= len(self._layout.shards):
            return False
        shard = self._layout.shards[record.shard]
        return len(shard.header) <= record.offset and record.end <= shard.n_bytes

    def is_done(self, shard: int, offset: int, n_bytes: int) -> bool:
        """Whether these bytes of a shard's file are finished, in whatever pieces they were written."""
        with self._guard:
            return self.finished or self._coverage[shard].covers(offset, offset + n_bytes)

    def write(self, shard: int, offset: int, data: memoryview, address: int) -> None:
        """Writes bytes of a shard's file. Ranges that are written at the same time must not overlap.

        Args:
            offset: in the file.
            data: contiguous bytes.
            address: of `data`. Large data goes past the page cache if this and `offset` are congruent modulo
                4096.

        Raises:
            OutputError: the disk is full, a limit was met, the staging directory vanished. What is finished
                remains so.
        """
        self._check_range(shard, offset, data.nbytes)
        self._shards.write(shard, offset, data.cast("B"), address)

    def done(self, shard: int, offset: int, n_bytes: int, crc32c: int) -> None:
        """Records that a range has been written completely.

        Raises:
            OutputError: the journal cannot be written, or vanished.
        """
        self._check_range(shard, offset, n_bytes)
        if n_bytes == 0:
            return
        record = Record(shard, offset, n_bytes, crc32c)
        with self._guard:
            self._open_journal().append(record)
            self._coverage[shard].add(record)

    def found_ranges(self) -> list[tuple[int, int, int]]:
        """(shard, first byte, end) of all that is finished, with or without a checksum."""
        with self._guard:
            return [(shard, *found) for shard, one in enumerate(self._coverage) for found in one.ranges]

    def new_records(self) -> list[Record]:
        """What this process has finished; of the one that has opened the output, also what it has found."""
        with self._guard:
            return [r for coverage in self._coverage for r in coverage.records if r not in self._fills]

    def sync(self) -> None:
        """Waits until what this process has written is on the disk.

        Raises:
            OutputError: the system could not write it.
        """
        self._shards.sync_written()

    def adopt(self, records: Iterable[Record]) -> None:
        """Counts as finished what another rank has written and brought to the disk."""
        with self._guard:
            for record in records:
                self._coverage[record.shard].add(record)

    def _check_range(self, shard: int, offset: int, n_bytes: int) -> None:
        if n_bytes and not self._is_inside(Record(shard, offset, n_bytes, 0)):
            raise ArgumentError(f"bytes [{offset}, {offset + n_bytes}) are no data of shard {shard}.")

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise MergeError(f"{self.out}: the output is closed already; nothing can be written to it.")
        return self._journal

    def _forget(self, shard: int) -> None:
        with self._guard:
            self._coverage[shard] = known_coverage(shard, self._layout.shards[shard])
            if self._journal is not None:
                self._journal.rewrite(r for coverage in self._coverage for r in coverage.records)

    def add_file(self, name: str, data: bytes) -> None:
        """Stages a companion of the weights; `name` may have directories.

        Raises:
            ArgumentError: `name` leads out of the output directory, or is one of ours.
            OutputError: it cannot be written.
        """
        self._open_journal()
        parts = name.split("/")
        ours = {INDEX_NAME, SINGLE_NAME, FINISHED_NAME, self._layout.index_name}
        ours |= {shard.name for shard in self._layout.shards}
        if name in ours or parts[0] == STAGING_NAME or any(part in ("", ".", "..") for part in parts):
            raise ArgumentError(f"{name!r} cannot be the name of a file beside the weights.")
        self._stage(name, data)
        if name not in self._companions:
            self._companions.append(name)

    def _stage(self, name: str, data: bytes) -> None:
        path = os.path.join(self._files, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, data)
            sync_file(path)
        except OSError as error:
            raise output_error(error, f"write {len(data)} bytes", path) from error

    def commit(self) -> None:
        """Puts the finished output in its place; the index, or the only weights, last.

        Stopped at any point, it is completed by the next run with `resume`.

        Raises:
            MergeError: bytes are missing.
            OutputError: something could not be brought to the disk or renamed.
        """
        if self.finished:
            return
        self._open_journal()
        paths = map(self._shards.path, range(len(self._layout.shards)))
        crcs = list(map(shard_checksum, self._layout.shards, paths, self._coverage))
        self._shards.sync()
        *shards, last = [shard.name for shard in self._layout.shards]
        if self._layout.index is not None:
            shards, last = [*shards, last], self._layout.index_name
            self._stage(last, self._layout.index)
        self._stage(FINISHED_NAME, finished_manifest(self._manifest.identity, self._layout, crcs))
        moves = (*shards, *self._companions, FINISHED_NAME, last)
        retired = old_weights(self.out) if self._manifest.overwrite else ()
        manifest = Manifest(
            self._manifest.identity, self._manifest.overwrite, State.COMMITTING, moves, retired
        )
        commit.check_free(self.out, manifest)
        try:
            commit.sync_tree(self._files)
        except OSError as error:
            raise output_error(error, "bring the staged names to the disk", self._files) from error
        manifest.write(self._folder)
        self._manifest = manifest
        self._shut_journal()
        self._complete()
        self.finished = True

    def _complete(self) -> None:
        commit.publish(self.out, self._folder, self._manifest)
        if self._manifest.overwrite:
            ours = {name.split("/")[0] for name in self._manifest.moves}
            foreign = [name for name in entries(self.out) if name not in ours]
            if foreign:
                self.warnings.append(
                    f"{self.out} also holds files that this merge has not written: {listed(foreign)}."
                )
        self._clean_up()

    def _clean_up(self) -> None:
        commit.clear(self._folder)
        if self._lock is not None:
            self._lock.remove()
        self._sync_out()

    def _sync_out(self) -> None:
        try:
            sync_folder(self.out)
        except OSError as error:
            raise output_error(error, "bring names to the disk", self.out) from error

    def abandon(self) -> None:
        """Closes files and gives the lock back; what is finished stays for `resume`. May be called twice."""
        self._shards.close()
        self._shut_journal()
        if self._lock is not None:
            self._lock.release()

    def _shut_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()
