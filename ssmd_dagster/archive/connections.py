"""Which connections recorded a day, which of them were up when, and whose rows come first. Read off the batches' headers.

Not here: which copy of a thing is kept (`filing`).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, BatchHeader, decode_records
from ssmd_dagster.archive.coverage import Life
from ssmd_dagster.archive.filing import FIRST, NEIGHBOUR_FIRST, NEIGHBOUR_SECOND, REST, SECOND
from ssmd_dagster.archive.normalize_job import NormalizeJob, RawSegment
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.archive.tables import TABLE_OF_CHANNEL
from ssmd_dagster.exchange import REST as REST_CHANNEL
from ssmd_dagster.exchange import SESSION

FOREIGN = (NEIGHBOUR_FIRST, NEIGHBOUR_SECOND)
_CONN = re.compile(r"(?P<epoch>[0-9]+)-(?P<replica>[a-z]+)(?P<slice>[0-9]*)-(?P<number>[0-9]+)")


class Conn(NamedTuple):
    """A connection by its id; `neighbour` is None for the day's own. The rank says whether it is filed as one of those."""

    name: str
    code: int
    rank: int
    neighbour: int | None


class Scanned(NamedTuple):
    """A segment and its batches as far as they are wanted; `neighbour` is whose it is, None for the day's own."""

    segment: RawSegment
    neighbour: int | None
    batches: tuple[Batch, ...]


def mapped(path: Path) -> memoryview:
    """Return a file's bytes without reading them; they count as memory for as long as they are held."""
    if path.stat().st_size == 0:  # cannot be mapped
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def age(conn: str) -> tuple[int, int, str]:
    """Return what sorts connections by their beginning."""
    match = _CONN.fullmatch(conn)
    return (int(match["epoch"]), int(match["number"]), conn) if match else (0, 0, conn)


def slice_of(conn: str) -> str:
    """Return which part of the markets a connection has: `2` of `1-a2-0`, nothing of the first part."""
    match = _CONN.fullmatch(conn)
    return match["slice"] if match else ""


def replica_of(conn: str) -> str:
    """Return which of the sockets for the same markets a connection is: `a` of `1-a2-0`, `rest` of one that fetched pages."""
    match = _CONN.fullmatch(conn)
    return match["replica"] if match else "a"


def connections_of(job: NormalizeJob, scanned: list[Scanned]) -> dict[str, Conn]:
    """Return all connections by id. A shard `b` is second to `a`, `b2` to `a2`, where that recorded at all.

    So is, within a shard, a connection that began while an earlier one was still up. One of a neighbour that recorded on is
    filed as the day's own if it was up when the day opened.
    """
    ended_ns = _ended_ns(job)
    lives: dict[str, tuple[int, int]] = {}
    of_day: dict[str, int | None] = {}
    for part in scanned:
        for header in (batch.header for batch in part.batches):
            low, high = lives.get(header.conn, (header.recv_first_ns, header.recv_first_ns))
            lives[header.conn] = min(low, header.recv_first_ns), max(high, _up_to_ns(header, ended_ns))
            of_day.setdefault(header.conn, part.neighbour)
    conns = {}
    firsts: dict[tuple[int | None, str], list[str]] = {}
    names = sorted(lives)
    for name in sorted(names, key=lambda name: (replica_of(name) != "a", lives[name])):
        neighbour = of_day[name]
        recorded_on = neighbour is not None and job.neighbours[neighbour].recorded_on
        foreign = neighbour is not None and not (recorded_on and lives[name][1] > job.open_ns)
        place = (neighbour if foreign else None, slice_of(name))
        before = firsts.setdefault(place, [])
        second = any(replica_of(other) != replica_of(name) or lives[name][0] < lives[other][1] for other in before)
        if replica_of(name) == REST_CHANNEL:
            rank = REST
        elif second:
            rank = NEIGHBOUR_SECOND if foreign else SECOND
        else:
            rank = NEIGHBOUR_FIRST if foreign else FIRST
            before.append(name)
        conns[name] = Conn(name, names.index(name), rank, neighbour)
    return conns


def _ended_ns(job: NormalizeJob) -> dict[str, int]:
    """Return when connections ended, of those behind which there is a gap."""
    return {str(gap.scope["conn"]): gap.from_ns for gap in job.gaps if gap.gap_id == f"gap-{gap.scope.get('conn')}"}


def _up_to_ns(header: BatchHeader, ended_ns: Mapping[str, int]) -> int:
    """Return until when a batch shows that its connection was up: the notes that a killed one owes come long after."""
    if header.channel != SESSION:
        return header.recv_last_ns
    return min(header.recv_last_ns, ended_ns.get(header.conn, header.recv_last_ns))


def lives_of(job: NormalizeJob, scanned: list[Scanned], conns: Mapping[str, Conn]) -> list[Life]:
    """Return when each own connection recorded what: from the note that it is subscribed (else its first record) on."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    channels: dict[str, set[str]] = {}
    ended_ns = _ended_ns(job)
    for part in scanned:
        if part.neighbour is not None and not job.neighbours[part.neighbour].recorded_on:
            continue
        data = mapped(Path(part.segment.path)) if part.segment.channel == SESSION else memoryview(b"")
        for batch in part.batches:
            header = batch.header
            if conns[header.conn].rank in (REST, *FOREIGN):
                continue
            first[header.conn] = min(first.get(header.conn, header.recv_first_ns), header.recv_first_ns)
            last[header.conn] = max(last.get(header.conn, header.recv_first_ns), _up_to_ns(header, ended_ns))
            if part.segment.channel in TABLE_OF_CHANNEL:
                channels.setdefault(header.conn, set()).add(part.segment.channel)
            elif part.segment.channel == SESSION:
                subscribed = _subscribed(data, batch)
                if subscribed is not None:
                    at_ns, names = subscribed
                    first[header.conn] = max(first[header.conn], at_ns)
                    channels.setdefault(header.conn, set()).update(names)
    return [
        Life(conn, tuple(sorted(channels.get(conn, ()))), first[conn], last[conn] + 1)
        for conn in sorted(first, key=age)
    ]


def earlier_lives_of(
    job: NormalizeJob, scanned: list[Scanned], conns: Mapping[str, Conn]
) -> dict[str, tuple[int, int]]:
    """Return since and until when connections of the day before recorded near the boundary.

    What they received of this day is in its tables: where a roll was some seconds late, nothing is missing.
    """
    lives: dict[str, tuple[int, int]] = {}
    for part in scanned:
        if part.neighbour is None or job.neighbours[part.neighbour].open_ns >= job.open_ns:
            continue
        for header in (batch.header for batch in part.batches):
            if conns[header.conn].rank in FOREIGN:
                low, high = lives.get(header.conn, (header.recv_first_ns, header.recv_last_ns + 1))
                lives[header.conn] = min(low, header.recv_first_ns), max(high, header.recv_last_ns + 1)
    return lives


def _subscribed(data: memoryview, batch: Batch) -> tuple[int, list[str]] | None:
    """Return when a `session` batch says that all was subscribed, and what; None where it does not."""
    try:
        records = decode_records(data, batch)
    except BatchDamagedError:
        return None  # named when it is read
    for line in records.splitlines():
        if b'"note":{"event":"subscribed"' in line:
            record = parse_record(line)
            assert record.note is not None
            return record.recv_ns, list(record.note.get("sids", {}))
    return None
