"""A whole house in a temporary home: real servers under a real supervisor, and the `ssmd` command as a user runs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml

from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import UnreachableError

COMMAND_TIMEOUT_S = 120.0
SIMULATED: dict[str, Any] = {
    "enabled": True,
    "feed": "kalshi",
    "schema": "trade:v1",
    "first_day": "2025-12-01",
    "capture": {
        "channels": ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"],
        "markets": {"all": True, "mve": "exclude", "max": 20000},
    },
    "keys": {
        "kalshi": {"source": "env", "fields": {"key_id": "TEST_KEY_ID", "private_key_path": "TEST_PRIVATE_KEY_PATH"}}
    },
    "transport": {"type": "embedded"},
    "cache": {"type": "embedded"},
    "formats": ["parquet"],
    "lease_ttl_s": 2,
}


@dataclass
class House:
    """One home with its own folder of environments."""

    home: Path
    exchanges: Path
    variables: dict[str, str] = field(default_factory=dict)
    timezone: ZoneInfo = field(default_factory=lambda: noon_somewhere())

    @classmethod
    def build(cls, folder: Path) -> House:
        """Make an empty house: feeds and schemas as shipped, no environment."""
        home, exchanges = folder / "home", folder / "exchanges"
        home.mkdir(mode=0o700)
        for name in ("feeds", "schemas"):
            shutil.copytree(project_dir() / "exchanges" / name, exchanges / name)
        (exchanges / "environments").mkdir()
        return cls(home, exchanges)

    def environment(self) -> dict[str, str]:
        """Return the variables that every command of this house is run with."""
        return {**os.environ, "SSMD_HOME": str(self.home), "SSMD_EXCHANGES": str(self.exchanges), **self.variables}

    def add(self, name: str, *, simulator: dict[str, Any] | None = None, **changes: Any) -> None:
        """Write an environment's file. `simulator` None: an exchange of the test's own, under `endpoint`."""
        slug = name.upper().replace("-", "_")
        fields = {"key_id": f"{slug}_KEY_ID", "private_key_path": f"{slug}_PRIVATE_KEY_PATH"}
        settings: dict[str, Any] = {
            **SIMULATED,
            "name": name,
            "schedule": {"timezone": self.timezone.key, "day_start": "00:10", "day_end": "00:00", "auto_roll": True},
            "keys": {"kalshi": {"source": "env", "fields": fields}},
            "storage": {"type": "local", "buckets": {"raw": f"raw-{name}", "normalized": f"normalized-{name}"}},
            **({"simulator": {"pauses": False, **simulator}} if simulator is not None else {}),
            **changes,
        }
        settings["capture"] = {"spool_limit_mb": 64, "stream_limit_mb": 64, "trades_settle_s": 0, **settings["capture"]}
        text = yaml.safe_dump({key: value for key, value in settings.items() if value is not None}, sort_keys=False)
        (self.exchanges / "environments" / f"{name}.yaml").write_text(text.replace("'2025-12-01'", "2025-12-01"))

    def ssmd(self, *arguments: str, check: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command; `check` is the exit code that it must have."""
        done = subprocess.run(
            self.command(*arguments),
            env={**self.environment(), **variables},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert check is None or done.returncode == check, (
            f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def json(self, *arguments: str, check: int = 0) -> dict[str, Any]:
        """Run a command with `--json` and return what it printed."""
        answer: dict[str, Any] = json.loads(self.ssmd(*arguments, "--json", check=check).stdout)
        return answer

    def command(self, *arguments: str) -> list[str]:
        """Return the words that run a command."""
        return [sys.executable, "-m", "ssmd_dagster.cli.main", *arguments]

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command and return at once."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def up(self, *names: str) -> None:
        """Bring up what environments need, without Dagster."""
        self.ssmd("up", *names, "--detach", "--no-dagster")

    def down(self) -> None:
        """Take everything down."""
        self.ssmd("down")

    def quiet(self) -> None:
        """Stop what a test leaves behind: every simulated exchange, day and gateway; the servers stay."""
        if not (self.home / "supervisor" / "access.json").exists():
            return

        async def stop() -> None:
            supervisor = connect_supervisor(self.home)
            for state in await supervisor.states():
                if state.group != "stack" or state.name.startswith("simulator-"):
                    await supervisor.stop(state.group, state.name)

        with contextlib.suppress(UnreachableError):  # a test has killed the supervisor: `down` finds what it left
            asyncio.run(stop())

    def today(self) -> str:
        """Return the trading day that the environments of this house are in."""
        return datetime.now(self.timezone).date().isoformat()

    def day(self, env: str, date: str) -> dict[str, Any]:
        """Return `ssmd day show` as JSON."""
        return self.json("day", "show", env, date)


def noon_somewhere() -> ZoneInfo:
    """Return a zone in which it is about noon, so that no test meets midnight."""
    ahead = 12 - datetime.now(UTC).hour
    return ZoneInfo("Etc/GMT" if ahead == 0 else f"Etc/GMT{-ahead:+d}")


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """Return what `condition` returns once it is truthy; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not so within {timeout_s} s: {condition}"
        time.sleep(0.05)
    return value
