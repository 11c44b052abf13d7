"""Plays recorded frames, byte for byte, to every client that subscribes. Not for the simulated markets.

A recording is lines of `{"recv_ns": int, "raw": "<text frame>"}`. Its `subscribed`, `ok` and `error` frames are part of it
and are played too; commands of the client are acknowledged besides, by `subscribed` alone.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.simulator.truth import TYPE_CODE

if TYPE_CHECKING:
    from ssmd_dagster.simulator.session import Connection

_AT_ONCE = 500


class PlayedFrame(NamedTuple):
    """One recorded frame: when it came after the first one, its bytes, and what the truth log says of it."""

    after_s: float
    payload: bytes
    key: int
    ticker: str


class Recording:
    """A recorded file and how fast it is played; `speed` 0 is at once."""

    def __init__(self, path: Path, speed: float) -> None:
        self.speed = speed
        self.frames: list[PlayedFrame] = []
        first_ns: int | None = None
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                told = json.loads(line)
                recv_ns, payload = int(told["recv_ns"]), str(told["raw"]).encode()
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"line {number} is not {{recv_ns, raw}}", where=str(path), do="Name a *.frames.jsonl file."
                ) from error
            first_ns = recv_ns if first_ns is None else first_ns
            self.frames.append(PlayedFrame((recv_ns - first_ns) / 1e9, payload, *_known(payload)))
        self.tickers = sorted({frame.ticker for frame in self.frames if frame.ticker})

    async def play(self, connection: Connection, numbers: dict[str, int]) -> None:
        """Send everything to one connection; `numbers` are the truth log's numbers of the markets."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        for position, frame in enumerate(self.frames):
            wait_s = begin_s + frame.after_s / self.speed - loop.time() if self.speed else 0.0
            if wait_s > 0 or position % _AT_ONCE == 0:
                connection.flush()
                await asyncio.sleep(max(0.0, wait_s))
            connection.out.append(frame.payload)
            connection.keys.append(frame.key)
            connection.marks.append(numbers.get(frame.ticker, 0))
        connection.flush()


def _known(payload: bytes) -> tuple[int, str]:
    """Return the truth log's key and the market of a recorded frame."""
    try:
        told: Any = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = None
    if not isinstance(told, dict):
        return TYPE_CODE["malformed"], ""
    sid, seq, msg = told.get("sid"), told.get("seq"), told.get("msg")
    key = TYPE_CODE.get(str(told.get("type")), TYPE_CODE["played"])
    if isinstance(sid, int) and 0 < sid < 1 << 16:
        key |= sid << 8
    if isinstance(seq, int) and 0 < seq < 1 << 40:
        key |= seq << 24
    ticker = msg.get("market_ticker") if isinstance(msg, dict) else None
    return key, ticker if isinstance(ticker, str) else ""
