"""Kill anything at random while a day runs: `python -m ssmd_dagster_tests.faults.chaos --minutes 10 --seed 1`.

The stack is the one that `ssmd up` brings up: NATS, Redis, the simulated exchange, connector, archiver and gateway under
supervisord, which is killed too. Each is killed with SIGKILL at least five times. Whoever operates would run `ssmd up` and
`ssmd day recover` when the day is in ERROR; so does this. At the end the day must be COMPLETE, and what is missing of what
the exchange sent must lie in the gaps that it declares.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil
import redis

from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.stores.connect import read_stack
from ssmd_dagster_tests.faults.stage import DONE, ENV, Stage
from ssmd_dagster_tests.faults.verdict import write_report

TARGETS = {
    "connector": "capture.connector",
    "archiver": "capture.archiver",
    "gateway": "capture.gateway",
    "nats": "nats-server",
    "redis": "valkey-server",
    "exchange": "ssmd_dagster.simulator",
    "supervisor": "supervisor.supervisord",
}
EACH_AT_LEAST = 5
KILLS_AT_LEAST = 50


class Chaos:
    """One run."""

    def __init__(self, stage: EmbeddedStage, seed: int, minutes: float) -> None:
        self.stage = stage
        self.random = random.Random(seed)
        self.seconds = minutes * 60
        self.kills: Counter[str] = Counter()
        self.recoveries = 0
        self.failed_recoveries = 0
        self.ups = 0
        self.log: list[tuple[float, str]] = []
        self.began = time.monotonic()

    def tell(self, what: str) -> None:
        """Print and keep what happened."""
        at = round(time.monotonic() - self.began, 1)
        self.log.append((at, what))
        print(f"{at:7.1f} s  {what}", flush=True)  # noqa: T201

    def kill_one(self) -> None:
        """Kill the one that is due, by lot; those that were killed least come more often."""
        least = min(self.kills[name] for name in TARGETS)
        names = [name for name in TARGETS for _ in range(4 if self.kills[name] == least else 1)]
        name = self.random.choice(names)
        pid = self.stage.pid(TARGETS[name])
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[name] += 1
            self.tell(f"killed {name} ({self.kills[name]})")

    def operate(self) -> None:
        """Do what an operator, or the reconciler, does: bring the servers up, recover a day that is in trouble."""
        if self.stage.pid(TARGETS["supervisor"]) is None:
            self.ups += 1
            done = self.stage.house.ssmd("up", ENV, "--detach", "--no-dagster", check=None)
            if done.returncode != 0:
                self.tell(f"up: exit {done.returncode}: {done.stderr.strip().splitlines()[-1][:200]}")
        done = self.stage.house.ssmd("day", "status", ENV, check=None)
        if done.returncode == 0 and "State: ACTIVE" not in done.stdout:
            tried = self.stage.house.ssmd("day", "recover", ENV, check=None)
            if tried.returncode == 0:
                self.recoveries += 1
            else:
                self.failed_recoveries += 1
                words = (tried.stderr.strip() or tried.stdout.strip()).splitlines()
                self.tell(f"recover: exit {tried.returncode}: {words[-1][:300] if words else ''}")

    def run(self) -> None:
        """Kill, with an operator at work beside it, until the time is up and everybody had their share."""
        gap_s = self.seconds / (self.wanted() * 1.3)
        over = threading.Event()
        operator = threading.Thread(target=self._operate_until, args=(over,))
        operator.start()
        try:
            while True:
                time.sleep(gap_s * self.random.uniform(0.2, 1.6))
                self.kill_one()
                spent = time.monotonic() - self.began
                enough = self.kills.total() >= self.wanted() and min(self.kills[n] for n in TARGETS) >= self.each()
                if spent >= self.seconds and (enough or spent > self.seconds * 1.6):
                    return
        finally:
            over.set()
            operator.join()

    def _operate_until(self, over: threading.Event) -> None:
        while not over.wait(1.0):
            self.operate()

    def wanted(self) -> int:
        """Return how many kills there must be: fifty in ten minutes, fewer in a shorter run."""
        return min(KILLS_AT_LEAST, round(KILLS_AT_LEAST * self.seconds / 600))

    def each(self) -> int:
        """Return how often each must be killed."""
        return max(1, min(EACH_AT_LEAST, round(EACH_AT_LEAST * self.seconds / 600)))


class EmbeddedStage(Stage):
    """The stage with the servers of `ssmd up` in place of the test's own."""

    def _open(self) -> None:
        self.house.add(
            ENV,
            simulator={"seed": self.seed, "markets": 60, "rate_per_second": 500},
            capture={
                "channels": ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"],
                "markets": {"all": True, "mve": "exclude"},
                "spool_limit_mb": 512,
                "stream_limit_mb": 512,
            },
            storage={"type": "local", "buckets": {"raw": "raw", "normalized": "normalized"}},
            lease_ttl_s=5,
        )
        self.house.up(ENV)

    @property
    def redis(self) -> Any:
        """Return a client of the embedded cache."""
        url = read_stack(self.house.home).cache
        assert url is not None
        return redis.Redis.from_url(url, password=load_secrets(self.house.home)["SSMD_REDIS_PASSWORD"], protocol=2)


def main() -> int:
    """Run, judge, print and write the report; the exit code is 0 if all is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=Path("build/faults/chaos"))
    parser.add_argument("--keep", action="store_true", help="keep the home for a look at its logs")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ssmd-chaos-"))
    (folder / "stage").mkdir()
    report: dict[str, Any] = {"row": "chaos", "seed": chosen.seed, "minutes": chosen.minutes, "result": "red"}
    with EmbeddedStage(folder / "stage", chosen.seed, {}) as stage:
        stage.start()
        chaos = Chaos(stage, chosen.seed, chosen.minutes)
        try:
            chaos.run()
            chaos.tell(f"{chaos.kills.total()} kills; ending the day")
            stage.wait(lambda: _ended(chaos), "the day to be ended", 240)
            shown = stage.shown()
            chaos.tell(f"{shown['state']}, {shown['condition']}, {len(shown['gaps'])} gaps")
            assert shown["state"] == "COMPLETE"
            stage.judge()
            assert chaos.kills.total() >= chaos.wanted(), chaos.kills
            assert min(chaos.kills[name] for name in TARGETS) >= chaos.each(), chaos.kills
            report["result"] = "green"
        except AssertionError as error:
            report["error"] = str(error)[:3000]
        finally:
            report |= {
                "kills": dict(chaos.kills),
                "ups": chaos.ups,
                "recoveries": chaos.recoveries,
                "failed_recoveries": chaos.failed_recoveries,
                "checks": msgspec.to_builtins(stage.verdict),
                "log": chaos.log,
            }
            write_report(chosen.report / f"chaos-{chosen.seed}" / "fault_report.json", report)
    print({key: value for key, value in report.items() if key != "log"}, flush=True)  # noqa: T201
    left = [process for process in psutil.process_iter() if stage._is_ours(process)]
    if left:
        print(f"left behind: {left}")  # noqa: T201
    if chosen.keep:
        print(f"kept: {folder}")  # noqa: T201
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if report["result"] == "green" and not left else 1


def _ended(chaos: Chaos) -> bool:
    stage = chaos.stage
    done = stage.house.ssmd("day", "status", ENV, check=None)
    if done.returncode == 0 and "State: COMPLETE" in done.stdout:
        return True
    if stage.pid(TARGETS["supervisor"]) is None:
        stage.house.ssmd("up", ENV, "--detach", "--no-dagster", check=None)
    ended = stage.try_to_end()
    if ended.returncode not in DONE:
        words = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        chaos.tell(f"end: exit {ended.returncode}: {words[-1][:300] if words else ''}")
        if ended.returncode == 6:
            raise AssertionError(ended.stderr[-1500:])
    return ended.returncode in DONE


if __name__ == "__main__":
    sys.exit(main())
