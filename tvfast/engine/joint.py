"""One merge by several ranks: who agrees on what, who writes what, and who puts the output in its place.

With one rank, each function does what that process would do alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvfast.checkpoint.layout import Layout
from tvfast.engine.arrange import Part, written
from tvfast.engine.communicator import Communicator
from tvfast.engine.journal import Record
from tvfast.engine.manifest import differences
from tvfast.engine.partition import partition
from tvfast.engine.plan import Share
from tvfast.engine.run import Outcome
from tvfast.engine.staging import Staging
from tvfast.engine.tasks import Task
from tvfast.errors import RankError


@dataclass(frozen=True, slots=True)
class RankWork:
    """What one rank has done. Sizes are bytes.

    Attributes:
        host: and rank, as messages name it.
        read_bytes, written_bytes: of tensors.
        seconds: of reading, merging and writing.
        device_peak_bytes: allocated on a GPU.
    """

    host: str
    read_bytes: int
    written_bytes: int
    seconds: float
    device_peak_bytes: int


def check_agreement(ranks: Communicator, job: Mapping[str, Any]) -> None:
    """Raise, on every rank, unless all were asked for the same merge.

    Args:
        job: `manifest.Identity`, and the options of the output.

    Raises:
        RankError: naming the ranks that differ from rank 0, and in what.
    """
    if ranks.size == 1:
        return
    first = ranks.gather(dict(job) if ranks.rank == 0 else None)[0]
    found = ranks.gather(list(differences(first, dict(job))))
    others = [
        f"{ranks.describe(rank)}: {'; '.join(changes[:3])}{' and more' if len(changes) > 3 else ''}"
        for rank, changes in enumerate(found)
        if changes
    ]
    if others:
        raise RankError(
            f"the ranks were not given the same merge; beside {ranks.describe(0)}, {'. '.join(others)}. "
            "Give every rank the same recipe, seed, options and files; copies of a file must keep its time "
            "(cp -p, rsync -t)."
        )


def open_staging(
    ranks: Communicator,
    out: str,
    layout: Layout,
    identity: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    inputs: Sequence[str],
) -> Staging:
    """`Staging.open` on rank 0; the others join what it has opened.

    Raises:
        RankError: rank 0 cannot open it, and this is another.
    """
    said: dict[str, Any] = {}
    staging: Staging | None = None
    try:
        if ranks.rank == 0:
            staging = Staging.open(out, layout, identity, resume=resume, overwrite=overwrite, inputs=inputs)
            said = {"finished": staging.finished, "ranges": staging.found_ranges()}
        if ranks.size > 1:
            said = ranks.gather(said)[0]
        if staging is None:
            staging = Staging.join(
                out, layout, identity, ranks.rank, said["ranges"], finished=said["finished"]
            )
    except BaseException:
        if staging is not None:
            staging.abandon()
        raise
    return staging


def share_of(
    ranks: Communicator, tasks: Sequence[Task], layout: Layout, staging: Staging | None = None
) -> Share | None:
    """What this rank writes; None: everything.

    Args:
        staging: what is finished there is left out; every rank has found the same there.
    """
    if ranks.size == 1:
        return None

    def is_done(part: Part) -> bool:
        if staging is None:
            return False
        places = [(layout.places[name], begin, n_bytes) for name, begin, n_bytes in written(part)]
        return all(staging.is_done(place.shard, place.offset + begin, n) for place, begin, n in places)

    return Share(partition(tasks, ranks.size, is_done)[ranks.rank], ranks.per_host)


def publish(
    ranks: Communicator, staging: Staging, outcome: Outcome, companions: Callable[[], Mapping[str, bytes]]
) -> tuple[Outcome, tuple[RankWork, ...]]:
    """Wait for all, then let rank 0 put the output in its place; what all have done together.

    Raises:
        MergeError: bytes are missing, or the output cannot be put in its place.
    """
    if ranks.size > 1:
        staging.sync()
    work = RankWork(
        ranks.describe(ranks.rank),
        outcome.read_bytes,
        outcome.written_bytes,
        outcome.seconds,
        outcome.device_peak_bytes,
    )
    records = _plain(staging.new_records()) if ranks.rank else []
    if ranks.rank:
        staging.abandon()  # rank 0 deletes what is open here, which NFS would keep under another name
    own = {"records": records, "notes": list(outcome.notes)}
    others = ranks.gather(own, to_all=False)
    if ranks.rank == 0:
        for found in others[1:]:
            staging.adopt(_records(found["records"]))
        for name, data in companions().items():
            staging.add_file(name, data)
        staging.commit()
    fields = [work.host, work.read_bytes, work.written_bytes, work.seconds, work.device_peak_bytes]
    works = tuple(RankWork(*found) for found in ranks.gather(fields))
    total = replace(
        outcome,
        read_bytes=sum(one.read_bytes for one in works),
        written_bytes=sum(one.written_bytes for one in works),
        notes=tuple(note for found in others for note in found["notes"]),
        device_peak_bytes=max(one.device_peak_bytes for one in works),
    )
    return total, works if ranks.size > 1 else ()


def _plain(records: Sequence[Record]) -> list[list[int]]:
    return [[record.shard, record.offset, record.n_bytes, record.crc32c] for record in records]


def _records(found: Sequence[Sequence[int]]) -> list[Record]:
    return [Record(*numbers) for numbers in found]
