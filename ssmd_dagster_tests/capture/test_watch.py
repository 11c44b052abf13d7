"""Silence, sleep, standstill and a clock that was set are told apart."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.capture import watch
from ssmd_dagster.capture.watch import (
    Clocks,
    ClockStep,
    Finding,
    Silent,
    Stalled,
    Suspended,
    Watch,
    Watcher,
    read_clocks,
)
from ssmd_dagster.clock import system_clock
from ssmd_dagster_tests.capture.recordings import eventually

HALF_NS = 500_000_000


class Host:
    """Three clocks that a test moves, and what the loop has seen."""

    def __init__(self) -> None:
        self.boot_ns = self.awake_ns = self.wall_ns = 10**18
        self.signs = self.turns = 0
        self.watcher = Watcher(self.clocks())

    def clocks(self) -> Clocks:
        """Read the clocks."""
        return Clocks(self.boot_ns, self.awake_ns, self.wall_ns)

    def pass_by(
        self, *, awake_ns: int = HALF_NS, asleep_ns: int = 0, step_ns: int = 0, sign: bool = True, turn: bool = True
    ) -> list[Finding]:
        """Let time go by, and look."""
        self.awake_ns += awake_ns
        self.boot_ns += awake_ns + asleep_ns
        self.wall_ns += awake_ns + asleep_ns + step_ns
        self.signs += sign
        self.turns += turn
        return self.watcher.look(self.clocks(), self.signs, self.turns)


@given(st.lists(st.tuples(st.integers(1, 1_900_000_000), st.booleans()), max_size=100))
def test_a_connection_with_signs_of_life_is_never_silent(looks: list[tuple[int, bool]]) -> None:
    """As long as one comes every ten looks, and nothing else is found in a host that runs."""
    host = Host()
    for number, (awake_ns, sign) in enumerate(looks):
        assert host.pass_by(awake_ns=awake_ns, sign=sign or number % 10 == 0) == []


def test_twenty_seconds_without_a_sign_are_silence() -> None:
    """Measured from the last sign on, told once."""
    host = Host()
    host.pass_by()
    found = [host.pass_by(sign=False) for _ in range(60)]
    assert [number for number, findings in enumerate(found) if findings] == [39]
    assert found[39] == [Silent(20.0)]


def test_a_stopped_process_has_not_heard_silence() -> None:
    """After SIGSTOP or a blocked loop, nobody has listened: that is told, and the connection gets its time again."""
    host = Host()
    host.pass_by()
    assert host.pass_by(awake_ns=3_600 * 10**9, sign=False) == [Stalled(3600.0)]
    for _ in range(100):
        assert host.pass_by(sign=False, turn=False) == []
    assert host.pass_by(sign=False) == [Stalled(50.5)]


def test_a_host_that_slept_is_told_from_a_clock_that_was_set() -> None:
    """Asleep, all clocks but one go on; set, only the wall clock moves."""
    host = Host()
    host.pass_by()
    assert host.pass_by(asleep_ns=3_600 * 10**9) == [Suspended(3600.0)]
    assert host.pass_by(step_ns=-3_600 * 10**9) == [ClockStep(-3_600 * 10**9)]
    assert host.pass_by(step_ns=90_000_000) == []


async def test_the_thread_tells_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds arrives on the loop; a loop that is blocked is not taken for a silent exchange."""
    monkeypatch.setattr(watch, "STALLED_S", 0.3)
    found: list[Finding] = []
    signs = 0
    watching = Watch(lambda: read_clocks(system_clock), lambda: signs, found.append, silence_s=0.6)
    time.sleep(1.0)  # noqa: ASYNC251 - the loop is to be blocked
    signs += 1
    await eventually(lambda: any(isinstance(one, Stalled) for one in found))
    assert not any(isinstance(one, Silent) for one in found)
    await eventually(lambda: any(isinstance(one, Silent) for one in found))
    await asyncio.to_thread(watching.close)
