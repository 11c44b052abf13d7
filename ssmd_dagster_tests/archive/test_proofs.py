"""Books are proved where nothing is missing, unknown where something is, and a difference is named."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.proofs import BookFindings, BookProofs
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE
from ssmd_dagster_tests.capture.recordings import Recording, build_segments

DATA = project_dir().parent / "shared" / "kalshi" / "data"
Frame = dict[str, Any]


class Exchange:
    """Sends one subscription's frames as the exchange numbers them, and knows the books."""

    def __init__(self, seed: int = 1) -> None:
        self.frames: list[Frame] = []
        self.books: dict[str, dict[tuple[str, int], int]] = {}
        self._random = random.Random(seed)

    def _send(self, kind: str, msg: dict[str, Any], **outside: Any) -> None:
        self.frames.append({"type": kind, "sid": 2, "seq": len(self.frames) + 1, **outside, "msg": msg})

    def snapshot(self, ticker: str, **outside: Any) -> None:
        """Send a market's book; a side without levels is not there."""
        msg: dict[str, Any] = {"market_ticker": ticker}
        for side in ("yes", "no"):
            levels = sorted((p, s) for (where, p), s in self.books.setdefault(ticker, {}).items() if where == side)
            if levels:
                msg[f"{side}_dollars_fp"] = [[f"0.{price:02d}00", f"{size / 100:.2f}"] for price, size in levels]
        self._send("orderbook_snapshot", msg, **outside)

    def delta(self, ticker: str) -> None:
        """Send a change that leaves no level below 0."""
        book = self.books[ticker]
        where = (self._random.choice(("yes", "no")), self._random.randrange(1, 99))
        change = max(self._random.randrange(-900, 900), -book.get(where, 0)) or 100
        book[where] = book.get(where, 0) + change
        if not book[where]:
            del book[where]
        msg = {"market_ticker": ticker, "side": where[0], "price_dollars": f"0.{where[1]:02d}00"}
        self._send("orderbook_delta", {**msg, "delta_fp": f"{change / 100:.2f}", "ts_ms": 1})

    def ok(self, tickers: Sequence[str]) -> None:
        """Answer a command with the subscription's markets."""
        self._send("ok", {"market_tickers": list(tickers)}, id=9)


def run(folder: Path, frames: Sequence[Frame | bytes], order: Sequence[int] | None = None) -> BookFindings:
    """Archive frames, a few a batch and (by `order`) the batches in another order, and fold them."""
    recording = Recording()
    recording.recorder._channel_of_type = CHANNEL_OF_TYPE
    for number, frame in enumerate(frames):
        recording.raw(frame if isinstance(frame, bytes) else json.dumps(frame).encode())
        if number % 4 == 3:
            recording.recorder.flush()
    recording.end()
    batches = recording.batches()
    if order is not None:
        batches = [batches[place] for place in sorted(range(len(batches)), key=lambda i: order[i % len(order)])]
    segments = build_segments(folder, batches, per_segment=3)
    proofs = BookProofs("kalshi")
    for _, (channel, _, data) in sorted(segments.items(), key=lambda item: (item[1][0] != "session", item[0])):
        proofs.feed(channel, data)
    return proofs.finish()


def busy(deltas: int = 40, seed: int = 1) -> Exchange:
    """Two markets with snapshots at the beginning, on the way and at the end."""
    exchange = Exchange(seed)
    for ticker in ("KX-1", "KX-2"):
        exchange.snapshot(ticker)
    for number in range(deltas):
        exchange.delta(("KX-1", "KX-2")[number % 2])
        if number % 15 == 14:
            exchange.ok(["KX-1", "KX-2"])
            exchange.snapshot("KX-1", id=3)
    for ticker in ("KX-1", "KX-2"):
        exchange.snapshot(ticker, id=4)
    return exchange


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.integers(0, 1_000), st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_a_clean_book_is_proved_in_whatever_order_its_batches_lie(tmp_path: Path, seed: int, order: list[int]) -> None:
    """Numbers that answers in `session` take are no holes."""
    assert run(tmp_path, busy(seed=seed).frames, order) == BookFindings(4, 0, 2, 46, ())


def test_a_wrong_level_is_named(tmp_path: Path) -> None:
    """Connection, subscription, number, market, side, price and both sizes."""
    exchange = busy()
    exchange.frames[-1]["msg"]["yes_dollars_fp"] = [["0.0100", "7.00"]]
    exchange.frames[-1]["msg"].pop("no_dollars_fp", None)
    found = run(tmp_path, exchange.frames)
    assert (found.points, found.differing) == (4, 1)
    assert found.faults[0].startswith("812-a-0: order book at sid 2 seq 48: KX-2: ")
    assert "in the snapshot" in found.faults[0]


@pytest.mark.parametrize("lost", range(2, 42, 3))
def test_behind_a_hole_books_are_unknown_until_their_next_snapshots(tmp_path: Path, lost: int) -> None:
    """No difference is claimed where a delta is missing; what is known again is proved again."""
    frames = busy().frames
    found = run(tmp_path, frames[:lost] + frames[lost + 1 :])
    assert found.differing == 0
    assert 0 < found.points < 4 + (frames[lost]["type"] == "ok") * 9


def test_repeated_and_late_frames_change_nothing(tmp_path: Path) -> None:
    """A frame that comes twice is folded once; neighbours in the wrong order are folded in the right one."""
    frames = busy().frames
    again = [*frames[:20], frames[10], frames[19], frames[21], frames[20], *frames[22:]]
    assert run(tmp_path, again).differing == 0


def test_a_market_that_left_the_subscription_is_unknown_when_it_comes_back(tmp_path: Path) -> None:
    """What happened to its book in between was not sent."""
    exchange = busy(10)
    exchange.ok(["KX-1"])
    exchange.books["KX-2"] = {("yes", 5): 100}
    exchange.ok(["KX-1", "KX-2"])
    exchange.snapshot("KX-2")
    assert run(tmp_path, exchange.frames).differing == 0
    without_answers = [frame for frame in exchange.frames if frame["type"] != "ok"]
    for seq, frame in enumerate(without_answers, start=1):
        frame["seq"] = seq
    assert run(tmp_path, without_answers).differing == 1


def test_a_level_below_nothing_is_named(tmp_path: Path) -> None:
    """More was taken away than there was."""
    exchange = busy(0)
    msg = {"market_ticker": "KX-1", "side": "no", "price_dollars": "0.0500", "delta_fp": "-1.00"}
    exchange._send("orderbook_delta", msg)
    assert run(tmp_path, exchange.frames).faults == (
        "812-a-0: order book at sid 2 seq 5: KX-1: the level no 0.0500 falls to -1.00",
    )


def test_the_emptying_of_a_closed_market_is_a_proof_point(tmp_path: Path) -> None:
    """Deltas take every level away, and the snapshot that nobody asked for has no side at all."""
    exchange = busy(4)
    for (side, price), size in list(exchange.books["KX-1"].items()):
        msg = {
            "market_ticker": "KX-1",
            "side": side,
            "price_dollars": f"0.{price:02d}00",
            "delta_fp": f"-{size / 100:.2f}",
        }
        exchange._send("orderbook_delta", msg)
    exchange.books["KX-1"].clear()
    exchange.snapshot("KX-1")
    found = run(tmp_path, exchange.frames)
    assert (found.points, found.differing) == (3, 0)


def test_frames_of_before_2026_03_are_folded(tmp_path: Path) -> None:
    """Integer cents and whole contracts."""

    def frame(seq: int, kind: str, **msg: Any) -> Frame:
        return {"type": kind, "sid": 2, "seq": seq, "msg": {"market_ticker": "KX-1", **msg}}

    frames = [
        frame(1, "orderbook_snapshot", yes=[[8, 300]], no=[[50, 5]]),
        frame(2, "orderbook_delta", side="yes", price=8, delta=-100),
        frame(3, "orderbook_snapshot", yes=[[8, 200]], no=[[50, 5]]),
        frame(4, "orderbook_snapshot", yes=[[8, 201]], no=[[50, 5]]),
    ]
    found = run(tmp_path, frames)
    assert (found.points, found.differing) == (2, 1)
    assert "yes 0.0800 is 200.00 folded and 201.00 in the snapshot" in found.faults[0]


def test_rounded_frames_of_the_older_shape_are_not_added_to_exact_books(tmp_path: Path) -> None:
    """A book is unknown from the first message of the other shape to the next snapshot of that shape."""
    exchange = busy()
    ticker = "KX-1"

    def old(kind: str, **msg: Any) -> Frame:
        return {"type": kind, "sid": 2, "seq": len(exchange.frames) + 1, "msg": {"market_ticker": ticker, **msg}}

    exchange.frames.append(old("orderbook_delta", side="yes", price=8, delta=-900))
    exchange.snapshot(ticker, id=5)
    exchange.delta(ticker)
    exchange.frames.append(old("orderbook_snapshot", yes=[[8, 300]]))
    exchange.delta(ticker)
    exchange.snapshot(ticker, id=6)
    plain = run(tmp_path, busy().frames)
    found = run(tmp_path, exchange.frames)
    assert (found.points, found.differing, found.faults) == (plain.points, 0, ())


def test_frames_that_cannot_be_read_make_books_unknown(tmp_path: Path) -> None:
    """A delta whose size is no number may have changed anything; junk without a number changes nothing."""
    frames: list[Frame | bytes] = [*busy().frames]
    delta = json.loads(json.dumps(frames[30]))
    delta["msg"]["delta_fp"] = "much"
    found = run(tmp_path, [*frames[:30], delta, b'{"type":"orderbook_delta","sid":2,"seq":', *frames[31:]])
    assert found.differing == 0
    assert found.points < 4


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder with real captures is not there")
def test_real_captures_are_folded_without_a_fault(tmp_path: Path) -> None:
    """Three captures of 2026: every frame is read."""
    for name in ("ws-sports-2026-08", "ws-kxbtc-2026-04", "ws-kxbtc15m-2026-05"):
        lines = (DATA / f"{name}.frames.jsonl").read_text().splitlines()
        (tmp_path / name).mkdir()
        found = run(tmp_path / name, [json.loads(line)["raw"].encode() for line in lines])
        assert found.faults == ()
        assert found.records > 60
