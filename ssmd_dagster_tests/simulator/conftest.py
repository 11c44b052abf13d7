"""A simulator in the test's own process, and a client that knows nothing of it but Kalshi's protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from ssmd_dagster.simulator.main import WS_PATH, Settings, Simulator
from ssmd_dagster.simulator.session import Limits

DEADLINE_S = 10.0


def sign(home: Path, method: str, path: str, *, stamp_ms: int | None = None) -> dict[str, str]:
    """Sign a request with the key that the simulator made for its home."""
    stamp = str(stamp_ms if stamp_ms is not None else time.time_ns() // 1_000_000)
    key = serialization.load_pem_private_key((home / "private_key.pem").read_bytes(), None)
    text = f"{stamp}{method}{path}".encode()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(text)
    else:
        assert isinstance(key, rsa.RSAPrivateKey)
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
        signature = key.sign(text, pss, hashes.SHA256())
    return {
        "KALSHI-ACCESS-KEY": (home / "key_id").read_text(),
        "KALSHI-ACCESS-TIMESTAMP": stamp,
        "KALSHI-ACCESS-SIGNATURE": base64.b64encode(signature).decode(),
    }


class Client:
    """One socket; keeps every frame as it came."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.raw: list[bytes] = []
        self.frames: list[dict[str, Any]] = []
        self.ended = False
        self._answers: dict[int, list[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self._last_id = 0

    async def _read(self) -> None:
        async for message in self.socket:
            raw = message.data.encode() if isinstance(message.data, str) else message.data
            self.raw.append(raw)
            try:
                frame = json.loads(raw)
            except (ValueError, RecursionError):
                frame = None
            if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
                frame = {"type": "malformed"}
            self.frames.append(frame)
            if "id" in frame:
                self._answers.setdefault(frame["id"], []).append(frame)
        self.ended = True

    async def send(self, cmd: str, **params: Any) -> int:
        """Send one command and return its id."""
        self._last_id += 1
        await self.socket.send_json({"id": self._last_id, "cmd": cmd, "params": params})
        return self._last_id

    async def until(self, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first frame that is meant, waiting for it."""
        deadline_s = time.monotonic() + DEADLINE_S
        looked = 0
        while time.monotonic() < deadline_s:
            for frame in self.frames[looked:]:
                looked += 1
                if found(frame):
                    return frame
            await asyncio.sleep(0.005)
        raise AssertionError(f"no such frame among {len(self.frames)}: {self.frames[-3:]}")

    async def wait(self, met: Callable[[], bool]) -> None:
        """Wait until a condition is met."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not met():
            assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s; {len(self.frames)} frames"
            await asyncio.sleep(0.01)

    async def answer(self, command_id: int) -> dict[str, Any]:
        """Return the first answer to a command."""
        return await self.until(lambda frame: frame.get("id") == command_id)

    async def subscribe(self, *channels: str, **params: Any) -> list[int]:
        """Subscribe channels and return their sids."""
        command_id = await self.send("subscribe", channels=list(channels), **params)
        await self.wait(lambda: len(self.answers(command_id)) >= len(channels))
        return [frame["msg"]["sid"] for frame in self.answers(command_id)]

    def answers(self, command_id: int) -> list[dict[str, Any]]:
        """Return all answers to a command so far."""
        return self._answers.get(command_id, [])

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the frames of some types."""
        return [frame for frame in self.frames if frame["type"] in kinds]

    async def close(self) -> None:
        """Close the socket and wait until all of it was read."""
        await self.socket.close()
        self._reader.cancel()


class Running:
    """A simulator that runs, and the ways to reach it."""

    def __init__(self, simulator: Simulator, http: aiohttp.ClientSession) -> None:
        self.simulator = simulator
        self.http = http
        self.home = simulator.settings.home
        self.clients: list[Client] = []

    async def connect(self, *, headers: dict[str, str] | None = None, autoping: bool = True) -> Client:
        """Open a signed socket."""
        if headers is None:
            headers = sign(self.home, "GET", WS_PATH, stamp_ms=self.simulator.clock() // 1_000_000)
        socket = await self.http.ws_connect(
            self.simulator.endpoint, headers=headers, max_msg_size=0, autoping=autoping, autoclose=True
        )
        client = Client(socket)
        self.clients.append(client)
        return client

    async def get(
        self, path: str, /, *, expect: int = 200, headers: dict[str, str] | None = None, **params: Any
    ) -> Any:
        """GET from REST (paths below `/trade-api/v2`) or from the control surface (`/sim/…`)."""
        base = f"http://127.0.0.1:{self.simulator.rest_port}"
        url = base + path if path.startswith("/sim") else f"{base}/trade-api/v2{path}"
        async with self.http.get(url, params=params, headers=headers) as response:
            assert response.status == expect, (await response.text())[:300]
            return json.loads(await response.read())

    async def post(self, path: str, /, *, expect: int = 200, **body: Any) -> Any:
        """POST to the control surface."""
        async with self.http.post(f"http://127.0.0.1:{self.simulator.rest_port}{path}", json=body) as response:
            assert response.status == expect, (await response.text())[:300]
            return json.loads(await response.read())

    async def open_tickers(self, series: str, count: int = 5) -> list[str]:
        """Return tickers of open markets of a series."""
        page = await self.get("/markets", series_ticker=series, status="open", limit=count)
        return [market["ticker"] for market in page["markets"]]


Start = Callable[..., Awaitable[Running]]


@asynccontextmanager
async def running(home: Path, **settings: Any) -> AsyncIterator[Running]:
    """Run a simulator in a home."""
    limits = Limits(**settings.pop("limits", {}))
    options: dict[str, Any] = {
        "markets": 60,
        "rate": 10_000.0,
        "seed": 7,
        "key_type": "ed25519",
        "pauses": False,
        "trades_per_day": 0,
    }
    options |= settings
    simulator = Simulator(Settings(home=home, limits=limits, **options))
    await simulator.start()
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S))
    here = Running(simulator, http)
    try:
        yield here
    finally:
        assert simulator.running is not None
        task = simulator.running
        crash = task.exception() if task.done() and not task.cancelled() else None
        await simulator.stop()
        for client in here.clients:
            await client.close()
        await http.close()
        if crash is not None:
            raise crash


@pytest.fixture
async def exchange(tmp_path: Path) -> AsyncIterator[Running]:
    """A simulator with some sixty markets and 10,000 messages a second."""
    async with running(tmp_path / "sim") as here:
        yield here
