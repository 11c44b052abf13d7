"""What the store alone says of a sealed day: manifests, segments and tables held against one another.

Where it is known what the journal says was sealed, they are held against that, too. Not here: what follows (`verify_sealed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from ssmd_dagster.archive.layout import day_prefix, manifest_key, manifest_revision, table_prefix, table_revision
from ssmd_dagster.archive.proofs import BookFindings
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.archive.trade_ids import TradeIds
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import BadEventError, DayEvent, JournalBrokenError, TradingDay
from ssmd_dagster.day.folding import fold
from ssmd_dagster.day.payloads import Sealed
from ssmd_dagster.day.seal import Manifest, root_hash, sha256_hex
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import NotFoundError, UnexplainedDifferenceError
from ssmd_dagster.stores.objects import ObjectStore
from ssmd_dagster.workflows.holdings import TABLES
from ssmd_dagster.workflows.reading import DayReading
from ssmd_dagster.workflows.sealing import connection_entries
from ssmd_dagster.workflows.trades import Tell
from ssmd_dagster.workflows.verify import Telling, nothing_examined


class StoreFindings(NamedTuple):
    """What the store alone says of a day."""

    manifest: Manifest
    day: TradingDay
    readback: Readback
    books: BookFindings
    ids: TradeIds
    examined: dict[str, int]
    faults: tuple[str, ...]

    def spoilt(self) -> list[str]:
        """Return the segments that are missing or changed."""
        there = {segment.key: segment.sha256 for segment in self.readback.segments}
        return [entry.key for entry in self.manifest.segments if there.get(entry.key) != entry.sha256]


async def examine_store(
    env: Environment,
    raw: ObjectStore,
    normalized: ObjectStore,
    date: str,
    sealed: Mapping[int, Sealed] | None,
    tell: Tell,
) -> StoreFindings:
    """Check manifests, segments and tables against one another and, where it is known, against what was sealed."""
    listed = {info.key: info.size for info in await raw.list(day_prefix(env.feed, date))}
    manifests, faults = await _manifests(env, raw, date, listed, sealed)
    if not manifests:
        where = raw.url(day_prefix(env.feed, date))
        if faults:
            raise UnexplainedDifferenceError(
                f"no manifest of {date} can be read, so nothing can be held against it: {'; '.join(faults)}",
                where=where,
                do=f"Put it back from a copy or from the store's own versions, then verify again: "
                f"`ssmd day verify {env.name} {date}`.",
            )
        raise NotFoundError(
            f"the store holds no manifest of {date}",
            where=where,
            do=f"The day may not be sealed yet: see `ssmd day show {env.name} {date}`.",
        )
    revisions = sorted(manifests)
    manifest = manifests[revisions[-1]]
    day, event_faults = _folded(manifest)
    faults += event_faults
    for before, after in pairwise(revisions):
        gone = set(manifests[before].segments) - set(manifests[after].segments)
        faults += [f"{entry.key}: in revision {before} and not, or otherwise, in revision {after}" for entry in gone]
    telling = Telling(tell)
    window = Window(open_ns=manifest.open_ns, close_ns=manifest.close_ns)
    async with DayReading(raw, env.name, env.feed, date, window, telling.read) as reading:
        await reading.read_new()
        readback, books = await reading.finish()
    faults += _segment_faults(manifest, readback)
    known = {entry.key for entry in manifest.segments} | {manifest_key(env.feed, date, number) for number in revisions}
    there = {segment.key for segment in readback.segments}
    faults += [f"{key}: an object that no manifest names" for key in sorted(listed.keys() - known - there)]
    tables, table_faults = await _table_faults(env, normalized, date, list(manifests.values()), telling)
    faults += table_faults
    faults += [*readback.faults, *nothing_examined(readback), *books.faults]
    examined = {
        "manifests": len(manifests),
        "events": len(manifest.events),
        "segments": len(readback.segments),
        "batches": sum(segment.batches for segment in readback.segments),
        "records": readback.records,
        "intervals": readback.intervals_confirmed,
        "numbers": sum(count.distinct for count in readback.wire),
        "books": books.points,
        "tables": tables,
    }
    faults += [
        f"there was nothing to check: no {name}"
        for name in ("events", "segments", "batches", "records")
        if not examined[name]
    ]
    return StoreFindings(manifest, day, readback, books, reading.ids, examined, tuple(faults))


async def _manifests(
    env: Environment, raw: ObjectStore, date: str, listed: Mapping[str, int], sealed: Mapping[int, Sealed] | None
) -> tuple[dict[int, Manifest], list[str]]:
    """Read every revision's manifest and hold it against itself and the journal."""
    found: dict[int, Manifest] = {}
    faults: list[str] = []
    there = {revision for key in listed if (revision := manifest_revision(key)) is not None}
    for revision in sorted(there | set(sealed or ())):
        key = manifest_key(env.feed, date, revision)
        if revision not in there:
            faults.append(f"{key}: was sealed and is not there")
            continue
        content = await raw.get(key)
        claim = sealed.get(revision) if sealed is not None else None
        if claim is not None and claim.manifest_sha256 != sha256_hex(content):
            faults.append(f"{key}: is not the manifest that was sealed")
        elif sealed is not None and claim is None:
            faults.append(f"{key}: is there and the journal knows of no such seal")
        try:
            manifest = found[revision] = Manifest.decode(content)
        except BadEventError as error:
            faults.append(f"{key}: {error.what}")
            continue
        if (manifest.env, manifest.feed, manifest.date, manifest.revision) != (env.name, env.feed, date, revision):
            faults.append(f"{key}: is of {manifest.env} {manifest.date} revision {manifest.revision}")
        if manifest.encode() != content:
            faults.append(f"{key}: is not written as manifests are")
        if _root(manifest) != manifest.root_hash:
            faults.append(f"{key}: its root hash is not that of its segments")
        if claim is not None and claim.root_hash != manifest.root_hash:
            faults.append(f"{key}: its root hash is not the one that was sealed")
    return found, faults


def _root(manifest: Manifest) -> str | None:
    try:
        return root_hash(manifest.segments)
    except ValueError:
        return None


def _folded(manifest: Manifest) -> tuple[TradingDay, list[str]]:
    """Fold a manifest's events and hold its claims against the day that they make."""
    key = manifest_key(manifest.feed, manifest.date, manifest.revision)
    try:
        events = [(entry.seq, DayEvent.decode(bytes(entry.event))) for entry in manifest.events]
        day = fold(events).days[manifest.date]
    except (BadEventError, JournalBrokenError, KeyError) as error:
        raise NotFoundError(
            f"the events in the day's manifest are not those of a day: {error}", where=key, do="Restore it from a copy."
        ) from error
    faults = [
        f"{key}: the event at sequence {after.seq} does not follow on the one before it"
        for (before, after), event in zip(pairwise(manifest.events), (event for _, event in events[1:]), strict=True)
        if after.seq == before.seq + 1 and event.prev_sha256 != sha256_hex(bytes(before.event))
    ]
    claims = {
        "gaps": (manifest.gaps, day.gaps),
        "ledger": (manifest.ledger, day.ledger),
        "condition": (manifest.condition, day.condition),
        "epochs": (manifest.epochs, day.epochs),
    }
    faults += [
        f"{key}: its {name} is not what its events say" for name, (left, right) in claims.items() if left != right
    ]
    return day, faults


def _segment_faults(manifest: Manifest, readback: Readback) -> list[str]:
    """Hold the segments and connections that are there against those that the manifest lists."""
    there = {segment.key: segment for segment in readback.segments}
    faults: list[str] = []
    by_hash = {entry.sha256: entry.key for entry in manifest.segments}
    for entry in manifest.segments:
        found = there.pop(entry.key, None)
        if found is None:
            faults.append(f"{entry.key}: is missing")
        elif (found.sha256, found.size) != (entry.sha256, entry.size):
            other = by_hash.get(found.sha256)
            faults.append(
                f"{entry.key}: holds the bytes of {other}"
                if other is not None
                else f"{entry.key}: was changed ({found.size} bytes, {entry.size} were sealed)"
            )
        elif (found.batches, found.records) != (entry.batches, entry.records):
            faults.append(f"{entry.key}: holds {found.records} records in {found.batches} batches, not what was sealed")
    faults += [f"{key}: a segment that no manifest names" for key in sorted(there)]
    sealed = {entry.conn: entry for entry in manifest.connections}
    found_conns = {entry.conn: entry for entry in connection_entries(readback)}
    faults += [
        f"{conn}: {sum(found_conns[conn].records.values()) if conn in found_conns else 0} records, not those that were sealed"
        for conn in sorted(sealed.keys() | found_conns.keys())
        if sealed.get(conn) != found_conns.get(conn)
    ]
    return faults


async def _table_faults(
    env: Environment, normalized: ObjectStore, date: str, manifests: list[Manifest], telling: Telling
) -> tuple[int, list[str]]:
    """Hold the tables of all revisions against their hashes; return how many were read."""
    listed: dict[str, int] = {}
    for table in TABLES:
        listed |= {info.key: info.size for info in await normalized.list(table_prefix(env.feed, table, date))}
    entries = {entry.key: entry for manifest in manifests for entry in manifest.tables}
    faults: list[str] = []
    for key, entry in sorted(entries.items()):
        if key not in listed:
            faults.append(f"{key}: is missing")
            continue
        digest, size = hashlib.sha256(), 0
        async for chunk in normalized.stream(key):
            digest.update(chunk)
            size += len(chunk)
        telling.read(key)
        if (digest.hexdigest(), size) != (entry.sha256, entry.size):
            faults.append(f"{key}: was changed ({size} bytes, {entry.size} were sealed)")
    revisions = {manifest.revision for manifest in manifests}
    for key in sorted(listed.keys() - entries.keys()):
        revision = table_revision(key)
        # What an attempt left that was cut off before its seal is no part of the day; nothing reads it.
        if revision in revisions or revision > max(revisions):
            faults.append(f"{key}: a table that no manifest names")
    return len(entries), faults
