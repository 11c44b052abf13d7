"""Verify a day again, whenever later: from its manifest and the store, and, where they answer, from the journal and the stream.

A day that was never verified (a forced end) is verified as its end would have done it, and sealed. A loss that is found after
the seal is journaled with the condition that follows from it; nothing that is stored is ever rewritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from ssmd_dagster.archive.layout import day_prefix, manifest_key, manifest_revision, table_prefix, table_revision
from ssmd_dagster.archive.proofs import BookFindings
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.archive.trade_ids import TradeIds
from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.condition import Condition, condition, gaps_within
from ssmd_dagster.day.events import BadEventError, DayEvent, JournalBrokenError, TradingDay, fold
from ssmd_dagster.day.ledger import ChannelLedger, Ledger, TradesLedger
from ssmd_dagster.day.payloads import ConditionChanged, ConditionValue, Sealed
from ssmd_dagster.day.seal import Manifest, root_hash, sha256_hex
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import NotFoundError, RefusedError, UnexplainedDifferenceError
from ssmd_dagster.stores.objects import ObjectStore
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.damage import described, journal_losses, rebuild, sort_out
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.end import END, examine
from ssmd_dagster.workflows.holdings import TABLES
from ssmd_dagster.workflows.reading import DayReading
from ssmd_dagster.workflows.sealing import connection_entries, seal
from ssmd_dagster.workflows.trades import Compared, Tell, compare_trades, line_of
from ssmd_dagster.workflows.verify import (
    FILED_LINES,
    Telling,
    Verdict,
    draw_up,
    journal_verdict,
    nothing_examined,
    published_by_channel,
    unexplained,
)

MISSING_NAMED = 5
"""So many of the trades that are missing are named; a replay finds all of them. Also: so many segments are built again."""
_CARRIED = ("published", *FILED_LINES)
"""Lines that the raw files alone do not give again; they are the sealed ledger's."""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What a later verification found. `examined` counts what each check looked at; `faults` empty means all is as sealed.

    `journal` says whether the journal was there to be asked, `changed` whether the day's condition is another one now, `mend`
    what can be done about the faults.
    """

    environment: str
    date: str
    revision: int
    condition: ConditionValue
    condition_reasons: tuple[str, ...]
    journal: bool
    changed: bool
    examined: dict[str, int]
    faults: tuple[str, ...]
    ledger: Ledger
    mend: tuple[str, ...] = ()


class _Store(NamedTuple):
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


async def verify_store(
    env: Environment, raw: ObjectStore, normalized: ObjectStore, date: str, tell: Tell
) -> Verification:
    """Verify a sealed day from the store alone. Raises `NotFoundError` where it holds no manifest of the day."""
    found = await _examine_store(env, raw, normalized, date, None, tell)
    ledger, holes = _ledger(found, published=None)
    lost = [f"{described(loss)}: not in the store; spool and stream were not asked" for loss in found.readback.losses]
    faults = (*found.faults, *lost, *holes, *unexplained(ledger))
    judged = _judge(found, ledger, faults)
    return _verification(env.name, found, judged, faults, ledger, journal=False, changed=False)


async def verify_sealed(desk: Desk, date: str, tell: Tell) -> Verification:
    """Verify a COMPLETE day and journal the verdict; a day that was not verified before is sealed.

    Raises `NotFoundError` where there is no such day, `RefusedError` where it is not COMPLETE.
    """
    day = await desk.book.day(date)
    if day is None:
        raise NotFoundError(
            f"trading day {date} is not recorded", where=desk.env, do=f"See `ssmd day history {desk.env}`."
        )
    if day.state is not DayState.COMPLETE:
        raise RefusedError(
            f"trading day {date} is {day.state}: only a COMPLETE day can be verified",
            where=desk.env,
            do=f"End it first, which verifies it: `ssmd day end {desk.env} --date {date}`.",
        )
    return await (_first_time(desk, day, tell) if day.sealed is None or day.is_unsealed else _again(desk, day, tell))


async def _first_time(desk: Desk, day: TradingDay, tell: Tell) -> Verification:
    """Do what a forced end left out: archive what is left, verify, and seal where nothing differs."""
    attempt = Attempt(desk, day.date, END, Options())
    try:
        verdict = await examine(attempt)
    finally:
        await desk.supervisor.remove_group(day_group(desk.env, day.date))
    day = await _day(desk, day.date)
    judged = condition(
        ledger=verdict.ledger,
        gaps=gaps_within(day.gaps, desk.window(day)),
        archived_records=verdict.readback.records,
        source=day.source,
        late=verdict.late,
        faults=len(verdict.faults),
    )
    changed = await _journal_condition(desk, day, judged)
    if not verdict.faults and verdict.readback.records:
        await seal(
            desk,
            await _day(desk, day.date),
            verdict.readback,
            verdict.tables,
            revision=verdict.revision,
            drift=verdict.drift,
        )
    tell("verified for the first time")
    return Verification(
        environment=desk.env,
        date=day.date,
        revision=day.revision,
        condition=judged.value,
        condition_reasons=judged.reasons,
        journal=True,
        changed=changed,
        examined={"records": verdict.readback.records, "intervals": verdict.readback.intervals_confirmed},
        faults=verdict.faults,
        ledger=verdict.ledger,
    )


async def _again(desk: Desk, day: TradingDay, tell: Tell) -> Verification:
    env = desk.setting.env
    sealed = await _seals(desk, day)
    found = await _examine_store(env, desk.stores.raw, desk.stores.normalized, day.date, sealed, tell)
    batches = await desk.stores.raw_stream.batches(day.date)
    published = published_by_channel(batches, found.readback) if batches else None
    losses = found.readback.losses
    damage = await sort_out(desk, day.date, losses)
    day = await journal_losses(desk, day, damage.gone, losses)
    found = found._replace(day=day)
    ledger, holes = _ledger(found, published=published)
    compared = await compare_trades(desk, day, found.ids, repair=False, tell=tell)
    ledger = again_with_trades(ledger, compared, line_of(compared, found.ids))
    faults = (*found.faults, *damage.faults(), *holes, *unexplained(ledger), *missing_by_name(ledger, compared))
    await journal_verdict(desk, day, Verdict(found.readback, ledger, faults))
    judged = _judge(found, ledger, faults)
    changed = await _journal_condition(desk, day, judged)
    rebuilt = {}
    for key in found.spoilt()[:MISSING_NAMED]:
        tell(f"building {key} again from the stream")
        if (path := await rebuild(desk, found.manifest, key)) is not None:
            rebuilt[desk.stores.raw.url(key)] = path
    return _verification(env.name, found, judged, faults, ledger, journal=True, changed=changed, rebuilt=rebuilt)


def again_with_trades(ledger: Ledger, compared: Compared, line: TradesLedger) -> Ledger:
    """Return the ledger with what the exchange's list says now: of a day that was compared before, only what is missing of it.

    A list from which trades have gone since proves nothing against a day that had them.
    """
    known = ledger.trades.exchange is not None
    if known and not line.missing:
        return ledger
    why_not = {part: why for part, why in ledger.why_not.items() if part != "trades"}
    if compared.why_not is not None:
        why_not["trades"] = compared.why_not
    return msgspec.structs.replace(ledger, trades=line, why_not=why_not)


def missing_by_name(ledger: Ledger, compared: Compared) -> tuple[str, ...]:
    """Return a fault that names the first of the trades that are missing."""
    if not ledger.trades.missing or compared.matching is None:
        return ()
    named = compared.matching.missing_ids(MISSING_NAMED)
    return (f"the exchange lists trades that the day does not have: {', '.join(named)}{_more(ledger, len(named))}",)


def _more(ledger: Ledger, named: int) -> str:
    left = (ledger.trades.missing or 0) - named
    return f" and {left:,} more" if left > 0 else ""


def mending(
    env: str, date: str, revision: int, store_faults: int, ledger: Ledger, rebuilt: Mapping[str, Path] | None = None
) -> tuple[str, ...]:
    """Return what can be done about the faults that a verification has found; what is stored is never rewritten.

    `rebuilt`: where objects lie that were built again as they were sealed, by the places where they belong.
    """
    done = [
        f"Built again as it was sealed: {path}; put it in the place of {url}" for url, path in (rebuilt or {}).items()
    ]
    if store_faults:
        done.append(
            "Put the named objects back from a copy or from the store's own versions, then verify again: "
            f"`ssmd day verify {env} {date}`."
        )
    elif ledger.trades.missing:  # a spoilt object's trades come back with it, and until then no revision can be sealed
        done.append(
            f"Fetch the missing trades into revision {revision + 1}: `ssmd day start {env} --date {date} --mode replay`, "
            f"then `ssmd day end {env} --date {date}`."
        )
    return tuple(done)


async def _day(desk: Desk, date: str) -> TradingDay:
    day = await desk.book.day(date)
    assert day is not None
    return day


async def _journal_condition(desk: Desk, day: TradingDay, judged: Condition) -> bool:
    """Append `condition_changed` where the verdict is another than the day's; tell whether it was."""
    if (judged.value, judged.reasons) == (day.condition, day.condition_reasons):
        return False
    data = ConditionChanged(
        condition=judged.value, condition_reasons=judged.reasons, rules_version=judged.rules_version
    )
    await desk.book.append(day.date, EventName.CONDITION_CHANGED, epoch=day.epoch, data=data)
    return True


def _judge(found: _Store, ledger: Ledger, faults: tuple[str, ...]) -> Condition:
    window = Window(open_ns=found.manifest.open_ns, close_ns=found.manifest.close_ns)
    return condition(
        ledger=ledger,
        gaps=gaps_within(found.day.gaps, window),
        archived_records=found.readback.records,
        source=found.day.source,
        late=found.day.late,
        faults=len(faults),
    )


def _verification(
    env: str,
    found: _Store,
    judged: Condition,
    faults: tuple[str, ...],
    ledger: Ledger,
    *,
    journal: bool,
    changed: bool,
    rebuilt: Mapping[str, Path] | None = None,
) -> Verification:
    return Verification(
        environment=env,
        date=found.manifest.date,
        revision=found.manifest.revision,
        condition=judged.value,
        condition_reasons=judged.reasons,
        journal=journal,
        changed=changed,
        examined=found.examined,
        faults=faults,
        ledger=ledger,
        mend=mending(env, found.manifest.date, found.day.revision, len(found.faults), ledger, rebuilt),
    )


def _ledger(found: _Store, *, published: dict[str, int] | None) -> tuple[Ledger, tuple[str, ...]]:
    """Draw the ledger up again: what the files give anew, what they do not as it was sealed."""
    sealed = Ledger() if found.manifest.ledger is None else Ledger.from_json(found.manifest.ledger)
    why_not = {part: why for part, why in sealed.why_not.items() if part not in ("wire", "books")}
    ledger, holes = draw_up(
        found.day, found.readback, found.books, published=published, trades=sealed.trades, why_not=why_not
    )
    before = {sheet.channel: sheet for sheet in sealed.channels}
    sheets = tuple(_with_carried(sheet, before.get(sheet.channel)) for sheet in ledger.channels)
    return msgspec.structs.replace(ledger, channels=sheets), holes


def _with_carried(sheet: ChannelLedger, sealed: ChannelLedger | None) -> ChannelLedger:
    if sealed is None:
        return sheet
    carried = {name: getattr(sealed, name) for name in _CARRIED if getattr(sheet, name) is None}
    return msgspec.structs.replace(sheet, **carried)


async def _seals(desk: Desk, day: TradingDay) -> dict[int, Sealed]:
    """Return what the journal says of each sealed revision."""
    return {
        data.revision: data
        for entry in await desk.stores.journal.read_day(day)
        if entry.event.event is EventName.SEALED
        for data in (msgspec.convert(entry.event.data, Sealed),)
    }


async def _examine_store(
    env: Environment,
    raw: ObjectStore,
    normalized: ObjectStore,
    date: str,
    sealed: Mapping[int, Sealed] | None,
    tell: Tell,
) -> _Store:
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
    return _Store(manifest, day, readback, books, reading.ids, examined, tuple(faults))


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
