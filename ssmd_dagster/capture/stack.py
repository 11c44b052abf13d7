"""`ssmd up` and `ssmd down` as functions: which servers the environments need, running, ready, and gone again.

The group `stack` holds NATS, the cache, one simulator per simulated environment, and Dagster. Not for a day's processes
(the workflows start those) nor for printing (`cli/stack.py`).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import aiohttp
import yaml

from ssmd_dagster.capture.supervisor import ProcessState, Program, Supervisor, log_path
from ssmd_dagster.capture.supervisord import connect_supervisor, end_supervisor, start_supervisor
from ssmd_dagster.environments.home import dagster_dir, project_dir, simulator_dir, supervisor_dir
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.environments.secrets import add_secrets, load_secrets
from ssmd_dagster.errors import ConfigurationError, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.simulator.main import command
from ssmd_dagster.stores import embedded
from ssmd_dagster.stores.connect import SimulatorAddress, connect
from ssmd_dagster.stores.embedded import HOST, EmbeddedStack

GROUP = "stack"
DEFINITIONS_MODULE = "ssmd_dagster.definitions"
CODE_LOCATION = "ssmd_dagster"

SERVER_TIMEOUT_S = 30.0
DAGSTER_TIMEOUT_S = 180.0
"""Dagster imports for ten seconds on a quiet machine with two cores, and for a minute on a busy one."""
LOCK_TIMEOUT_S = 300.0

_POLL_S = 0.1
_WATCH_S = 1.0
_DAY_GROUP = re.compile(r".*-\d{4}-\d{2}-\d{2}")
_LOG_TAIL_BYTES = 4096
_PYTHON = (sys.executable, "-P")
"""Without the working folder in the module path: that is SSMD_HOME, whose folders are called `nats` and `dagster`."""

_WORKSPACE_QUERY = """{ workspaceOrError { __typename
  ... on Workspace { locationEntries { name loadStatus locationOrLoadError {
    __typename ... on PythonError { message } } } }
  ... on PythonError { message } } }"""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One thing that happened while the stack came up or went down.

    `state` is `running` (it ran already), `starting`, `ready`, `stopped` or `note`; `part` names what it is about.
    """

    part: str
    state: str
    detail: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Up:
    """What `up` came to: the parts that it started, those that ran already, and where they listen."""

    stack: EmbeddedStack
    started: tuple[str, ...]
    already: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Down:
    """What `down` came to: the programs that it stopped in order, and the processes that it had to look for and end."""

    stopped: tuple[str, ...]
    ended: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A program of the group `stack` and how to see that it is ready; `where` is its address."""

    program: Program
    probe: Callable[[], Awaitable[bool]]
    timeout_s: float
    where: str

    @property
    def name(self) -> str:
        return self.program.name


async def up(
    environments: Sequence[Environment],
    home: Path,
    exchanges: Path,
    *,
    dagster: bool = True,
    report: Report = lambda progress: None,
    definitions_module: str = DEFINITIONS_MODULE,
) -> Up:
    """Bring up what the environments need of the embedded stack, and Dagster; return once each part answers.

    What runs already stays as it is and counts as success, unless its settings have changed. What fails leaves the rest
    running, for a second try. Side effects: `stack.json`, `secrets.env`, configuration and logs in `home`.

    Raises:
        ConfigurationError: A server is not installed, a file is damaged, a name cannot be used.
        UnreachableError: A part ended or did not answer in time; names it and its log.
        RefusedError: Another `up` or `down` holds this home.
    """
    for environment in environments:
        if environment.name == GROUP:
            raise ConfigurationError(f"no environment can be called {GROUP!r}", where=environment.name, do="Rename it")
    if dagster:
        _check_instance(home)
    async with _locked(home):
        supervisor, is_new, orphans = await start_supervisor(home)
        for orphan in orphans:
            report(Progress(part="supervisor", state="note", detail=f"ended {orphan}, left behind by a killed one"))
        report(Progress(part="supervisor", state="ready" if is_new else "running"))
        alive = {state.name for state in await supervisor.states(GROUP) if state.alive}
        stack = _address(environments, embedded.remembered_stack(home), alive, dagster=dagster, report=report)
        await asyncio.to_thread(embedded.write_stack, home, stack)
        first, second = _servers(environments, home, stack, exchanges), []
        if dagster:
            # The webserver and the daemon look for the code server once when they start, so it comes before them.
            first.append(_code_server(home, exchanges, stack, definitions_module))
            second = _dagster(home, exchanges, stack)
        await supervisor.ensure_group(GROUP, [part.program for part in (*first, *second)])
        alive = {state.name for state in await supervisor.states(GROUP) if state.alive}
        await _start_all(supervisor, home, first, alive, report)
        _keep_keys(environments, home)
        await _start_all(supervisor, home, second, alive, report)
    names = [part.name for part in (*first, *second)]
    return Up(
        stack=stack,
        started=tuple(name for name in names if name not in alive),
        already=tuple(name for name in names if name in alive),
    )


async def down(home: Path, *, report: Report = lambda progress: None) -> Down:
    """Stop everything of this home: connectors, archivers, gateways, Dagster, exchanges, servers, supervisord.

    Bounded; whatever does not end by itself is killed. Nothing running is a success.
    """
    stopped: list[str] = []
    async with _locked(home):
        try:
            supervisor = connect_supervisor(home)
            for is_turn in _STOP_ORDER:
                states = [state for state in await supervisor.states() if state.alive and is_turn(state)]
                await asyncio.gather(*(supervisor.stop(state.group, state.name) for state in states))
                for state in states:
                    stopped.append(f"{state.group}.{state.name}")
                    report(Progress(part=stopped[-1], state="stopped"))
        except UnreachableError:
            # No supervisord to ask; what it may have left behind is found below.
            pass
        except SsmdError as error:
            report(Progress(part="supervisor", state="note", detail=f"{error}; ending it all the same"))
        ended = await end_supervisor(home)
        for name in ended:
            report(Progress(part=name, state="stopped", detail="it ran without its supervisor"))
    return Down(stopped=tuple(stopped), ended=tuple(ended))


@dataclass(frozen=True, kw_only=True)
class DayNow:
    """The current day of an environment as the cache has it; None where there is none or nobody answers."""

    date: str | None = None
    state: str | None = None


class Watch:
    """What runs and where the days stand, looked at again and again: `async with Watch(…) as watch`.

    `days` is kept up to date in the background; a server that goes away empties it until it is back.
    """

    def __init__(self, environments: Sequence[Environment], home: Path) -> None:
        self.days: dict[str, DayNow] = {}
        self._environments = environments
        self._home = home
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    async def __aenter__(self) -> Self:
        secrets = load_secrets(self._home)
        self._tasks = [asyncio.create_task(self._follow(each, secrets)) for each in self._environments]
        return self

    async def __aexit__(self, *_: object) -> None:
        # A cancellation can get lost in `asyncio.wait_for` (before Python 3.12), which the clients use.
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def processes(self) -> list[ProcessState]:
        """Return all processes of this home, sorted by group and name."""
        return await connect_supervisor(self._home).states()

    async def _follow(self, environment: Environment, secrets: Mapping[str, str]) -> None:
        while not self._is_over:
            try:
                async with connect(environment, self._home, secrets, name="ssmd-up") as stores:
                    while not self._is_over:
                        date = await stores.cache.current()
                        state = None if date is None else await stores.cache.state(date)
                        self.days[environment.name] = DayNow(date=date, state=state)
                        await asyncio.sleep(_WATCH_S)
            except SsmdError:
                # The screen shows a dash; the verbs say what is wrong with the server.
                self.days.pop(environment.name, None)
                await asyncio.sleep(_WATCH_S)


def _is_day(state: ProcessState) -> bool:
    return state.group != GROUP and _DAY_GROUP.fullmatch(state.group) is not None


_STOP_ORDER: tuple[Callable[[ProcessState], bool], ...] = (
    lambda state: _is_day(state) and state.name.startswith("connector"),
    _is_day,
    lambda state: state.group != GROUP,
    lambda state: state.name.startswith("dagster"),
    lambda state: state.name.startswith("simulator"),
    lambda state: True,
)
"""Who stops when: those who write come before those whom they write to. Each turn takes what is left."""


@asynccontextmanager
async def _locked(home: Path) -> AsyncIterator[None]:
    folder = supervisor_dir(home)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        "another `ssmd up` or `ssmd down` is at work", where=str(home), do="Wait until it has ended"
                    ) from error
            await asyncio.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _address(
    environments: Sequence[Environment],
    remembered: EmbeddedStack,
    alive: set[str],
    *,
    dagster: bool,
    report: Report,
) -> EmbeddedStack:
    """Return the stack with an address for all that is needed now; what runs keeps its ports."""
    ports = dict(remembered.ports)
    taken = set(ports.values())

    def port(part: str, role: str = "") -> int:
        name = f"{part}-{role}" if role else part
        before = ports.get(name)
        if before is not None:
            if part in alive or embedded.port_is_free(before):
                return before
            report(Progress(part=part, state="note", detail=f"port {before} is taken, so another is used"))
        ports[name] = embedded.pick_port(taken)
        taken.add(ports[name])
        return ports[name]

    nats, cache, web = remembered.nats, remembered.cache, remembered.dagster
    if any(environment.transport.type == "embedded" for environment in environments):
        nats = embedded.nats_url(port("nats"))
        port("nats", "monitor")
    if any(environment.cache.type == "embedded" for environment in environments):
        cache = embedded.cache_url(port("cache"))
    simulators = dict(remembered.simulators)
    for environment in environments:
        if environment.simulator is not None:
            part = _simulator(environment)
            simulators[environment.name] = SimulatorAddress(
                endpoint=f"ws://{HOST}:{port(part, 'ws')}/trade-api/ws/v2",
                rest_endpoint=f"http://{HOST}:{port(part, 'rest')}/trade-api/v2",
            )
    if dagster:
        port("dagster-code")
        web = f"http://{HOST}:{port('dagster-webserver')}"
    return EmbeddedStack(nats=nats, cache=cache, simulators=simulators, dagster=web, ports=ports)


def _servers(environments: Sequence[Environment], home: Path, stack: EmbeddedStack, exchanges: Path) -> list[_Part]:
    """Configure the servers that the environments need; the first time this generates their credentials."""
    credentials = embedded.ensure_credentials(home)
    parts: list[_Part] = []
    if any(environment.transport.type == "embedded" for environment in environments):
        port, monitor_port = stack.ports["nats"], stack.ports["nats-monitor"]
        server = embedded.configure_nats(home, port, monitor_port, credentials)
        parts.append(
            _Part(
                program=Program(name=server.name, command=server.command),
                probe=partial(embedded.nats_is_ready, monitor_port),
                timeout_s=SERVER_TIMEOUT_S,
                where=embedded.nats_url(port),
            )
        )
    if any(environment.cache.type == "embedded" for environment in environments):
        port = stack.ports["cache"]
        server = embedded.configure_cache(home, port, credentials)
        parts.append(
            _Part(
                program=Program(name=server.name, command=server.command),
                probe=partial(embedded.cache_is_ready, port, credentials),
                timeout_s=SERVER_TIMEOUT_S,
                where=embedded.cache_url(port),
            )
        )
    return parts + [
        _simulator_part(environment, home, stack, exchanges)
        for environment in environments
        if environment.simulator is not None
    ]


def _simulator(environment: Environment) -> str:
    return f"simulator-{environment.name}"


def _simulator_part(environment: Environment, home: Path, stack: EmbeddedStack, exchanges: Path) -> _Part:
    settings = environment.simulator
    assert settings is not None, "only a simulated environment has a simulator"
    name = _simulator(environment)
    ws_port, rest_port = stack.ports[f"{name}-ws"], stack.ports[f"{name}-rest"]
    folder = simulator_dir(home, environment.name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    line = command(
        home=folder,
        ws_port=ws_port,
        rest_port=rest_port,
        seed=settings.seed,
        markets=settings.markets,
        rate=settings.rate_per_second,
        pauses=settings.pauses,
        trades_per_day=settings.trades_per_day,
        reads_per_second=settings.reads_per_second,
    )
    return _Part(
        program=Program(
            name=name, command=tuple(line), environment={"SSMD_HOME": str(home), "SSMD_EXCHANGES": str(exchanges)}
        ),
        probe=partial(_answers_ok, f"http://{HOST}:{rest_port}/sim/status"),
        timeout_s=SERVER_TIMEOUT_S,
        where=stack.simulators[environment.name].endpoint,
    )


def _keep_keys(environments: Iterable[Environment], home: Path) -> None:
    """Put the simulators' keys where every process looks for credentials, under the names of the environment's YAML."""
    found: dict[str, str] = {}
    for environment in environments:
        keys = environment.keys.get(environment.feed)
        if environment.simulator is None or keys is None:
            continue
        folder = simulator_dir(home, environment.name)
        values = {
            "key_id": (folder / "key_id").read_text(encoding="utf-8").strip(),
            "private_key_path": str(folder / "private_key.pem"),
        }
        found |= {variable: values[field] for field, variable in keys.fields.items() if field in values}
    known = load_secrets(home)
    if changed := {name: value for name, value in found.items() if known.get(name) != value}:
        add_secrets(home, changed)


def _code_server(home: Path, exchanges: Path, stack: EmbeddedStack, module: str) -> _Part:
    port = stack.ports["dagster-code"]
    # Not `_PYTHON`: while it loads the module Dagster takes the first entry of the path for the script's folder.
    command = (
        # Not `dagster api grpc`: this one loads the module anew when the location is reloaded in the UI.
        *(sys.executable, "-m", "ssmd_dagster.defs.code_server", "start", "-h", HOST, "-p", str(port), "-m", module),
        *("--location-name", CODE_LOCATION, "--use-python-environment-entry-point"),
        *("--working-directory", str(project_dir()), "--log-level", "warning"),
    )
    return _Part(
        program=_dagster_program("dagster-code", command, home, exchanges),
        probe=partial(_listens, port),
        timeout_s=DAGSTER_TIMEOUT_S,
        where=f"{HOST}:{port}",
    )


def _check_instance(home: Path) -> None:
    """Raise where Dagster has no settings, or where this home's has others, as in production: its units run the one daemon."""
    source, target = project_dir() / "dagster.yaml", dagster_dir(home) / "dagster.yaml"
    if not source.exists():
        raise ConfigurationError(
            "Dagster's instance has no settings", where=str(source), do="Run from a checkout, or `ssmd up --no-dagster`"
        )
    if target.exists() and _storage(target) not in (None, _storage(source)):
        raise ConfigurationError(
            "Dagster has a storage of its own here, so this is no place for another daemon",
            where=str(target),
            do="Run `ssmd up --no-dagster`; where nothing else runs this Dagster, remove that file",
        )


def _storage(settings: Path) -> object:
    return (yaml.safe_load(settings.read_text(encoding="utf-8")) or {}).get("storage")


def _dagster(home: Path, exchanges: Path, stack: EmbeddedStack) -> list[_Part]:
    """Write the instance's files and return the webserver and the daemon, which need the code server."""
    folder = dagster_dir(home)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(project_dir() / "dagster.yaml", folder / "dagster.yaml")
    server = {"host": HOST, "port": stack.ports["dagster-code"], "location_name": CODE_LOCATION}
    workspace = folder / "workspace.yaml"
    workspace.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}), encoding="utf-8")
    port, url = stack.ports["dagster-webserver"], f"http://{HOST}:{stack.ports['dagster-webserver']}"
    web = (*_PYTHON, "-m", "dagster_webserver", "-h", HOST, "-p", str(port), "-w", str(workspace))
    daemon = (*_PYTHON, "-m", "dagster._daemon", "run", "-w", str(workspace))
    return [
        _Part(
            program=_dagster_program("dagster-webserver", web, home, exchanges),
            probe=partial(_location_is_loaded, url),
            timeout_s=DAGSTER_TIMEOUT_S,
            where=url,
        ),
        _Part(
            program=_dagster_program("dagster-daemon", daemon, home, exchanges),
            probe=_yes,
            timeout_s=DAGSTER_TIMEOUT_S,
            where="",
        ),
    ]


def _dagster_program(name: str, command: tuple[str, ...], home: Path, exchanges: Path) -> Program:
    # SSMD_HOME and SSMD_EXCHANGES reach the runs too, which the code server starts.
    environment = {
        "SSMD_HOME": str(home),
        "SSMD_EXCHANGES": str(exchanges),
        "DAGSTER_HOME": str(dagster_dir(home)),
    }
    return Program(name=name, command=command, environment=environment)


async def _start_all(
    supervisor: Supervisor, home: Path, parts: Sequence[_Part], alive: set[str], report: Report
) -> None:
    for part in parts:
        if part.name not in alive:
            report(Progress(part=part.name, state="starting"))
            # One that is between two attempts would count as started and as dead at once.
            await supervisor.stop(GROUP, part.name)
            await supervisor.start(GROUP, part.name)
    waits = [asyncio.ensure_future(_wait_ready(supervisor, home, part, part.name in alive, report)) for part in parts]
    try:
        await asyncio.gather(*waits)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _wait_ready(supervisor: Supervisor, home: Path, part: _Part, was_alive: bool, report: Report) -> None:
    log = log_path(home, GROUP, part.name)
    deadline = time.monotonic() + part.timeout_s
    while True:
        state = next((state for state in await supervisor.states(GROUP) if state.name == part.name), None)
        if state is None or not state.alive:
            code = None if state is None else state.exit_code
            raise UnreachableError(
                f"{part.name} ended{'' if code is None else f' with exit code {code}'}{_last_words(log)}",
                where=str(log),
                do="Correct that and run `ssmd up` again; `ssmd down` stops the rest",
            )
        if await part.probe():
            report(Progress(part=part.name, state="running" if was_alive else "ready", detail=part.where))
            return
        if time.monotonic() > deadline:
            raise UnreachableError(
                f"{part.name} was not ready within {part.timeout_s:g} s{_last_words(log)}",
                where=str(log),
                do="Run `ssmd up` again; `ssmd down` stops the rest",
            )
        await asyncio.sleep(_POLL_S)


def _last_words(log: Path) -> str:
    """Return the last line that a program wrote, for its error."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    words = [line.strip() for line in lines if line.strip()]
    return f": {words[-1][:300]}" if words else ""


async def _yes() -> bool:
    return True


async def _answers_ok(url: str) -> bool:
    return await embedded.http_status(url) == 200


async def _listens(port: int) -> bool:
    try:
        async with asyncio.timeout(embedded.PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
    return True


async def _location_is_loaded(url: str) -> bool:
    """Whether the webserver has loaded the code location. Raises `ConfigurationError` with the reason if it cannot."""
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.get(f"{url}/server_info") as response:
                if response.status != 200:
                    return False
            async with session.post(f"{url}/graphql", json={"query": _WORKSPACE_QUERY}) as response:
                answer = await response.json()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
    for entry in answer["data"]["workspaceOrError"].get("locationEntries", []):
        found = entry["locationOrLoadError"]
        if found is not None and found["__typename"] == "PythonError":
            raise ConfigurationError(
                f"Dagster cannot load the code location: {found['message'].strip()}",
                where=entry["name"],
                do="Correct it, then reload the location in Dagster or run `ssmd up` again",
            )
        if entry["name"] == CODE_LOCATION and entry["loadStatus"] == "LOADED" and found is not None:
            return True
    return False
