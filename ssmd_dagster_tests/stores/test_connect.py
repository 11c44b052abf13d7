"""Opening the stores of an environment, and what an operator reads when a server is away."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import date
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.stores import connect as connect_module
from ssmd_dagster.stores.connect import SimulatorAddress, Stack, connect, connect_nats, connect_redis, read_stack
from ssmd_dagster.stores.objects import LocalObjectStore, S3ObjectStore
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path


def an_environment(name: str, **changes: Any) -> Environment:
    """Make an environment with everything embedded, or as `changes` says."""
    fields = {
        "name": name,
        "feed": "kalshi",
        "schema": "trade:v1",
        "first_day": date(2025, 12, 1),
        "schedule": {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00"},
        "capture": {"channels": ["trade"], "markets": {"all": True}},
        "transport": {"type": "embedded"},
        "cache": {"type": "embedded"},
        "storage": {"type": "local", "buckets": {"raw": "ssmd-raw", "normalized": "ssmd-normalized"}},
    }
    return Environment.model_validate({**fields, **changes})


def write_stack(home: Path, stack: Stack) -> None:
    """Write what the embedded stack leaves for its clients."""
    (home / "stack.json").write_bytes(msgspec.json.encode(stack))


async def test_the_embedded_stores_of_an_environment_work_together(
    tmp_path: Path, nats: servers.NatsServer, valkey: servers.ValkeyServer, env_name: str
) -> None:
    """Addresses come from stack.json, credentials from secrets.env, and everything answers."""
    write_stack(tmp_path, Stack(nats=nats.url, cache=valkey.url))
    secrets = {
        "SSMD_NATS_USER": nats.user,
        "SSMD_NATS_PASSWORD": nats.password,
        "SSMD_REDIS_PASSWORD": valkey.password,
    }
    async with connect(an_environment(env_name), tmp_path, secrets, name="test") as stores:
        await stores.journal.create()
        await stores.raw_stream.create(1024 * 1024)
        await stores.secmaster.create()
        assert await stores.journal.read() == []
        assert await stores.cache.current() is None
        assert await stores.secmaster.markets() == []
        assert isinstance(stores.raw, LocalObjectStore)
        assert stores.normalized.url("x") == f"{tmp_path}/objects/ssmd-normalized/x"
    assert stores.nc.is_closed


async def test_remote_stores_take_their_credentials_from_the_environment(
    tmp_path: Path, nats: servers.NatsServer, valkey: servers.ValkeyServer, s3: servers.S3Server, env_name: str
) -> None:
    """keys.nats, keys.redis and keys.s3 name the variables; no stack.json is needed."""
    s3.make_bucket(f"{env_name}-raw")
    env = an_environment(
        env_name,
        transport={"type": "nats", "url": nats.url},
        cache={"type": "redis", "url": valkey.url},
        storage={
            "type": "s3",
            "endpoint": s3.url,
            "region": "us-east-1",
            "buckets": {"raw": f"{env_name}-raw", "normalized": f"{env_name}-normalized"},
        },
        keys={
            "nats": {"source": "env", "fields": {"user": "N_USER", "password": "N_PASSWORD"}},
            "redis": {"source": "env", "fields": {"password": "R_PASSWORD"}},
            "s3": {"source": "env", "fields": {"access_key_id": "S_ID", "secret_access_key": "S_KEY"}},
        },
    )
    secrets = {
        "N_USER": nats.user,
        "N_PASSWORD": nats.password,
        "R_PASSWORD": valkey.password,
        "S_ID": s3.access_key_id,
        "S_KEY": s3.secret_access_key,
    }
    async with connect(env, tmp_path, secrets) as stores:
        assert isinstance(stores.raw, S3ObjectStore)
        await stores.raw.create("k", b"x")
        assert await stores.raw.head("k") == 1
    with pytest.raises(ConfigurationError, match="R_PASSWORD"):
        async with connect(env, tmp_path, {**secrets, "R_PASSWORD": ""}):
            pass


async def test_without_a_stack_the_operator_is_told_to_bring_it_up(tmp_path: Path) -> None:
    """No file, or a part that is not in it, is an unreachable server, and the cure is `ssmd up`."""
    for stack in (None, Stack()):
        if stack is not None:
            write_stack(tmp_path, stack)
        with pytest.raises(UnreachableError, match="Run `ssmd up`"):
            async with connect(an_environment("x"), tmp_path, {}):
                pass
    write_stack(tmp_path, Stack(nats="nats://127.0.0.1:1", cache="redis://127.0.0.1:1/0"))
    with pytest.raises(ConfigurationError, match="SSMD_NATS_USER"):
        async with connect(an_environment("x"), tmp_path, {}):
            pass


def test_stack_files_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    """Known keys are typed, unknown ones ignored, rubbish is named."""
    path = tmp_path / "stack.json"
    path.write_text(
        '{"nats":"nats://127.0.0.1:5","simulators":{"kalshi-sim":{"endpoint":"ws://a","rest_endpoint":"http://a"}},'
        '"dagster":"http://127.0.0.1:3000","later":1}'
    )
    assert read_stack(tmp_path) == Stack(
        nats="nats://127.0.0.1:5",
        simulators={"kalshi-sim": SimulatorAddress("ws://a", "http://a")},
        dagster="http://127.0.0.1:3000",
    )
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"stack\.json"):
        read_stack(tmp_path)


async def test_servers_that_are_away_are_named_within_bounded_time(
    tmp_path: Path, nats: servers.NatsServer, env_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each error has host and port and what to do, comes within a few seconds, and nothing is written to stderr."""
    secrets = {"SSMD_NATS_USER": nats.user, "SSMD_NATS_PASSWORD": nats.password, "SSMD_REDIS_PASSWORD": "x"}
    port = servers.free_port()
    for stack in (
        Stack(nats=f"nats://127.0.0.1:{port}", cache=f"redis://127.0.0.1:{port}/0"),
        Stack(nats=nats.url, cache=f"redis://127.0.0.1:{port}/0"),
    ):
        write_stack(tmp_path, stack)
        begun_s = time.monotonic()
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}.*Run `ssmd up`"):
            async with connect(an_environment(env_name), tmp_path, secrets):
                pass
        assert time.monotonic() - begun_s < 30  # of three seconds each
    assert capfd.readouterr().err == ""


async def test_refused_credentials_are_told_at_once(nats: servers.NatsServer) -> None:
    """A wrong or missing password of NATS is a matter of configuration, not of waiting."""
    begun_s = time.monotonic()
    for password in ("wrong", None):
        with pytest.raises(ConfigurationError, match=f"refused.*127.0.0.1:{nats.port}"):
            async with connect_nats(nats.url, nats.user, password, name="test"):
                pass
    assert time.monotonic() - begun_s < 20


async def test_servers_that_hang_do_not_hang_the_caller(tmp_path: Path) -> None:
    """A server that accepts and says nothing is unreachable after the bounded wait."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
            async with connect_nats(f"nats://127.0.0.1:{port}", None, None, name="test", timeout_s=0.5):
                pass
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
            async with connect_redis(f"redis://127.0.0.1:{port}/0", None, name="test"):
                pass


async def test_a_client_connects_again_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Five SIGKILLs later the same client still publishes and subscribes, without a word above INFO."""
    caplog.set_level(logging.INFO)
    with servers.nats_server(tmp_path) as server:
        async with connect_nats(server.url, server.user, server.password, name="test") as nc:
            heard: asyncio.Queue[bytes] = asyncio.Queue()

            async def on_message(message: Any) -> None:
                heard.put_nowait(message.data)

            await nc.subscribe("echo", cb=on_message)
            for round_number in range(5):
                server.kill()
                await asyncio.to_thread(server.start)
                async with asyncio.timeout(10):
                    while nc.stats["reconnects"] <= round_number or not nc.is_connected:
                        await asyncio.sleep(0.01)
                    await nc.publish("echo", b"%d" % round_number)
                    assert await heard.get() == b"%d" % round_number
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_a_connection_that_takes_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that swallows everything, with megabytes yet to be written, costs neither the next connection nor the end."""
    monkeypatch.setattr(connect_module, "_PING_INTERVAL_S", 0.05)
    over = asyncio.Event()

    async def greet_and_fall_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","max_payload":8388608,"headers":true}\r\n')
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # it reads, but its type does not say so
        await over.wait()
        writer.transport.abort()

    server = await asyncio.start_server(greet_and_fall_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(10):
        async with connect_nats(f"nats://127.0.0.1:{port}", None, None, name="test") as nc:
            for round_number in range(2):
                while nc.stats["reconnects"] < round_number or not nc.is_connected:
                    await asyncio.sleep(0.01)
                for _ in range(4):
                    await nc.publish("x", bytes(8_000_000))
        over.set()


async def test_a_server_that_says_why_it_ends_a_connection_is_connected_to_again() -> None:
    """Whatever it says: an account's limit, credentials that have expired, a restart."""
    greeted = 0

    async def greet_and_refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        greeted += 1
        writer.write(b'INFO {"server_id":"x","max_payload":1048576,"headers":true}\r\n')
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        if greeted == 1:
            writer.write(b"-ERR 'User Authentication Expired'\r\n")
        else:
            await reader.readuntil(b"PING\r\n")
            writer.write(b"PONG\r\n")
            await reader.read()
        writer.close()

    server = await asyncio.start_server(greet_and_refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(10), connect_nats(f"nats://127.0.0.1:{port}", None, None, name="test") as nc:
        while not nc.stats["reconnects"] or not nc.is_connected:
            await asyncio.sleep(0.01)
    assert greeted == 2
