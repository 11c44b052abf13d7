"""The door: which command is called, what an error looks like, how things are printed; `ssmd up` and `ssmd down`."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from ssmd_dagster.capture import supervisord
from ssmd_dagster.cli import main, output
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import ExitCode, RefusedError, UnreachableError

SSMD = (sys.executable, "-c", "from ssmd_dagster.cli.main import main; main()")
READY_TIMEOUT_S = 60


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private home."""
    home = tmp_path / "home"
    monkeypatch.setenv("SSMD_HOME", str(home))
    return home


@pytest.fixture
def stack_home(home: Path) -> Iterator[Path]:
    """A private home in which nothing runs when the test is over."""
    yield home
    subprocess.run([*SSMD, "down"], check=True, timeout=READY_TIMEOUT_S, capture_output=True)
    assert supervisord.marked_processes(home) == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command `fail` that raises what the test gives it."""

    def install(error: BaseException) -> None:
        @click.command()
        @click.option("--json", "as_json", is_flag=True)
        def fail(as_json: bool) -> None:
            raise error

        monkeypatch.setitem(main.cli.commands, "fail", fail)

    return install


def ssmd(*arguments: str, timeout_s: float = READY_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run([*SSMD, *arguments], check=False, capture_output=True, text=True, timeout=timeout_s)


def test_the_help_imports_no_command_and_no_dagster(home: Path) -> None:
    """`ssmd --help` lists every command with its line and stays quick by importing none."""
    code = (
        "import sys; from ssmd_dagster.cli.main import run; run(['--help']);"
        "print([m for m in sys.modules if m.split('.')[0] in ('dagster', 'nats', 'redis', 'aiohttp', 'rich')])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    for name in ("up", "down", "day", "env", "secmaster", "completion"):
        assert f"\n  {name} " in result.stdout
    assert result.stdout.endswith("[]\n")
    assert not home.exists()


def test_no_command_imports_dagster() -> None:
    """The CLI works, and answers at once, where Dagster is broken or absent."""
    modules = {module for name in main._COMMANDS for module in [main._COMMANDS[name][0].partition(":")[0]]}
    present = [m for m in sorted(modules) if (project_dir() / (m.replace(".", "/") + ".py")).exists()]
    assert "ssmd_dagster.cli.stack" in present
    code = f"import sys, {', '.join(present)}; print('dagster' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert result.stdout == "False\n"


def test_an_error_says_what_where_and_what_to_do(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of ours goes to stderr in two lines, with its own exit code."""
    failing(
        RefusedError("the day is held by alice", where="kalshi-sim 2025-12-14", do="Wait, or look at `ssmd day status`")
    )
    assert main.run(["fail"]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "Error: the day is held by alice (kalshi-sim 2025-12-14)\n  Wait, or look at `ssmd day status`\n"
    )


def test_an_error_is_json_where_json_is_asked_for(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json` stderr holds one object with stable keys, stdout stays free for data."""
    failing(UnreachableError("no answer", where="127.0.0.1:20000", do="Run `ssmd up`"))
    assert main.run(["fail", "--json"]) == ExitCode.UNREACHABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err) == {
        "error": {"exit_code": 7, "what": "no answer", "where": "127.0.0.1:20000", "do": "Run `ssmd up`"}
    }


def test_an_error_inside_a_task_group_is_the_error(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A group that wraps one known error is not an unexpected failure."""
    failing(ExceptionGroup("tasks", [UnreachableError("no answer")]))
    assert main.run(["fail"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err == "Error: no answer\n"


@pytest.mark.parametrize("arguments", [["no-such-command"], ["up", "--no-such-option"], ["completion"], ["fail", "x"]])
def test_wrong_words_are_usage_errors(failing: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and where the help is."""
    failing(RuntimeError())
    assert main.run(arguments) == ExitCode.USAGE
    assert "--help`" in capsys.readouterr().err


def test_an_interruption_exits_with_130(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no traceback."""
    failing(KeyboardInterrupt())
    assert main.run(["fail"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.endswith("Error: interrupted\n")


TALKING = """
import asyncio, click
from ssmd_dagster.cli import main

@main.cli.command("talk")
def talk():
    asyncio.run(talking())

async def talking():
    try:
        while True:
            click.echo("ready " * 1000)
            await asyncio.sleep(0.01)
    finally:
        click.echo("tidied up", err=True)

main.main()
"""


@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("shell", ["", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_to_be_told_to_end_is_to_be_interrupted(number: signal.Signals, shell: str) -> None:
    """A command that is ended, or whose terminal is closed, tidies up like one that gets Ctrl-C, also as a background job."""
    command = [sys.executable, "-c", shell + TALKING, "talk"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        process.send_signal(number)
        _, errors = process.communicate(timeout=READY_TIMEOUT_S)
    assert (process.returncode, errors) == (ExitCode.INTERRUPTED, "tidied up\n\nError: interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`ssmd … | head -1` prints its line and nothing about a broken pipe."""
    command = [sys.executable, "-c", TALKING, "talk"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == "tidied up\n"
        assert process.wait(READY_TIMEOUT_S) == ExitCode.FAILURE


def test_a_full_disk_is_named(
    failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output that cannot be written is no unexpected failure."""
    failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(main, "_can_print", lambda: False)
    assert main.run(["fail"]) == ExitCode.FAILURE
    assert capsys.readouterr().err == "Error: stdout cannot be written: No space left on device\n"


def test_a_disk_that_fails_is_no_traceback(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of ours is at fault, and a log could not be written either."""
    failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/nats.conf"))
    assert main.run(["fail"]) == ExitCode.FAILURE
    told = capsys.readouterr().err
    assert told.startswith("Error: the disk failed: No space left on device (/x/nats.conf)\n  Make room")


def test_a_process_ends_without_finalising_the_interpreter() -> None:
    """The threads of the object store's client abort a process that finalises; what was printed is there all the same."""
    code = "import atexit, ssmd_dagster.leaving as l; atexit.register(print, 'late'); print('done', end=''); l.leave(4)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (4, "done", "")


def test_an_unexpected_exception_is_one_line_and_a_file(
    failing: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal gets one line, the log the traceback; the log has a bound."""
    failing(ValueError("first line\nsecond line"))
    assert main.run(["fail"]) == ExitCode.FAILURE
    log = home / "logs" / "cli.log"
    assert capsys.readouterr().err == (f"Error: unexpected ValueError: first line\n  The traceback is in {log}\n")
    assert "Traceback" in log.read_text()
    log.write_bytes(b"x" * (main.LOG_MAX_BYTES + 1))
    assert main.run(["fail"]) == ExitCode.FAILURE
    assert log.stat().st_size < 100_000
    assert sorted(path.name for path in log.parent.iterdir()) == ["cli.log", "cli.log.1"]


def test_an_unexpected_exception_without_a_home_is_shown(
    failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no log can be written, the traceback goes to the terminal rather than nowhere."""
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "file").write_text("")
    failing(ValueError("lost"))
    assert main.run(["fail"]) == ExitCode.FAILURE
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str) -> None:
    """The script can be evaluated, and what it calls completes commands."""
    assert "_SSMD_COMPLETE" in ssmd("completion", shell).stdout


def test_completion_completes_commands() -> None:
    """The shell's request is answered with the commands that fit."""
    environment = {**os.environ, "_SSMD_COMPLETE": "bash_complete", "COMP_WORDS": "ssmd d", "COMP_CWORD": "1"}
    result = subprocess.run(SSMD, env=environment, check=False, capture_output=True, text=True, timeout=30)
    assert "plain,down" in result.stdout


def test_colour_is_for_terminals_only(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets no escape codes."""
    failing(RefusedError("no"))
    main.run(["fail"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_no_color_is_respected_on_a_terminal(home: Path, no_color: str, colored: bool) -> None:
    """On a terminal errors are coloured unless NO_COLOR is set."""
    code, text = on_a_terminal(["env", "show", "no-such"], {"NO_COLOR": no_color})
    assert code == ExitCode.NOT_FOUND
    assert ("\x1b[31m" in text) is colored


@pytest.mark.parametrize(
    ("span_s", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (725, "12m 5s"),
        (3600, "1h 0m"),
        (52_200, "14h 30m"),
        (86_400, "24h 0m"),
        (-5, "0s"),
    ],
)
def test_spans_are_printed_as_the_design_has_them(span_s: float, text: str) -> None:
    """Hours and minutes; smaller units only where there are no larger ones."""
    assert output.duration(int(span_s * 1e9)) == text


def test_times_and_numbers_are_printed_as_the_design_has_them() -> None:
    """UTC, with a Z, to the second; thousands with commas."""
    at_ns = 1_765_670_400_123_456_789
    assert output.rfc3339(at_ns) == "2025-12-14T00:00:00Z"
    assert output.to_the_minute(at_ns) == "2025-12-14T00:00"
    assert output.time_of_day(at_ns) == "00:00:00"
    assert output.thousands(1_234_567) == "1,234,567"


@pytest.mark.parametrize(("encoding", "lines"), [("utf-8", "  ✓ yes\n  ✗ no\n"), ("ascii", "  + yes\n  x no\n")])
def test_marks_fall_back_where_the_terminal_has_none(encoding: str, lines: str) -> None:
    """A terminal without UTF-8 gets plain letters, not an exception."""
    code = "from ssmd_dagster.cli.output import step; step('yes'); step('no', ok=False)"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=30)
    assert result.stdout.decode(encoding) == lines


def test_up_and_down_speak_json(stack_home: Path) -> None:
    """`up --detach --json` returns when all is ready; a second one says what runs; `down` says what it stopped."""
    first = ssmd("up", "--detach", "--no-dagster", "--json")
    assert first.returncode == 0, first.stderr
    up = json.loads(first.stdout)
    assert list(up) == ["home", "environments", "started", "already", "nats", "cache", "simulators", "dagster"]
    assert up["environments"] == ["kalshi-sim"]
    assert up["started"] == ["nats", "cache", "simulator-kalshi-sim"]
    assert up["dagster"] is None
    second = ssmd("up", "kalshi-sim", "--detach", "--no-dagster")
    assert second.returncode == 0
    assert second.stdout.startswith("Already up: kalshi-sim\n")
    assert "✓ nats runs already" in second.stderr
    down = json.loads(ssmd("down", "--json").stdout)
    assert set(down["stopped"]) == {"stack.nats", "stack.cache", "stack.simulator-kalshi-sim"}
    assert down["ended"] == []
    again = ssmd("down")
    assert (again.returncode, again.stdout) == (0, "Nothing was running.\n")


def test_up_in_the_foreground_ends_with_everything(stack_home: Path) -> None:
    """SIGTERM (or Ctrl-C, or a closed terminal) takes everything down; the exit code is 0."""
    with subprocess.Popen([*SSMD, "up", "--no-dagster"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"Stop: Ctrl-C"):
            assert process.poll() is None
        assert supervisord.marked_processes(stack_home) != []
        process.send_signal(signal.SIGTERM)
        assert process.wait(READY_TIMEOUT_S) == 0
    assert supervisord.marked_processes(stack_home) == []


def test_up_as_a_service_ends_once_its_supervisor_is_gone(stack_home: Path) -> None:
    """Killed, supervisord leaves its programs behind: they are stopped, and exit code 7 has the service started again."""
    code = "from ssmd_dagster.cli import main, stack; stack._LOOK_S = 0.1; main.main()"
    command = [sys.executable, "-c", code, "up", "--no-dagster"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith(b"Stop: Ctrl-C"):
            assert process.poll() is None
        os.kill(int((stack_home / "supervisor" / "supervisord.pid").read_text()), signal.SIGKILL)
        assert process.wait(READY_TIMEOUT_S) == ExitCode.UNREACHABLE
        assert b"supervisord is gone" in process.stderr.read()
    assert supervisord.marked_processes(stack_home) == []


def test_up_that_is_interrupted_too_soon_leaves_nothing(stack_home: Path) -> None:
    """Ctrl-C before all is ready stops what was started and exits with 130."""
    with subprocess.Popen([*SSMD, "up", "--no-dagster"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"supervisor" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(READY_TIMEOUT_S) == ExitCode.INTERRUPTED
    assert supervisord.marked_processes(stack_home) == []


def test_the_live_screen_shows_processes_and_ends_with_ctrl_c(stack_home: Path) -> None:
    """On a terminal `up` shows a screen with every process; Ctrl-C takes everything down."""
    code, text = on_a_terminal(
        ["up", "--no-dagster"], {"COLUMNS": "120", "LINES": "40"}, until="simulator-kalshi-sim  "
    )
    assert code == 0
    assert "RUNNING" in text or "STARTING" in text
    assert "Ctrl-C stops everything." in text
    assert supervisord.marked_processes(stack_home) == []


def on_a_terminal(arguments: list[str], environment: dict[str, str], until: str | None = None) -> tuple[int, str]:
    """Run the command line on a terminal, interrupt it once `until` is shown; return exit code and output."""
    terminal, other_side = pty.openpty()
    # Unbuffered, Python drops the rest of a write that a signal cuts short.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [*SSMD, *arguments],
        env={**inherited, "TERM": "xterm", **environment},
        stdin=other_side,
        stdout=other_side,
        stderr=other_side,
    ) as process:
        os.close(other_side)
        deadline = time.monotonic() + READY_TIMEOUT_S
        shown = b""
        while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:
                # Linux says EIO where the other side has closed the terminal.
                break
            if not chunk:
                break
            shown += chunk
            if until is not None and until.encode() in shown:
                until = None
                process.send_signal(signal.SIGINT)
        code = process.wait(READY_TIMEOUT_S)
    os.close(terminal)
    return code, shown.decode(errors="replace")
