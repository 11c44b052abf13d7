"""The supervisor port on a real supervisord: groups, restarts, final exit codes, orphans, odd paths and values."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.options import ServerOptions, UnhosedConfigParser

from ssmd_dagster.capture import supervisord
from ssmd_dagster.capture.supervisor import ProcessState, Program, SupervisordSupervisor, log_path, render_program
from ssmd_dagster.errors import ConfigurationError, NotFoundError, RefusedError, SsmdError, UnreachableError

GROUP = "kalshi-test-2025-12-14"


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    """A private home in which nothing runs when the test is over."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    yield home
    await supervisord.end_supervisor(home)
    assert supervisord.marked_processes(home) == []


@pytest.fixture
async def supervisor(home: Path) -> SupervisordSupervisor:
    """A running supervisord."""
    started, is_new, orphans = await supervisord.start_supervisor(home)
    assert is_new
    assert orphans == []
    return started


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 15) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.02)


async def state_of(supervisor: SupervisordSupervisor, name: str) -> str:
    """Return the state of one program of the group."""
    return next(state.state for state in await supervisor.states(GROUP) if state.name == name)


async def pid_of(supervisor: SupervisordSupervisor, name: str) -> int | None:
    """Return the pid of one program of the group."""
    return next(state.pid for state in await supervisor.states(GROUP) if state.name == name)


def python(name: str, code: str, **settings: object) -> Program:
    """Return a program that runs Python code."""
    return Program(name=name, command=(sys.executable, "-c", code), **settings)  # type: ignore[arg-type]


def sleeper(name: str, **settings: object) -> Program:
    """Return a program that runs until it is stopped."""
    return Program(name=name, command=("sleep", "600"), **settings)  # type: ignore[arg-type]


async def test_programs_start_and_stop_by_name(supervisor: SupervisordSupervisor) -> None:
    """A known program starts only when asked, a second start and a second stop change nothing."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a"), sleeper("archiver")])
    assert [(s.name, s.state, s.pid) for s in await supervisor.states(GROUP)] == [
        ("archiver", "STOPPED", None),
        ("connector-a", "STOPPED", None),
    ]
    await supervisor.start(GROUP, "connector-a")
    pid = await pid_of(supervisor, "connector-a")
    assert pid is not None
    await supervisor.start(GROUP, "connector-a")
    assert await pid_of(supervisor, "connector-a") == pid
    assert await state_of(supervisor, "archiver") == "STOPPED"
    await supervisor.stop(GROUP)
    await supervisor.stop(GROUP, "connector-a")
    await supervisor.stop("no-such-group")
    assert not psutil.pid_exists(pid)


async def test_a_group_is_ensured_again_without_touching_what_runs(supervisor: SupervisordSupervisor) -> None:
    """The same definition leaves a process alone, a changed one replaces it alone, a group left out stays."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a"), sleeper("archiver")])
    await supervisor.start(GROUP, "connector-a")
    await supervisor.start(GROUP, "archiver")
    connector = await pid_of(supervisor, "connector-a")
    await supervisor.ensure_group(GROUP, [sleeper("connector-a"), sleeper("archiver", environment={"EPOCH": "9"})])
    assert await pid_of(supervisor, "connector-a") == connector
    assert await state_of(supervisor, "archiver") == "STOPPED"
    await supervisor.ensure_group(GROUP, [sleeper("archiver")])
    assert await pid_of(supervisor, "connector-a") == connector


async def test_a_removed_group_is_gone_and_its_logs_stay(supervisor: SupervisordSupervisor, home: Path) -> None:
    """After removal nothing runs, nothing is known, and the output can still be read."""
    await supervisor.ensure_group(GROUP, [python("connector-a", "import time; print('hello'); time.sleep(600)")])
    await supervisor.start(GROUP, "connector-a")
    log = log_path(home, GROUP, "connector-a")

    async def written() -> bool:
        return log.exists() and log.read_text() == "hello\n"

    await until(written, "the program's output")
    await supervisor.remove_group(GROUP)
    await supervisor.remove_group(GROUP)
    assert await supervisor.states(GROUP) == []
    assert log.read_text() == "hello\n"
    assert list((home / "supervisor" / "conf.d").iterdir()) == []
    with pytest.raises(NotFoundError):
        await supervisor.start(GROUP, "connector-a")


async def test_a_killed_program_is_started_again(supervisor: SupervisordSupervisor) -> None:
    """SIGKILL of a running program leads to a new process without anyone asking."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a")])
    await supervisor.start(GROUP, "connector-a")
    first = await pid_of(supervisor, "connector-a")
    assert first is not None
    os.kill(first, signal.SIGKILL)

    async def back() -> bool:
        return await pid_of(supervisor, "connector-a") not in (None, first)

    await until(back, "a new process")


@pytest.mark.parametrize("code", [0, 8])
async def test_final_exit_codes_are_final_however_soon_they_come(supervisor: SupervisordSupervisor, code: int) -> None:
    """Exit 0 and 8 (refused credentials) are never tried again, not even right after the start."""
    await supervisor.ensure_group(GROUP, [python("connector-a", f"print('once'); raise SystemExit({code})")])
    await supervisor.start(GROUP, "connector-a")

    async def ended() -> bool:
        return await state_of(supervisor, "connector-a") == "EXITED"

    await until(ended, "the end")
    (state,) = await supervisor.states(GROUP)
    assert state.exit_code == code
    assert not state.alive
    assert log_path(supervisor.home, GROUP, "connector-a").read_text() == "once\n"


class SeesTheCrash(SupervisordSupervisor):
    """Looks in the moment after a crash, before supervisord starts the program again."""

    crash: ProcessState | None = None

    async def states(self, group: str | None = None) -> list[ProcessState]:
        """Show the crash once, then what supervisord says."""
        crash, self.crash = self.crash, None
        return [crash] if crash is not None else await super().states(group)


async def test_a_stop_right_after_a_crash_stops_what_is_started_again(
    supervisor: SupervisordSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """supervisord starts a crashed program again after it has said that it EXITED: that one is stopped too."""
    monkeypatch.setattr(supervisor, "__class__", SeesTheCrash)
    assert isinstance(supervisor, SeesTheCrash)
    for stop in (supervisor.stop, supervisor.remove_group):
        await supervisor.ensure_group(GROUP, [sleeper("replayer")])
        await supervisor.start(GROUP, "replayer")
        (running,) = await supervisor.states(GROUP)
        supervisor.crash = dataclasses.replace(running, state="EXITED", pid=None, exit_code=4)
        await stop(GROUP)
        assert [state.pid for state in await supervisor.states(GROUP)] in ([None], [])


async def test_a_program_that_dies_at_once_is_tried_again_with_a_pause(supervisor: SupervisordSupervisor) -> None:
    """A failure right after the start backs off, and its exit code can be seen."""
    await supervisor.ensure_group(GROUP, [python("connector-a", "raise SystemExit(7)")])
    await supervisor.start(GROUP, "connector-a")

    async def backs_off() -> bool:
        return await state_of(supervisor, "connector-a") == "BACKOFF"

    await until(backs_off, "the back-off")
    (state,) = await supervisor.states(GROUP)
    assert state.exit_code == 7
    await supervisor.stop(GROUP)
    assert await state_of(supervisor, "connector-a") in ("STOPPED", "FATAL")


async def test_a_program_that_ignores_sigterm_is_killed(supervisor: SupervisordSupervisor) -> None:
    """A stop ends with SIGKILL after the program's own time, children included."""
    code = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid); time.sleep(600)"
    )
    await supervisor.ensure_group(GROUP, [python("connector-a", code, stop_timeout_s=1)])
    await supervisor.start(GROUP, "connector-a")
    log = log_path(supervisor.home, GROUP, "connector-a")

    async def written() -> bool:
        return log.exists() and log.read_text().endswith("\n")

    await until(written, "the child's pid")
    pid = await pid_of(supervisor, "connector-a")
    assert pid is not None
    await supervisor.stop(GROUP, "connector-a")
    assert not psutil.pid_exists(pid)
    child = int(log.read_text())

    async def gone() -> bool:
        return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    await until(gone, "the child's end")


async def test_a_program_runs_once_and_gives_its_exit_code(supervisor: SupervisordSupervisor) -> None:
    """`run_once` waits for the end, returns the code, never restarts and forgets the program."""
    assert await supervisor.run_once(GROUP, python("verify", "raise SystemExit(6)"), timeout_s=20) == 6
    assert await supervisor.run_once(GROUP, python("verify", "pass"), timeout_s=20) == 0
    assert await supervisor.run_once(GROUP, python("verify", "import os; os.kill(os.getpid(), 9)"), timeout_s=20) == -1
    assert await supervisor.states(GROUP) == []


async def test_a_program_that_runs_too_long_is_stopped(supervisor: SupervisordSupervisor) -> None:
    """`run_once` has a deadline, after which nothing is left."""
    with pytest.raises(SsmdError, match="did not end within"):
        await supervisor.run_once(GROUP, sleeper("verify"), timeout_s=0.2)
    assert await supervisor.states(GROUP) == []


async def test_a_program_that_runs_is_not_run_a_second_time(supervisor: SupervisordSupervisor) -> None:
    """`run_once` refuses while one of that name runs."""
    await supervisor.ensure_group(GROUP, [sleeper("verify")])
    await supervisor.start(GROUP, "verify")
    with pytest.raises(RefusedError):
        await supervisor.run_once(GROUP, sleeper("verify"), timeout_s=5)


async def test_environment_and_arguments_arrive_as_they_are(supervisor: SupervisordSupervisor) -> None:
    """Quotes, percent signs, comment signs, blanks and accents reach the program unchanged."""
    odd = "%d %(here)s \"double\" 'single' a ;b #c \\ $HOME é, =,"
    code = "import json, os, sys; print(json.dumps([os.environ['ODD'], sys.argv[1], os.environ['SSMD_GROUP']]))"
    program = Program(name="echo", command=(sys.executable, "-c", code, odd), environment={"ODD": odd})
    assert await supervisor.run_once(GROUP, program, timeout_s=20) == 0
    assert json.loads(log_path(supervisor.home, GROUP, "echo").read_text()) == [odd, odd, GROUP]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=40)


@given(value=text, argument=text)
def test_supervisord_reads_the_words_that_were_written(value: str, argument: str) -> None:
    """Whatever is in a variable or an argument, supervisord's own parser gets it back."""
    home = Path("/tmp/home of % 'x'")
    program = Program(name="connector-a", command=(sys.executable, argument), environment={"ODD": value})
    options = ServerOptions()
    options.environ_expansions = {"ENV_HOME": "/root"}
    parser = UnhosedConfigParser()
    section = render_program(home, GROUP, program).replace(f"logs/{GROUP}/", "/tmp/")
    parser.read_string(section)
    parser.expand_here("/here")
    (config,) = options.processes_from_section(parser, f"program:{GROUP}.connector-a", GROUP)
    words = shlex.split(config.command)
    assert words[1:] == [
        "PYTHONUNBUFFERED=1",
        f"ODD={value}",
        f"SSMD_HOME={home}",
        f"SSMD_GROUP={GROUP}",
        sys.executable,
        argument,
    ]


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "\udcff"])
def test_what_cannot_be_written_is_refused(value: str) -> None:
    """A line break would be a new setting: the program is refused before anything is written."""
    with pytest.raises(ConfigurationError):
        render_program(Path("/home"), GROUP, Program(name="x", command=("sleep", value)))


@pytest.mark.parametrize(
    ("group", "program"),
    [
        ("../x", sleeper("x")),
        ("x", sleeper("a.b")),
        ("x", sleeper("a]\nb")),
        ("x", Program(name="x", command=("no-such-program",))),
        ("x", Program(name="x", command=())),
        ("x", sleeper("x", log=Path("/etc/passwd"))),
        ("x", sleeper("x", environment={"A B": "c"})),
    ],
)
def test_names_and_paths_that_would_leave_their_place_are_refused(group: str, program: Program) -> None:
    """Names reach file names and section headers, so only plain ones are taken."""
    with pytest.raises(ConfigurationError):
        render_program(Path("/home"), group, program)


async def test_a_lost_log_folder_does_not_stop_other_groups(supervisor: SupervisordSupervisor, home: Path) -> None:
    """Someone who cleans the logs while the stack runs must not keep days from starting."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a")])
    (home / "logs" / GROUP).rmdir()
    await supervisor.ensure_group("kalshi-test", [sleeper("gateway")])
    await supervisor.start("kalshi-test", "gateway")


async def test_without_a_supervisor_the_error_says_what_to_run(home: Path) -> None:
    """Before the first `ssmd up`, and after a kill, the advice is `ssmd up`."""
    with pytest.raises(UnreachableError, match="ssmd up"):
        supervisord.connect_supervisor(home)
    supervisor, _, _ = await supervisord.start_supervisor(home)
    await supervisord.end_supervisor(home)
    with pytest.raises(UnreachableError, match="ssmd up"):
        await supervisor.states()


async def test_a_wrong_password_is_refused(supervisor: SupervisordSupervisor, home: Path) -> None:
    """Another user of the socket needs the password, and the files that hold it are ours alone."""
    stranger = SupervisordSupervisor(home, supervisor.socket_path, "ssmd", "guess")
    with pytest.raises(ConfigurationError):
        await stranger.states()
    files = [home / "supervisor" / "access.json", home / "supervisor" / "supervisord.conf", supervisor.socket_path]
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []


async def test_a_running_supervisor_is_found_again(supervisor: SupervisordSupervisor, home: Path) -> None:
    """Starting it twice gives the same one, and what runs goes on."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a")])
    await supervisor.start(GROUP, "connector-a")
    pid = await pid_of(supervisor, "connector-a")
    again, is_new, _ = await supervisord.start_supervisor(home)
    assert not is_new
    assert await pid_of(again, "connector-a") == pid


async def test_orphans_of_a_killed_supervisor_are_ended_first(supervisor: SupervisordSupervisor, home: Path) -> None:
    """SIGKILL of supervisord leaves children and a stale socket behind; the next start clears both away."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a")])
    await supervisor.start(GROUP, "connector-a")
    orphan = await pid_of(supervisor, "connector-a")
    assert orphan is not None
    os.kill(int((home / "supervisor" / "supervisord.pid").read_text()), signal.SIGKILL)

    async def dead() -> bool:
        return all(process.pid == orphan for process in supervisord.marked_processes(home))

    await until(dead, "the end of supervisord")
    assert supervisor.socket_path.exists()
    again, is_new, orphans = await supervisord.start_supervisor(home)
    assert is_new
    assert len(orphans) == 1
    assert f"pid {orphan}" in orphans[0]
    assert await again.states() == []


async def test_a_supervisor_that_does_not_answer_is_left_alone(
    supervisor: SupervisordSupervisor, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy supervisord may own a capture: it is named, not replaced; only the end of the stack ends it."""
    monkeypatch.setattr("ssmd_dagster.capture.supervisor.CALL_TIMEOUT_S", 0.3)
    pid = int((home / "supervisor" / "supervisord.pid").read_text())
    assert not await supervisord.supervisor_is_gone(home)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(UnreachableError, match=str(pid)):
        await supervisord.start_supervisor(home)
    assert not await supervisord.supervisor_is_gone(home)
    assert [process for process in await supervisord.end_supervisor(home) if str(pid) in process]
    assert await supervisord.supervisor_is_gone(home)


async def test_the_end_of_the_supervisor_leaves_nothing(supervisor: SupervisordSupervisor, home: Path) -> None:
    """supervisord takes its programs along, and nothing has to be killed."""
    await supervisor.ensure_group(GROUP, [sleeper("connector-a")])
    await supervisor.start(GROUP, "connector-a")
    assert await supervisord.end_supervisor(home) == []
    assert await supervisord.end_supervisor(home) == []
    assert supervisord.marked_processes(home) == []


async def test_a_supervisor_that_is_told_to_end_stops_writers_first(
    supervisor: SupervisordSupervisor, home: Path
) -> None:
    """When the machine shuts down, supervisord itself stops connectors, then archivers, then servers."""
    order = home / "order"
    for group, name in (("stack", "nats"), (GROUP, "archiver"), (GROUP, "connector-a")):
        code = (
            f"import signal, sys, time; path = {str(order)!r};"
            f"signal.signal(signal.SIGTERM, lambda *_: (open(path, 'a').write({name!r} + '\\n'), sys.exit(0)));"
            "print('ready'); time.sleep(600)"
        )
        await supervisor.ensure_group(group, [python(name, code)])
        await supervisor.start(group, name)
        log = log_path(home, group, name)

        async def ready(log: Path = log) -> bool:
            return log.exists() and log.read_text() == "ready\n"

        await until(ready, name)
    assert await supervisord.end_supervisor(home) == []
    assert order.read_text().split() == ["connector-a", "archiver", "nats"]


@pytest.mark.parametrize("name", [("a long 'home' " * 12).strip(), "50% ;x #1 %(here)s é"])
async def test_a_long_or_odd_home_has_its_socket_elsewhere(tmp_path: Path, name: str) -> None:
    """A unix socket's path has a limit of 100 bytes, and `;` begins a comment; such a home works all the same."""
    home = tmp_path / name
    home.mkdir(mode=0o700)
    try:
        supervisor, _, _ = await supervisord.start_supervisor(home)
        assert len(os.fsencode(supervisor.socket_path)) <= supervisord.SOCKET_PATH_LIMIT
        assert supervisor.socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert await supervisor.run_once(GROUP, python("once", "pass"), timeout_s=20) == 0
        supervisor.socket_path.parent.chmod(0o755)
        with pytest.raises(ConfigurationError, match="0700"):
            supervisord.connect_supervisor(home)
        supervisor.socket_path.parent.chmod(0o700)
    finally:
        await supervisord.end_supervisor(home)
    assert not supervisor.socket_path.parent.exists()


async def test_a_home_that_supervisord_cannot_write_down_is_refused(tmp_path: Path) -> None:
    """`[` starts a pattern where supervisord looks for its programs."""
    home = tmp_path / "[x]"
    home.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="another folder"):
        await supervisord.start_supervisor(home)
