"""What the simulated exchange breaks on purpose, when asked to or by a seeded schedule.

Every fault has a number. The truth log names it when it begins (`fault`), marks every frame that it altered or added with
its number, and lists every frame that it kept from the socket (`withheld`), so the log stays exact.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from ssmd_dagster.simulator.frames import compact, frame_head
from ssmd_dagster.simulator.truth import TYPE_CODE

if TYPE_CHECKING:
    from ssmd_dagster.simulator.engine import Engine
    from ssmd_dagster.simulator.session import Connection, Subscription

FrameKind = Literal["sequence_jump", "duplicate", "reorder", "late", "unknown_keys", "cents", "huge"]
SocketKind = Literal[
    "disconnect",
    "torn_frame",
    "half_snapshot",
    "malformed",
    "unknown_type",
    "channel_error",
    "black_hole",
    "clock_back",
]
HttpKind = Literal["http_429", "http_5xx", "http_slow", "http_cut", "http_shift", "http_short", "refuse_handshake"]

FRAME_KINDS: tuple[str, ...] = FrameKind.__args__  # type: ignore[attr-defined]
SOCKET_KINDS: tuple[str, ...] = SocketKind.__args__  # type: ignore[attr-defined]
HTTP_KINDS: tuple[str, ...] = HttpKind.__args__  # type: ignore[attr-defined]

ALL_KINDS = (*FRAME_KINDS, *SOCKET_KINDS, *(kind for kind in HTTP_KINDS if kind != "http_short"))
"""What may be broken at random. `http_short` leaves the exchange's own lists untrue, so it is only done when asked for."""

MAX_HUGE_BYTES = 60 << 20
_DATA = frozenset(
    TYPE_CODE[name] for name in ("orderbook_delta", "orderbook_snapshot", "trade", "ticker", "market_lifecycle_v2")
)


class Order(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A fault as it is asked for: `POST /sim/faults`.

    `connection`: a number, or absent for every open one, or "next" for the one that comes; `channel`: only its frames;
    `count`: frames (or answers over HTTP) that it touches; `for_s`, `delay_s`: seconds; `path`: prefix below
    `/trade-api/v2`; `status`: of HTTP answers; `body`: which of Kalshi's two 429 bodies; `code`: 10 or 25, or 7, which only
    answers to later commands have; `ticker`: one market; `size`: bytes of a huge frame, how far a clock goes back, or by how
    many rows a page is off; `then`: how a black hole ends.
    """

    fault: FrameKind | SocketKind | HttpKind
    connection: int | Literal["next"] | None = None
    channel: str | None = None
    count: int = 1
    for_s: float = 5.0
    delay_s: float = 5.0
    path: str = ""
    status: int = 503
    body: Literal["flat", "nested"] = "nested"
    code: Literal[7, 10, 25] = 10
    ticker: str | None = None
    size: int = 0
    then: Literal["cut", "resume"] = "cut"


class Queued(NamedTuple):
    """One frame on its way out: payload, `seq << 24 | sid << 8 | type`, market number, fault number."""

    payload: bytes
    key: int
    market: int
    fault: int = 0


class FrameFault:
    """A fault that alters the data frames of one connection as they go out."""

    def __init__(self, number: int, order: Order) -> None:
        self.number = number
        self.order = order
        self.left = order.count
        self._channels = None if order.channel is None else {TYPE_CODE[name] for name in _types_of(order.channel)}

    def wants(self, queued: Queued) -> bool:
        """True for a frame that this fault is to alter."""
        kind = queued.key & 0xFF
        return (
            self.left > 0 and not queued.fault and kind in _DATA and (self._channels is None or kind in self._channels)
        )

    def alter(self, queued: list[Queued], connection: Connection) -> list[Queued]:
        """Return what goes out instead."""
        if self.order.fault == "reorder":
            return self._reorder(queued)
        out: list[Queued] = []
        withheld: list[Queued] = []
        for item in queued:
            if not self.wants(item):
                out.append(item)
                continue
            self.left -= 1
            if self.order.fault == "sequence_jump":
                withheld.append(item)
            elif self.order.fault == "late":
                connection.release_later(item._replace(fault=self.number), self.order.delay_s)
                withheld.append(item)
            elif self.order.fault == "duplicate":
                out += [item, item._replace(fault=self.number)]
            else:
                payload = _ALTER[self.order.fault](item.payload, self.order)
                out.append(item._replace(payload=payload, fault=self.number))
        if withheld:
            connection.tell_withheld(withheld, self.number)
        return out

    def _reorder(self, queued: list[Queued]) -> list[Queued]:
        """Swap neighbours; a frame that has none in this write goes as it is, and the fault waits."""
        out = list(queued)
        index = 0
        while index + 1 < len(out):
            if self.wants(out[index]) and self.wants(out[index + 1]):
                out[index], out[index + 1] = (
                    out[index + 1]._replace(fault=self.number),
                    out[index]._replace(fault=self.number),
                )
                self.left -= 1
                index += 1
            index += 1
        return out


def _types_of(channel: str) -> tuple[str, ...]:
    return ("orderbook_delta", "orderbook_snapshot") if channel == "orderbook_delta" else (channel,)


def _unknown_keys(payload: bytes, order: Order) -> bytes:
    payload = b'{"novelty":{"since":[2027,null,true]},' + payload[1:]
    return payload.replace(b'"msg":{', b'"msg":{"novel_field":"\\u00e9","novel_number":1e3,', 1)


def _huge(payload: bytes, order: Order) -> bytes:
    return b'{"padding":"%b",' % (b"x" * min(order.size or 10_000_000, MAX_HUGE_BYTES)) + payload[1:]


def _cents(payload: bytes, order: Order) -> bytes:
    """Write a frame as before 2026-03-12: integer cents and whole contracts, no strings, no milliseconds."""
    frame = json.loads(payload)
    frame.pop("sending_ts_ms", None)
    msg = frame["msg"]
    for key in ("clock", "ts_ms", "time", "taker_outcome_side", "taker_book_side", "is_block_trade"):
        msg.pop(key, None)
    for key in [name for name in msg if name.endswith(("_dollars", "_fp"))]:
        value = msg.pop(key)
        name = key.removesuffix("_fp").removesuffix("_dollars")
        if isinstance(value, list):
            msg[name] = [[_whole(price, 100), _whole(count, 1)] for price, count in value]
        else:
            msg[name] = _whole(value, 100 if key.endswith("_dollars") else 1)
    return compact(frame)


def _whole(text: str, factor: int) -> int:
    return round(float(text) * factor)


_ALTER: dict[str, Callable[[bytes, Order], bytes]] = {"unknown_keys": _unknown_keys, "huge": _huge, "cents": _cents}

_MALFORMED = (
    b'{"type":"orderbook_delta","sid":1,"seq":',
    b"",
    b"null",
    b"[]",
    b'"trade"',
    b"{}",
    b'{"type":7,"sid":"one","seq":-1,"msg":[]}',
    b'{"type":"trade","sid":1,"seq":1e400}',
    b"\x00\x01\x02",
    b"<html><body>502 Bad Gateway</body></html>",
    b'{"type":"orderbook_delta"}{"type":"orderbook_delta"}',
    b"[" * 2_000,
)


class Faults:
    """Takes orders, gives them numbers and carries them out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.log: list[dict[str, Any]] = []
        self.http: list[FrameFault] = []
        self.for_next: list[FrameFault] = []
        self._rng = random.Random(f"{engine.world.seed}/faults")

    def inject(self, order: Order) -> int:
        """Begin a fault and return its number; 0 if there is no such connection."""
        if order.fault in HTTP_KINDS:
            number = self._named(order, None)
            self.http.append(FrameFault(number, order))
            return number
        if order.fault == "clock_back":
            number = self._named(order, None)
            self._clock_back(order)
            return number
        if order.connection == "next":
            number = self._named(order, None)
            self.for_next.append(FrameFault(number, order))
            return number
        connections = self.engine.connections
        if order.connection is None:
            chosen = list(connections.values())
        else:
            chosen = [connections[order.connection]] if order.connection in connections else []
        number = 0
        for connection in chosen:
            number = self._named(order, connection.number)
            self._begin(FrameFault(number, order), connection)
        return number

    def opened(self, connection: Connection) -> None:
        """Begin what waits for the next connection."""
        waiting, self.for_next = self.for_next, []
        for fault in waiting:
            self.engine.truth.note(
                "fault_begins", self.engine.clock(), fault=fault.number, connection=connection.number
            )
            self._begin(fault, connection)

    def clear(self) -> None:
        """End every fault that is still going on or waiting."""
        self.http.clear()
        self.for_next.clear()
        for connection in self.engine.connections.values():
            connection.faults.clear()
            connection.cut_in_snapshots = 0
        self.engine.truth.note("faults_cleared", self.engine.clock())

    def over_http(self, kinds: tuple[str, ...], path: str) -> FrameFault | None:
        """Return the fault that a request meets, and count it."""
        for fault in self.http:
            if fault.order.fault in kinds and path.startswith(fault.order.path):
                fault.left -= 1
                if fault.left <= 0:
                    self.http.remove(fault)
                self.engine.truth.note("fault_met", self.engine.clock(), fault=fault.number, path=path)
                return fault
        return None

    async def schedule(self, seed: int, per_minute: float, kinds: tuple[str, ...]) -> None:
        """Inject random faults for ever, the same ones for the same seed."""
        rng = random.Random(seed)
        while True:
            await asyncio.sleep(rng.expovariate(per_minute / 60))
            kind = rng.choice(kinds)
            told = {
                "fault": kind,
                "count": rng.randint(1, 20),
                "for_s": rng.uniform(1, 5),
                "delay_s": rng.uniform(0.1, 5),
            }
            order = msgspec.convert(told, Order)
            numbers = sorted(self.engine.connections)
            if kind not in HTTP_KINDS:
                if not numbers:
                    continue
                order.connection = rng.choice(numbers)
            self.inject(order)

    def _named(self, order: Order, connection: int | None) -> int:
        number = len(self.log) + 1
        told = msgspec.to_builtins(order)
        told["connection"] = order.connection if connection is None else connection
        self.log.append({"number": number, **told})
        self.engine.truth.note("fault", self.engine.clock(), number=number, **told)
        return number

    def _begin(self, fault: FrameFault, connection: Connection) -> None:
        order = fault.order
        match order.fault:
            case "disconnect":
                connection.cut()
            case "torn_frame":
                connection.tear(frame_head(1_000) + b'{"type":"orderbook_delta","sid":1,')
            case "half_snapshot":
                connection.cut_in_snapshots = fault.number
            case "malformed":
                for _ in range(order.count):
                    connection.put_fault(self._rng.choice(_MALFORMED), "malformed", fault.number)
            case "unknown_type":
                self._unknown_type(connection, fault)
            case "channel_error":
                for sub in self._subscriptions(connection, order):
                    connection.end_subscription(sub, order.code)
            case "black_hole":
                connection.swallow(fault.number, order.for_s, resume=order.then == "resume")
            case _:
                connection.faults.append(fault)

    def _subscriptions(self, connection: Connection, order: Order) -> list[Subscription]:
        subs = [sub for sub in connection.subscriptions.values() if order.channel in (None, sub.channel)]
        return subs[:1] if order.channel is None else subs

    def _unknown_type(self, connection: Connection, fault: FrameFault) -> None:
        """Send messages of a type that nobody has heard of; they take numbers of a subscription's sequence."""
        for _ in range(fault.order.count):
            weather = {"sky": "clear", "wind": [1, None, {"from": "west"}]}
            subs = self._subscriptions(connection, fault.order)
            if not subs:
                connection.put_fault(compact({"type": "market_weather", "msg": weather}), "unknown", fault.number)
            for sub in subs:
                seq = sub.next_seq()
                message = {"type": "market_weather", "sid": sub.sid, "seq": seq, "msg": weather}
                connection.put_fault(compact(message), "unknown", fault.number, sid=sub.sid, seq=seq)

    def _clock_back(self, order: Order) -> None:
        """Let the exchange clocks go down, as they may over a maintenance; of one market, or of all."""
        for market in self.engine.world.markets.values():
            if order.ticker in (None, market.ticker) and market.live:
                market.clock_base -= min(order.size or 10_000, market.clock - 1)
