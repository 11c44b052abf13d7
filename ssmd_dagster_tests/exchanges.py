"""Exchanges that only acknowledge: WebSocket servers that a test scripts frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from aiohttp import WSMsgType, web

TICKERS = {"channels": ["trade"], "markets": {"tickers": ["KXBTCD-26FEB07-T98249.99", "KX ODD/*>.TICKER"]}}
"""One channel of two markets whose names are hard on keys and subjects."""


class PlainExchange:
    """A WebSocket server without authentication: acknowledges subscriptions, then, to all `channels`, sends `frames` once.

    `sent` is set when the last frame of a connection has been handed to the socket.
    """

    def __init__(self, frames: Sequence[bytes], channels: int) -> None:
        self.frames = frames
        self.channels = channels
        self.sent = threading.Event()
        self.port = 0
        self.handshakes = 0
        self.status = 101

    def settings(self) -> dict[str, Any]:
        """Return an environment's settings that point at it; its REST answers nothing but 404."""
        return {
            "endpoint": f"ws://127.0.0.1:{self.port}/trade-api/ws/v2",
            "rest_endpoint": f"http://127.0.0.1:{self.port}/trade-api/v2",
            "auth_method": "none",
            "keys": {},
            "capture": TICKERS,
        }

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        self.handshakes += 1
        if self.status != 101:
            return web.json_response({"code": "token_authentication_failure"}, status=self.status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        playing: asyncio.Task[None] | None = None
        sid = 0
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            command = json.loads(message.data)
            for channel in command["params"].get("channels", ()):
                sid += 1
                answer = {"id": command["id"], "type": "subscribed", "msg": {"channel": channel, "sid": sid}}
                await socket.send_json(answer)
            if playing is None and sid >= self.channels:
                playing = asyncio.create_task(self._play(socket))
        if playing is not None:
            playing.cancel()
        return socket

    async def _play(self, socket: web.WebSocketResponse) -> None:
        for frame in self.frames:
            try:
                await socket.send_str(frame.decode())
            except UnicodeDecodeError:
                await socket.send_bytes(frame)
        self.sent.set()


@contextlib.contextmanager
def plain_exchange(frames: Sequence[bytes], channels: int = 1) -> Iterator[PlainExchange]:
    """Run a `PlainExchange` on a free port, in a thread of its own; `channels` is how many are subscribed before it plays."""
    exchange = PlainExchange(frames, channels)
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        async with _served(exchange):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield exchange
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@contextlib.asynccontextmanager
async def _served(exchange: PlainExchange) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get("/trade-api/ws/v2", exchange._socket)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    exchange.port = runner.addresses[0][1]
    try:
        yield
    finally:
        await runner.cleanup()
