"""WebSocket commands and their answers: numbering, matching by id in any order, deadlines, refusals.

Every command is of a shape that has one outcome (one channel, or one sid), so that an error, which names neither,
can be told apart. Not for the socket itself: see `socket`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.exchange import Envelope
from ssmd_dagster.kalshi.errors import (
    TOO_MANY_MARKETS,
    ExchangeAnswerError,
    ExchangeRefusedError,
    TooManyMarketsError,
)

ORDERBOOK_SNAPSHOT = "orderbook_snapshot"


class ErrorBody(msgspec.Struct, frozen=True):
    """The `msg` of an `error` message."""

    code: int = 0
    msg: str = ""


def read_error_body(msg: msgspec.Raw) -> ErrorBody:
    """Read the `msg` of an `error`; code 0 and the text itself where it has an unknown shape."""
    try:
        return msgspec.json.decode(msg, type=ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ErrorBody(0, bytes(msg)[:200].decode("utf-8", "replace"))


class _Pending:
    __slots__ = ("about", "outcome", "snapshots_left")

    def __init__(self, about: str, outcome: asyncio.Future[Envelope], snapshots: int) -> None:
        self.about = about
        self.outcome = outcome
        self.snapshots_left = snapshots


class Commands:
    """The commands under way on one connection; `send` writes one to the socket."""

    def __init__(self, send: Callable[[bytes], None], address: str, timeout_s: float) -> None:
        self._send = send
        self._address = address
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._closed: str | None = None

    async def call(self, cmd: str, params: Mapping[str, Any] | None, *, about: str, snapshots: int = 0) -> Envelope:
        """Send a command and return its answer, or the last of `snapshots` snapshots that it asks for.

        Raises `ExchangeRefusedError` for an `error`, `UnreachableError` where the connection is or gets closed or no
        answer comes in time.
        """
        if self._closed is not None:
            raise self._lost(about)
        number = next(self._ids)
        command: dict[str, Any] = {"id": number, "cmd": cmd}
        if params is not None:
            command["params"] = params
        pending = _Pending(about, asyncio.get_running_loop().create_future(), snapshots)
        self._pending[number] = pending
        try:
            self._send(msgspec.json.encode(command))
            async with asyncio.timeout(self._timeout_s):
                return await pending.outcome
        except TimeoutError as error:
            what = f"the exchange did not answer {about} within {self._timeout_s:g} s"
            raise UnreachableError(what, where=self._address, do="Reconnect") from error
        finally:
            del self._pending[number]

    def take(self, envelope: Envelope) -> None:
        """Look whether a message answers a command and settle it; messages that answer nothing are left alone."""
        pending = self._pending.get(envelope.id) if envelope.id is not None else None
        if pending is None or pending.outcome.done():
            return
        if envelope.type == "error":
            body = read_error_body(envelope.msg)
            kind = TooManyMarketsError if body.code == TOO_MANY_MARKETS else ExchangeRefusedError
            refusal = kind(body.code, body.msg, where=self._address, about=pending.about)
            pending.outcome.set_exception(refusal)
            return
        if envelope.type == ORDERBOOK_SNAPSHOT:
            pending.snapshots_left -= 1
            if pending.snapshots_left > 0:
                return
        pending.outcome.set_result(envelope)

    def close(self, reason: str) -> None:
        """Fail everything under way: the connection is gone."""
        self._closed = reason
        for pending in self._pending.values():
            if not pending.outcome.done():
                pending.outcome.set_exception(self._lost(pending.about))

    def _lost(self, about: str) -> UnreachableError:
        return UnreachableError(
            f"the connection is gone, {about} was not answered: {self._closed}", where=self._address
        )


def read_sid(envelope: Envelope, about: str, address: str) -> int:
    """Return the sid of a `subscribed` (inside `msg`) or `ok` (outside). Raises `ExchangeAnswerError`."""
    if envelope.sid is not None:
        return envelope.sid
    try:
        sid = msgspec.json.decode(envelope.msg, type=_SubscribedBody).sid
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        what = f"the exchange answered {about} with a {envelope.type!r} that has no sid"
        raise ExchangeAnswerError(what, where=address) from error
    return sid


class _SubscribedBody(msgspec.Struct):
    sid: int
