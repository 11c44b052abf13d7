"""Verify a day again, whenever later: from its manifest and the store, and, where they answer, from the journal and the stream.

A day that was never verified (a forced end) is verified as its end would have done it, and sealed. A loss that is found after
the seal is journaled with the condition that follows from it; nothing that is stored is ever rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.condition import Condition, condition, gaps_within
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.ledger import ChannelLedger, Ledger, TradesLedger
from ssmd_dagster.day.payloads import ConditionChanged, ConditionValue, Sealed
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import NotFoundError, RefusedError
from ssmd_dagster.stores.objects import ObjectStore
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.damage import described, journal_losses, rebuild, sort_out
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.end import END, examine
from ssmd_dagster.workflows.sealed_store import StoreFindings, examine_store
from ssmd_dagster.workflows.sealing import seal
from ssmd_dagster.workflows.trades import Compared, Tell, compare_trades, line_of
from ssmd_dagster.workflows.verify import (
    FILED_LINES,
    Verdict,
    draw_up,
    journal_verdict,
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


async def verify_store(
    env: Environment, raw: ObjectStore, normalized: ObjectStore, date: str, tell: Tell
) -> Verification:
    """Verify a sealed day from the store alone. Raises `NotFoundError` where it holds no manifest of the day."""
    found = await examine_store(env, raw, normalized, date, None, tell)
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
    found = await examine_store(env, desk.stores.raw, desk.stores.normalized, day.date, sealed, tell)
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


def _judge(found: StoreFindings, ledger: Ledger, faults: tuple[str, ...]) -> Condition:
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
    found: StoreFindings,
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


def _ledger(found: StoreFindings, *, published: dict[str, int] | None) -> tuple[Ledger, tuple[str, ...]]:
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
