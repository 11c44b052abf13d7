"""What a simulator keeps in its home: the truth log, the list of trades, keys and the clock."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.clock import ShiftedClock, system_clock
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.simulator import tradebook, truth
from ssmd_dagster.simulator.keys import KeyRing
from ssmd_dagster.simulator.playback import Recording
from ssmd_dagster.simulator.shift import SimulatorClock
from ssmd_dagster.simulator.tradebook import TradeBook
from ssmd_dagster.simulator.truth import Frame, Note, TruthLog, read_truth

KEYS = st.tuples(st.integers(0, (1 << 40) - 1), st.integers(0, (1 << 16) - 1), st.sampled_from(range(len(truth.TYPES))))


@given(st.lists(st.lists(st.tuples(KEYS, st.integers(0, 5)), min_size=1, max_size=20), max_size=10), st.data())
@settings(max_examples=40, deadline=None)
def test_the_log_reads_as_written_and_a_torn_tail_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[tuple[tuple[int, int, int], int]]], data: st.DataObject
) -> None:
    """All frames come back in order; cutting the file anywhere leaves a prefix of them and no error."""
    folder = tmp_path_factory.mktemp("truth")
    log = TruthLog(folder, 1, {number: f"T-{number}" for number in range(1, 6)})
    log.note("started", 1)
    wanted = []
    for number, block in enumerate(blocks):
        digests = [hashlib.sha256(f"{number}/{index}".encode()).digest() for index in range(len(block))]
        keys = [seq << 24 | sid << 8 | kind for (seq, sid, kind), _ in block]
        log.sent(7, 100 + number, number, number % 2, keys, [market for _, market in block], digests)
        for ((seq, sid, kind), market), digest in zip(block, digests, strict=True):
            name = f"T-{market}" if market else ""
            wanted.append(Frame(7, sid, seq, 100 + number, number, truth.TYPES[kind], name, digest, number % 2))
    log.close()
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entries = list(read_truth(folder))
    assert entries == [Note("started", 1, {}), *wanted]
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    torn = list(read_truth(folder))
    assert torn == entries[: len(torn)]


def test_the_log_begins_another_file_when_one_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are written again in each file, so that each can be read alone."""
    monkeypatch.setattr(truth, "_ROTATE_BYTES", 1_000)
    log = TruthLog(tmp_path, 1, {1: "A"})
    for number in range(100):
        log.sent(1, number, 0, 0, [number << 24], [1], [bytes(32)])
    log.close()
    assert len(list(tmp_path.iterdir())) > 2
    assert [entry.seq for entry in read_truth(tmp_path) if isinstance(entry, Frame)] == list(range(100))
    for path in tmp_path.iterdir():
        assert all(entry.market == "A" for entry in truth.read_file(path) if isinstance(entry, Frame))


def test_the_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest whole files go, and the log says which; the newest frames are there."""
    monkeypatch.setattr(truth, "_ROTATE_BYTES", 1_000)
    log = TruthLog(tmp_path, 1, {}, keep_bytes=5_000)
    for number in range(500):
        log.sent(1, number, 0, 0, [number << 24], [0], [bytes(32)])
    log.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8_000
    entries = list(read_truth(tmp_path))
    assert [entry.note for entry in entries if isinstance(entry, Note)].count("pruned") >= 2
    frames = [entry.seq for entry in entries if isinstance(entry, Frame)]
    assert frames == list(range(frames[0], 500))


def test_trades_are_listed_newest_first_by_page_and_window(tmp_path: Path) -> None:
    """Pages join without a hole or a repetition, by ticker and by time, and over a restart."""
    book = TradeBook(tmp_path)
    for number in range(1_000):
        book.add(number * 500_000, f"T-{number % 7}", b'{"n":%d}' % number)
    book.close()
    book = TradeBook(tmp_path)
    for number in range(1_000, 1_100):
        book.add(number * 500_000, f"T-{number % 7}", b'{"n":%d}' % number)

    def listed(**filters: object) -> list[int]:
        rows: list[int] = []
        cursor = None
        while True:
            options: dict[str, object] = {"ticker": None, "min_us": None, "max_us": None, "limit": 64, **filters}
            page, cursor = book.page(cursor=cursor, **options)  # type: ignore[arg-type]
            rows += [json.loads(row)["n"] for row in page]
            if cursor is None:
                return rows

    assert listed() == list(range(1_099, -1, -1))
    assert listed(limit=1_100) == listed()
    assert listed(min_us=100_000_000, max_us=101_000_000) == [202, 201, 200]
    assert listed(ticker="T-3") == [number for number in range(1_099, -1, -1) if number % 7 == 3]
    assert listed(ticker="T-3", max_us=5_000_000) == [10, 3]
    assert listed(ticker="nobody") == []
    book.close()


def test_a_clock_that_was_set_back_loses_no_trade(tmp_path: Path) -> None:
    """Trades of an earlier time are found by their time, though they were added later."""
    book = TradeBook(tmp_path)
    for second in (1_000, 1_001, 500, 501, 2_000):
        book.add(second * 1_000_000, "A", b'{"s":%d}' % second)
    rows, cursor = book.page(ticker=None, min_us=400_000_000, max_us=600_000_000, limit=10, cursor=None)
    assert [json.loads(row)["s"] for row in rows] == [501, 500]
    assert cursor is None
    assert len(book) == 5
    book.close()


def test_a_killed_process_leaves_a_list_that_can_be_read(tmp_path: Path) -> None:
    """Rows without an index entry and half an entry are dropped, and new trades follow cleanly."""
    book = TradeBook(tmp_path)
    for number in range(10):
        book.add(number, "A", b'{"n":%d}' % number)
    book.close()
    (rows,) = tmp_path.glob("rows-*")
    (index,) = tmp_path.glob("index-*")
    rows.write_bytes(rows.read_bytes() + b'{"n":99')
    index.write_bytes(index.read_bytes()[:-5])
    book = TradeBook(tmp_path)
    book.add(50, "A", b'{"n":50}')
    page, _ = book.page(ticker="A", min_us=None, max_us=None, limit=100, cursor=None)
    assert [json.loads(row)["n"] for row in page] == [50, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    book.close()


def test_old_trades_leave_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only about the newest so many are kept."""
    monkeypatch.setattr(tradebook, "ROWS_PER_FILE", 100)
    monkeypatch.setattr(tradebook, "TRADES_KEPT", 300)
    book = TradeBook(tmp_path)
    for number in range(1_000):
        book.add(number, "A", b"{}")
        if number % 50 == 49:
            book.flush()
    assert 300 <= len(book) <= 400
    assert len(list(tmp_path.glob("rows-*"))) <= 5
    book.close()


def test_a_home_keeps_its_key_and_takes_others(tmp_path: Path) -> None:
    """One key is made in an empty home; a second start makes none; a registered one is accepted after a restart."""
    ring = KeyRing(tmp_path, system_clock, kind="rsa")
    key_id = (tmp_path / "key_id").read_text()
    assert stat.S_IMODE((tmp_path / "private_key.pem").stat().st_mode) == 0o600
    pem = (tmp_path / "keys" / f"{key_id}.pem").read_bytes()
    ring.register("another-key", pem)
    again = KeyRing(tmp_path, system_clock)
    assert (tmp_path / "key_id").read_text() == key_id
    assert sorted(again.ids()) == sorted([key_id, "another-key"])
    with pytest.raises(ConfigurationError):
        ring.register("../escape", pem)
    with pytest.raises(ConfigurationError):
        ring.register("third", b"not a key")


def test_the_clock_outlives_the_process_and_others_read_it(tmp_path: Path) -> None:
    """The offset is in the file at once, and every process of the environment moves with it."""
    clock = SimulatorClock(tmp_path / "clock.json")
    clock.shift_to(86_400 * 10**9)
    assert SimulatorClock(tmp_path / "clock.json").offset_ns == 86_400 * 10**9
    assert abs(ShiftedClock(tmp_path / "clock.json")() - clock()) < 10**9
    assert json.loads((tmp_path / "clock.json").read_bytes()) == {"offset_ns": 86_400 * 10**9}


def test_a_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    """The line is named."""
    path = tmp_path / "x.frames.jsonl"
    path.write_text('{"recv_ns": 1, "raw": "{}"}\n{"raw": 5}\n')
    with pytest.raises(ConfigurationError, match="line 2"):
        Recording(path, 1.0)
