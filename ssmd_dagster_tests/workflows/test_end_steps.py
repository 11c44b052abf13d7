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
from ssmd_dagster.workflows.end import stop_connector


@pytest.mark.parametrize(
    ("code", "transient", "exit_code"),
    [(7, True, ExitCode.UNREACHABLE), (-1, True, ExitCode.FAILURE), (1, False, ExitCode.FAILURE)],
)
async def test_an_audit_that_was_cut_off_may_be_tried_again(
    tmp_path: Path, code: int, transient: bool, exit_code: ExitCode
) -> None:
    """A NATS that was away for a moment, or a killed process, leaves no day to a person."""

    class Supervisor:
        async def stop(self, _group: str, _name: str) -> None:
            """Stop a connector."""

        async def run_once(self, *_arguments: Any) -> int:
            return code

    desk: Any = SimpleNamespace(
        env="kalshi-sim",
        setting=Setting(load_registry().get("kalshi-sim"), tmp_path, Secrets(), system_clock),
        supervisor=Supervisor(),
        where=lambda date: date,
    )
    attempt: Any = SimpleNamespace(desk=desk, date="2026-01-01")
    with pytest.raises(SsmdError, match="the audit of the spool") as failed:
        await stop_connector(attempt)
    assert (failed.value.transient, failed.value.exit_code) == (transient, exit_code)
