"""Kalshi's REST calls: signing, pace, retries, deadlines, paging, and what its refusals mean.

Not for what the rows mean: see `markets`, `trades` and `wire`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
import yarl

from ssmd_dagster.clock import Clock
from ssmd_dagster.errors import ConfigurationError, NotFoundError, UnreachableError
from ssmd_dagster.exchange import ExchangeSettings
from ssmd_dagster.kalshi.auth import Signer, where_the_key_is
from ssmd_dagster.kalshi.errors import ExchangeAnswerError, ExchangeRefusedError, RateLimitedError, read_rest_error
from ssmd_dagster.kalshi.pacing import Backoff, Sleep, TokenBucket

Params = Sequence[tuple[str, str]]

_CALL_TIMEOUT_S = 60.0
_ATTEMPT_TIMEOUT = aiohttp.ClientTimeout(total=20, sock_connect=5)
_MAX_ATTEMPTS = 5
_MAX_ATTEMPTS_RATE_LIMITED = 10
_MAX_BODY_BYTES = 256 * 1024 * 1024
_CHUNK_BYTES = 1 << 20
_MAX_CONNECTIONS = 16
_BUFFER_BYTES = 1 << 20
"""A page of trades fits: with aiohttp's 64 KiB the socket is stopped and started again several times a page."""

T = TypeVar("T")


class Page(Protocol):
    """One page of a list."""

    @property
    def cursor(self) -> str | None:
        """Where the next page begins; empty or None on the last."""


P = TypeVar("P", bound=Page)


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answered request."""

    status: int
    body: bytes


class RestClient:
    """One HTTP client for one environment. Create it inside a running event loop; `close` it.

    `sleep` and `rng` make pace and back-off testable. Every call ends within 60 s, whatever the exchange does.
    """

    def __init__(
        self,
        settings: ExchangeSettings,
        signer: Signer | None,
        clock: Clock,
        *,
        rng: random.Random,
        sleep: Sleep = asyncio.sleep,
        call_timeout_s: float = _CALL_TIMEOUT_S,
    ) -> None:
        try:
            self._base = yarl.URL(settings.rest_endpoint.rstrip("/"), encoded=True)
        except ValueError as error:
            raise self._bad_address(settings) from error
        if self._base.scheme not in ("http", "https") or not self._base.host:
            raise self._bad_address(settings)
        self._environment = settings.environment
        self._signer = signer
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._call_timeout_s = call_timeout_s
        self._bucket = TokenBucket(settings.rate_limit_per_second, asyncio.get_running_loop().time, sleep)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
            read_bufsize=_BUFFER_BYTES,
            timeout=_ATTEMPT_TIMEOUT,
            headers={"Accept": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    @staticmethod
    def _bad_address(settings: ExchangeSettings) -> ConfigurationError:
        return ConfigurationError(
            f"rest_endpoint: got {settings.rest_endpoint!r}, expected http(s)://host/path",
            where=f"environment {settings.environment}",
            do="Look at the environment's YAML and its feed's",
        )

    async def close(self) -> None:
        """Close the client's connections."""
        await self._session.close()

    async def get(
        self, path: str, params: Params = (), *, answer: type[T], also_statuses: frozenset[int] = frozenset()
    ) -> T:
        """GET `path` (below the endpoint, parts quoted by `part`) and decode the JSON answer as `answer`.

        A status in `also_statuses` is an answer too, where its body decodes. Raises `ConfigurationError` (401, 403:
        not tried again), `NotFoundError` (404), `ExchangeRefusedError` (other 4xx), `RateLimitedError` (429 to the
        end), `UnreachableError` (refused, timeouts, 5xx to the end), `ExchangeAnswerError` (not the expected JSON).
        """
        url = yarl.URL(f"{self._base}{path}", encoded=True)
        if params:
            url = url.with_query(params)
        tries = _Tries(str(url), Backoff(self._rng))
        try:
            async with asyncio.timeout(self._call_timeout_s):
                while True:
                    await self._bucket.take()
                    decoded = await self._attempt(url, answer, also_statuses, tries)
                    if decoded is not None:
                        return decoded
                    await self._sleep(tries.pause_s())
        except TimeoutError as error:
            raise tries.give_up(f"no usable answer within {self._call_timeout_s:g} s") from error

    async def pages(self, path: str, params: Params, *, limit: int, max_pages: int, page: type[P]) -> AsyncIterator[P]:
        """Yield the pages of a list, at most `max_pages`. Rows move while one pages: the caller drops repeated rows.

        Raises what `get` raises, and `ExchangeAnswerError` where the cursor repeats or the pages do not end.
        """
        cursors: set[str] = set()
        cursor = ""
        for _ in range(max_pages):
            with_cursor = [("cursor", cursor)] if cursor else []
            one = await self.get(path, [*params, ("limit", str(limit)), *with_cursor], answer=page)
            yield one
            cursor = one.cursor or ""
            if not cursor:
                return
            if cursor in cursors:
                raise ExchangeAnswerError("the list repeats a cursor and would never end", where=f"{self._base}{path}")
            cursors.add(cursor)
        raise ExchangeAnswerError(f"the list has more than {max_pages} pages", where=f"{self._base}{path}")

    async def _attempt(self, url: yarl.URL, answer: type[T], also_statuses: frozenset[int], tries: _Tries) -> T | None:
        """Make one request; None where it should be tried again."""
        try:
            got = await self._request(url)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            tries.failed(f"{type(error).__name__}: {error}".rstrip(": "), _MAX_ATTEMPTS, error)
            return None
        if got.status == 200 or got.status in also_statuses:
            try:
                return msgspec.json.decode(got.body, type=answer)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if got.status == 200:
                    raise ExchangeAnswerError(
                        f"the answer is not the expected JSON: {error}", where=str(url)
                    ) from error
        self._raise_refusal(got, url)
        said = f"HTTP {got.status} {read_rest_error(got.status, got.body)}"
        if got.status == 429:
            self._bucket.refused()
            tries.failed(said, _MAX_ATTEMPTS_RATE_LIMITED, None, rate_limited=True)
        else:
            tries.failed(said, _MAX_ATTEMPTS, None)
        return None

    async def _request(self, url: yarl.URL) -> Answer:
        headers = self._signer.headers("GET", url.raw_path, self._clock()) if self._signer else {}
        async with self._session.get(url, headers=headers, allow_redirects=False) as response:
            chunks: list[bytes] = []
            size = 0
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                size += len(chunk)
                if size > _MAX_BODY_BYTES:
                    raise ExchangeAnswerError(f"the answer is larger than {_MAX_BODY_BYTES} bytes", where=str(url))
                chunks.append(chunk)
            return Answer(response.status, b"".join(chunks))

    def _raise_refusal(self, got: Answer, url: yarl.URL) -> None:
        """Raise for an answer that no repetition changes; return for 429, 5xx and what is as fleeting."""
        if got.status == 429 or got.status >= 500 or got.status == 408:
            return
        said = read_rest_error(got.status, got.body)
        if got.status in (401, 403):
            what = f"the exchange refused the credentials: HTTP {got.status} {said}"
            if self._signer is None:
                what = f"the exchange wants a key and the environment has none: HTTP {got.status} {said}"
            raise ConfigurationError(what, where=str(url), do=where_the_key_is(self._environment))
        if got.status == 404:
            raise NotFoundError(f"the exchange knows no such thing: HTTP 404 {said}", where=str(url))
        raise ExchangeRefusedError(said.code, said.message, where=str(url), about=f"the request with HTTP {got.status}")


class _Tries:
    """Counts one call's failed attempts and makes the error when there are enough."""

    def __init__(self, url: str, backoff: Backoff) -> None:
        self._url = url
        self._backoff = backoff
        self._count = 0
        self._last = "nothing came"
        self._rate_limited = False

    def failed(self, why: str, max_attempts: int, cause: Exception | None, *, rate_limited: bool = False) -> None:
        """Note a failed attempt; raises once there were `max_attempts`."""
        self._count += 1
        self._last = why
        self._rate_limited = rate_limited
        if self._count >= max_attempts:
            raise self.give_up(why) from cause

    def pause_s(self) -> float:
        """Return how long to wait before the next attempt, in seconds."""
        return self._backoff.next_s()

    def give_up(self, why: str) -> UnreachableError:
        """Make the error that ends the call."""
        last = "" if self._last == why else f"; last: {self._last}"
        if self._rate_limited:
            do = "Lower rate_limit_per_second of the feed, or wait"
            return RateLimitedError(f"rate limited by the exchange: {why}{last}", where=self._url, do=do)
        do = "Check the address, the network and the exchange's status"
        return UnreachableError(f"cannot reach the exchange: {why}{last}", where=self._url, do=do)


def part(text: str) -> str:
    """Quote a ticker for use as one part of a path."""
    return quote(text, safe="")
