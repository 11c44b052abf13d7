"""Days in fast time: a simulated exchange whose clock is led from day to day, and a real Dagster that has to keep up with it.

Nothing here asks for anything to be done about a day. It moves the exchange's clock, breaks things, waits for what the
journal says, and reads. Not here: what is expected of the days (`test_week`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from time import monotonic, sleep
from time import time as wall
from typing import Any

import psutil

from ssmd_dagster.archive.batch import Batch, scan
from ssmd_dagster.archive.layout import day_prefix
from ssmd_dagster.capture.setting import clock_path
from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.clock import ShiftedClock
from ssmd_dagster.day.events import Book, DayEvent, Gap, TradingDay
from ssmd_dagster.day.folding import fold
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.simulator.truth import Frame, read_truth
from ssmd_dagster.stores.connect import connect
from ssmd_dagster_tests.defs.dagster_instance import LOCATION, Instance
from ssmd_dagster_tests.faults.verdict import Day, Span, Verdict, judge
from ssmd_dagster_tests.house import House
from ssmd_dagster_tests.workflows.replaying import sim

ENV = "week"
PATIENCE_S = 400.0
POLL_S = 0.5
CHANNELS = ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"]
SERIES = ("KXFED", "KXPRESPERSON")
"""Markets that live for longer than the week: a leap of the clock lists and settles the others by hundreds at one instant."""
SCHEDULE = {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", "auto_roll": True}
BACK = 12
"""Days that the first one lies behind the host's date: Dagster's partitions end with that."""

TICKS = """query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) { ... on Sensor {
  sensorState { ticks(limit: 3) { timestamp status } } } } }"""


class Week:
    """A house with everything in it, and the exchange's clock in the hand of the test."""

    def __init__(self, folder: Path) -> None:
        self.house = House.build(folder)
        self._crash_file = folder / "crash-at"
        self.house.variables["SSMD_CRASH_FILE"] = str(self._crash_file)
        self.house.add(
            ENV,
            simulator={"seed": 11, "markets": 60, "rate_per_second": 400, "trades_per_day": 0},
            schedule=SCHEDULE,
            capture={"channels": CHANNELS, "markets": {"series": list(SERIES)}},
        )
        self.first = datetime.now(UTC).date() - timedelta(days=BACK)
        self.instance: Instance

    def up(self) -> None:
        """Bring everything up, as a machine does when it is switched on."""
        self.house.ssmd("up", ENV, "--detach")
        self.instance = Instance(self.house)

    def date(self, number: int) -> str:
        """Return the date of a day of the week, the first one being 0."""
        return (self.first + timedelta(days=number)).isoformat()

    def begin(self) -> None:
        """Lead the clock to the moment at which the first day is due, and wait until it is ACTIVE."""
        self.leap(0, "00:05:00")
        self.looked("moved_clocks")
        self.leap(0, "00:10:00")
        self.reaches(0, DayState.ACTIVE)

    def running(self) -> int:
        """Return the number of the day that is ACTIVE; where none ever was, the first one is begun."""
        current = self.book().current
        if current is None:
            self.begin()
            return 0
        number = (date.fromisoformat(current) - self.first).days
        self.reaches(number, DayState.ACTIVE)
        return number

    # the exchange

    def leap(self, number: int, at: str) -> None:
        """Set the exchange's clock to a time of a day."""
        moment = datetime.combine(date.fromisoformat(self.date(number)), time.fromisoformat(at), tzinfo=UTC)
        self.tell("clock", set=moment.isoformat())

    def tell(self, path: str, **order: Any) -> None:
        """Tell the exchange's control surface something."""
        sim(self.house, ENV, f"/sim/{path}", order)

    def true_trades(self, window: Span) -> dict[str, int]:
        """Return the ids of all trades that the exchange made in a window in the markets that are recorded, and their times."""
        start_s, end_s = window.start // 1_000_000_000, -(-window.end // 1_000_000_000)
        rows = [json.loads(line) for line in sim(self.house, ENV, f"/sim/truth?from={start_s}&to={end_s}").splitlines()]
        times = {row["trade_id"]: _ns(row["created_time"]) for row in rows if row["ticker"].startswith(SERIES)}
        return {number: at_ns for number, at_ns in times.items() if window.start <= at_ns < window.end}

    # the journal

    def events(self) -> list[tuple[int, DayEvent]]:
        """Return the whole journal."""

        async def read() -> list[tuple[int, DayEvent]]:
            env, secrets = load_registry(self.house.exchanges).get(ENV), load_secrets(self.house.home)
            async with connect(env, self.house.home, secrets, name="week") as stores:
                return [(stored.seq, stored.event) for stored in await stores.journal.read()]

        return asyncio.run(read())

    def book(self) -> Book:
        """Return the days as the journal has them."""
        return fold(self.events())

    def day(self, number: int) -> TradingDay | None:
        """Return one day, None where the journal has nothing of it."""
        return self.book().days.get(self.date(number))

    def reaches(self, number: int, *states: DayState) -> TradingDay:
        """Wait until a day is in one of the states."""

        def there() -> TradingDay | None:
            day = self.day(number)
            return day if day is not None and day.state in states else None

        found: TradingDay = self.wait(there, f"day {number} to be {' or '.join(states)}")
        return found

    def gaps(self, number: int) -> tuple[Gap, ...]:
        """Return the gaps of a day."""
        day = self.day(number)
        return () if day is None else day.gaps

    def is_ready(self, number: int) -> None:
        """Wait until a day that is rolled to only waits for its boundary."""

        def healthy() -> bool:
            day = self.day(number)
            return day is not None and any(step.step == "health" and step.finished_ns is not None for step in day.steps)

        self.wait(healthy, f"day {number} to be ready")

    def records(self, number: int, messages: int = 500) -> None:
        """Wait until so many messages of a day have come in."""

        async def count() -> int:
            env, secrets = load_registry(self.house.exchanges).get(ENV), load_secrets(self.house.home)
            async with connect(env, self.house.home, secrets, name="week") as stores:
                stats = await stores.cache.stats(self.date(number))
                return 0 if stats is None else stats.messages

        before = asyncio.run(count())
        self.wait(lambda: asyncio.run(count()) >= before + messages, f"{messages} messages of day {number}")

    def proves_books(self) -> None:
        """Wait until the exchange has sent a second snapshot of a book on its latest connection: only that proves one."""

        def proved() -> bool:
            frames = [one for one in read_truth(self.truth) if isinstance(one, Frame)]
            latest = max(one.connection for one in frames)
            sent = Counter(one.market for one in frames if (one.connection, one.type) == (latest, "orderbook_snapshot"))
            return max(sent.values(), default=0) > 1

        self.wait(proved, "a second snapshot of a book")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Return what `condition` returns once it is truthy; fail with what was waited for and how everything stands."""
        deadline = monotonic() + PATIENCE_S
        while not (value := condition()):
            if monotonic() > deadline:
                days = {name: (str(day.state), day.error) for name, day in self.book().days.items()}
                raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}: {days}; {self.runs()[:8]}")
            sleep(POLL_S)
        return value

    # Dagster

    def runs(self) -> list[dict[str, Any]]:
        """Return all runs, newest first, with their tags."""
        return self.instance.runs(ssmd__environment=ENV)

    def looked(self, sensor: str) -> None:
        """Wait until a sensor has looked at the clock as it stands now."""
        now_s, selector = wall(), {**LOCATION, "sensorName": sensor}

        def ticked() -> bool:
            ticks = self.instance.ask(TICKS, selector=selector)["sensorState"]["ticks"]
            return any(tick["timestamp"] > now_s and tick["status"] != "STARTED" for tick in ticks)

        self.wait(ticked, f"a tick of {sensor}")

    # breaking things

    @staticmethod
    def obstruct(folder: Path) -> None:
        """Put a file where a folder is wanted."""
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.write_text("in the way")

    @staticmethod
    def clear(folder: Path) -> None:
        """Take it away again."""
        folder.unlink()

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return the house's processes with a word in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SSMD_HOME") == str(self.house.home) and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, word: str) -> None:
        """Kill processes without a word."""
        killed = self.processes(word)
        assert killed, word
        for process in killed:
            process.kill()

    def crash_at(self, point: str) -> None:
        """Let the next process that reaches a named point die there, once."""
        self._crash_file.write_text(point)

    def crashed(self) -> bool:
        """Tell whether somebody has died at the named point."""
        return not self._crash_file.exists()

    def switch_off(self) -> None:
        """Kill everything but the exchange, which is no part of the machine."""
        for _ in range(3):  # whoever was just being started
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ssmd_dagster.simulator" not in " ".join(process.cmdline()):
                        process.kill()

    @contextlib.contextmanager
    def without_daemon(self) -> Iterator[None]:
        """Kill Dagster's daemon, and keep it down for as long."""
        self.kill("dagster._daemon")
        supervisor = connect_supervisor(self.house.home)
        asyncio.run(supervisor.stop("stack", "dagster-daemon"))
        yield
        asyncio.run(supervisor.start("stack", "dagster-daemon"))

    # reading

    def history(self) -> list[dict[str, Any]]:
        """Return `ssmd day history` as JSON."""
        days: list[dict[str, Any]] = self.house.json("day", "history", ENV, "--limit", "40")["days"]
        return days

    def folder(self, date: str) -> Path:
        """Return the folder of a day's raw objects."""
        return self.house.home / "objects" / f"raw-{ENV}" / day_prefix("kalshi", date)

    def table(self, date: str, name: str) -> Path:
        """Return a table of a day."""
        folder = self.house.home / "objects" / f"normalized-{ENV}" / "kalshi" / "v1" / name / date.replace("-", "/")
        return max(folder.glob("data*.parquet"))

    def window(self, date: str) -> Span:
        """Return the window of a day that is sealed."""
        manifest = json.loads(max(self.folder(date).glob("manifest*.json")).read_text())
        return Span(manifest["open_ns"], manifest["close_ns"])

    def stored_messages(self, date: str) -> int:
        """Return how many records the store holds of a day, the session's own left out, by the bytes themselves."""
        return sum(
            item.header.records
            for path in self.folder(date).glob("*.jsonl.zst")
            for item in scan(path.read_bytes())
            if isinstance(item, Batch) and item.header.channel != SESSION
        )

    def true_changes(self, window: Span) -> int:
        """Return how many changes of order books the exchange told within a window, on all connections."""
        frames = (one for one in read_truth(self.truth) if isinstance(one, Frame) and one.type == "orderbook_delta")
        return sum(window.start <= frame.event_ns < window.end for frame in frames)

    @property
    def truth(self) -> Path:
        """Return the folder of the exchange's log."""
        return self.house.home / "simulator" / ENV / "truth"

    def judged(self, shown: dict[str, dict[str, Any]]) -> Verdict:
        """Hold the days that are sealed (as `ssmd day history` has them) against the log of what was sent.

        What the connection of the day after them was sent before its own window began is nobody's loss: its spool says which.
        """
        days = [
            Day(shown[name], self.window(name), {path.name: path.read_bytes() for path in self.folder(name).iterdir()})
            for name in sorted(shown)
        ]
        following = (date.fromisoformat(max(shown)) + timedelta(days=1)).isoformat()
        spool = spool_dir(self.house.home, ENV, following).glob("*.batches")
        spooled = {f"{path.stem}.jsonl.zst": path.read_bytes() for path in spool}
        close_ns = days[-1].window.end
        nothing: dict[str, Any] = {"gaps": [], "ledger": None}
        return judge(self.truth, [*days, Day(nothing, Span(close_ns, close_ns), spooled)])

    def now_ns(self) -> int:
        """Return the exchange's time."""
        return ShiftedClock(clock_path(self.house.home, ENV))()


def _ns(text: str) -> int:
    """Return an RFC 3339 time with microseconds in nanoseconds since the epoch."""
    moment = datetime.fromisoformat(text)
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1_000
