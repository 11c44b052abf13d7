"""The seal of a day's revision: the manifest in the store, create-only, and its hash in the journal.

The manifest is derived from the files and the journal alone. Not here: what its parts mean (`day.seal`), and when it is time.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ssmd_dagster import __version__
from ssmd_dagster.archive.layout import manifest_key
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.day.events import BadEventError, TradingDay
from ssmd_dagster.day.payloads import DriftFound, Sealed
from ssmd_dagster.day.seal import (
    ConnectionEntry,
    JournalEntry,
    Manifest,
    SegmentEntry,
    TableEntry,
    root_hash,
    sha256_hex,
)
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import NotFoundError, RefusedError, SsmdError, UnexplainedDifferenceError
from ssmd_dagster.stores.cache import rfc3339
from ssmd_dagster.stores.objects import ObjectExistsError
from ssmd_dagster.workflows.desk import Desk

_SEALS = frozenset({EventName.COMPLETED, EventName.VERIFIED, EventName.CONDITION_CHANGED})
"""The events behind which a manifest ends: what comes later does not change what a repeated seal writes."""


async def seal(
    desk: Desk,
    day: TradingDay,
    readback: Readback,
    tables: Sequence[TableEntry] = (),
    *,
    revision: int | None = None,
    drift: DriftFound | None = None,
) -> TradingDay:
    """Write the manifest of the day's revision (or of a later one), and append `sealed` with its hash.

    Doing it again, after a crash between the two, writes the same bytes, or keeps those that are there where they claim the same
    of the same files. Returns the day after it.
    """
    files = segment_entries(readback), connection_entries(readback)
    return await _seal(desk, day, *files, tables, day.revision if revision is None else revision, drift)


async def _seal(
    desk: Desk,
    day: TradingDay,
    segments: tuple[SegmentEntry, ...],
    connections: tuple[ConnectionEntry, ...],
    tables: Sequence[TableEntry],
    revision: int,
    drift: DriftFound | None,
) -> TradingDay:
    manifest = await _manifest(desk, day, segments, connections, tables, revision)
    raw = manifest.encode()
    key = manifest_key(manifest.feed, manifest.date, manifest.revision)
    try:
        await desk.stores.raw.create(key, raw)
    except ObjectExistsError as error:
        there = await desk.stores.raw.get(key)
        if there != raw and not _says_the_same(there, manifest):
            raise SsmdError(
                f"revision {manifest.revision} of the day has another manifest already",
                where=desk.stores.raw.url(key),
                do="Two journals write to one archive: give each environment its own bucket or prefix.",
            ) from error
        raw = there
    return await desk.book.append(
        day.date,
        EventName.SEALED,
        epoch=day.epoch,
        data=Sealed(
            manifest_sha256=sha256_hex(raw),
            root_hash=manifest.root_hash,
            revision=manifest.revision,
            manifest_key=key,
            drift=drift,
        ),
    )


async def seal_revision(
    desk: Desk,
    day: TradingDay,
    readback: Readback,
    tables: Sequence[TableEntry],
    *,
    drift: DriftFound | None = None,
) -> TradingDay:
    """Seal the next revision of a COMPLETE day whose tables are new; what was sealed before stays as it is.

    A raw file that was sealed before is sealed again as it was then: what was spoilt since is never sealed as it is now.
    Where the manifest of then is gone or changed, what was read back is all that is known.

    Raises `RefusedError` where the day has no sealed revision to follow.
    """
    if day.sealed is None or day.completed is None:
        raise RefusedError(
            f"trading day {day.date} has no sealed revision that another could follow",
            where=desk.env,
            do=f"Verify it first: `ssmd day verify {desk.env} {day.date}`.",
        )
    segments = {entry.key: entry for entry in segment_entries(readback)}
    connections = {entry.conn: entry for entry in connection_entries(readback)}
    try:
        before = await newest_manifest(desk, day.date, day.sealed)
    except UnexplainedDifferenceError:  # the operator knows, and has asked for a revision of what is left
        pass
    else:
        segments |= {entry.key: entry for entry in before.segments}
        connections |= {entry.conn: entry for entry in before.connections}
    files = tuple(segments[key] for key in sorted(segments)), tuple(connections[conn] for conn in sorted(connections))
    return await _seal(desk, day, *files, tables, day.sealed.revision + 1, drift)


async def newest_manifest(desk: Desk, date: str, sealed: Sealed) -> Manifest:
    """Read the manifest that the journal's last seal of a day names.

    Raises `UnexplainedDifferenceError` where it is gone, or is not the one that was sealed.
    """
    raw = desk.stores.raw
    key = manifest_key(desk.setting.env.feed, date, sealed.revision)
    try:
        content = await raw.get(key)
        if sha256_hex(content) == sealed.manifest_sha256:
            return Manifest.decode(content)
        what = "is not the manifest that was sealed"
    except NotFoundError:
        what = "was sealed and is not there"
    raise UnexplainedDifferenceError(
        f"{key}: {what}",
        where=raw.url(key),
        do="Put it back from a copy or from the store's own versions, then verify the day: "
        f"`ssmd day verify {desk.env} {date}`.",
    )


def segment_entries(readback: Readback) -> tuple[SegmentEntry, ...]:
    """Return the segments that were read back as a manifest lists them."""
    return tuple(
        SegmentEntry(key=s.key, size=s.size, sha256=s.sha256, batches=s.batches, records=s.records)
        for s in sorted(readback.segments, key=lambda s: s.key)
    )


def connection_entries(readback: Readback) -> tuple[ConnectionEntry, ...]:
    """Return the connections that were read back as a manifest lists them."""
    return tuple(
        ConnectionEntry(conn=conn, epoch=readback.epochs[conn], records=counts)
        for conn, counts in sorted(readback.by_connection.items())
    )


def _says_the_same(there: bytes, manifest: Manifest) -> bool:
    """Tell whether a manifest of before a crash claims the same files, and events that the journal has in these places."""
    try:
        before = Manifest.decode(there)
    except BadEventError:
        return False
    events = {entry.seq: bytes(entry.event) for entry in manifest.events}
    return (before.root_hash, before.tables) == (manifest.root_hash, manifest.tables) and all(
        events.get(entry.seq) == bytes(entry.event) for entry in before.events
    )


async def _manifest(
    desk: Desk,
    day: TradingDay,
    segments: tuple[SegmentEntry, ...],
    connections: tuple[ConnectionEntry, ...],
    tables: Sequence[TableEntry],
    revision: int,
) -> Manifest:
    """Derive the manifest from the files and from the day's events up to its last verdict, from nothing else."""
    env = desk.setting.env
    assert day.condition is not None
    stored = await desk.stores.journal.read_day(day)
    end = max(i for i, entry in enumerate(stored) if entry.event.event in _SEALS)
    events = stored[: end + 1]
    window = desk.window(day)
    return Manifest(
        env=env.name,
        feed=env.feed,
        date=day.date,
        open_ns=window.open_ns,
        close_ns=window.close_ns,
        revision=revision,
        epochs=day.epochs,
        segments=segments,
        root_hash=root_hash(segments),
        tables=tuple(sorted(tables, key=lambda table: table.key)),
        connections=connections,
        gaps=day.gaps,
        ledger=day.ledger,
        condition=day.condition,
        condition_reasons=day.condition_reasons,
        rules_version=day.rules_version,
        journal_seq=events[-1].seq,
        events=tuple(JournalEntry(seq=entry.seq, event=msgspec.Raw(entry.event.encode())) for entry in events),
        versions={"ssmd_dagster": __version__, "configuration": env.fingerprint()},
        created_at=rfc3339(events[-1].event.at_ns),
    )
