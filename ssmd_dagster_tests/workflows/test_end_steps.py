"""Steps of an end whose helper fails: which failures reconcile may try again, and which need a person."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.clock import system_clock
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.secrets import Secrets
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.workflows import end
from ssmd_dagster.workflows.end import stop_connector


class Supervisor:
    """Has the programs of a day; its audit ends with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.stopped: list[str] = []

    async def ensure_group(self, *_arguments: Any) -> None:
        """Know them."""

    async def start(self, *_arguments: Any) -> None:
        """Start one."""

    async def states(self, _group: str) -> list[Any]:
        """Return them."""
        return [SimpleNamespace(name=name) for name in ("archiver", "connector-a", "connector-a2", "connector-b")]

    async def stop(self, _group: str, name: str) -> None:
        """Stop one."""
        self.stopped.append(name)

    async def run_once(self, *_arguments: Any) -> int:
        """Audit."""
        return self.code


def attempt_with(supervisor: Supervisor, home: Path) -> Any:
    """Return an attempt at the end of a day."""
    desk = SimpleNamespace(
        env="kalshi-sim",
        setting=Setting(load_registry().get("kalshi-sim"), home, Secrets(), system_clock),
        supervisor=supervisor,
        stores=SimpleNamespace(nc=None),
        book=SimpleNamespace(day=_no_day),
        where=lambda date: date,
    )
    return SimpleNamespace(
        desk=desk, date="2026-01-01", options=SimpleNamespace(force=False), tell=lambda *_arguments: None
    )


async def _no_day(_date: str) -> None:
    return None


@pytest.mark.parametrize(
    ("code", "transient", "exit_code"),
    [(7, True, ExitCode.UNREACHABLE), (-1, True, ExitCode.FAILURE), (1, False, ExitCode.FAILURE)],
)
async def test_an_audit_that_was_cut_off_may_be_tried_again(
    tmp_path: Path, code: int, transient: bool, exit_code: ExitCode
) -> None:
    """A NATS that was away for a moment, or a killed process, leaves no day to a person."""

    attempt = attempt_with(Supervisor(code), tmp_path)
    with pytest.raises(SsmdError, match="the audit of the spool") as failed:
        await stop_connector(attempt)
    assert (failed.value.transient, failed.value.exit_code) == (transient, exit_code)


async def test_every_connector_that_the_day_was_started_with_is_stopped_before_the_audit(tmp_path: Path) -> None:
    """Also those that the environment would not have any more: the audit takes their spool for finished."""
    supervisor = Supervisor(0)
    await stop_connector(attempt_with(supervisor, tmp_path))
    assert supervisor.stopped == ["connector-a", "connector-a2", "connector-b"]


async def test_an_archiver_that_was_killed_while_it_flushed_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that its supervisor has started instead knows of no flush."""
    told: list[str] = []
    since_ns = 1

    async def request(_nc: Any, _subject: str, command: str) -> dict[str, Any]:
        nonlocal since_ns
        told.append(command)
        if told == ["flush", "status"]:
            since_ns = 2
        flushing = command == "flush" or (since_ns == 2 and told.count("status") == 2)
        return {"flushing": flushing, "since_ns": since_ns, "open_batches": 1, "error": None, "messages": 7}

    monkeypatch.setattr(end, "request", request)
    monkeypatch.setattr(end, "POLL_S", 0)
    assert await end.flush_archiver(attempt_with(Supervisor(0), tmp_path)) == "7 messages archived"
    assert told == ["flush", "status", "flush", "status", "status"]
