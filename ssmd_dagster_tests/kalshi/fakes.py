"""A REST server and a WebSocket server whose every answer a test decides, a sink that keeps what it gets, and keys.

Not a simulator of the exchange: that is `ssmd_dagster.simulator`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

from ssmd_dagster.exchange import Envelope, ExchangeEvent, ExchangeSettings
from ssmd_dagster.kalshi.client import Kalshi

REAL_DATA = Path(__file__).parents[3] / "shared" / "kalshi" / "data"
SPEC = Path(__file__).parents[3] / "shared" / "kalshi" / "asyncapi-2026-10-26.yaml"
NOW_NS = 1_790_000_000_000_000_000

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED25519_KEY = ed25519.Ed25519PrivateKey.generate()


def pem(key: Any) -> bytes:
    """Return a private key as a person would have it in a file."""
    content: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return content


def settings(**changes: Any) -> ExchangeSettings:
    """Return settings that point nowhere, with `changes`."""
    values: dict[str, Any] = {
        "environment": "kalshi-test",
        "endpoint": "ws://127.0.0.1:1/trade-api/ws/v2",
        "rest_endpoint": "http://127.0.0.1:1/trade-api/v2",
        "rate_limit_per_second": 10_000,
        "max_symbols_per_connection": 20_000,
    }
    return ExchangeSettings(**(values | changes))


class Sleeps:
    """Stands in for `asyncio.sleep`: notes how long, and only yields."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        """Take the place of a pause."""
        self.seconds.append(seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def opened(config: ExchangeSettings, sleeps: Sleeps | None = None) -> AsyncIterator[Kalshi]:
    """Open Kalshi with a fixed clock and seed, and close it."""
    exchange = Kalshi(config, lambda: NOW_NS, rng=random.Random(1), sleep=sleeps or Sleeps())
    try:
        yield exchange
    finally:
        await exchange.close()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RestServer:
    """Answers below `/trade-api/v2` with what `routes` says per path, a JSON object or a handler; keeps requests."""

    def __init__(self) -> None:
        self.routes: dict[str, Any] = {}
        self.requests: list[web.Request] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        """The `rest_endpoint` to use."""
        return f"http://127.0.0.1:{self.port}/trade-api/v2"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        answer = self.routes.get(request.path.removeprefix("/trade-api/v2"))
        if answer is None:
            return web.json_response({"error": {"code": "not_found", "message": "not found"}}, status=404)
        if callable(answer):
            response: web.StreamResponse = await answer(request)
            return response
        return web.json_response(answer)


@asynccontextmanager
async def rest_server() -> AsyncIterator[RestServer]:
    """Run a `RestServer` on a free port."""
    server = RestServer()
    app = web.Application()
    app.router.add_route("GET", "/{tail:.*}", server._answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


def in_turn(*answers: tuple[int, Any]) -> Handler:
    """Answer each request with the next (status, JSON or text), and all later ones with the last."""
    left = deque(answers)

    async def handler(_: web.Request) -> web.StreamResponse:
        status, body = left.popleft() if len(left) > 1 else left[0]
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(status=status, text=text, content_type="application/json")

    return handler


class WsPeer(WSListener):
    """The server's side of one socket."""

    def __init__(self, server: WsServer) -> None:
        self._server = server

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Keep the socket."""
        self._server.transport = transport
        if self._server.greet is not None:
            self._server.greet(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Answer a command as the test says; keep pongs."""
        if frame.msg_type is WSMsgType.TEXT:
            command = json.loads(frame.get_payload_as_bytes())
            self._server.commands.append(command)
            for answer in self._server.answer(command):
                transport.send(WSMsgType.TEXT, json.dumps(answer).encode())
        elif frame.msg_type is WSMsgType.PONG:
            self._server.pongs.append(frame.get_payload_as_bytes())
        elif frame.msg_type is WSMsgType.CLOSE:
            if not transport.is_close_frame_sent:
                transport.send_close(frame.get_close_code())
            transport.disconnect()


class WsServer:
    """A WebSocket server; `answer` maps a command to what is sent back, `refuse` is the status of the handshake."""

    def __init__(self) -> None:
        self.transport: WSTransport | None = None
        self.greet: Callable[[WSTransport], None] | None = None
        self.commands: list[dict[str, Any]] = []
        self.pongs: list[bytes] = []
        self.handshakes: list[WSUpgradeRequest] = []
        self.answer: Callable[[dict[str, Any]], Sequence[dict[str, Any]]] = acknowledge()
        self.refuse: tuple[int, bytes] | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        """The `endpoint` to use."""
        return f"ws://127.0.0.1:{self.port}/trade-api/ws/v2"

    def send(self, *messages: dict[str, Any] | bytes) -> None:
        """Send messages to the socket that connected last."""
        assert self.transport is not None
        for message in messages:
            payload = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.transport.send(WSMsgType.TEXT, payload)

    def listener(self, request: WSUpgradeRequest) -> WSListener | WSUpgradeResponseWithListener:
        """Take or refuse a handshake."""
        self.handshakes.append(request)
        if self.refuse is not None:
            status, body = self.refuse
            response = WSUpgradeResponse.create_error_response(status, body)
            return WSUpgradeResponseWithListener(response, None)
        return WsPeer(self)


def acknowledge() -> Callable[[dict[str, Any]], Sequence[dict[str, Any]]]:
    """Answer commands as Kalshi does: sids from 1, `ok` for a repeated subscribe, snapshots with the command's id."""
    sid_of_channel: dict[str, int] = {}

    def answer(command: dict[str, Any]) -> list[dict[str, Any]]:
        number, params = command["id"], command.get("params", {})
        if command["cmd"] == "subscribe":
            answers = []
            for channel in params["channels"]:
                if channel in sid_of_channel:
                    answers.append({"type": "ok", "id": number, "sid": sid_of_channel[channel], "seq": 1, "msg": {}})
                else:
                    sid_of_channel[channel] = len(sid_of_channel) + 1
                    msg = {"channel": channel, "sid": sid_of_channel[channel]}
                    answers.append({"type": "subscribed", "id": number, "msg": msg})
            return answers
        if command["cmd"] == "list_subscriptions":
            msg_list = [{"channel": channel, "sid": sid, "new": 1} for channel, sid in sid_of_channel.items()]
            return [{"type": "ok", "id": number, "msg": msg_list}]
        sid = params["sids"][0]
        if command["cmd"] == "unsubscribe":
            return [{"type": "unsubscribed", "id": number, "sid": sid, "seq": 9}]
        if params["action"] == "get_snapshot":
            return [
                {"type": "orderbook_snapshot", "id": number, "sid": sid, "seq": 2, "msg": {"market_ticker": ticker}}
                for ticker in params["market_tickers"]
            ]
        return [{"type": "ok", "id": number, "sid": sid, "seq": 3, "msg": {"market_tickers": params["market_tickers"]}}]

    return answer


@asynccontextmanager
async def ws_server() -> AsyncIterator[WsServer]:
    """Run a `WsServer` on a free port."""
    server = WsServer()
    running = await ws_create_server(server.listener, "127.0.0.1", 0, max_frame_size=1 << 30)
    server.port = running.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        if server.transport is not None:
            server.transport.disconnect(graceful=False)
        running.close()
        await running.wait_closed()


class Sink:
    """Keeps what a connection says."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes, Envelope | None]] = []
        self.pings: list[int] = []
        self.events: list[ExchangeEvent] = []
        self.closed: list[tuple[int, str]] = []

    def on_frame(self, recv_ns: int, payload: bytes, envelope: Envelope | None) -> None:
        """Keep a frame."""
        assert not self.closed
        self.frames.append((recv_ns, payload, envelope))

    def on_ping(self, recv_ns: int) -> None:
        """Keep a ping."""
        self.pings.append(recv_ns)

    def on_event(self, recv_ns: int, event: ExchangeEvent) -> None:
        """Keep what a frame means."""
        self.events.append(event)

    def on_closed(self, recv_ns: int, reason: str) -> None:
        """Keep the end."""
        self.closed.append((recv_ns, reason))


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition; TimeoutError when it stays away."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
