"""The judge by itself: each of its counts is 0 for a clean day, and turned red by one seeded fault."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.simulator.truth import TYPE_CODE, TruthLog
from ssmd_dagster_tests.capture.recordings import START_NS, Recording, build_segments
from ssmd_dagster_tests.faults.verdict import NS, Day, Span, Verdict, judge, judge_journal, minus, union

FRAMES = 60
STEP_NS = 100_000_000
"""Between two frames; the recorder's clock moves on by this for each too."""


class Rehearsal:
    """An exchange that sent `FRAMES` frames on one connection, and a recorder that kept what a test lets it keep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recording = Recording("3-a-0")
        self.payloads = [b'{"type":"trade","sid":1,"seq":%d,"msg":{}}\n' % (n + 1) for n in range(FRAMES)]
        self.gaps: list[dict[str, Any]] = []
        self.closed_ns = START_NS + FRAMES * STEP_NS

    def write_truth(self) -> None:
        """Write the log of the truth."""
        log = TruthLog(self.folder / "truth", START_NS, {1: "KX-1"})
        log.note("opened", START_NS, connection=1)
        for n, payload in enumerate(self.payloads):
            key = (n + 1) << 24 | 1 << 8 | TYPE_CODE["trade"]
            log.sent(1, START_NS + n * STEP_NS, 0, 0, [key], [1], [hashlib.sha256(payload).digest()])
        log.note("closed", self.closed_ns, connection=1, frames=FRAMES)
        log.note("stopped", START_NS + FRAMES * STEP_NS)
        log.close()

    def judge(self, kept: list[bytes]) -> Verdict:
        """Record `kept`, archive it, and judge the day."""
        self.write_truth()
        self.recording.begin()
        for payload in kept:
            place = self.payloads.index(payload) if payload in self.payloads else 0
            self.recording.clock.now_ns = START_NS + place * STEP_NS + 1_000_000
            self.recording.raw(payload)
        self.recording.end()
        segments = build_segments(self.folder, self.recording.batches())
        objects = {key.rsplit("/", 1)[1]: data for key, (_, _, data) in segments.items()}
        shown = {"gaps": self.gaps, "ledger": None}
        return judge(self.folder / "truth", [Day(shown, Span(START_NS, START_NS + FRAMES * STEP_NS), objects)])


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    """A rehearsal in a folder of its own."""
    return Rehearsal(tmp_path)


def _gap(start: int, end: int, cause: str = "process_crash") -> dict[str, Any]:
    return {
        "gap_id": "gap-3-a-0",
        "cause": cause,
        "from_ns": START_NS + start * STEP_NS,
        "to_ns": START_NS + end * STEP_NS,
        "scope": {"conn": "3-a-0"},
    }


def test_a_clean_day_is_green(rehearsal: Rehearsal) -> None:
    """Everything that was sent was looked at, and no count is raised."""
    verdict = rehearsal.judge(rehearsal.payloads)
    assert (verdict.sent, verdict.archived) == (FRAMES, FRAMES)
    assert verdict.faults() == {}
    assert (verdict.lost_declared, verdict.declared_s, verdict.down_s) == (0, 0, 0)


@pytest.mark.parametrize("declared", [True, False])
def test_a_missing_frame_is_declared_or_not(rehearsal: Rehearsal, declared: bool) -> None:
    """Ten frames are missing; with a gap over them they count as declared, and one frame beside it does not."""
    if declared:
        rehearsal.gaps = [_gap(19, 30)]
    verdict = rehearsal.judge(rehearsal.payloads[:20] + rehearsal.payloads[30:50] + rehearsal.payloads[51:])
    assert (verdict.lost_declared, verdict.lost_undeclared) == ((10, 1) if declared else (0, 11))
    assert set(verdict.faults()) == {"lost_undeclared"}


def test_altered_repeated_and_swapped_frames_are_found(rehearsal: Rehearsal) -> None:
    """One of each."""
    kept = list(rehearsal.payloads)
    kept[5] = kept[5].replace(b"trade", b"TRADE")
    kept[10], kept[11] = kept[11], kept[10]
    kept.insert(40, kept[40])
    verdict = rehearsal.judge(kept)
    assert verdict.faults() == {
        "lost_undeclared": 1,
        "byte_mismatch": 1,
        "order_violations": 1,
        "duplicates": 1,
    }


def test_frames_of_a_connection_that_never_was_are_phantoms(rehearsal: Rehearsal) -> None:
    """Nothing of what is archived was sent."""
    verdict = rehearsal.judge([b'{"type":"trade","sid":9,"seq":9,"msg":{}}'])
    assert (verdict.phantoms, verdict.lost_undeclared) == (1, FRAMES)


@pytest.mark.parametrize("declared", [True, False])
def test_a_time_without_a_connection_has_to_be_declared(rehearsal: Rehearsal, declared: bool) -> None:
    """The connection closed two seconds before the day's end, and no other came."""
    rehearsal.payloads = rehearsal.payloads[: FRAMES - 20]
    rehearsal.closed_ns = START_NS + (FRAMES - 20) * STEP_NS
    if declared:
        rehearsal.gaps = [_gap(FRAMES - 21, FRAMES)]
    verdict = rehearsal.judge(rehearsal.payloads)
    assert verdict.down_s == 2
    assert verdict.undeclared_s == (0 if declared else 2)


def test_the_journal_is_judged() -> None:
    """A transition from a state that the day was not in, an epoch that starts twice, and a cache that says otherwise."""
    verdict = Verdict()
    event = {"date": "2025-12-14", "epoch": 2, "event": "started", "from": "STARTING", "to": "ACTIVE"}
    events = [{**event, "event": "start_requested", "from": None, "to": "STARTING"}, event, event]
    judge_journal(list(enumerate(events, 1)), {"2025-12-14": "ENDING"}, verdict)
    assert verdict.faults() == {"illegal_transitions": 1, "double_transitions": 1, "cache_differs": 1}


def test_spans() -> None:
    """Unions merge what touches, differences leave what no other covers."""
    assert union([Span(5, 7), Span(0, 2), Span(2, 3), Span(6, 9), Span(4, 4)]) == [Span(0, 3), Span(5, 9)]
    assert minus([Span(0, 10)], [Span(2, 3), Span(5, NS)]) == [Span(0, 2), Span(3, 5)]
