"""What Kalshi's refusals mean: its table of WebSocket error codes and its REST error bodies.

Not for our own failures to reach it (`errors.UnreachableError`) nor for wrong keys (`errors.ConfigurationError`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import MarketLimitError, RateLimitedError

__all__ = [
    "ERROR_CODES",
    "TERMINAL_CODES",
    "TOO_MANY_COMMANDS",
    "TOO_MANY_MARKETS",
    "UNKNOWN_SUBSCRIPTION",
    "ExchangeAnswerError",
    "ExchangeRefusedError",
    "RateLimitedError",
    "RestError",
    "TooManyMarketsError",
    "read_rest_error",
]

ERROR_CODES = {
    1: "unable to process the message",
    2: "params required",
    3: "channels required",
    4: "subscription ids required",
    5: "unknown command",
    6: "already subscribed",
    7: "unknown subscription id",
    8: "unknown channel",
    9: "authentication required",
    10: "channel error",
    11: "invalid parameter",
    12: "exactly one subscription id required",
    13: "unsupported action",
    14: "market ticker required",
    15: "action required",
    18: "command timeout",
    19: "shard_factor must be above 0",
    20: "shard_factor required with shard_key",
    21: "shard_key out of range",
    22: "shard_factor above 100",
    23: "match ids required",
    24: "index ids required",
    25: "subscription buffer overflow",
    26: "subscription market limit exceeded",
    27: "too many requests",
    28: "underlying tickers required",
}
"""Meaning of `msg.code` of an `error` message (AsyncAPI of 2026-10-26; 6 was retired before it)."""

TERMINAL_CODES = frozenset({10, 25})
"""After these the subscription is dead and has to be made anew; the socket may live on."""

UNKNOWN_SUBSCRIPTION = 7
"""In the answer to a command about a subscription that was acknowledged: the exchange has forgotten it."""
TOO_MANY_MARKETS = 26
TOO_MANY_COMMANDS = 27
_TRANSIENT_CODES = frozenset({1, 10, 18, 25, TOO_MANY_COMMANDS})
_WHAT_TO_DO = {
    8: "Look at capture.channels of the environment.",
    9: "Look at keys.kalshi of the environment.",
    26: "Give a connection fewer markets (max_symbols_per_connection of the feed).",
    TOO_MANY_COMMANDS: "Try again later.",
}
_MAX_QUOTED_CHARS = 300


class ExchangeAnswerError(SsmdError):
    """The exchange answered what makes no sense: a body that is not its JSON, a cursor that repeats."""

    transient = True


class ExchangeRefusedError(SsmdError):
    """The exchange understood and said no. `code` is its own: an int on the WebSocket, a word over REST."""

    def __init__(self, code: int | str, msg: str, *, where: str, about: str) -> None:
        self.code = code
        self.msg = msg
        meaning = ERROR_CODES.get(code, "unknown code") if isinstance(code, int) else ""
        said = f"{code} {msg}" if not meaning or meaning.lower() == msg.lower() else f"{code} {msg} ({meaning})"
        do = _WHAT_TO_DO.get(code, "") if isinstance(code, int) else ""
        super().__init__(f"the exchange refused {about}: {said}", where=where, do=do)
        self.transient = code in _TRANSIENT_CODES


class TooManyMarketsError(ExchangeRefusedError, MarketLimitError):
    """A subscription is full (code 26)."""


class RestError(msgspec.Struct, frozen=True):
    """Code and message of a REST error body, whichever of its shapes it had."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message and self.message != self.code else self.code


def read_rest_error(status: int, body: bytes) -> RestError:
    """Read `{"error":{"code","message"}}`, `{"code","message"}`, `{"error":"text"}` or whatever else came."""
    quoted = body[:_MAX_QUOTED_CHARS].decode("utf-8", "replace").strip()
    fallback = RestError(str(status), quoted)
    try:
        content: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return fallback
    if not isinstance(content, dict):
        return fallback
    inner = content.get("error", content)
    if isinstance(inner, str):
        return RestError(str(status), inner)
    if not isinstance(inner, dict):
        return fallback
    code, message = inner.get("code"), inner.get("message", "")
    details = inner.get("details")
    if details:
        message = f"{message} ({details})"
    return RestError(str(code), str(message)[:_MAX_QUOTED_CHARS]) if code else fallback
