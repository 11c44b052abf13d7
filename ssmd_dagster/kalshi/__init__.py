"""The Kalshi exchange: signing, REST, WebSocket, and what its messages mean.

Not for anything that another exchange would share: see `ssmd_dagster.exchange` for what the rest knows of it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec

from ssmd_dagster.clock import Clock
from ssmd_dagster.exchange import ExchangeSettings

if TYPE_CHECKING:
    from ssmd_dagster.kalshi.client import Kalshi

__all__ = ["market_of", "open_exchange"]


class _Message(msgspec.Struct, gc=False):
    market_ticker: str | None = None


class _Frame(msgspec.Struct, gc=False):
    msg: _Message | None = None


_decode_frame = msgspec.json.Decoder(_Frame).decode


def market_of(frame: msgspec.Raw) -> str | None:
    """Return the ticker of the market that a frame is about, None where it is about no single one."""
    try:
        message = _decode_frame(frame).msg
    except msgspec.DecodeError:  # another shape: not about a market
        return None
    return message.market_ticker if message is not None else None


def open_exchange(settings: ExchangeSettings, clock: Clock) -> Kalshi:
    """Open Kalshi. Call inside a running event loop; no request is made. Raises `ConfigurationError` for a bad key."""
    from ssmd_dagster.kalshi.client import Kalshi  # here: who only reads messages needs no HTTP client

    return Kalshi(settings, clock, rng=random.Random())
