"""Journal records and coverage against a model that keeps a set of bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.staged import Memory
from tvfast.engine.checksums import Range, checksums, combined, file_checksum
from tvfast.engine.journal import RECORD_BYTES, Coverage, Journal, Record, unpack
from tvfast.ops.host import crc32c

SIZE = 60

records = st.builds(
    Record, st.integers(0, 2**32 - 1), st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**32 - 1)
)
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


def crc(data: bytes) -> int:
    memory = Memory(data, 0)
    return crc32c(memory.address, len(data))


@given(st.lists(records, max_size=5), st.data())
def test_records_come_back_up_to_the_first_damage(written: list[Record], data: st.DataObject) -> None:
    raw = bytearray(b"".join(record.pack() for record in written))
    assert unpack(bytes(raw)) == written
    if not raw:
        return
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert unpack(bytes(raw)) == written[: bit // 8 // RECORD_BYTES]
    n_kept = data.draw(st.integers(0, len(raw)))
    raw[bit // 8] ^= 1 << bit % 8
    assert unpack(bytes(raw[:n_kept])) == written[: n_kept // RECORD_BYTES]


@given(st.lists(spans, max_size=12), spans)
def test_coverage_is_a_set_of_bytes(added: list[list[int]], asked: list[int]) -> None:
    content = random.Random(0).randbytes(SIZE)
    coverage, covered = Coverage(), set()
    for start, end in added:
        coverage.add(Record(0, start, end - start, crc(content[start:end])))
        covered |= set(range(start, end))
    assert coverage.n_bytes == len(covered)
    start, end = asked
    gap = next((i for i in range(start, end) if i not in covered), None)
    assert coverage.first_gap(start, end) == gap
    assert coverage.covers(start, end) == (gap is None)

    # The pieces of a covered range join up, and each known checksum is that of its bytes.
    coverage.add(Record(0, 0, 1, crc(content[:1])))
    for at in range(SIZE):
        if not coverage.covers(at, at + 1):
            coverage.add(Record(0, at, 1, crc(content[at : at + 1])))
    pieces = list(coverage.pieces(0, SIZE))
    assert [at for at, _, _ in pieces] == [sum(n for _, n, _ in pieces[:i]) for i in range(len(pieces))]
    assert sum(n for _, n, _ in pieces) == SIZE
    whole = combined((n, crc(content[at : at + n]) if known is None else known) for at, n, known in pieces)
    assert whole == crc(content)


def test_disjoint_records_need_no_second_look() -> None:
    coverage = Coverage()
    for start in (20, 0, 40, 10, 50, 30):
        coverage.add(Record(0, start, 10, start))
    assert list(coverage.pieces(0, SIZE)) == [(at, 10, at) for at in range(0, SIZE, 10)]


def test_a_rewritten_journal_holds_what_was_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    written = [Record(0, i, 1, i) for i in range(5)]
    journal = Journal(path)
    for record in written:
        journal.append(record)
    journal.rewrite(written[3:])
    journal.append(written[0])
    journal.close()
    journal.close()
    again = Journal(path)
    assert again.records == [written[3], written[4], written[0]]
    again.close()


@pytest.mark.parametrize("n_bytes", [0, 1, 4 * 2**20 - 1, 4 * 2**20 + 1])
def test_checksums_of_files(tmp_path: Path, n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    content = random.Random(1).randbytes(n_bytes + 10)
    path.write_bytes(content)
    found = checksums([Range(str(path), at, n_bytes) for at in range(10)])
    assert found == [crc(content[at : at + n_bytes]) for at in range(10)]
    monkeypatch.setattr("tvfast.engine.checksums._RANGE_BYTES", 1_000_003)
    assert file_checksum(str(path), n_bytes) == crc(content[:n_bytes])


def test_what_cannot_be_read_has_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    ranges = [Range(str(path), 50, 51), Range(str(path), 50, 50), Range(str(tmp_path / "none"), 0, 1)]
    assert checksums([*ranges, Range(str(tmp_path), 0, 1)]) == [None, crc(bytes(50)), None, None]
    assert file_checksum(str(path), 101) is None
