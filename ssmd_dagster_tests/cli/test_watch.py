"""`ssmd day watch`: how a look is drawn, and how it ends."""

from __future__ import annotations

import io
import itertools
import sys
from typing import Any

import pytest

from ssmd_dagster.cli import watch
from ssmd_dagster.cli.main import run
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ExitCode
from ssmd_dagster.workflows.views import DayView
from ssmd_dagster_tests.day.builders import started


class Terminal(io.StringIO):
    """A terminal that remembers what was written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        """Say that it is one."""
        return True

    def write(self, text: str) -> int:
        """Take a piece."""
        written = super().write(text)
        self.writes.append(text)
        return written


def seen(messages: int | None, at_s: int, components: dict[str, dict[str, Any]] | None = None) -> DayView:
    """A look at an ACTIVE day."""
    return DayView(
        day=started().day(),
        state=DayState.ACTIVE,
        error=None,
        messages=messages,
        gaps=0,
        stats=None,
        components=components or {},
        at_ns=at_s * 1_000_000_000,
    )


def test_a_look_is_written_over_the_last_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that is emptied first and filled line by line flickers."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    view = seen(7, 9, {"connector-a": {"state": "subscribed"}})
    watch._show("kalshi-sim", view, None, None, as_json=False)
    screen = "".join(terminal.writes)
    assert len([text for text in terminal.writes if text]) == 1
    assert "State: ACTIVE\x1b[K\n" in screen
    assert "  connector-a   subscribed\x1b[K\n" in screen
    assert screen.startswith("\x1b[H")
    assert screen.endswith("\x1b[J")
    assert "\x1b[2J" not in screen


def test_a_cache_that_is_away_makes_no_rate() -> None:
    """What is not known is neither 0 nor a burst once it is known again."""
    looks = [seen(100, 2), seen(None, 4), seen(300, 6), seen(400, 8)]
    rates = [watch._per_second(look, before) for before, look in itertools.pairwise(looks)]
    assert rates == ["-/s", "-/s", "50/s"]


def test_to_stop_watching_needs_no_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is how it is meant to end; the exit code is that of every interrupted command."""

    async def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "_watch", interrupted)
    assert run(["day", "watch"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == ""
