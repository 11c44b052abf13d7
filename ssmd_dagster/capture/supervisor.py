"""Who starts, restarts and stops the long-running processes: the port, and supervisord behind it.

A Dagster run or a command never is their parent. Not for starting supervisord itself (`supervisord.py`), nor for what
the processes do. Every program is a supervisord group of its own, `{group}.{name}`, so that one can be replaced while
its neighbours run on.
"""

from __future__ import annotations

import asyncio
import base64
import configparser
import http.client
import math
import re
import shutil
import socket
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol
from xml.parsers import expat

import psutil

from ssmd_dagster.environments.home import logs_dir, supervisor_dir
from ssmd_dagster.errors import ConfigurationError, ExitCode, NotFoundError, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.stores.embedded import write_private

MARK_HOME = "SSMD_HOME"
MARK_GROUP = "SSMD_GROUP"
"""Both stand in the environment of every supervised process: by them the next `ssmd up` finds orphans."""

CALL_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 15.0
STOP_DEADLINE_S = 120.0
"""Longest time that a stop may take, SIGKILL included; a program's own `stop_timeout_s` must be below it."""
START_SECONDS = 1
START_RETRIES = 10
"""A program that dies within START_SECONDS is tried again after 1, 2, 3 … s, at most this often (FATAL then)."""
LOG_MAX_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 5
FINAL_EXIT_CODES = (int(ExitCode.OK), int(ExitCode.CONFIGURATION))

_POLL_S = 0.05
_FORK_POLL_S = 0.005
_GROUP_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
_PROGRAM_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_./:,+@=-]+")
_QUOTED_PARTS = re.compile(f"{_PLAIN.pattern}|.", re.DOTALL)
_STOPPED_STATES = frozenset({"STOPPED", "EXITED", "FATAL"})


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process to run: `command` with `environment` on top of the supervisor's own.

    With `restart` it is started again when it dies, unless its exit code is final (0 and 8). stdout and stderr go to
    `log` (inside SSMD_HOME, default `logs/{group}/{name}.log`), rotated at 10 MB, five old files kept.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    restart: bool = True
    stop_timeout_s: float = STOP_TIMEOUT_S
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What the supervisor knows of one program.

    `state` is STARTING (alive for less than a second), RUNNING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL or UNKNOWN.
    `exit_code` is that of the last end where one is known, -1 after a signal; `since_ns` counts since the epoch.
    """

    group: str
    name: str
    state: str
    pid: int | None
    exit_code: int | None
    since_ns: int

    @property
    def alive(self) -> bool:
        """Whether a process exists."""
        return self.pid is not None


class Supervisor(Protocol):
    """Owns processes in named groups: `{env}-{date}` for a day, `{env}` for the gateway, `stack` for servers."""

    async def ensure_group(self, group: str, programs: Sequence[Program]) -> None:
        """Make the programs known, none started. A changed one is stopped and replaced; others stay as they are."""

    async def start(self, group: str, name: str) -> None:
        """Start one known program; nothing happens if it runs. Does not wait until it is ready."""

    async def stop(self, group: str, name: str | None = None) -> None:
        """Stop one program or the whole group and wait until it is gone; unknown ones count as stopped."""

    async def remove_group(self, group: str) -> None:
        """Stop the group and forget it; its logs stay."""

    async def states(self, group: str | None = None) -> list[ProcessState]:
        """Return what is known of one group's programs or of all, sorted by group and name."""

    async def run_once(self, group: str, program: Program, timeout_s: float) -> int:
        """Run a program to its end, forget it and return its exit code (-1: a signal)."""


class _Fault(IntEnum):
    """The supervisord faults that mean something here (supervisor/xmlrpc.py, `Faults`)."""

    SHUTDOWN_STATE = 6
    BAD_NAME = 10
    NO_FILE = 20
    NOT_EXECUTABLE = 21
    FAILED = 30
    SPAWN_ERROR = 50
    ALREADY_STARTED = 60
    NOT_RUNNING = 70
    ALREADY_ADDED = 90
    STILL_RUNNING = 91
    CANT_REREAD = 92


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path, timeout_s: float, headers: list[tuple[str, str]]) -> None:
        super().__init__(headers=headers)
        self._path = path
        self._timeout_s = timeout_s

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        # Kept where the base class looks for what it has to close.
        connection = _UnixConnection(self._path, self._timeout_s)
        self._connection = host, connection
        return connection


class SupervisordSupervisor:
    """supervisord over its unix socket. Calls run off the event loop, each with a deadline of five seconds.

    Errors: `UnreachableError` where nobody answers, `ConfigurationError` for a refused password or a program that
    supervisord cannot take.
    """

    def __init__(self, home: Path, socket_path: Path, user: str, password: str) -> None:
        self.home = home
        self.socket_path = socket_path
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = [("Authorization", f"Basic {token}")]

    def __repr__(self) -> str:
        return f"SupervisordSupervisor({self.socket_path})"

    async def ensure_group(self, group: str, programs: Sequence[Program]) -> None:
        """Make the programs known, none started. A changed one is stopped and replaced; others stay as they are."""
        await self._ensure(group, programs, once=False)

    async def start(self, group: str, name: str) -> None:
        """Start one known program; nothing happens if it runs. Does not wait until it is ready."""
        key = _key(group, name)
        try:
            await self._call("supervisor.startProcess", key, False)
            info: Any = await self._call("supervisor.getProcessInfo", key)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == _Fault.ALREADY_STARTED:
                return
            if fault.faultCode == _Fault.BAD_NAME:
                raise NotFoundError(
                    f"the supervisor knows no program {name}", where=group, do="Start the day or run `ssmd up`"
                ) from fault
            raise self._unexpected(fault, key) from fault
        # Until it has become the program, the fork of supervisord swallows a SIGTERM, and a stop would take
        # `stop_timeout_s`.
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while _is_still_a_fork(info["pid"], group) and time.monotonic() < deadline:
            await asyncio.sleep(_FORK_POLL_S)

    async def stop(self, group: str, name: str | None = None) -> None:
        """Stop one program or the whole group and wait until it is gone; unknown ones count as stopped.

        Raises `SsmdError` if something still lives after two minutes (SIGKILL comes after its `stop_timeout_s`).
        """
        deadline = time.monotonic() + STOP_DEADLINE_S
        seen_stopped = False
        while True:
            states = [s for s in await self.states(group) if name in (None, s.name)]
            left = [state for state in states if state.state not in _STOPPED_STATES]
            # supervisord starts what has just crashed again only after it has answered: the next look shows it.
            if not left and (seen_stopped or not any(_has_crashed(state) for state in states)):
                return
            seen_stopped = not left
            if time.monotonic() > deadline:
                names = ", ".join(f"{state.name} (pid {state.pid})" for state in left)
                raise SsmdError(
                    f"still running {STOP_DEADLINE_S:.0f} s after it was told to stop: {names}",
                    where=group,
                    do="Look at its log, then `kill -9` it",
                )
            for state in left:
                if state.state != "STOPPING":
                    await self._tell_to_stop(_key(group, state.name))
            if left:
                await asyncio.sleep(_POLL_S)

    async def remove_group(self, group: str) -> None:
        """Stop the group and forget it; its logs stay."""
        _check(_GROUP_NAME, group, "group")
        for path in self._config_dir.glob(f"{group}.*.conf"):
            path.unlink(missing_ok=True)
        await self.stop(group)
        for state in await self.states(group):
            await self._forget(_key(group, state.name))

    async def states(self, group: str | None = None) -> list[ProcessState]:
        """Return what is known of one group's programs or of all, sorted by group and name."""
        infos: Any = await self._call("supervisor.getAllProcessInfo")
        states = [_state_of(info) for info in infos]
        return sorted(
            (state for state in states if group in (None, state.group)), key=lambda state: (state.group, state.name)
        )

    async def run_once(self, group: str, program: Program, timeout_s: float) -> int:
        """Run a program to its end, forget it and return its exit code (-1: a signal).

        Raises `RefusedError` if one of that name is running, `SsmdError` after `timeout_s` (it is stopped then).
        """
        before = [state for state in await self.states(group) if state.name == program.name]
        if any(state.state not in _STOPPED_STATES for state in before):
            raise RefusedError(f"{program.name} is running already", where=group, do="Wait until it has ended")
        await self._ensure(group, [program], once=True)
        deadline = time.monotonic() + timeout_s
        try:
            await self.start(group, program.name)
            while True:
                state = next((s for s in await self.states(group) if s.name == program.name), None)
                if state is not None and state.state == "EXITED":
                    return 0 if state.exit_code is None else state.exit_code
                if state is None or state.state in _STOPPED_STATES:
                    raise SsmdError(f"{program.name} did not run to its end", where=group, do="Look at its log")
                if time.monotonic() > deadline:
                    raise SsmdError(
                        f"{program.name} did not end within {timeout_s:g} s", where=group, do="Look at its log"
                    )
                await asyncio.sleep(_POLL_S)
        finally:
            await self.stop(group, program.name)
            self._config_path(group, program.name).unlink(missing_ok=True)
            await self._forget(_key(group, program.name))

    async def shutdown(self) -> None:
        """Tell supervisord to stop everything, latest groups first, and to end; does not wait."""
        await self._call("supervisor.shutdown")

    async def ping(self) -> None:
        """Return if supervisord answers and takes the password."""
        await self._call("supervisor.getState")

    @property
    def _config_dir(self) -> Path:
        return supervisor_dir(self.home) / "conf.d"

    def _config_path(self, group: str, name: str) -> Path:
        return self._config_dir / f"{_key(group, name)}.conf"

    async def _ensure(self, group: str, programs: Sequence[Program], *, once: bool) -> None:
        for program in programs:
            text = render_program(self.home, group, program, once=once)
            path = self._config_path(group, program.name)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_private(path, text)
        _, changed = await self._reload()
        wanted = {_key(group, program.name): program.name for program in programs}
        for key in sorted(wanted.keys() & changed):
            await self.stop(group, wanted[key])
            await self._forget(key)
        known = {_key(state.group, state.name) for state in await self.states(group)}
        for key in sorted(wanted.keys() - known):
            try:
                await self._call("supervisor.addProcessGroup", key)
            except xmlrpc.client.Fault as fault:
                # Another actor that wants the same group came first: what was asked for is so.
                if fault.faultCode != _Fault.ALREADY_ADDED:
                    raise self._unexpected(fault, key) from fault

    async def _reload(self) -> tuple[set[str], set[str]]:
        # supervisord refuses every program if one log folder is gone, so all of them are made first.
        for path in self._config_dir.glob("*.conf"):
            _make_log_folder(self.home, path)
        try:
            result: Any = await self._call("supervisor.reloadConfig")
        except xmlrpc.client.Fault as fault:
            raise ConfigurationError(
                f"supervisord cannot read its configuration: {fault.faultString}",
                where=str(self._config_dir),
                do="Remove the file that it names, then try again",
            ) from fault
        added, changed, _ = result[0]
        return set(added), set(changed)

    async def _tell_to_stop(self, key: str) -> None:
        try:
            await self._call("supervisor.stopProcess", key, False)
        except xmlrpc.client.Fault as fault:
            # It ended, or was removed, between the look and the request.
            if fault.faultCode not in (_Fault.NOT_RUNNING, _Fault.BAD_NAME):
                raise self._unexpected(fault, key) from fault

    async def _forget(self, key: str) -> None:
        try:
            await self._call("supervisor.removeProcessGroup", key)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != _Fault.BAD_NAME:
                raise self._unexpected(fault, key) from fault

    def _unexpected(self, fault: xmlrpc.client.Fault, key: str) -> SsmdError:
        if fault.faultCode == _Fault.SHUTDOWN_STATE:
            return UnreachableError(
                "supervisord is shutting down", where=str(self.socket_path), do="Run `ssmd up` once it has ended"
            )
        return SsmdError(f"supervisord refused: {fault.faultString}", where=key, do=f"Look at {self._log_hint}")

    @property
    def _log_hint(self) -> Path:
        return supervisor_dir(self.home) / "supervisord.log"

    async def _call(self, method: str, *arguments: object) -> object:
        return await asyncio.to_thread(self._call_now, method, arguments)

    def _call_now(self, method: str, arguments: tuple[object, ...]) -> object:
        transport = _UnixTransport(self.socket_path, CALL_TIMEOUT_S, self._headers)
        proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport)
        try:
            with proxy:
                return getattr(proxy, method)(*arguments)
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == http.HTTPStatus.UNAUTHORIZED:
                raise ConfigurationError(
                    "supervisord refused the password",
                    where=str(self.socket_path),
                    do="Run `ssmd down`, then `ssmd up`",
                ) from error
            raise self._unreachable() from error
        except (OSError, http.client.HTTPException, expat.ExpatError) as error:
            raise self._unreachable() from error

    def _unreachable(self) -> UnreachableError:
        return UnreachableError("supervisord does not answer", where=str(self.socket_path), do="Run `ssmd up`")


def log_path(home: Path, group: str, name: str) -> Path:
    """Return where a program's output goes unless it names another file."""
    return logs_dir(home) / group / f"{name}.log"


def render_program(home: Path, group: str, program: Program, *, once: bool = False) -> str:
    """Return the supervisord section of one program. Raises `ConfigurationError` for what cannot be written down.

    The environment is part of the command, through env(1), which becomes the program: supervisord's own `environment=`
    has no way to write a value with both kinds of quotes, or one with a ` ;` in it. supervisord reads the command as
    shlex does, after it has cut comments and expanded `%`.
    """
    key = _key(group, program.name)
    if not program.command or "=" in program.command[0] or shutil.which(program.command[0]) is None:
        raise ConfigurationError(
            f"cannot run {program.command[0] if program.command else 'an empty command'}",
            where=key,
            do="Install the program or correct its path",
        )
    if program.stop_timeout_s >= STOP_DEADLINE_S:
        raise ConfigurationError(
            f"stop_timeout_s is {program.stop_timeout_s:g}", where=key, do=f"Give less than {STOP_DEADLINE_S:g}"
        )
    environment = {
        "PYTHONUNBUFFERED": "1",
        **program.environment,
        MARK_HOME: str(home),
        MARK_GROUP: group,
    }
    words = [_env_binary()]
    for name, value in environment.items():
        _check(_VARIABLE_NAME, name, "variable")
        words.append(f"{name}={value}")
    words += program.command
    restart = program.restart and not once
    settings = {
        "command": " ".join(_quote(word, key) for word in words),
        "autostart": "false",
        "autorestart": "unexpected" if restart else "false",
        "exitcodes": ",".join(str(code) for code in FINAL_EXIT_CODES),
        "startsecs": START_SECONDS if restart else 0,
        "startretries": START_RETRIES if restart else 0,
        "stopwaitsecs": math.ceil(program.stop_timeout_s),
        "stopasgroup": "true",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _log_setting(home, group, program),
        "stdout_logfile_maxbytes": LOG_MAX_BYTES,
        "stdout_logfile_backups": LOG_BACKUPS,
        "priority": _priority(group, program.name),
    }
    lines = [f"[program:{key}]", *(f"{name}={value}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"


def _quote(word: str, where: str) -> str:
    if any(char in word for char in "\0\r\n") or not _is_utf8(word):
        raise ConfigurationError(f"supervisord cannot pass on {word!r}", where=where, do="Use text without line breaks")
    # Quoting char by char keeps `;` and `#` away from white space (a comment) and `%` away from `(here)s`.
    quoted = {"%": "%%''", "'": '"\'"'}
    parts = _QUOTED_PARTS.findall(word)
    return "".join(part if _PLAIN.fullmatch(part) else quoted.get(part, f"'{part}'") for part in parts) or "''"


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _log_setting(home: Path, group: str, program: Program) -> str:
    path = program.log or log_path(home, group, program.name)
    if not path.is_relative_to(home) or not _PLAIN_PATH.fullmatch(str(path.relative_to(home))):
        raise ConfigurationError(
            f"the log {path} is no plain path inside {home}", where=_key(group, program.name), do="Leave it out"
        )
    # supervisord runs in the home, whose own path may hold what its configuration cannot.
    return str(path.relative_to(home))


def _make_log_folder(home: Path, path: Path) -> None:
    parser = configparser.RawConfigParser()
    parser.read(path, encoding="utf-8")
    for section in parser.sections():
        (home / parser[section]["stdout_logfile"]).parent.mkdir(parents=True, exist_ok=True, mode=0o700)


def _env_binary() -> str:
    found = shutil.which("env")
    if found is None:
        raise ConfigurationError("env(1) is not on PATH", where="PATH", do="Add /usr/bin to PATH")
    return found


def _is_still_a_fork(pid: int, group: str) -> bool:
    try:
        return pid != 0 and psutil.Process(pid).environ().get(MARK_GROUP) != group
    except psutil.Error:
        return False


def _priority(group: str, name: str) -> int:
    """Return the order in which supervisord starts; it stops the other way round: connectors first, servers last."""
    if group == "stack":
        return 100
    return 900 if name.startswith("connector") else 500


def _key(group: str, name: str) -> str:
    _check(_GROUP_NAME, group, "group")
    _check(_PROGRAM_NAME, name, "program")
    return f"{group}.{name}"


def _check(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise ConfigurationError(f"{text!r} is no name of a {what}", where="supervisor", do=f"Use {pattern.pattern}")


def _has_crashed(state: ProcessState) -> bool:
    return state.state == "EXITED" and state.exit_code not in FINAL_EXIT_CODES


def _state_of(info: Mapping[str, Any]) -> ProcessState:
    group, _, name = str(info["name"]).rpartition(".")
    state = str(info["statename"])
    ended = state in ("EXITED", "FATAL", "BACKOFF", "STOPPED")
    since_s = info["stop"] if ended else info["start"]
    return ProcessState(
        group=group,
        name=name,
        state=state,
        pid=info["pid"] or None,
        exit_code=info["exitstatus"] if ended and info["stop"] else None,
        since_ns=int(since_s) * 1_000_000_000,
    )
