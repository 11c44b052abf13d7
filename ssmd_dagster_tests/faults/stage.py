"""A trading day on a stage: real processes, servers of its own behind a network that can be broken, and everything's measure.

A `Stage` runs one scenario: it brings the house up, starts the day, lets the scenario break things, and writes the
`fault_report.json` of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import os
import random
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis

from ssmd_dagster.archive.layout import day_prefix
from ssmd_dagster.capture.setting import Setting, clock_path
from ssmd_dagster.clock import ShiftedClock
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.secrets import Secrets, load_secrets
from ssmd_dagster.stores.connect import Stores, connect
from ssmd_dagster.stores.objects import open_object_stores
from ssmd_dagster_tests.faults.network import Network, S3Proxy, TcpProxy
from ssmd_dagster_tests.faults.verdict import Day, Span, Verdict, judge, judge_journal
from ssmd_dagster_tests.house import House
from ssmd_dagster_tests.servers import NatsServer, S3Server, ValkeyServer, nats_server, s3_server, valkey_server

ENV = "faulty"
NS = 1_000_000_000
DONE = (0, 3)
"""Exit codes of a command that did what it was asked to; 3 says that the day is degraded."""
_TABLES = ("trade", "ticker", "lifecycle", "orderbook")


class Stage:
    """One environment, `faulty`, in a house of its own; NATS, Redis and S3 belong to the test, behind proxies."""

    def __init__(self, folder: Path, seed: int, needs: dict[str, Any]) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.seed = seed
        self.house = House.build(folder)
        self.house.variables["SSMD_CRASH_FILE"] = str(folder / "crash-at")
        self.dates: list[str] = []
        self.verdict = Verdict()
        self.rto_s: float | None = None
        self.detect_s: float | None = None
        self.notes: dict[str, Any] = {}
        self._needs = needs
        self._stack = contextlib.ExitStack()
        self.nats: NatsServer
        self.valkey: ValkeyServer
        self.network: Network
        self.to_nats: TcpProxy
        self.to_redis: TcpProxy
        self.to_exchange: TcpProxy | None = None
        self.s3: S3Server | None = None
        self.to_s3: S3Proxy | None = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in psutil.process_iter():  # nothing stopped may keep `down` waiting
            if self._is_ours(process):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
        with contextlib.suppress(AttributeError):
            self.to_nats.heal()
            self.to_redis.heal()
        self.house.ssmd("down", check=None)
        self._stack.close()

    def _open(self) -> None:
        self.network = self._stack.enter_context(Network())
        folders = {name: self.folder / name for name in ("nats", "valkey", "s3")}
        for folder in folders.values():
            folder.mkdir()
        self.nats = self._stack.enter_context(nats_server(folders["nats"]))
        self.valkey = self._stack.enter_context(valkey_server(folders["valkey"]))
        self.to_nats = self.network.tcp(self.nats.port)
        self.to_redis = self.network.tcp(self.valkey.port)
        needs = dict(self._needs)
        storage: dict[str, Any] = {"type": "local", "buckets": {"raw": "raw", "normalized": "normalized"}}
        variables = {
            "FAULTY_NATS_USER": self.nats.user,
            "FAULTY_NATS_PASSWORD": self.nats.password,
            "FAULTY_REDIS_PASSWORD": self.valkey.password,
        }
        keys: dict[str, Any] = {
            "kalshi": {
                "source": "env",
                "fields": {"key_id": "FAULTY_KEY_ID", "private_key_path": "FAULTY_PRIVATE_KEY_PATH"},
            },
            "nats": {"source": "env", "fields": {"user": "FAULTY_NATS_USER", "password": "FAULTY_NATS_PASSWORD"}},
            "redis": {"source": "env", "fields": {"password": "FAULTY_REDIS_PASSWORD"}},
        }
        if needs.pop("s3", False):
            self.s3 = self._stack.enter_context(s3_server(folders["s3"]))
            for bucket in ("raw", "normalized"):
                self.s3.make_bucket(bucket)
            self.to_s3 = self.network.s3(self.s3.url)
            storage |= {"type": "s3", "endpoint": self.to_s3.url, "region": "us-east-1"}
            fields = {"access_key_id": "FAULTY_S3_ID", "secret_access_key": "FAULTY_S3_KEY"}
            keys["s3"] = {"source": "env", "fields": fields}
            variables |= {"FAULTY_S3_ID": self.s3.access_key_id, "FAULTY_S3_KEY": self.s3.secret_access_key}
        self.house.variables |= variables
        exchange_proxy = needs.pop("exchange_proxy", False)
        simulator = {"seed": self.seed, "markets": 40, "rate_per_second": 500, **needs.pop("simulator", {})}
        capture = {
            "channels": ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"],
            "markets": {"all": True, "mve": "exclude", "max": 20000},
            **needs.pop("capture", {}),
        }
        self.house.add(
            ENV,
            simulator=simulator,
            keys=keys,
            storage=storage,
            capture=capture,
            transport={"type": "nats", "url": f"nats://127.0.0.1:{self.to_nats.port}"},
            cache={"type": "redis", "url": f"redis://127.0.0.1:{self.to_redis.port}/0"},
            **needs,
        )
        self.house.up(ENV)
        if exchange_proxy:
            self._put_proxy_before_the_exchange()

    def enter(self, context: contextlib.AbstractContextManager[Any]) -> Any:
        """Enter a context that is left when the house is down."""
        return self._stack.enter_context(context)

    def _put_proxy_before_the_exchange(self) -> None:
        path = self.house.home / "stack.json"
        stack = json.loads(path.read_text())
        endpoint = stack["simulators"][ENV]["endpoint"]
        port = int(endpoint.split(":")[2].split("/")[0])
        self.to_exchange = self.network.tcp(port)
        stack["simulators"][ENV]["endpoint"] = endpoint.replace(f":{port}/", f":{self.to_exchange.port}/")
        path.write_text(json.dumps(stack))

    # The day

    def start(self, *, messages: int = 400) -> str:
        """Start the day and wait until it has recorded something; return its date."""
        self.house.ssmd("day", "start", ENV)
        date = self.today()
        self.dates.append(date)
        self.wait(lambda: self.archived_or_open() > messages, "the first records to reach the archiver")
        return date

    def today(self) -> str:
        """Return the day that is the environment's current one."""
        return str(self.house.json("day", "status", ENV)["date"])

    @property
    def date(self) -> str:
        """Return the latest day."""
        return self.dates[-1]

    def end(self) -> None:
        """End the latest day: exit 0, or 3 where gaps degrade it."""
        done = self.try_to_end()
        assert done.returncode in DONE, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert self.shown()["state"] == "COMPLETE"

    def try_to_end(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Ask for the end of the latest day and return how the command fared."""
        return self.house.ssmd("day", "end", ENV, "--date", self.date, check=None, **variables)

    def shown(self, date: str | None = None) -> dict[str, Any]:
        """Return `ssmd day show` as JSON."""
        return self.house.day(ENV, date or self.date)

    def recover(self) -> None:
        """Recover the day, once the lease of whoever died is gone."""
        self.wait(
            lambda: (done := self.house.ssmd("day", "recover", ENV, check=None)).returncode != 5 and done, "a recovery"
        )

    # What the processes say

    @property
    def redis(self) -> redis.Redis:
        """Return a client that goes round the proxy."""
        return redis.Redis(port=self.valkey.port, password=self.valkey.password, protocol=2)

    def beat(self, component: str, date: str | None = None) -> dict[str, Any]:
        """Return a component's heartbeat, empty where there is none."""
        with contextlib.closing(self.redis) as client, contextlib.suppress(redis.RedisError):
            raw = client.get(f"{ENV}:capture:{date or self.date}:{component}")
            return {} if raw is None else dict(msgspec.json.decode(raw))
        return {}

    def states(self) -> list[str]:
        """Return the states of all days, as the cache has them."""
        with contextlib.closing(self.redis) as client:
            keys = list(client.scan_iter(f"{ENV}:day:*:state"))
            return [bytes(value).decode() for value in client.mget(keys) if value is not None] if keys else []  # type: ignore[arg-type]

    def archived_or_open(self) -> int:
        """Return how many messages the archiver has taken."""
        return int(self.beat("archiver").get("messages", 0))

    def connectors(self) -> list[str]:
        """Return the connectors' names."""
        with contextlib.closing(self.redis) as client:
            keys = client.keys(f"{ENV}:capture:{self.date}:connector-*")
        return sorted(key.decode().rsplit(":", 1)[1] for key in keys)  # type: ignore[union-attr]

    def flows(self, records: int = 100, timeout_s: float = 60.0) -> float:
        """Wait until new frames get from the exchange to the archiver; return how long that took."""
        began = time.monotonic()
        self.wait(lambda: self.beat("archiver").get("state") == "archiving", "the archiver to archive", timeout_s)
        before = self.archived_or_open()
        self.wait(lambda: self.archived_or_open() > before + records, "frames to flow again", timeout_s)
        self.wait(
            lambda: self.beat("connector-a").get("unacked_batches", 99) < 20, "the spool to be published", timeout_s
        )
        return time.monotonic() - began

    def recovered(self, since: float, timeout_s: float = 60.0) -> None:
        """Note the time from a fault (`time.monotonic()`) until frames flow again."""
        self.flows(timeout_s=timeout_s)
        self.rto_s = round(time.monotonic() - since, 2)

    def detected(self, since: float) -> None:
        """Note the time from a fault until somebody could see it."""
        self.detect_s = round(time.monotonic() - since, 2)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
        """Return what `condition` returns once it is truthy; fail with `what` was waited for."""
        deadline = time.monotonic() + timeout_s
        while True:
            asked = time.monotonic()
            if value := condition():
                return value
            now = time.monotonic()
            if now > deadline:
                said = {name: self.beat(name) for name in ("connector-a", "archiver")} if self.dates else {}
                raise AssertionError(f"waited {timeout_s:.0f} s for {what}; {said}")
            time.sleep(max(0.05, now - asked))  # a condition that runs a command is not asked all the time

    def pause(self, least_s: float, most_s: float) -> None:
        """Let some time go by: faults have to come at any moment."""
        time.sleep(self.random.uniform(least_s, most_s))

    # Processes

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("SSMD_HOME") == str(self.house.home)
        except (psutil.Error, OSError):
            return False

    def pid(self, words: str) -> int | None:
        """Return the process of this house whose command line has `words` in it."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()) and self._is_ours(process):
                    return int(process.pid)
        return None

    def kill(self, words: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the process with these words and return its pid."""
        pid = int(self.wait(lambda: self.pid(words), f"a process {words}"))
        os.kill(pid, number)
        return pid

    def crash_at(self, point: str) -> None:
        """Let the next process that reaches a named point die there, once."""
        path = self.folder / "crash-at"
        temporary = path.with_suffix(".new")
        temporary.write_text(point)
        temporary.replace(path)

    def crashed(self) -> bool:
        """Tell whether somebody has died at the named point."""
        return not (self.folder / "crash-at").exists()

    # The exchange

    def exchange(self, path: str, body: dict[str, Any] | None = None, *, method: str | None = None) -> dict[str, Any]:
        """Ask the exchange's control surface; with a body it is told something."""
        stack = json.loads((self.house.home / "stack.json").read_text())
        url = stack["simulators"][ENV]["rest_endpoint"].replace("/trade-api/v2", f"/sim/{path}")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: dict[str, Any] = json.loads(answer.read() or b"{}")
        return found

    def fault(self, name: str, **order: Any) -> None:
        """Have the exchange break something; a connection that is just not there cannot be broken."""
        try:
            self.exchange("faults", {"fault": name, **order})
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.CONFLICT:
                raise

    # The stores

    def setting(self) -> Setting:
        """Return the environment as a process of this house sees it."""
        env = load_registry(self.house.exchanges).get(ENV)
        clock = ShiftedClock(clock_path(self.house.home, ENV))
        secrets = Secrets({**load_secrets(self.house.home), **self.house.variables})
        return Setting(env, self.house.home, secrets, clock)

    def with_stores(self, work: Callable[[Stores], Any]) -> Any:
        """Run `work(stores)`, a coroutine, with the environment's stores open."""
        setting = self.setting()

        async def body() -> Any:
            async with connect(setting.env, setting.home, setting.secrets, name="judge") as stores:
                return await work(stores)

        return asyncio.run(body())

    def objects(self, date: str) -> dict[str, bytes]:
        """Return a day's raw objects by file name."""
        setting = self.setting()

        async def read() -> dict[str, bytes]:
            raw, _ = open_object_stores(setting.env, setting.home, setting.secrets)
            return {
                info.key.rsplit("/", 1)[1]: await raw.get(info.key)
                for info in await raw.list(day_prefix("kalshi", date))
            }

        return asyncio.run(read())

    def archive_folder(self, date: str | None = None) -> Path:
        """Return the folder of a day's raw objects in a local store."""
        return self.house.home / "objects" / "raw" / day_prefix("kalshi", date or self.date)

    def table(self, name: str) -> pa.Table:
        """Return the newest revision of a table of the latest day."""
        folder = self.house.home / "objects" / "normalized" / "kalshi" / "v1" / name / self.date.replace("-", "/")
        return pq.read_table(max(folder.glob("data*.parquet"), key=lambda path: path.stat().st_mtime_ns))

    def spool_folder(self, date: str | None = None) -> Path:
        """Return the folder of a day's spool."""
        return self.house.home / "spool" / ENV / (date or self.date)

    # The judgement

    def journal(self) -> tuple[list[tuple[int, dict[str, Any]]], dict[str, str]]:
        """Return the journal's events by sequence, and each day's state as the cache has it."""
        events = self.with_stores(_events)
        with contextlib.closing(self.redis) as client:
            states = {
                date: (client.get(f"{ENV}:day:{date}:state") or b"").decode()  # type: ignore[union-attr]
                for date in {event["date"] for _, event in events}
            }
        return events, states

    def judge(self) -> Verdict:
        """Hold the days against the truth; the counts that must be 0 are asserted."""
        days = []
        for date in self.dates:
            shown = self.shown(date)
            close_ns = shown["ended_ns"] or time.time_ns()
            objects = self.objects(date)
            window = Span(shown["started_ns"], close_ns)
            for name in sorted(objects):
                if name.startswith("manifest") and name.endswith(".json"):
                    manifest = json.loads(objects[name])
                    window = Span(manifest["open_ns"], manifest["close_ns"])
            days.append(Day(shown, window, objects))
        self.verdict = judge(self.house.home / "simulator" / ENV / "truth", days)
        judge_journal(*self.journal(), self.verdict)
        self._judge_tables(days)
        found = self.verdict.faults()
        assert not found, f"{found}; {self.verdict.examples[:6]}"
        assert self.verdict.archived > 0
        return self.verdict

    def _judge_tables(self, days: list[Day]) -> None:
        """Count table rows in a day whose window does not hold the exchange's time; None where there are no tables."""
        for date, day in zip(self.dates, days, strict=True):
            for table in _TABLES:
                folder = self.house.home / "objects" / "normalized" / "kalshi" / "v1" / table / date.replace("-", "/")
                for path in folder.glob("data*.parquet"):
                    rows = pq.read_table(path)
                    if table == "orderbook":
                        rows = rows.filter(pc.equal(rows["kind"], "delta"))
                    low = pc.less(rows["event_ns"], day.window.start)
                    high = pc.greater_equal(rows["event_ns"], day.window.end)
                    wrong = pc.sum(pc.or_(low, high)).as_py() or 0
                    self.verdict.misfiled = (self.verdict.misfiled or 0) + int(wrong)


async def _events(stores: Stores) -> list[tuple[int, dict[str, Any]]]:
    stored = await stores.journal.read()
    return [(entry.seq, msgspec.json.decode(entry.event.encode())) for entry in stored]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of `size` over an empty folder; where that is not allowed, `PermissionError` says so."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        raise PermissionError("only root can mount a small file system")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise PermissionError(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


__all__ = ["DONE", "ENV", "NS", "Stage", "small_disk"]
