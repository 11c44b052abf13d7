"""Holes in the exchange's numbering: what gaps say of them explains exactly that much, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmd_dagster.archive.proofs import BookFindings
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.ledger import Explanation
from ssmd_dagster.day.states import DayState
from ssmd_dagster.workflows.verify import MAX_EXPLANATIONS, draw_up, explain_holes
from ssmd_dagster_tests.capture.recordings import DATE, Recording, build_segments, read_segments
from ssmd_dagster_tests.workflows.stored_days import NO_TRADES

CONN = "812-a-0"


def gap(number: int | str, *, sid: int = 1, cause: str = "sequence_jump") -> Gap:
    """The gap of a jump behind a number."""
    return Gap(gap_id=f"gap-{CONN}-{sid}-{number}", cause=cause, from_ns=1, to_ns=2, outcome="stays")


def read(folder: Path, seqs: list[int], *notes: dict[str, object]) -> Readback:
    """A day whose one subscription had these numbers, and whose recorder noted this."""
    recording = Recording()
    recording.recorder.note({"event": "subscribed", "sids": {"trade": 1}})
    for seq in seqs:
        recording.frame("trade", seq=seq)
    for note in notes:
        recording.recorder.note(note)
    recording.end()
    readback = read_segments(build_segments(folder, recording.batches()))
    assert readback.faults == ()
    return readback


def jump(first: int, last: int) -> dict[str, object]:
    """What the recorder notes of a jump."""
    return {"event": "sequence_jump", "sid": 1, "channel": "trade", "seq": [first - 1, last + 1]}


OVERSIZED: dict[str, object] = {"event": "oversized", "channel": "trade", "bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("seqs", "notes", "gaps", "explained", "faults"),
    [
        ([1, 2, 3], (), (), [], []),
        ([1, 2, 5], (jump(3, 4),), (gap(2),), [("1-2", 2)], []),
        ([1, 2, 5], (), (gap(2),), [("1-2", 2)], []),
        ([1, 2, 5], (jump(3, 4),), (), [], ["3-4"]),
        ([1, 2, 5, 8], (jump(3, 4),), (gap(2),), [("1-2", 2)], ["6-7"]),
        ([1, 2, 6, 4], (jump(3, 5),), (gap(2),), [("1-2", 2)], []),
        ([4, 5], (jump(1, 3),), (gap(0),), [("1-0", 3)], []),
        ([4, 5], (), (gap(0, sid=2),), [], ["1-3"]),
        ([1, 2, 5], (jump(3, 3),), (gap(2),), [("1-2", 1)], ["4-4"]),
        ([1, 2, 5], ({**jump(3, 4), "numbering": 1},), (gap("2-1"),), [("1-2-1", 2)], []),
        ([1, 3], (OVERSIZED,), (), [("", 1)], []),
        ([1, 4], (OVERSIZED,), (), [("", 1)], ["2-3"]),
    ],
)
def test_gaps_explain_what_they_name(
    tmp_path: Path,
    seqs: list[int],
    notes: tuple[dict[str, object], ...],
    gaps: tuple[Gap, ...],
    explained: list[tuple[str, int]],
    faults: list[str],
) -> None:
    """By the connection's own note, or the run behind the number; a late frame inside makes the rest smaller."""
    found, left = explain_holes(read(tmp_path, seqs, *notes), gaps)
    wanted = [
        Explanation(difference="wire: holes", gap_id=f"gap-{CONN}-{name}".rstrip("-"), size=size)
        for name, size in explained
    ]
    assert list(found) == wanted
    assert list(left) == [f"{CONN}: of sid 1 the numbers {run} are missing and no gap says so" for run in faults]


def test_the_ledger_balances_only_where_every_hole_is_explained(tmp_path: Path) -> None:
    """One gap of two is a difference that nobody explains."""
    readback = read(tmp_path, [1, 3, 5], jump(2, 2), jump(4, 4))

    def ledger_with(*gaps: Gap) -> tuple[bool, tuple[str, ...]]:
        day = TradingDay(
            env="e",
            date=DATE,
            state=DayState.ENDING,
            actor="test",
            gap_by_id={one.gap_id: one for one in gaps},
            first_seq=1,
            last_seq=1,
            updated_ns=1,
        )
        ledger, faults = draw_up(
            day, readback, BookFindings(0, 0, 0, 0, ()), published=dict(readback.archived), trades=NO_TRADES, why_not={}
        )
        assert (ledger.wire.distinct, ledger.wire.holes, ledger.wire.duplicates) == (3, 2, 0)
        return not ledger.unexplained(), faults

    assert ledger_with(gap(1), gap(3)) == (True, ())
    balanced, faults = ledger_with(gap(1))
    assert not balanced
    assert "4-4" in faults[0]


def test_ten_thousand_holes_stay_a_short_list(tmp_path: Path) -> None:
    """The first gaps are named, what the others explain is added up, and the sum is exact."""
    readback = read(tmp_path, list(range(1, 1_001, 2)))
    found, left = explain_holes(readback, tuple(gap(number) for number in range(1, 1_000, 2)))
    assert left == ()
    assert len(found) == MAX_EXPLANATIONS + 1
    assert sum(entry.size or 0 for entry in found) == 499
