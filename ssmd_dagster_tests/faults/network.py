"""A network that can be broken: TCP proxies that are cut, black-holed or slowed, and an S3 that fails when asked to.

All of it runs in one thread with an event loop of its own; the methods are called from the test's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Coroutine
from typing import Any, Literal, Self, TypeVar

import aiohttp
from aiohttp import web

_T = TypeVar("_T")
_NAME = re.compile(rb'"name"\s*:\s*"([^"]*)"')
_CALL_TIMEOUT_S = 20.0
_CHUNK_BYTES = 64 << 10

Mode = Literal["open", "hole", "refuse"]


class Network:
    """The thread that all proxies live in; a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="network")
        self._ends: list[TcpProxy | S3Proxy] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            self.call(end.close())
        self.call(self._settle())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    async def _settle(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the network's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(_CALL_TIMEOUT_S)

    def tcp(self, port: int) -> TcpProxy:
        """Put a proxy before a loopback port."""
        proxy = TcpProxy(self, port)
        self._ends.append(proxy)
        self.call(proxy.open())
        return proxy

    def s3(self, url: str) -> S3Proxy:
        """Put a proxy before an S3 server."""
        proxy = S3Proxy(self, url)
        self._ends.append(proxy)
        self.call(proxy.open())
        return proxy


class _Link:
    """One connection through a proxy; `name` is what a NATS client calls itself."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.name = ""


class TcpProxy:
    """Passes bytes on to a loopback port, for all connections or for those of one NATS client, until told otherwise."""

    def __init__(self, network: Network, target: int) -> None:
        self.port = 0
        self._network = network
        self._target = target
        self._links: set[_Link] = set()
        self._mode: dict[str, Mode] = {}
        self._rate: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None

    def cut(self, name: str = "") -> None:
        """Reset the connections there are (of the client `name`); new ones are passed on."""
        self._network.call(self._cut(name))

    def hole(self, name: str = "") -> None:
        """From now on no byte gets through and nobody is told; new connections are accepted and hear nothing."""
        self._network.call(self._set(name, "hole"))

    def refuse(self, name: str = "") -> None:
        """Reset the connections there are, and every new one at once."""
        self._network.call(self._set(name, "refuse"))
        self._network.call(self._cut(name))

    def slow(self, bytes_per_s: float, name: str = "") -> None:
        """Pass on at most so many bytes a second, per connection and direction."""
        self._rate[name] = bytes_per_s

    def heal(self) -> None:
        """Pass everything on again, what was held back included."""
        self._rate.clear()
        self._network.call(self._heal())

    def clients(self) -> list[str]:
        """Return the names of the NATS clients that are connected."""
        return [link.name for link in self._links]

    async def open(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and reset everything."""
        assert self._server is not None
        self._server.close()
        await self._heal()
        await self._cut("")

    async def _set(self, name: str, mode: Mode) -> None:
        self._mode[name] = mode

    async def _heal(self) -> None:
        self._mode.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _cut(self, name: str) -> None:
        for link in list(self._links):
            if name in ("", link.name):
                for writer in (link.client, link.server):
                    if writer is not None:
                        writer.transport.abort()

    def _of(self, link: _Link) -> Mode:
        return self._mode.get(link.name) or self._mode.get("", "open")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._mode.get("") == "refuse":
                return
            while self._mode.get("") == "hole":
                await self._changed.wait()
            server_reader, link.server = await asyncio.open_connection("127.0.0.1", self._target)
            passing = [
                asyncio.create_task(self._pass(link, reader, link.server, first=True)),
                asyncio.create_task(self._pass(link, server_reader, writer, first=False)),
            ]
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            for task in passing:
                task.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
        except OSError:
            pass  # the server is away: its client sees a reset
        finally:
            self._links.discard(link)
            for end in (link.client, link.server):
                if end is not None:
                    end.transport.abort()

    async def _pass(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, first: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if first and (found := _NAME.search(data)) is not None:
                    link.name = found[1].decode()
                first = False
                if self._of(link) == "refuse":
                    return
                while self._of(link) == "hole":
                    await self._changed.wait()
                rate = self._rate.get(link.name) or self._rate.get("")
                if rate:
                    await asyncio.sleep(len(data) / rate)
                writer.write(data)
                await writer.drain()


S3Fault = Literal["5xx", "403", "slow", "lost_answer", "cut_upload", "timeout"]


class S3Proxy:
    """Passes requests on to an S3 server; breaks those of `methods` as long as `fault` is set, at most `count` of them."""

    def __init__(self, network: Network, url: str) -> None:
        self.url = ""
        self.fault: S3Fault | None = None
        self.methods: tuple[str, ...] = ("PUT",)
        self.count = 0
        self.broken = 0
        self._network = network
        self._target = url
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    def breaks(self, fault: S3Fault, count: int = 1_000_000, methods: tuple[str, ...] = ("PUT",)) -> None:
        """Break the next `count` requests."""
        self.methods, self.count, self.fault = methods, count, fault

    def heal(self) -> None:
        """Break nothing any more."""
        self.fault = None

    async def open(self) -> None:
        """Listen on a free port."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._session = aiohttp.ClientSession(auto_decompress=False)

    async def close(self) -> None:
        """Stop listening."""
        assert self._runner is not None
        assert self._session is not None
        await self._session.close()
        await self._runner.cleanup()

    def _next_fault(self, request: web.Request) -> S3Fault | None:
        if self.fault is None or request.method not in self.methods or self.count <= 0:
            return None
        self.count -= 1
        self.broken += 1
        return self.fault

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self._next_fault(request)
        if fault == "5xx":
            return web.Response(status=503, text="<Error><Code>SlowDown</Code></Error>", content_type="application/xml")
        if fault == "403":
            return web.Response(
                status=403, text="<Error><Code>AccessDenied</Code></Error>", content_type="application/xml"
            )
        if fault == "cut_upload":  # at nine tenths of it the line goes dead
            wanted = int((request.content_length or 0) * 0.9)
            while wanted > 0 and (chunk := await request.content.read(wanted)):
                wanted -= len(chunk)
            return self._reset(request)
        body = await request.read()
        if fault == "timeout":
            await asyncio.sleep(1.5)
            return self._reset(request)
        if fault == "slow":
            await asyncio.sleep(1.0)
        assert self._session is not None
        # The body is framed anew; everything that is signed stays as it is.
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("content-length", "transfer-encoding")}
        async with self._session.request(
            request.method, f"{self._target}{request.raw_path}", data=body, headers=headers, allow_redirects=False
        ) as answer:
            content = await answer.read()
        if fault == "lost_answer":
            return self._reset(request)
        kept = {
            k: v
            for k, v in answer.headers.items()
            if k.lower() not in ("content-length", "transfer-encoding", "connection")
        }
        response = web.Response(status=answer.status, body=content, headers=kept)
        if request.method == "HEAD":
            response.headers["Content-Length"] = answer.headers.get("Content-Length", "0")
        return response

    def _reset(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)
