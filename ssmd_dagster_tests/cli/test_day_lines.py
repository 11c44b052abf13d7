"""What `ssmd day show` and `ssmd day verify` print of ledgers and verifications."""

from __future__ import annotations

import msgspec
import pytest

from ssmd_dagster.cli.day_lines import (
    FAULTS_SHOWN,
    Printer,
    print_day,
    print_ledger,
    print_status,
    print_verification,
)
from ssmd_dagster.day.ledger import BooksLedger, Explanation, Ledger, TradesLedger, WireLedger
from ssmd_dagster.day.payloads import DriftCount, DriftFound
from ssmd_dagster.day.states import EventName
from ssmd_dagster.stores.cache import DayStats
from ssmd_dagster.workflows.desk import Progress
from ssmd_dagster.workflows.verify_sealed import Verification
from ssmd_dagster.workflows.views import DayView
from ssmd_dagster_tests.day.builders import started
from ssmd_dagster_tests.day.test_ledger import trade_ledger


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the printed lines."""
    return capsys.readouterr().out.splitlines()


def test_a_ledger_is_printed_with_what_stands_beside_the_channels(capsys: pytest.CaptureFixture[str]) -> None:
    """Channels as tables; wire, trades and books as lines."""
    print_ledger(trade_ledger())
    lines = printed(capsys)
    assert [line.split() for line in lines[1:5]] == [
        ["received", "spooled", "published", "archived"],
        ["trade", "10", "10", "10", "10"],
        ["normalised", "duplicates", "control", "rejected", "other_day", "opening_fold"],
        ["trade", "7", "1", "1", "1", "0", "0"],
    ]
    assert lines[5:] == [
        "  wire: distinct 9, holes 0, duplicates 1",
        "  trades: exchange 7, captured 7, repaired 0, missing 0, extra 0",
        "  books: points 4, differing 0, markets 2",
    ]


def test_differences_name_their_gaps_and_parts_without_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A hole that a gap explains, and one difference that nothing does."""
    ledger = msgspec.structs.replace(
        trade_ledger(published=8, archived=10),
        wire=WireLedger(distinct=9, holes=2, duplicates=0),
        trades=TradesLedger(),
        books=BooksLedger(),
        explanations=(Explanation(difference="wire: holes", gap_id="gap-1-a-0-2-7", size=2),),
    )
    print_ledger(ledger)
    lines = printed(capsys)
    assert not [line for line in lines if line.startswith(("  trades", "  books"))]
    assert "  difference: wire: holes +2, explained by gap-1-a-0-2-7" in lines
    assert "  difference: trade: spooled - published +2, explained by nothing" in lines


def verification(*faults: str) -> Verification:
    """A verification of a degraded day."""
    return Verification(
        environment="kalshi-sim",
        date="2025-12-14",
        revision=1,
        condition="degraded",
        condition_reasons=("gap g stays",),
        journal=False,
        changed=bool(faults),
        examined={"segments": 4, "records": 12_345},
        faults=faults,
        ledger=Ledger(),
    )


def test_a_verification_says_what_was_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """And that the journal was away."""
    print_verification(verification())
    assert printed(capsys) == [
        "  segments                 4",
        "  records             12,345",
        "  The journal and the stream were not asked",
        "Trading day 2025-12-14 is what was sealed; its condition is degraded",
        "  - gap g stays",
    ]


def test_many_faults_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    """The first ones are named, the others counted."""
    print_verification(verification(*(f"fault {n}" for n in range(1_000))))
    lines = printed(capsys)
    assert sum("fault " in line for line in lines) == FAULTS_SHOWN
    assert f"  and {1_000 - FAULTS_SHOWN} more; --json has all of them" in lines
    assert "Trading day 2025-12-14 is not what was sealed; its condition is now degraded" in lines


def test_what_mends_a_fault_is_said_last(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each thing that can be done."""
    print_verification(msgspec.structs.replace(verification("fault"), mend=("Put it back.", "Replay it.")))
    assert printed(capsys)[-2:] == ["To mend it: Put it back.", "To mend it: Replay it."]


DRIFT = {"fingerprints": 12, "most": [{"kind": "key", "name": "trade.msg.foo", "json_type": "string", "count": 120}]}


def view(*, filed: bool = False) -> DayView:
    """A COMPLETE day that was sealed, with drift, and was told of three late rows."""
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED)
    log.add(EventName.SEALED, data={"drift": DRIFT})
    log.add(EventName.CONDITION_CHANGED, data={"late": {"rows": 3, "until_ns": 5, "filed": filed}})
    day = log.day()
    return DayView(day=day, state=day.state, error=None, messages=9, gaps=0, stats=None, components={}, at_ns=9)


def test_late_rows_and_drift_are_shown_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Late rows until a table has them, and what the reader did not know, with where its examples are."""
    print_day("kalshi-sim", view())
    lines = printed(capsys)
    assert "Late Rows: 3, no table has them yet: ssmd day normalize kalshi-sim --date 2025-12-14" in lines
    assert (
        "Drift: 12 unknown keys, types or shapes (key trade.msg.foo string ×120, …); "
        "examples: ssmd day report kalshi-sim 2025-12-14"
    ) in lines
    print_day("kalshi-sim", view(filed=True))
    assert "Late Rows: 3, in the table `late`" in printed(capsys)
    plain = view().to_json("kalshi-sim")
    assert (plain["late"]["rows"], plain["drift"]["fingerprints"], plain["unknown"]) == (3, 12, 0)


def test_every_sealed_revision_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader can ask for each of them (`revision=1`); the first seal is not forgotten over the second."""
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED)
    for revision in (1, 2):
        log.add(EventName.SEALED, data={"revision": revision}, at_ns=revision * 10**9)
    seen = msgspec.structs.replace(view(), day=log.day())
    print_day("kalshi-sim", seen)
    assert "Sealed: r1 (1970-01-01T00:00:01Z), r2 (1970-01-01T00:00:02Z)" in printed(capsys)
    assert seen.to_json("kalshi-sim")["sealed"][0] == {"revision": 1, "sealed_ns": 10**9}


def test_a_gap_of_a_whole_day_says_where_it_ends_and_of_what(capsys: pytest.CaptureFixture[str]) -> None:
    """Midnight to midnight is not nothing, and three channels that no replay brings back are three, not one thrice."""
    day_ns = 86_400 * 10**9
    gap = {"gap_id": "gap-replay-ticker", "cause": "not_captured", "from_ns": day_ns, "scope": {"channel": "ticker"}}
    log = started()
    log.add(EventName.GAP_OPENED, data=gap)
    log.add(EventName.GAP_CLOSED, data={"gap_id": gap["gap_id"], "to_ns": 2 * day_ns, "outcome": "stays"})
    day = log.day()
    print_day("kalshi-sim", msgspec.structs.replace(view(), day=day))
    assert "  - 00:00:00 - 1970-01-03T00:00:00 (not_captured, ticker)" in printed(capsys)


def test_drift_of_a_running_day_is_shown_as_far_as_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages of no known type so far, and the unknown keys of the newest ones."""
    day = started().day()
    stats = DayStats(messages=9, gaps=0, bytes=1, by_channel={"trade": 7, "other": 2})
    running = DayView(day=day, state=day.state, error=None, messages=9, gaps=0, stats=stats, components={}, at_ns=9)
    newest = DriftFound(fingerprints=1, most=(DriftCount(kind="key", name="trade.msg.foo", json_type="int", count=7),))
    print_day("kalshi-sim", running, newest=newest)
    assert [line for line in printed(capsys) if line.startswith("Drift")] == [
        "Drift: 2 messages so far that are of no known type or cannot be read",
        "Drift: 1 unknown keys, types or shapes (key trade.msg.foo int ×7) in the newest messages",
    ]


def test_gaps_of_several_connectors_say_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """With one connector its name would say nothing."""
    log = started()
    for name in ("connector-a", "connector-b"):
        gap = {"gap_id": f"gap-{name}", "cause": "connection_lost", "from_ns": 0, "scope": {"component": name}}
        log.add(EventName.GAP_OPENED, data=gap)
        log.add(EventName.GAP_CLOSED, data={"gap_id": f"gap-{name}", "to_ns": 10**9, "outcome": "healed"})
        day = log.day()
        view = DayView(day=day, state=day.state, error=None, messages=9, gaps=0, stats=None, components={}, at_ns=9)
        print_day("kalshi-sim", view)
    lines = [line for line in printed(capsys) if "connection_lost" in line]
    assert lines == [
        "  - 00:00:00 - 00:00:01 (connection_lost, healed)",
        "  - 00:00:00 - 00:00:01 (connection_lost, connector-a, healed)",
        "  - 00:00:00 - 00:00:01 (connection_lost, connector-b, healed)",
    ]


def test_a_day_that_records_beyond_its_close_and_one_left_behind_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With the command that ends them; nothing is said of a day whose end is under way but that it is."""
    log = started()
    running = DayView(
        day=log.day(), state=log.day().state, error=None, messages=None, gaps=0, stats=None, components={}, at_ns=9
    )

    def lines(**changes: object) -> list[str]:
        print_status("kalshi-sim", msgspec.structs.replace(running, **changes), None)
        return [line for line in printed(capsys) if line.startswith(("Messages", "Over", "Behind"))]

    assert lines() == ["Messages: not known"]
    over = "Over: its window has closed, and it records on; ssmd day roll kalshi-sim"
    assert lines(messages=7, over=True) == ["Messages: 7", over]
    behind = "Behind: 2025-12-14 is ACTIVE still; ssmd day roll kalshi-sim ends it"
    assert lines(behind=log.day())[1:] == [behind]
    log.add(EventName.END_REQUESTED)
    assert lines(behind=log.day())[1:] == ["Behind: 2025-12-14 is ENDING"]


def test_what_a_forced_end_skipped_is_not_ticked(capsys: pytest.CaptureFixture[str]) -> None:
    """A tick says that it was done; what proves the day later is named."""
    for kind, detail in (("done", ""), ("skipped", "skipped (--force)")):
        Printer(as_json=False).progress(Progress(kind, "end", "2025-12-14", "verify", "Verifying", detail), "  ")  # type: ignore[arg-type]
    assert printed(capsys) == ["  ✓ Verifying", "  - Verifying: skipped (--force)"]
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED, data={"forced_by": "cli:a@b"})
    day = log.day()
    print_day("kalshi-sim", msgspec.structs.replace(view(), day=day))
    assert printed(capsys)[-1] == "Next: ssmd day verify kalshi-sim 2025-12-14"
