"""`up` and `down` with the real servers: ready, private, found again, restarted, and gone without a trace."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from ssmd_dagster.capture import stack, supervisord
from ssmd_dagster.capture.supervisor import Program, log_path
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment, NatsTransport, RedisCache
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.stores import embedded
from ssmd_dagster.stores.connect import connect, read_stack

EXCHANGES = project_dir() / "exchanges"
DEFINITIONS = """
import os
import dagster as dg

@dg.op
def write_home():
    print(os.environ["SSMD_HOME"], os.environ["SSMD_EXCHANGES"])

@dg.job(tags={"ssmd/lane": "kalshi-sim/live"})
def throw_away():
    write_home()

defs = dg.Definitions(jobs=[throw_away])
"""


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    """A private home with an odd name, in which nothing runs when the test is over."""
    home = tmp_path / 'it\'s a "home"'
    home.mkdir(mode=0o700)
    yield home
    await supervisord.end_supervisor(home)
    assert supervisord.marked_processes(home) == []


@pytest.fixture
def environment() -> Environment:
    """The simulated environment as it is shipped."""
    return load_registry(EXCHANGES).get("kalshi-sim")


def servers_only(environment: Environment) -> Environment:
    """Return the environment without its simulator, which takes a second to start."""
    return environment.model_copy(update={"simulator": None})


async def test_everything_is_ready_when_up_returns(home: Path, environment: Environment) -> None:
    """NATS, the cache and the exchange answer with the generated credentials, and only on loopback."""
    result = await stack.up([environment], home, EXCHANGES, dagster=False)
    assert result.started == ("nats", "cache", "simulator-kalshi-sim")
    assert result.already == ()
    secrets = load_secrets(home)
    async with connect(environment, home, secrets) as stores:
        await stores.journal.create()
        assert await stores.journal.read() == []
        assert await stores.redis.config_get("appendfsync") == {"appendfsync": "everysec"}
    assert Path(environment.secret("kalshi", "private_key_path", secrets)).read_text().startswith("-----BEGIN")
    assert environment.secret("kalshi", "key_id", secrets)
    for path in (home / "nats" / "nats.conf", home / "cache" / "cache.conf", home / "secrets.env", home / "stack.json"):
        assert path.stat().st_mode & 0o077 == 0, path
    listening = [
        connection.laddr
        for process in supervisord.marked_processes(home)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(result.stack.ports.values())
    assert not {address.port for address in listening} & {4222, 8222, 6379, 3000}


async def test_the_servers_want_credentials(home: Path, environment: Environment) -> None:
    """Another user of this machine gets into neither server."""
    result = await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    reader, writer = await asyncio.open_connection("127.0.0.1", result.stack.ports["nats"])
    assert b'"auth_required":true' in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()
    assert not await embedded.cache_is_ready(result.stack.ports["cache"], {embedded.CACHE_PASSWORD: "guess"})
    for value in (load_secrets(home)[embedded.NATS_PASSWORD], load_secrets(home)[embedded.CACHE_PASSWORD]):
        assert value not in (home / "stack.json").read_text()
        assert all(value not in " ".join(process.cmdline()) for process in supervisord.marked_processes(home))


async def test_a_second_up_changes_nothing(home: Path, environment: Environment) -> None:
    """What runs is named and left alone; after a down the same ports, credentials and data are used again."""
    environment = servers_only(environment)
    first = await stack.up([environment], home, EXCHANGES, dagster=False)
    pids = {process.pid for process in supervisord.marked_processes(home)}
    secrets = load_secrets(home)
    async with connect(environment, home, secrets) as stores:
        await stores.redis.set("kept", "yes")
    second = await stack.up([environment], home, EXCHANGES, dagster=False)
    assert (second.started, second.already) == ((), ("nats", "cache"))
    assert second.stack == first.stack
    assert {process.pid for process in supervisord.marked_processes(home)} == pids
    down = await stack.down(home)
    assert set(down.stopped) == {"stack.nats", "stack.cache"}
    assert down.ended == ()
    assert supervisord.marked_processes(home) == []
    third = await stack.up([environment], home, EXCHANGES, dagster=False)
    assert third.started == ("nats", "cache")
    assert third.stack == first.stack
    assert load_secrets(home) == secrets
    async with connect(environment, home, secrets) as stores:
        assert await stores.redis.get("kept") == b"yes"


async def test_down_where_nothing_runs_is_a_success(home: Path) -> None:
    """Before the first up, and twice in a row, there is nothing to stop."""
    assert await stack.down(home) == stack.Down(stopped=(), ended=())
    assert await stack.down(home) == stack.Down(stopped=(), ended=())


async def test_a_port_that_is_taken_is_changed_and_said(home: Path, environment: Environment) -> None:
    """Someone else on the remembered port is not disturbed, and the new port is remembered."""
    environment = servers_only(environment)
    first = await stack.up([environment], home, EXCHANGES, dagster=False)
    await stack.down(home)
    notes: list[stack.Progress] = []
    with socket.create_server(("127.0.0.1", first.stack.ports["nats"])):
        second = await stack.up([environment], home, EXCHANGES, dagster=False, report=notes.append)
    assert second.stack.ports["nats"] != first.stack.ports["nats"]
    assert second.stack.ports["cache"] == first.stack.ports["cache"]
    assert read_stack(home).nats == f"nats://127.0.0.1:{second.stack.ports['nats']}"
    assert [note.part for note in notes if note.state == "note"] == ["nats"]


async def test_a_killed_server_comes_back_with_its_data(home: Path, environment: Environment) -> None:
    """kill -9 of both servers: they are started again by themselves, and what was acknowledged is still there."""
    environment = servers_only(environment)
    await stack.up([environment], home, EXCHANGES, dagster=False)
    async with connect(environment, home, load_secrets(home)) as stores:
        await stores.js.add_stream(name="kept", subjects=["kept"])
        await stores.js.publish("kept", b"acknowledged")
    supervisor = supervisord.connect_supervisor(home)
    before = {state.name: state.pid for state in await supervisor.states("stack")}
    for pid in before.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(s.state != "RUNNING" or s.pid == before[s.name] for s in await supervisor.states("stack")):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    await stack.up([environment], home, EXCHANGES, dagster=False)
    async with connect(environment, home, load_secrets(home)) as stores:
        assert (await stores.js.get_msg("kept", 1)).data == b"acknowledged"


async def test_up_after_a_killed_supervisor_clears_its_orphans(home: Path, environment: Environment) -> None:
    """The orphans hold ports and files: they are ended, named, and the stack comes up on the same ports."""
    environment = servers_only(environment)
    first = await stack.up([environment], home, EXCHANGES, dagster=False)
    os.kill(int((home / "supervisor" / "supervisord.pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while len(supervisord.marked_processes(home)) > 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    notes: list[stack.Progress] = []
    second = await stack.up([environment], home, EXCHANGES, dagster=False, report=notes.append)
    assert second.started == ("nats", "cache")
    assert second.stack == first.stack
    assert len([note for note in notes if note.state == "note" and "left behind" in note.detail]) == 2


async def test_down_after_a_killed_supervisor_ends_its_orphans(home: Path, environment: Environment) -> None:
    """Even without a supervisor to ask, nothing is left running."""
    await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    os.kill(int((home / "supervisor" / "supervisord.pid").read_text()), signal.SIGKILL)
    down = await stack.down(home)
    assert len([name for name in down.ended if "stack" in name]) == 2
    assert supervisord.marked_processes(home) == []


async def test_an_environment_with_its_own_servers_needs_none(home: Path, environment: Environment) -> None:
    """With real servers in the YAML only the supervisor is started."""
    external = servers_only(environment).model_copy(
        update={
            "transport": NatsTransport(type="nats", url="nats://nats.example:4222"),
            "cache": RedisCache(type="redis", url="redis://redis.example:6379/0"),
        }
    )
    result = await stack.up([external], home, EXCHANGES, dagster=False)
    assert result.started == ()
    assert result.stack.ports == {}
    assert await supervisord.connect_supervisor(home).states() == []


async def test_a_server_that_does_not_come_up_is_named_with_its_log(
    home: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends at once fails the command at once, with its last words and where to read the others."""
    monkeypatch.setenv("SSMD_NATS_SERVER", str(project_dir() / ".venv" / "no" / "nats-server"))
    with pytest.raises(ConfigurationError, match="SSMD_NATS_SERVER"):
        await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    monkeypatch.setenv("SSMD_NATS_SERVER", sys.executable)
    with pytest.raises(UnreachableError, match="nats ended with exit code 1: SyntaxError") as caught:
        await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    assert caught.value.where == str(log_path(home, "stack", "nats"))
    monkeypatch.delenv("SSMD_NATS_SERVER")
    result = await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    assert "nats" in result.started


async def test_two_ups_at_once_are_one_after_the_other(home: Path, environment: Environment) -> None:
    """Both succeed, and every server is started by exactly one of them."""
    environment = servers_only(environment)
    ups = [stack.up([environment], home, EXCHANGES, dagster=False) for _ in range(2)]
    results = await asyncio.gather(*ups)
    assert sorted(result.started for result in results) == [(), ("nats", "cache")]
    assert results[0].stack == results[1].stack


async def test_down_stops_writers_before_those_they_write_to(home: Path, environment: Environment) -> None:
    """Connector, archiver, gateway, servers: in this order, so that the last batches still find their way."""
    await stack.up([servers_only(environment)], home, EXCHANGES, dagster=False)
    supervisor = supervisord.connect_supervisor(home)
    day = "kalshi-sim-2025-12-14"
    sleeper = ("sleep", "600")
    await supervisor.ensure_group(day, [Program(name=n, command=sleeper) for n in ("archiver", "connector-a")])
    await supervisor.ensure_group("kalshi-sim", [Program(name="gateway", command=sleeper)])
    for group, name in ((day, "archiver"), (day, "connector-a"), ("kalshi-sim", "gateway")):
        await supervisor.start(group, name)
    down = await stack.down(home)
    assert down.stopped[:3] == (f"{day}.connector-a", f"{day}.archiver", "kalshi-sim.gateway")
    assert set(down.stopped[3:]) == {"stack.nats", "stack.cache"}
    assert down.ended == ()


async def test_the_watch_sees_processes_and_days(home: Path, environment: Environment) -> None:
    """What the live screen shows: every process, and each environment's current day once there is one."""
    environment = servers_only(environment)
    await stack.up([environment], home, EXCHANGES, dagster=False)
    async with connect(environment, home, load_secrets(home)) as stores, stack.Watch([environment], home) as watch:
        assert [process.name for process in await watch.processes()] == ["cache", "nats"]
        await stores.redis.set("kalshi-sim:day:current", "2025-12-14")
        await stores.redis.set("kalshi-sim:day:2025-12-14:state", "ACTIVE")
        deadline = time.monotonic() + 10
        while watch.days.get("kalshi-sim") != stack.DayNow(date="2025-12-14", state="ACTIVE"):
            assert time.monotonic() < deadline, watch.days
            await asyncio.sleep(0.05)


async def test_dagster_comes_up_and_runs_a_job_from_its_queue(
    home: Path, environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Webserver, daemon and code server are ready together; a launched run finds this home's environment."""
    (tmp_path / "throw_away_definitions.py").write_text(DEFINITIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = await stack.up([servers_only(environment)], home, EXCHANGES, definitions_module="throw_away_definitions")
    assert result.started == ("nats", "cache", "dagster-code", "dagster-webserver", "dagster-daemon")
    launch = """mutation { launchRun(executionParams: {selector: {repositoryLocationName: "ssmd_dagster",
        repositoryName: "__repository__", jobName: "throw_away"}, runConfigData: {}}) {
        __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
    async with aiohttp.ClientSession() as session:

        async def ask(query: str) -> dict[str, Any]:
            async with session.post(f"{result.stack.dagster}/graphql", json={"query": query}) as response:
                answer = await response.json()
                return dict(answer["data"])

        launched = (await ask(launch))["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run_id = launched["run"]["runId"]
        query = f'{{ runOrError(runId: "{run_id}") {{ ... on Run {{ status }} }} }}'
        deadline = time.monotonic() + 90
        while (status := (await ask(query))["runOrError"]["status"]) != "SUCCESS":
            assert status not in ("FAILURE", "CANCELED"), status
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.2)
    outputs = [path.read_text() for path in (home / "dagster").rglob("*.out")]
    assert f"{home} {EXCHANGES}\n" in outputs
    again = await stack.up([servers_only(environment)], home, EXCHANGES, definitions_module="throw_away_definitions")
    assert again.started == ()
    down = await stack.down(home)
    assert down.ended == ()
    assert supervisord.marked_processes(home) == []


async def test_definitions_that_cannot_be_loaded_are_said(home: Path, environment: Environment) -> None:
    """An import error in the definitions fails the command with its message, not with a timeout."""
    with pytest.raises(ConfigurationError, match="no_such_definitions"):
        await stack.up([servers_only(environment)], home, EXCHANGES, definitions_module="no_such_definitions")


async def test_production_settings_are_neither_overwritten_nor_given_a_second_daemon(
    home: Path, environment: Environment
) -> None:
    """Where Dagster has a storage of its own its units run it: `up` is refused before anything is started."""
    settings = home / "dagster" / "dagster.yaml"
    settings.parent.mkdir()
    written = (project_dir() / "deploy" / "dagster.yaml").read_text(encoding="utf-8")
    settings.write_text(written, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"a storage of its own.*--no-dagster"):
        await stack.up([environment], home, EXCHANGES)
    assert settings.read_text(encoding="utf-8") == written
    assert supervisord.marked_processes(home) == []
