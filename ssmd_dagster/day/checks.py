"""What may be claimed of a day: one check per claim, from the journal's day and its ledger alone. Pure.

A check that had nothing to look at fails: silence is no proof. `blocking` tells what makes a day wrong (ERROR) from what
only makes it less than it could be (WARN). Names are those of Dagster's asset checks.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.payloads import DriftFound

ON_TIME_S = 120
"""How long after its opening a day may become ACTIVE, and after its close its end be asked for."""

_NS = 1_000_000_000


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question about one day. `examined` counts what was looked at: 0 never passes."""

    name: str
    asset: str
    passed: bool
    blocking: bool
    text: str
    examined: int


def checks_of(day: TradingDay, planned: Window) -> tuple[Check, ...]:
    """Return all checks of a day that is over; `planned` is the calendar's window, with the opening that was due."""
    ledger = None if day.ledger is None else Ledger.from_json(day.ledger)
    return (
        *(_with_ledger(name, asset, ledger, look) for name, (asset, look) in _OF_LEDGER.items()),
        _no_drift(day, ledger),
        _on_time(day, planned),
    )


_Answer = tuple[bool, bool, str, int]
"""Passed, blocking, text, examined."""


def _with_ledger(name: str, asset: str, ledger: Ledger | None, look: Callable[[Ledger], _Answer]) -> Check:
    answer = (False, False, "no ledger was drawn up", 0) if ledger is None else look(ledger)
    passed, blocking, text, examined = answer
    if passed and not examined:
        passed, text = False, "there was nothing to look at"
    return Check(name=name, asset=asset, passed=passed, blocking=blocking, text=text, examined=examined)


def _ledger_balance(ledger: Ledger) -> _Answer:
    records = sum(sheet.received or 0 for sheet in ledger.channels)
    if unexplained := ledger.unexplained():
        return False, True, "; ".join(f"{entry.name} {entry.size:+,d}" for entry in unexplained), records
    if missing := ledger.not_computed_briefly():
        return False, False, f"not computed: {', '.join(missing)}", records
    explained = ledger.differences()
    if explained:
        return True, True, f"balances; {len(explained)} differences are explained by declared gaps", records
    return True, True, f"{records:,} records in {len(ledger.channels)} channels are accounted for", records


def _wire_sequence(ledger: Ledger) -> _Answer:
    wire = ledger.wire
    if wire.distinct is None or wire.holes is None:
        return False, False, "the wire's numbering was not computed", 0
    text = f"{wire.distinct:,} numbered messages, {wire.holes:,} holes, {wire.duplicates or 0:,} duplicates"
    return wire.holes == 0, any("wire" in entry.name for entry in ledger.unexplained()), text, wire.distinct


def _trades(ledger: Ledger) -> _Answer:
    trades = ledger.trades
    if trades.exchange is None or trades.missing is None:
        return False, False, _not_computed(ledger, "trades", "the exchange's list of trades was not compared"), 0
    text = (
        f"the exchange lists {trades.exchange:,}: {trades.captured or 0:,} captured, {trades.repaired or 0:,} repaired, "
        f"{trades.missing:,} missing, {trades.extra or 0:,} extra"
    )
    return trades.missing == 0 and not trades.extra, trades.missing > 0, text, trades.exchange


def _books(ledger: Ledger) -> _Answer:
    books = ledger.books
    if books.points is None or books.differing is None:
        return False, False, _not_computed(ledger, "books", "no book was rebuilt"), 0
    text = f"{books.points:,} comparisons over {books.markets or 0:,} markets, {books.differing:,} differ"
    return books.differing == 0, books.differing > 0, text, books.points


def _not_computed(ledger: Ledger, part: str, text: str) -> str:
    return f"{text}: {ledger.why_not[part]}" if part in ledger.why_not else text


def _normalised(ledger: Ledger) -> _Answer:
    without = [sheet.channel for sheet in ledger.channels if sheet.normalised is None]
    if without or not ledger.channels:
        text = f"not normalised: {', '.join(without) or 'no channel'}"
        return False, False, _not_computed(ledger, "normalised", text), 0
    rows = sum(sheet.normalised or 0 for sheet in ledger.channels)
    rejected = sum(sheet.rejected_total or 0 for sheet in ledger.channels)
    # The trades of a day that was recorded with another one all repeat what that one's archive has.
    repeated = sum(sheet.duplicates or 0 for sheet in ledger.channels)
    return rejected == 0, False, f"{rows:,} records became rows, {rejected:,} were rejected", rows + repeated


_OF_LEDGER: dict[str, tuple[str, Callable[[Ledger], _Answer]]] = {
    "ledger_balance": ("raw", _ledger_balance),
    "wire_sequence": ("raw", _wire_sequence),
    "trades_against_exchange": ("trades", _trades),
    "normalised": ("trades", _normalised),
    "book_proofs": ("orderbook", _books),
}

CHECKS: dict[str, str] = {
    **{name: asset for name, (asset, _) in _OF_LEDGER.items()},
    "drift": "raw",
    "on_time": "trading_day",
}
"""Every check's name and the asset that it is about."""

DESCRIPTIONS: dict[str, str] = {
    "ledger_balance": "Received, spooled, published, archived and filed records are the same, or a declared gap says why not.",
    "wire_sequence": "The exchange's own numbering has no hole.",
    "trades_against_exchange": "Every trade that the exchange lists was captured or repaired, and none besides.",
    "normalised": "Every archived record became a row, or was counted under the reason why not.",
    "book_proofs": "Order books rebuilt from the archive agree with the exchange's own snapshots.",
    "drift": "The exchange sent no key, message type or shape that the reader does not know.",
    "on_time": "The day was ACTIVE when it was due, and its end was asked for when it closed.",
}


def _no_drift(day: TradingDay, ledger: Ledger | None) -> Check:
    drift = None if day.sealed is None else day.sealed.drift
    examined = 0 if ledger is None else sum(sheet.archived or 0 for sheet in ledger.channels)
    if drift is None or not examined:
        passed, text = False, "nobody has looked: the day has no sealed tables, or they were made by an earlier version"
    else:
        passed, text = not drift.fingerprints, f"{examined:,} records read, {drift_words(drift)}"
    return Check(name="drift", asset="raw", passed=passed, blocking=False, text=text, examined=examined)


def drift_words(drift: DriftFound) -> str:
    """Return in words what a reader did not know, the most frequent things named."""
    if not drift.fingerprints:
        return "nothing unknown"
    most = ", ".join(f"{one.kind} {one.name} {one.json_type}".rstrip() + f" ×{one.count:,}" for one in drift.most)
    more = ", …" if drift.fingerprints > len(drift.most) else ""
    return f"{drift.fingerprints} unknown keys, types or shapes ({most}{more})"


def _on_time(day: TradingDay, planned: Window) -> Check:
    late: list[str] = []
    if day.started_ns is None:
        late.append("it was never ACTIVE")
    elif day.mode == "replay":
        late.append("it is a replay")
    elif (by_s := (day.started_ns - planned.open_ns) // _NS) > ON_TIME_S:
        late.append(f"ACTIVE {by_s:,} s after its opening")
    after_s = 0 if day.ended_ns is None or day.mode == "replay" else (day.ended_ns - planned.close_ns) // _NS
    if after_s > ON_TIME_S:
        late.append(f"its end was asked for {after_s:,} s after its close")
    text = "; ".join(late) or "started and ended when it was due"
    return Check(name="on_time", asset="trading_day", passed=not late, blocking=False, text=text, examined=1)
