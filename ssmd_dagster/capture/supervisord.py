"""supervisord's own life: its configuration, starting it, finding it again, ending it with all that it left behind.

Not for what runs under it (`stack.py`, the workflows), which goes through the port in `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from ssmd_dagster.capture.supervisor import MARK_GROUP, MARK_HOME, SupervisordSupervisor
from ssmd_dagster.environments.home import supervisor_dir
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.stores.embedded import write_private

GROUP = "supervisor"
"""SSMD_GROUP of supervisord itself; what it starts carries the name of its own group."""

START_TIMEOUT_S = 15.0
END_TIMEOUT_S = 60.0
ORPHAN_TIMEOUT_S = 20.0
SOCKET_PATH_LIMIT = 100
"""Bytes; the system's limit for a unix socket is 104 (macOS) or 108 (Linux) with the closing zero."""

_POLL_S = 0.02
_SOCKET = "supervisor.sock"
_PATTERN_CHARACTERS = re.compile(r"[\x00-\x1f\[\]*?]")
_PLAIN_PATH = re.compile(r"[^\x00-\x1f%;#]+")

_CONFIG = """\
[supervisord]
logfile=supervisor/supervisord.log
logfile_maxbytes=10MB
logfile_backups=5
pidfile=supervisor/supervisord.pid
childlogdir=supervisor
umask=077
identifier=ssmd

[unix_http_server]
file={socket}
chmod=0600
username={user}
password={password}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[rpcinterface:ssmd]
supervisor.rpcinterface_factory=ssmd_dagster.capture.supervisord_plugin:make_rpcinterface

[include]
files=conf.d/*.conf
"""


class _Access(msgspec.Struct, frozen=True):
    """How a client gets in; kept in `supervisor/access.json`, 0600."""

    socket: str
    user: str
    password: str

    def __repr__(self) -> str:
        return f"_Access({self.socket})"


def connect_supervisor(home: Path) -> SupervisordSupervisor:
    """Return the supervisor of this home. Nothing is asked of it yet.

    Raises `UnreachableError` if none was ever started, `ConfigurationError` if its socket's folder is not ours alone.
    """
    path = _access_path(home)
    try:
        access = msgspec.json.decode(path.read_bytes(), type=_Access)
    except FileNotFoundError as error:
        raise UnreachableError("no supervisor has been started", where=str(home), do="Run `ssmd up`") from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"cannot be read: {error}", where=str(path), do="Run `ssmd down`, `ssmd up`"
        ) from error
    socket_path = Path(access.socket)
    if socket_path.parent.exists():
        _check_private(socket_path.parent)
    return SupervisordSupervisor(home, socket_path, access.user, access.password)


async def start_supervisor(home: Path) -> tuple[SupervisordSupervisor, bool, list[str]]:
    """Return the running supervisor of this home; start one if there is none.

    The second value says whether it was started now, the third names the orphans of a killed one, stopped before.
    A living supervisord that does not answer is left alone (it may own a capture): `UnreachableError`.
    """
    try:
        supervisor = connect_supervisor(home)
        await supervisor.ping()
    except UnreachableError as error:
        if living := _supervisors(home):
            raise UnreachableError(
                f"supervisord (pid {living[0].pid}) runs and does not answer",
                where=str(home),
                do="Try again; `ssmd down` ends it and everything that it runs",
            ) from error
    else:
        return supervisor, False, []
    orphans = await end_processes(home)
    access = _write_configuration(home)
    await asyncio.to_thread(_launch, home)
    supervisor = connect_supervisor(home)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            await supervisor.ping()
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)
        else:
            break
    _check_private(Path(access.socket).parent)
    return supervisor, True, orphans


async def supervisor_is_gone(home: Path) -> bool:
    """Say whether no supervisord of this home lives. One that lives and does not answer may own a capture: not gone."""
    try:
        await connect_supervisor(home).ping()
    except (UnreachableError, ConfigurationError):
        return not await asyncio.to_thread(_supervisors, home)
    except xmlrpc.client.Fault:  # it is shutting down, and stops its programs first
        return False
    return False


async def end_supervisor(home: Path) -> list[str]:
    """Shut supervisord down and make sure that nothing of this home runs; name what had to be ended.

    Bounded: a minute for supervisord (it stops its programs), then SIGTERM and SIGKILL for whatever is left.
    """
    try:
        await connect_supervisor(home).shutdown()
    except (UnreachableError, ConfigurationError):
        # Gone, or it does not listen to us: what is left of it is found by its mark.
        ended = await end_processes(home)
    else:
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline and _supervisors(home):
            await asyncio.sleep(_POLL_S)
        ended = await end_processes(home)
    _remove_socket(home)
    return ended


def marked_processes(home: Path) -> list[psutil.Process]:
    """Return the living processes that carry this home's mark, without the caller and those above it."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in own and _is_marked(process, home)]


def _supervisors(home: Path) -> list[psutil.Process]:
    return [process for process in marked_processes(home) if _group_of(process) == GROUP]


async def end_processes(home: Path) -> list[str]:
    """Stop every marked process (SIGTERM, then SIGKILL), supervisord first and the servers last; name them.

    Raises `SsmdError` if one survives even that.
    """
    ended: list[str] = []
    for is_turn in (
        lambda group: group == GROUP,
        lambda group: group not in (GROUP, "stack"),
        lambda group: True,
    ):
        processes = [process for process in marked_processes(home) if is_turn(_group_of(process))]
        # supervisord is killed: told to end, it would first wait for all that it runs.
        ended += await _end(processes)
    left = marked_processes(home)
    if left:
        raise SsmdError(
            f"cannot end {', '.join(_describe(process) for process in left)}", where=str(home), do="`kill -9` them"
        )
    return ended


async def _end(processes: Sequence[psutil.Process]) -> list[str]:
    names = [_describe(process) for process in processes]
    for process in processes:
        _signal(process, kill=_group_of(process) == GROUP)
    for process in await _wait_until_gone(processes):
        _signal(process, kill=True)
    await _wait_until_gone(processes)
    return names


async def _wait_until_gone(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return those that still live after `ORPHAN_TIMEOUT_S`. One that nobody has reaped yet counts as gone."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_S
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
    return alive


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        # It ended by itself in between, which is what was wanted.
        return


def _is_marked(process: psutil.Process, home: Path) -> bool:
    try:
        environment = process.environ()
        return (
            MARK_GROUP in environment
            and Path(environment.get(MARK_HOME, "/")).resolve() == home.resolve()
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except (psutil.Error, OSError):
        # Another user's, or gone between the listing and the look: not ours.
        return False


def _group_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(MARK_GROUP, ""))
    except psutil.Error:
        return ""


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.name()} (pid {process.pid}, {_group_of(process)})"
    except psutil.Error:
        return f"pid {process.pid}"


def _write_configuration(home: Path) -> _Access:
    if found := _PATTERN_CHARACTERS.search(str(home)):
        raise ConfigurationError(
            f"the path holds {found.group()!r}, and supervisord would take it for a pattern",
            where=f"SSMD_HOME={home}",
            do="Choose another folder",
        )
    folder = supervisor_dir(home)
    for path in (folder, folder / "conf.d"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    # What ran before is over; a day's programs come back with the verb that wants them.
    for path in (folder / "conf.d").iterdir():
        path.unlink()
    socket_path = _socket_folder(home) / _SOCKET
    socket_path.unlink(missing_ok=True)
    access = _Access(socket=str(socket_path), user="ssmd", password=secrets.token_hex(16))
    write_private(
        folder / "supervisord.conf",
        _CONFIG.format(socket=access.socket, user=access.user, password=access.password),
    )
    write_private(_access_path(home), msgspec.json.encode(access).decode())
    return access


def _socket_folder(home: Path) -> Path:
    """Return the socket's folder: in the home, or a private one elsewhere if that path is too long or too odd."""
    folder = supervisor_dir(home)
    if len(os.fsencode(folder / _SOCKET)) <= SOCKET_PATH_LIMIT and _PLAIN_PATH.fullmatch(str(folder)):
        return folder
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"ssmd-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_private(folder)
    return folder


def _remove_socket(home: Path) -> None:
    if not _access_path(home).exists():
        return
    folder = _socket_folder(home)
    (folder / _SOCKET).unlink(missing_ok=True)
    if folder != supervisor_dir(home):
        # Made for this socket alone; a socket that supervisord was about to move into place may lie beside it.
        shutil.rmtree(folder)


def _check_private(folder: Path) -> None:
    """Refuse a folder that another user could have put there or can look into."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigurationError(
            "the supervisor's socket must lie in a folder of yours with mode 0700", where=str(folder), do="Remove it"
        )


def _access_path(home: Path) -> Path:
    return supervisor_dir(home) / "access.json"


def _launch(home: Path) -> None:
    # The child forks once its socket listens, and returns; relative paths in the configuration count from the home.
    environment = {**os.environ, MARK_HOME: str(home), MARK_GROUP: GROUP}
    command = [sys.executable, "-P", "-X", "utf8", "-m", "supervisor.supervisord", "-c", "supervisor/supervisord.conf"]
    try:
        result = subprocess.run(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SsmdError(
            f"supervisord did not start within {START_TIMEOUT_S:g} s", where=str(home), do=_look(home)
        ) from error
    if result.returncode != 0:
        output = result.stdout.decode(errors="replace").strip()
        raise SsmdError(f"supervisord did not start: {output}", where=str(home), do=_look(home))


def _look(home: Path) -> str:
    return f"Look at {home / 'supervisor' / 'supervisord.log'}"
