"""The verdict over a day."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.causes import NEVER_DEGRADE
from ssmd_dagster.day.condition import (
    MAX_GAPS_NAMED,
    RULES_VERSION,
    beyond_replay,
    condition,
    with_late_rows,
)
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.ledger import Ledger, TradesLedger
from ssmd_dagster.day.payloads import LateRows
from ssmd_dagster_tests.day.test_ledger import ledgers, trade_ledger

CLEAN = msgspec.structs.replace(
    trade_ledger(normalised=8),
    channels=tuple(msgspec.structs.replace(sheet, rejected={}) for sheet in trade_ledger(normalised=8).channels),
)
GAP = Gap(gap_id="g1", cause="connection_lost", from_ns=1, to_ns=2, outcome="stays")


def judge(**changes: Any) -> tuple[str, tuple[str, ...]]:
    """The verdict over a clean day with some facts changed."""
    facts: dict[str, Any] = {"ledger": CLEAN, "gaps": (), "archived_records": 10} | changes
    verdict = condition(**facts)
    assert verdict.rules_version == RULES_VERSION
    return verdict.value, verdict.reasons


def test_a_clean_day_is_available() -> None:
    """A ledger that balances, no gap, no remark."""
    assert judge() == ("available", ())


@pytest.mark.parametrize(
    ("changes", "value", "reason"),
    [
        ({"archived_records": 0}, "missing", "nothing archived"),
        ({"archived_records": 0, "forced_by": "cli:a@b"}, "missing", "nothing archived"),
        ({"ledger": None}, "pending", "not verified"),
        ({"ledger": Ledger()}, "pending", "the ledger has no channel"),
        ({"ledger": None, "forced_by": "cli:a@b"}, "degraded", "forced by cli:a@b"),
        ({"forced_by": "cli:a@b"}, "degraded", "forced by cli:a@b"),
        ({"gaps": (GAP,)}, "degraded", "gap g1 (connection_lost) stays"),
        ({"gaps": (msgspec.structs.replace(GAP, outcome="open"),)}, "degraded", "gap g1 (connection_lost) is open"),
        ({"source": "replay"}, "degraded", "replayed source"),
        ({"late": LateRows(rows=3, filed=True)}, "degraded", "3 rows arrived after the seal"),
        ({"late": LateRows(rows=3)}, "degraded", "3 rows arrived after the seal, and no table has them yet"),
        ({"ledger": trade_ledger()}, "degraded", "trade: 1 rejected (bad_json)"),
        (
            {
                "ledger": msgspec.structs.replace(
                    CLEAN, trades=TradesLedger(exchange=7, captured=7, repaired=0, missing=0, extra=2)
                )
            },
            "degraded",
            "2 trades that the exchange does not list",
        ),
    ],
)
def test_each_remark_has_its_verdict_and_its_reason(changes: dict[str, Any], value: str, reason: str) -> None:
    """One fact against a clean day decides the verdict and is named."""
    assert judge(**changes) == (value, (reason,))


def test_a_line_that_is_not_computed_keeps_the_day_pending() -> None:
    """Without the exchange's list the day is pending, and what speaks against it is named beside."""
    ledger = msgspec.structs.replace(CLEAN, trades=TradesLedger(captured=7, repaired=0, missing=0, extra=0))
    assert judge(ledger=ledger) == ("pending", ("not computed: trades exchange",))
    assert judge(ledger=ledger, gaps=(GAP,))[1][1] == "gap g1 (connection_lost) stays"


@pytest.mark.parametrize("cause", sorted(NEVER_DEGRADE))
def test_pauses_of_the_exchange_and_of_the_schedule_never_degrade(cause: str) -> None:
    """Where there was nothing to record nothing is missing."""
    assert judge(gaps=(msgspec.structs.replace(GAP, cause=cause),)) == ("available", ())


@pytest.mark.parametrize("outcome", ["healed", "repaired"])
def test_gaps_that_were_mended_do_not_degrade(outcome: str) -> None:
    """What the second connection or the exchange's list has filled is whole."""
    assert judge(gaps=(msgspec.structs.replace(GAP, outcome=outcome),)) == ("available", ())


@given(ledgers(), st.none() | st.integers(0, 5), st.sampled_from(["live", "replay"]), st.none() | st.just("cli:a@b"))
def test_available_is_never_said_lightly(
    ledger: Ledger, archived: int | None, source: Any, forced_by: str | None
) -> None:
    """A day is available only if all lines are computed and balance, live, unforced; any other verdict has a reason."""
    verdict = condition(ledger=ledger, gaps=(), archived_records=archived, source=source, forced_by=forced_by)
    if verdict.value == "available":
        assert not ledger.not_computed()
        assert not ledger.unexplained()
        assert (source, forced_by, verdict.reasons) == ("live", None, ())
    else:
        assert verdict.reasons


def test_what_a_later_verification_finds_degrades_whatever_else_is_known() -> None:
    """Also a day that is still pending, and one without a ledger."""
    said = ("2 faults found by a later verification",)
    assert judge(faults=2) == ("degraded", said)
    assert judge(faults=2, ledger=None) == ("degraded", said)
    assert judge(faults=2, gaps=(GAP,)) == ("degraded", (*said, "gap g1 (connection_lost) stays"))


def test_a_thousand_gaps_are_counted_by_cause_behind_the_first_ones() -> None:
    """The reasons stay readable; what of a gap was repaired is said."""
    gaps = [msgspec.structs.replace(GAP, gap_id=f"g{n}", detail="trades repaired") for n in range(1_000)]
    value, reasons = judge(gaps=gaps)
    assert (value, len(reasons)) == ("degraded", MAX_GAPS_NAMED + 1)
    assert reasons[0] == "gap g0 (connection_lost) stays: trades repaired"
    assert reasons[-1] == f"{1_000 - MAX_GAPS_NAMED} more gaps (connection_lost)"


def test_late_rows_change_a_verdict_and_leave_its_other_reasons() -> None:
    """They are counted once, however often they are told of; where they were none, the day is what it was before."""
    told = with_late_rows("available", (), LateRows(rows=3))
    assert told.value == "degraded"
    filed = with_late_rows(told.value, ("forced by cli:a@b", *told.reasons), LateRows(rows=2, filed=True))
    assert (filed.value, filed.reasons) == ("degraded", ("forced by cli:a@b", "2 rows arrived after the seal"))
    none = with_late_rows(told.value, told.reasons, LateRows(rows=0, filed=True))
    assert (none.value, none.reasons) == ("available", ())
    pending = with_late_rows("pending", ("not computed: books",), LateRows(rows=1))
    assert (pending.value, len(pending.reasons)) == ("pending", 2)


def test_what_every_replay_lacks_is_told_from_what_only_this_one_lacks() -> None:
    """The source and channels without a history say nothing new of a replayed day; anything else does."""
    never = tuple(
        Gap(gap_id=f"gap-replay-{channel}", cause="not_captured", from_ns=0, to_ns=9, outcome="stays")
        for channel in ("ticker", "orderbook_delta")
    )
    value, reasons = judge(gaps=never, source="replay")
    assert value == "degraded"
    assert len(reasons) == 3
    assert beyond_replay(reasons, never) == ()
    _, reasons = judge(gaps=(*never, GAP), source="replay")
    assert beyond_replay(reasons, (*never, GAP)) == ("gap g1 (connection_lost) stays",)
    assert beyond_replay(("3 faults found by a later verification", "replayed source"), ()) != ()
