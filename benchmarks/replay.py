"""How fast a missed day comes back: `python -m benchmarks replay`; prints a table with its targets, writes nothing else.

A day of the simulated exchange's past through the real commands, without the exchange's rate limit: fetched over REST, recorded,
archived, read back, held against the exchange's list, made into tables. Then the fetching of a day with 20 requests a second, and
the fold of ten years of days and its copy in the cache. Wants two quiet cores and about three minutes.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psutil
from msgspec.structs import replace

from ssmd_dagster.day.events import EMPTY_BOOK, Book, TradingDay
from ssmd_dagster.day.folding import fold, fold_day, new_event
from ssmd_dagster.day.payloads import ChannelCount, Checkpoint, Completed, EndRequested, Started, StartRequested, Step
from ssmd_dagster.day.states import EventName
from ssmd_dagster.stores.folded import pack, unpack
from ssmd_dagster_tests.house import House

ENV = "bench"
TRADES, LIMITED_TRADES = 5_000_000, 1_000_000
RATE = 20
YEARS = 10
MINUTES = 1_440
MOST_MIB = 400
NORMALISER = "archive.normalize"
OURS = ("capture.replayer", "capture.archiver", "capture.audit", "cli.main", NORMALISER)


def row(name: str, value: str, target: str = "", met: bool | None = None, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {name} | {value} | {target} | {'' if met is None else 'yes' if met else '**no**'} | {note} |", flush=True)


class Watch(threading.Thread):
    """Looks at the memory of the project's processes of one home, several times a second."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, int] = {}
        self.tables_s = 0.0
        self._home, self._stop_it = str(home), threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        first_seen: float | None = None
        while not self._stop_it.wait(0.2):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                line = " ".join(process.info["cmdline"] or ())
                name = next((name for name in OURS if f"ssmd_dagster.{name} " in f"{line} "), None)
                memory = process.info.get("memory_info")
                if name is None or memory is None or not self._is_ours(process):
                    continue
                self.most[name] = max(self.most.get(name, 0), memory.rss)
                if name == NORMALISER:
                    first_seen = first_seen or time.monotonic()
                    self.tables_s = time.monotonic() - first_seen

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("SSMD_HOME") == self._home
        except psutil.Error:
            return False

    def end(self) -> None:
        """Stop looking."""
        self._stop_it.set()
        self.join()


def replay(trades: int, limit: int) -> None:
    """Replay one past day and print how long its parts took; where the exchange limits the rate, fetch it only."""
    with tempfile.TemporaryDirectory() as folder:
        house = House.build(Path(folder))
        feed = house.exchanges / "feeds" / "kalshi.yaml"
        rate = limit or 100_000
        feed.write_text(feed.read_text().replace("rate_limit_per_second: 20", f"rate_limit_per_second: {rate}"))
        simulated = {"markets": 200, "rate_per_second": 1, "trades_per_day": trades, "reads_per_second": limit}
        capture = {"channels": ["trade"], "markets": {"all": True, "mve": "include"}, "stream_limit_mb": 1024}
        house.add(ENV, simulator={"seed": 7, **simulated}, capture=capture)
        watch = Watch(house.home)
        try:
            house.up(ENV)
            day = (date.fromisoformat(house.today()) - timedelta(days=3)).isoformat()
            watch.start()
            began = time.perf_counter()
            house.ssmd("day", "start", ENV, "--date", day)
            active_s = time.perf_counter() - began
            complete_s = None
            if not limit:
                house.ssmd("day", "end", ENV, "--date", day, check=None)
                complete_s = time.perf_counter() - began
            events = [json.loads(line) for line in house.ssmd("day", "events", ENV, "--json").stdout.splitlines()]
            shown = house.day(ENV, day)
        finally:
            watch.end()
            house.down()
    detail = [event["data"].get("detail", {}).get("text", "") for event in events if event["event"] == "step_finished"]
    said = next(text for text in detail if "trades/s" in text)
    count = int(said.split()[0].replace(",", ""))
    steps = {step["step"]: (step["finished_ns"] - step["started_ns"]) / 1e9 for step in shown["steps"]}
    name = f"{count:,} trades, {'no limit' if not limit else f'{limit} requests/s'}"
    if complete_s is None:
        fetched, most = count / (steps["secmaster"] + steps["connector"]), limit * 1_000
        row(
            f"{name}: REST to spool and stream",
            f"{fetched:,.0f} trades/s",
            f"{most * 0.95:,.0f}",
            fetched >= most * 0.95,
            said,
        )
    else:
        proved = count / (complete_s - watch.tables_s)
        parts = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in steps.items() if seconds >= 0.1)
        row(f"{name}: to ACTIVE", f"{count / active_s:,.0f} trades/s", "", None, said)
        row(
            f"{name}: REST to verified archive",
            f"{proved:,.0f} trades/s",
            "100,000",
            proved >= 100_000,
            "both commands",
        )
        row(
            f"{name}: with its tables",
            f"{count / complete_s:,.0f} trades/s",
            "",
            None,
            f"tables {watch.tables_s:.1f} s; {parts}",
        )
        row(f"{name}: condition", shown["condition"], "", None, "; ".join(shown["condition_reasons"]))
    for process, most_bytes in sorted(watch.most.items()):
        row(f"{name}: memory of {process}", f"{most_bytes >> 20} MiB", f"{MOST_MIB}", most_bytes < MOST_MIB << 20)


def fold_years() -> None:
    """Fold the journal of ten years of days, as every command does first."""
    events, day, seq = [], None, 0
    first = date(2016, 1, 1)
    for number in range(YEARS * 365):
        text = (first + timedelta(days=number)).isoformat()
        day = None
        script: list[tuple[EventName, Any]] = [
            (EventName.DEFINED, None),
            (EventName.START_REQUESTED, StartRequested(mode="live")),
            *(
                (kind, Step(step=name))
                for name in "abcde"
                for kind in (EventName.STEP_STARTED, EventName.STEP_FINISHED)
            ),
            (EventName.STARTED, Started(markets=10)),
            (EventName.END_REQUESTED, EndRequested()),
            *(
                (kind, Step(step=name))
                for name in "fghij"
                for kind in (EventName.STEP_STARTED, EventName.STEP_FINISHED)
            ),
            (EventName.COMPLETED, Completed(condition="available", messages=1, gaps=0, archive_url="x")),
        ]
        for event, data in script:
            seq += 1
            epoch = None if day is None else day.epoch
            spoken = None if event is EventName.START_REQUESTED else epoch
            made = new_event(
                day, event, id=str(seq), env=ENV, date=text, epoch=spoken, at_ns=seq, actor="bench", data=data
            )
            day = fold_day(day, made, seq)
            events.append((seq, made))
    began = time.perf_counter()
    book = fold(events, EMPTY_BOOK)
    took_s = time.perf_counter() - began
    last: TradingDay = book.days[max(book.days)]
    row(
        f"fold of {len(book.days):,} days",
        f"{took_s:.2f} s",
        "1 s",
        took_s < 1,
        f"{len(events):,} events, {last.state}",
    )


def copy_of_years() -> None:
    """Take ten years of days, a checkpoint a minute in each, from the copy of their fold that the cache keeps."""
    count = ChannelCount(records=1_000_000, batches=9_000, bytes=30_000_000, last_n=10**9)
    channels = dict.fromkeys(("trade", "orderbook_delta", "ticker", "market_lifecycle_v2", "other", "session"), count)
    day, seq = None, 0
    script: list[tuple[EventName, Any]] = [
        (EventName.DEFINED, None),
        (EventName.START_REQUESTED, StartRequested(mode="live")),
        (EventName.STARTED, Started(markets=10)),
        *(
            (EventName.CHECKPOINT, Checkpoint(component=name, connections={f"{minute // 360}-{name}-0": channels}))
            for minute in range(MINUTES)
            for name in ("connector-0", "connector-1")
        ),
    ]
    began = time.perf_counter()
    for event, data in script:
        seq += 1
        spoken = None if day is None or event is EventName.START_REQUESTED else day.epoch
        made = new_event(
            day, event, id=str(seq), env=ENV, date="2016-01-01", epoch=spoken, at_ns=seq, actor="bench", data=data
        )
        day = fold_day(day, made, seq)
    took_s = time.perf_counter() - began
    assert day is not None
    row("checked and folded", f"{seq / took_s:,.0f} events/s", "", None, "checkpoints of two connectors")
    days = {}
    for number in range(YEARS * 365):
        text = (date(2016, 1, 1) + timedelta(days=number)).isoformat()
        days[text] = replace(day, date=text)
    raw = pack(Book(env=ENV, days=days, tip_seq=seq), "ab")
    began = time.perf_counter()
    folded = unpack(raw)
    took_s = time.perf_counter() - began
    assert folded is not None
    row(
        f"{len(folded.book.days):,} days from the cache's copy",
        f"{took_s:.2f} s",
        "1 s",
        took_s < 1,
        f"instead of {seq * len(days):,} events",
    )


def main() -> None:
    """Print the table."""
    print("| what | measured | target | met | |\n|---|---|---|---|---|")
    fold_years()
    copy_of_years()
    replay(TRADES, 0)
    replay(LIMITED_TRADES, RATE)


if __name__ == "__main__":
    main()
