"""Real servers for tests: NATS, Valkey and an S3 of moto, each on a free loopback port with a folder of its own.

Not for the embedded stack of `ssmd up`, which has its own room. Every helper is a context manager that waits until the
server answers and leaves no process behind (SIGKILL).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from ssmd_dagster.stores import embedded

READY_TIMEOUT_S = 15.0
USER = "ssmd"
PASSWORD = "secret-of-a-test"

_NATS_CONFIG = """\
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor_port}"
max_payload: 8388608
jetstream {{ store_dir: "{store_dir}", max_mem: 268435456, max_file: 8589934592, sync_interval: always }}
authorization {{ user: "{user}", password: "{password}" }}
"""


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    return embedded.pick_port(())


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Poll `condition` every 10 ms until it holds; TimeoutError names `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.01)


class ServerProcess:
    """One server that can be killed and started again on the same port and data."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        ready: Callable[[], bool],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._ready = ready
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return once it answers; its log is part of the error if it does not."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self._env
            )
        try:
            wait_until(lambda: not self.running or self._ready(), f"{self.name} to answer")
        except TimeoutError:
            self.kill()
            raise
        if not self.running:
            raise RuntimeError(f"{self.name} did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """Kill the server with SIGKILL and wait until it is gone; nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(READY_TIMEOUT_S)

    def pause(self) -> None:
        """Stop the server's clock (SIGSTOP): it accepts bytes and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while psutil.Process(self._process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.01)

    def resume(self) -> None:
        """Let a paused server go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


class NatsServer(ServerProcess):
    """nats-server with JetStream, credentials and `sync_interval: always`; `url` is without credentials."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.monitor_port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.user = USER
        self.password = PASSWORD
        config = folder / "nats.conf"
        config.write_text(
            _NATS_CONFIG.format(
                port=self.port,
                monitor_port=self.monitor_port,
                store_dir=folder / "jetstream",
                user=USER,
                password=PASSWORD,
            )
        )
        super().__init__("nats-server", [embedded.nats_binary(), "-c", str(config)], folder, self._healthy)

    def _healthy(self) -> bool:
        return _http_status(f"http://127.0.0.1:{self.monitor_port}/healthz") == 200


class ValkeyServer(ServerProcess):
    """Valkey with a password and an append-only file; `url` is without the password."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.password = PASSWORD
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "requirepass": PASSWORD,
        }
        command = [embedded.cache_binary()]
        for option, value in options.items():
            command += [f"--{option}", value]
        super().__init__("valkey-server", command, folder, self._answers)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"AUTH %s\r\n" % PASSWORD.encode())
                probe.recv(64)
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class S3Server(ServerProcess):
    """An S3 of moto with the credentials `access_key_id` and `secret_access_key`; buckets are made by `make_bucket`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.access_key_id = "test-key"
        self.secret_access_key = "test-secret"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        super().__init__("moto-server", command, folder, lambda: _http_status(f"{self.url}/moto-api/") == 200)

    def make_bucket(self, name: str) -> None:
        """Create a bucket."""
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S):
            pass


def _http_status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


@contextmanager
def _running(server: ServerProcess) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.kill()


@contextmanager
def nats_server(folder: Path) -> Iterator[NatsServer]:
    """Run a NATS server whose data lie in `folder`."""
    server = NatsServer(folder)
    with _running(server):
        yield server


@contextmanager
def valkey_server(folder: Path) -> Iterator[ValkeyServer]:
    """Run a Valkey server whose data lie in `folder`."""
    server = ValkeyServer(folder)
    with _running(server):
        yield server


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run moto's S3 in memory; `folder` takes its log."""
    server = S3Server(folder)
    with _running(server):
        yield server
