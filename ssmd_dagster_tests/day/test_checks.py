"""The checks of a day: each passes on a clean day, each fails when its claim does, and none passes on nothing."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.checks import CHECKS, DESCRIPTIONS, Check, checks_of
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.ledger import BooksLedger, ChannelLedger, Ledger, TradesLedger, WireLedger
from ssmd_dagster.day.payloads import DriftCount, DriftFound, Sealed
from ssmd_dagster_tests.day.builders import started

WINDOW = Window(open_ns=0, close_ns=86_400_000_000_000)


def sheet(**changes: Any) -> ChannelLedger:
    """Return a channel that balances."""
    counts = {
        "received": 9,
        "spooled": 9,
        "published": 9,
        "archived": 9,
        "normalised": 8,
        "duplicates": 1,
        "control": 0,
    }
    return ChannelLedger(channel="trade", **{**counts, "rejected": {}, "other_day": 0, "opening_fold": 0, **changes})


CLEAN = Ledger(
    channels=(sheet(),),
    wire=WireLedger(distinct=9, holes=0, duplicates=0),
    trades=TradesLedger(exchange=8, captured=8, repaired=0, missing=0, extra=0),
    books=BooksLedger(points=3, differing=0, markets=2),
)


NO_DRIFT = DriftFound(fingerprints=0)


def day(ledger: Ledger | None, drift: DriftFound | None = NO_DRIFT) -> TradingDay:
    """Return a day with a ledger and a seal."""
    log = started()
    sealed = Sealed(manifest_sha256="00", root_hash="11", revision=1, drift=drift)
    plain = None if ledger is None else ledger.to_json()
    return replace(log.day(), ledger=plain, started_ns=1, ended_ns=WINDOW.close_ns, sealed=sealed)


def answers(ledger: Ledger | None) -> dict[str, Check]:
    """Return the checks by name."""
    return {check.name: check for check in checks_of(day(ledger), WINDOW)}


def test_a_clean_day_passes_everything() -> None:
    """Every check has looked at something, and has a description and an asset."""
    found = answers(CLEAN)
    assert found.keys() == CHECKS.keys() == DESCRIPTIONS.keys()
    assert all(check.passed and check.examined and check.asset == CHECKS[name] for name, check in found.items())


@pytest.mark.parametrize(
    ("name", "ledger", "blocking"),
    [
        ("ledger_balance", replace(CLEAN, channels=(sheet(archived=8, normalised=7),)), True),
        ("wire_sequence", replace(CLEAN, wire=WireLedger(distinct=9, holes=2, duplicates=0)), True),
        ("trades_against_exchange", replace(CLEAN, trades=replace(CLEAN.trades, captured=7, missing=1)), True),
        ("trades_against_exchange", replace(CLEAN, trades=replace(CLEAN.trades, extra=1)), False),
        ("book_proofs", replace(CLEAN, books=BooksLedger(points=3, differing=1, markets=2)), True),
        ("normalised", replace(CLEAN, channels=(sheet(normalised=7, rejected={"bad price": 1}),)), False),
    ],
)  # fmt: skip
def test_a_claim_that_does_not_hold_fails_its_check(name: str, ledger: Ledger, blocking: bool) -> None:
    """What makes the day wrong is an ERROR, what makes it less a WARN."""
    check = answers(ledger)[name]
    assert (check.passed, check.blocking) == (False, blocking)


@pytest.mark.parametrize("ledger", [None, Ledger(), Ledger(channels=(ChannelLedger(channel="trade"),))])
def test_a_check_that_could_not_look_at_anything_fails(ledger: Ledger | None) -> None:
    """Without a ledger, or with empty lines, nothing that depends on it passes."""
    found = answers(ledger)
    assert [name for name, check in found.items() if check.passed] == ["on_time"]


def test_nothing_to_look_at_is_no_success() -> None:
    """Zero trades that all match prove nothing."""
    none = replace(CLEAN, trades=TradesLedger(exchange=0, captured=0, repaired=0, missing=0, extra=0))
    check = answers(none)["trades_against_exchange"]
    assert (check.passed, check.text, check.blocking) == (False, "there was nothing to look at", False)


@pytest.mark.parametrize(
    ("drift", "text"),
    [
        (None, "nobody has looked"),
        (
            DriftFound(
                fingerprints=2,
                most=(DriftCount(kind="key", name="trade.msg.foo", json_type="string", count=1_200),),
            ),
            "9 records read, 2 unknown keys, types or shapes (key trade.msg.foo string ×1,200, …)",
        ),
    ],
)
def test_what_the_reader_does_not_know_is_a_warning(drift: DriftFound | None, text: str) -> None:
    """It names what and how often; a day of which nobody looked does not pass either."""
    (check,) = [check for check in checks_of(day(CLEAN, drift), WINDOW) if check.name == "drift"]
    assert (check.passed, check.blocking) == (False, False)
    assert check.text.startswith(text)


def test_a_late_day_fails_on_time() -> None:
    """It says by how much."""
    late = replace(day(CLEAN), started_ns=600_000_000_000, ended_ns=WINDOW.close_ns + 7_200_000_000_000)
    (check,) = [check for check in checks_of(late, WINDOW) if check.name == "on_time"]
    assert check.text == "ACTIVE 600 s after its opening; its end was asked for 7,200 s after its close"
