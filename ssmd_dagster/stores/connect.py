"""Opens all stores of one environment, embedded or remote, with bounded waits and errors that name the address.

Not for starting the embedded servers: that is `embedded`. Nothing is created here; verbs call `create` of what they
need.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import nats.errors
import redis.asyncio
import redis.exceptions
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.protocol.parser import PERMISSIONS_ERR
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.stores.cache import DayCache, redis_errors
from ssmd_dagster.stores.journal import Journal
from ssmd_dagster.stores.objects import ObjectStore, open_object_stores
from ssmd_dagster.stores.secmaster import SecurityMaster
from ssmd_dagster.stores.stream import RawStream

CONNECT_TIMEOUT_S = 3.0
_RECONNECT_WAIT_S = 0.25
_PING_INTERVAL_S = 5
_PENDING_BYTES = 32 * 1024 * 1024
_CLOSE_TIMEOUT_S = 2.0
_REDIS_TIMEOUT_S = 3.0

_log = logging.getLogger(__name__)


class SimulatorAddress(msgspec.Struct, frozen=True):
    """Where a simulated exchange listens: WebSocket and REST addresses."""

    endpoint: str
    rest_endpoint: str


class Stack(msgspec.Struct, frozen=True, omit_defaults=True):
    """Addresses of the running embedded stack (`$SSMD_HOME/stack.json`); no secrets. None or missing: not part of it.

    `simulators` are by environment.
    """

    nats: str | None = None
    cache: str | None = None
    simulators: dict[str, SimulatorAddress] = {}
    dagster: str | None = None


def read_stack(home: Path) -> Stack:
    """Read the addresses of the embedded stack.

    Raises:
        UnreachableError: There is no such file: nothing was ever brought up in this home.
        ConfigurationError: The file cannot be understood.
    """
    path = home / "stack.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Stack)
    except FileNotFoundError as error:
        raise UnreachableError("the embedded servers do not run", where=str(path), do="Run `ssmd up`") from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"cannot be read: {error}", where=str(path), do="Run `ssmd down`, `ssmd up`"
        ) from error


@dataclass(frozen=True)
class Stores:
    """The open stores of one environment."""

    nc: Client
    js: JetStreamContext
    redis: redis.asyncio.Redis
    journal: Journal
    cache: DayCache
    secmaster: SecurityMaster
    raw_stream: RawStream
    raw: ObjectStore
    normalized: ObjectStore


@asynccontextmanager
async def connect(
    env: Environment, home: Path, secrets: Mapping[str, str], *, name: str = "ssmd", needs_cache: bool = True
) -> AsyncIterator[Stores]:
    """Open the stores of `env`, and close them at exit. `name` is what the servers list the client as.

    Once connected, the clients of NATS and Redis connect again by themselves for as long as they are open. Who only reads
    the journal does not need the cache: then Redis is not waited for, and whatever asks it may raise `UnreachableError`.

    Raises:
        UnreachableError: NATS or Redis does not answer within 3 s; names host and port and what to do.
        ConfigurationError: A credential is missing or refused.
    """
    nats_url, user, nats_password = _nats_access(env, home, secrets)
    redis_url, redis_password = _redis_access(env, home, secrets)
    raw, normalized = open_object_stores(env, home, secrets)
    embedded = "Run `ssmd up`"
    async with AsyncExitStack() as stack:
        nc = await stack.enter_async_context(
            connect_nats(
                nats_url,
                user,
                nats_password,
                name=name,
                do=embedded if env.transport.type == "embedded" else "Check transport.url of the environment",
            )
        )
        client = await stack.enter_async_context(
            connect_redis(
                redis_url,
                redis_password,
                name=name,
                do=embedded if env.cache.type == "embedded" else "Check cache.url of the environment",
                waits=needs_cache,
            )
        )
        js = nc.jetstream()
        yield Stores(
            nc=nc,
            js=js,
            redis=client,
            journal=Journal(js, env.name),
            cache=DayCache(client, env.name),
            secmaster=SecurityMaster(client, js, env.name),
            raw_stream=RawStream(js, env.name),
            raw=raw,
            normalized=normalized,
        )


def _nats_access(env: Environment, home: Path, secrets: Mapping[str, str]) -> tuple[str, str | None, str | None]:
    if env.transport.type == "embedded":
        url = read_stack(home).nats
        if url is None:
            raise UnreachableError("the embedded NATS does not run", where=str(home), do="Run `ssmd up`")
        return url, _embedded_secret("SSMD_NATS_USER", secrets), _embedded_secret("SSMD_NATS_PASSWORD", secrets)
    if "nats" not in env.keys:
        return env.transport.url, None, None
    return env.transport.url, env.secret("nats", "user", secrets), env.secret("nats", "password", secrets)


def _redis_access(env: Environment, home: Path, secrets: Mapping[str, str]) -> tuple[str, str | None]:
    if env.cache.type == "embedded":
        url = read_stack(home).cache
        if url is None:
            raise UnreachableError("the embedded Redis does not run", where=str(home), do="Run `ssmd up`")
        return url, _embedded_secret("SSMD_REDIS_PASSWORD", secrets)
    return env.cache.url, env.secret("redis", "password", secrets) if "redis" in env.keys else None


def _embedded_secret(variable: str, secrets: Mapping[str, str]) -> str:
    try:
        return secrets[variable]
    except KeyError as error:
        raise ConfigurationError(
            f"{variable} is missing", where="secrets.env", do="Run `ssmd up`, which generates it"
        ) from error


class _NatsClient(Client):
    """Connects again also where nats-py 2.16 would not.

    It waits until a dead socket has taken what was written: minutes, or for ever. And it closes for good where the server says
    why it ends a connection.
    """

    def drop_socket(self) -> None:
        """Cut the connection, whatever waits to be written."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _process_op_err(self, e: Exception) -> None:
        if self.is_connected:
            self.drop_socket()
        await super()._process_op_err(e)

    async def _process_err(self, err_msg: str) -> None:
        if PERMISSIONS_ERR in err_msg:  # the connection stays
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)


@asynccontextmanager
async def connect_nats(
    url: str,
    user: str | None,
    password: str | None,
    *,
    name: str,
    do: str = "Check that the server runs",
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> AsyncIterator[Client]:
    """Connect to NATS within `timeout_s`; afterwards the client connects again for ever, and is closed at exit.

    Raises:
        UnreachableError: Nobody answers; `do` is the error's advice.
        ConfigurationError: The credentials are refused.
    """
    address = f"NATS at {url.rpartition('@')[2].removeprefix('nats://').removeprefix('tls://')}"
    refused = asyncio.Event()
    last_error: list[Exception] = []

    async def on_error(error: Exception) -> None:
        # nats-py tells of every lost connection and failed attempt here; whoever waits for an answer gets an error of
        # its own, so these are for whoever turns the log on.
        _log.info("%s: %s", address, error or type(error).__name__)
        last_error[:] = [error]
        if "authorization violation" in str(error).lower():
            refused.set()

    nc = _NatsClient()
    connecting = asyncio.ensure_future(
        nc.connect(
            url,
            name=name,
            user=user,
            password=password,
            error_cb=on_error,
            connect_timeout=int(CONNECT_TIMEOUT_S),
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it is slept for; any number will do
            ping_interval=_PING_INTERVAL_S,
            max_outstanding_pings=2,
            pending_size=_PENDING_BYTES,
        )
    )
    refusal = asyncio.ensure_future(refused.wait())
    try:
        await asyncio.wait({connecting, refusal}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            if refused.is_set():
                raise ConfigurationError(
                    "the credentials are refused", where=address, do="Check the user and password of NATS"
                )
            cause = last_error[0] if last_error else None
            raise UnreachableError(f"no answer within {timeout_s:g} s", where=address, do=do) from cause
        try:
            connecting.result()
        except (nats.errors.Error, OSError) as error:
            raise UnreachableError(f"cannot connect: {error}", where=address, do=do) from error
        yield nc
    finally:
        connecting.cancel()
        refusal.cancel()
        await asyncio.wait({connecting, refusal})
        closing = asyncio.ensure_future(nc.close())
        await asyncio.wait({closing}, timeout=_CLOSE_TIMEOUT_S)
        if not closing.done():
            nc.drop_socket()
        await asyncio.gather(closing, return_exceptions=True)


@asynccontextmanager
async def connect_redis(
    url: str, password: str | None, *, name: str, do: str = "Check that the server runs", waits: bool = True
) -> AsyncIterator[redis.asyncio.Redis]:
    """Connect to Redis, wait for its first answer if that is wanted, and close the client at exit. Answers are bytes.

    Raises:
        UnreachableError: Nobody answers; `do` is the error's advice.
        ConfigurationError: The password is refused.
    """
    client = redis.asyncio.Redis.from_url(
        url,
        password=password,
        client_name=name,
        protocol=2,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        socket_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=1),
    )
    try:
        if waits:
            with redis_errors(client, do=do):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await client.ping()
        yield client
    finally:
        await client.aclose()
