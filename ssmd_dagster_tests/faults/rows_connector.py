"""Rows C1 to C14: the connector, its socket, its host, and what the exchange sends."""

from __future__ import annotations

import html
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc

from ssmd_dagster.archive.batch import Batch, decode_records, scan
from ssmd_dagster.capture.programs import connector_names
from ssmd_dagster.capture.setting import clock_path
from ssmd_dagster_tests.faults.scenario import scenario
from ssmd_dagster_tests.faults.stage import ENV, NS, Stage

CONNECTOR = "capture.connector"
MS = 1_000_000


def causes(stage: Stage) -> set[str]:
    """Return the causes of the day's gaps."""
    return {gap["cause"] for gap in stage.shown()["gaps"]}


def only(stage: Stage, *wanted: str) -> None:
    """See that the day has gaps, all of these causes."""
    assert causes(stage), "no gap is declared"
    assert causes(stage) <= set(wanted), stage.shown()["gaps"]


def new_connection(stage: Stage, before: str, timeout_s: float = 60.0, *, component: str = "connector-a") -> None:
    """Wait until the connector records on another connection than `before`."""
    stage.wait(
        lambda: (
            stage.beat(component).get("conn") not in (None, before)
            and stage.beat(component).get("state") == "subscribed"
        ),
        "a new connection",
        timeout_s,
    )


@scenario("C1", "kill -9 connector", "its spool is published, the gap is declared with its cause")
def connector_killed(stage: Stage) -> None:
    """Twice, at random moments under load."""
    for _ in range(2):
        stage.pause(1.1, 2.0)
        since = time.monotonic()
        before = stage.beat("connector-a")["conn"]
        stage.kill(CONNECTOR)
        new_connection(stage, before)
        stage.recovered(since)
    only(stage, "process_crash")


@scenario("C2", "kill -9 one of two connectors", "the other one heals the gap", capture={"connections": 2})
def one_of_two_killed(stage: Stage) -> None:
    """Each in turn; what one lacks the other has."""
    stage.wait(lambda: stage.connectors() == ["connector-a", "connector-b"], "both connectors")
    for shard in ("a", "b"):
        stage.pause(1.1, 2.0)
        since = time.monotonic()
        before = stage.beat(f"connector-{shard}")["conn"]
        stage.kill(f"{CONNECTOR} {ENV} {stage.date} {shard}")
        stage.wait(
            lambda before=before, shard=shard: (  # type: ignore[misc]
                stage.beat(f"connector-{shard}").get("conn") not in (None, before)
            ),
            "a new connection",
        )
        stage.recovered(since)
    stage.end()
    day = stage.shown()
    assert {gap["outcome"] for gap in day["gaps"]} == {"healed"}, day["gaps"]


@scenario(
    "C2",
    "kill -9 of both connectors at once",
    "that time is declared, and only that; the tables have each thing exactly once",
    capture={"connections": 2},
)
def both_of_two_killed(stage: Stage) -> None:
    """Each in turn, whose gaps are healed, then both in one instant, whose gaps stay."""
    stage.wait(lambda: stage.connectors() == ["connector-a", "connector-b"], "both connectors")
    since = time.monotonic()
    for dying in (["a"], ["b"], ["a", "b"]):
        stage.pause(1.5, 2.5)
        before = {shard: stage.beat(f"connector-{shard}")["conn"] for shard in dying}
        since = time.monotonic()
        for shard in dying:
            stage.kill(f"{CONNECTOR} {ENV} {stage.date} {shard}")
        for shard in dying:
            new_connection(stage, before[shard], component=f"connector-{shard}")
        stage.flows()
    stage.recovered(since)
    stage.end()
    gaps = stage.shown()["gaps"]
    assert {gap["cause"] for gap in gaps} == {"process_crash"}, gaps
    assert sorted(gap["outcome"] for gap in gaps) == ["healed", "healed", "stays", "stays"], gaps
    each_once(stage)


def each_once(stage: Stage) -> None:
    """See that the tables have every change of a book, and every trade, that any connection or page has, exactly once."""
    changes, trades = Counter[tuple[str, int]](), set[str]()
    objects = stage.objects(stage.date)
    manifest = json.loads(objects["manifest.json"])
    of_conn: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
    for wire, conn in frames_of(objects):
        msg = wire["msg"]
        if wire["type"] == "orderbook_delta" and manifest["open_ns"] <= msg["ts_ms"] * MS < manifest["close_ns"]:
            of_conn[conn][msg["market_ticker"], msg["clock"]] += 1
        elif wire["type"] == "trade" and manifest["open_ns"] <= msg["ts_ms"] * MS < manifest["close_ns"]:
            trades.add(msg["trade_id"])
        elif wire["type"] == "rest_trades":
            trades |= {row["trade_id"] for row in msg["trades"]}
    for counted in of_conn.values():  # two sockets are sent the same, and one is sent it once
        changes |= counted
    table = stage.table("orderbook").filter(pc.field("kind") == "delta")
    found = Counter(zip(table["ticker"].to_pylist(), table["clock"].to_pylist(), strict=True))
    assert found == changes, f"{(found - changes).total()} too many, {(changes - found).total()} missing"
    ids = Counter(stage.table("trade")["trade_id"].to_pylist())
    assert max(ids.values()) == 1
    assert set(ids) == trades
    stage.notes["each once"] = {"changes": changes.total(), "trades": len(trades)}


def frames_of(objects: Mapping[str, bytes]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every message of a day's segments that is JSON with a `msg`, and its connection."""
    for name, data in sorted(objects.items()):
        if name.startswith(("orderbook-", "trades-", "rest-")):
            for item in scan(data):
                if isinstance(item, Batch):
                    for line in decode_records(data, item).splitlines():
                        wire = json.loads(line).get("wire")
                        if isinstance(wire, dict) and "msg" in wire:
                            yield wire, item.header.conn


@scenario(
    "C3", "kill -9 between the socket's read and the spool's write", "at most what was read is lost, and declared"
)
def killed_before_the_spool(stage: Stage) -> None:
    """At a named point before the write."""
    _killed_at(stage, "connector.spool.before")


@scenario("C4", "kill -9 between the stream's acknowledgement and its note", "published twice, archived once")
def killed_before_the_note(stage: Stage) -> None:
    """At a named point behind the acknowledgement."""
    _killed_at(stage, "connector.acked.before")


def _killed_at(stage: Stage, point: str) -> None:
    for _ in range(2):
        stage.pause(1.1, 2.0)
        before = stage.beat("connector-a")["conn"]
        since = time.monotonic()
        stage.crash_at(point)
        stage.wait(stage.crashed, point)
        new_connection(stage, before)
        stage.recovered(since)
    only(stage, "process_crash")


@scenario("C5", "TCP black hole", "dead after 20 s without frame or ping; the gap is declared", exchange_proxy=True)
def black_hole(stage: Stage) -> None:
    """The line passes nothing on and nobody is told."""
    assert stage.to_exchange is not None
    before = stage.beat("connector-a")["conn"]
    since = time.monotonic()
    stage.to_exchange.hole()
    stage.wait(lambda: stage.beat("connector-a").get("state") != "subscribed", "the silence to be noticed", 40)
    stage.detected(since)
    assert stage.detect_s is not None
    assert stage.detect_s < 26
    stage.to_exchange.heal()
    new_connection(stage, before, 90)
    stage.recovered(since)
    only(stage, "connection_lost")


@scenario("C6", "disconnect amid the snapshots", "the next connection has them all; the gap is declared")
def half_of_the_snapshots(stage: Stage) -> None:
    """The connection breaks, and the next one breaks again amid its snapshots."""
    since = time.monotonic()
    before = stage.beat("connector-a")["conn"]
    stage.fault("half_snapshot", connection="next")
    stage.fault("disconnect")
    new_connection(stage, before)
    stage.recovered(since)


@scenario("C7", "disconnects, torn frames and 429 in a loop", "reconnects with growing pauses; everything is declared")
def disconnects_in_a_loop(stage: Stage) -> None:
    """Eight breaks, behind two of them refused handshakes: whoever is told 429 waits long."""
    since = time.monotonic()
    refused = stage.random.sample(range(8), 2)
    for attempt in range(8):
        if attempt in refused:
            stage.fault("refuse_handshake", status=stage.random.choice((429, 503)), count=1)
        stage.fault(stage.random.choice(("disconnect", "torn_frame")))
        stage.pause(0.5, 2.5)
    stage.recovered(since, timeout_s=180)
    only(stage, "connection_lost", "rate_limited")


@scenario("C7", "the key is revoked while the day runs", "no storm of handshakes, ERROR with the cause", ends=False)
def key_revoked(stage: Stage) -> None:
    """The connection breaks and every handshake is answered with 401."""
    since = time.monotonic()
    stage.fault("refuse_handshake", status=401, count=1000)
    stage.fault("disconnect")
    stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ERROR", "the day to be in ERROR")
    stage.detected(since)
    stage.house.ssmd("day", "end", ENV, "--date", stage.date, check=None)


@scenario("C8", "sequence jump on one sid", "a gap for the markets of that sid, at once", quick=True)
def sequence_jump(stage: Stage) -> None:
    """Numbers are taken and never sent."""
    for _ in range(2):
        stage.fault("sequence_jump", channel="orderbook_delta", count=stage.random.randrange(1, 20))
        stage.pause(0.5, 1.5)
    since = time.monotonic()
    stage.wait(lambda: "sequence_jump" in causes(stage), "the gap", 20)
    stage.detected(since)
    stage.flows()


@scenario("C9", "duplicate, reordered and late messages", "the raw archive keeps all as they came")
def odd_order(stage: Stage) -> None:
    """All that a network or an exchange may do to the order of frames."""
    for name in stage.random.sample(("duplicate", "reorder", "late"), 3):
        stage.fault(name, count=stage.random.randrange(5, 40), delay_s=3.0)
        stage.pause(0.3, 1.0)
    stage.pause(3.5, 4.0)
    stage.flows()


@scenario("C10", "malformed, huge and unknown messages", "archived as they came, no crash")
def odd_frames(stage: Stage) -> None:
    """Ten megabytes in a frame, types and keys that nobody knows, and what is no JSON."""
    pid = stage.pid(CONNECTOR)
    for name in stage.random.sample(("malformed", "huge", "unknown_type", "unknown_keys"), 4):
        stage.fault(name, count=1 if name == "huge" else 10)
        stage.pause(0.2, 0.6)
    stage.flows()
    assert stage.pid(CONNECTOR) == pid
    stage.wait(lambda: stage.shown()["unknown"] >= 20, "the unknown messages to be shown while the day runs")
    assert "Drift: " in stage.house.ssmd("day", "show", ENV, stage.date).stdout
    stage.fault("unknown_keys", count=100_000)
    stage.wait(
        lambda: "in the newest messages" in stage.house.ssmd("day", "show", ENV, stage.date).stdout,
        "the unknown key of all messages to be shown while the day runs",
    )
    stage.exchange("faults", method="DELETE")
    drift(stage, "key", "type", "shape")


def drift(stage: Stage, *kinds: str) -> None:
    """End the day and see that it shows what the reader did not know, of all of these kinds, and where examples are."""
    stage.end()
    found = stage.shown()["drift"]
    stage.notes["drift"] = found
    assert {one["kind"] for one in found["most"]} >= set(kinds), found
    assert found["fingerprints"] >= len(found["most"]) > 0
    lines = stage.house.ssmd("day", "show", ENV, stage.date).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("Drift: ")]
    assert line.endswith(f"; examples: ssmd day report {ENV} {stage.date}")
    page = stage.folder / "report.html"
    stage.house.ssmd("day", "report", ENV, stage.date, "--to", str(page))
    assert html.escape(found["most"][0]["name"]) in page.read_text()


@scenario(
    "C10", "some messages as before March 2026: cents and whole contracts", "archived as they came; degraded at most"
)
def old_format(stage: Stage) -> None:
    """Their counts are rounded, so that no book can be folded from them to the last contract; that is no loss of ours."""
    stage.fault("cents", count=10)
    stage.flows()
    stage.end()
    day = stage.shown()
    assert day["drift"] == {"fingerprints": 0, "most": []}, "both eras are known to the reader"
    assert not any(sheet["rejected"] for sheet in day["ledger"]["channels"])


@scenario("C11", "the exchange's clock goes down", "no false gap")
def clock_goes_down(stage: Stage) -> None:
    """As after the exchange's maintenance."""
    stage.fault("clock_back", size=10_000)
    stage.flows(300)
    assert stage.shown()["gaps"] == []


@scenario("C12", "the host's clock steps by an hour, forth and back", "timers hold, nothing is lost")
def clock_steps(stage: Stage) -> None:
    """Only the recorder's clock is moved: the exchange's, whose file it reads, goes on as it was."""
    path = clock_path(stage.house.home, ENV)
    offset_ns = json.loads(path.read_text())["offset_ns"] if path.exists() else 0
    before = stage.beat("connector-a")["conn"]
    for step_s in (3600, 0, -3600, 0):
        stepped = path.with_suffix(".step")
        stepped.write_text(json.dumps({"offset_ns": offset_ns + step_s * NS}))
        stepped.replace(path)
        stage.flows(200)
    assert stage.beat("connector-a")["conn"] == before, "the step of a clock cost the connection"


@scenario(
    "C13", "hundreds of markets listed and gone within minutes", "all are subscribed within a minute, else declared"
)
def markets_come_and_go(stage: Stage) -> None:
    """The exchange's clock is moved over the rollovers of the 15-minute series."""
    for _ in range(2):
        stage.exchange("clock", {"advance_s": 900})
        stage.flows(200, 90)


@scenario(
    "C13",
    "50,000 markets listed at once, with 429",
    "all are subscribed within a minute over several connections, what came before is declared",
    started=False,
    simulator={"markets": 50_000},
    capture={"markets": {"all": True, "mve": "exclude", "max": 60_000}, "spool_limit_mb": 512, "stream_limit_mb": 512},
)
def fifty_thousand_markets(stage: Stage) -> None:
    """The list has few of them when the day is started; a sync brings all the others to connectors that run."""
    stage.fault("http_short", path="/markets", count=1_000_000, size=995)
    stage.start(messages=50)
    names = connector_names(stage.setting().env)
    assert len(names) > 1
    pids = {name: stage.beat(name)["pid"] for name in names}
    few = sum(stage.beat(name)["markets"] for name in names)
    assert few < 1_000
    stage.exchange("faults", method="DELETE")
    stage.fault("http_429", path="/markets", count=5)
    syncing = stage.house.spawn("secmaster", "sync", ENV, "--json")
    peaks: list[int] = []

    def ended() -> bool:
        # Not what `wait4` says: that counts what this process held when it forked.
        peaks.extend(_most_memory_mib(syncing.pid))
        return syncing.poll() is not None

    stage.wait(ended, "the sync to end", 120)
    said, complaint = syncing.communicate()
    assert syncing.returncode == 0, complaint
    since = time.monotonic()
    listed = json.loads(said)["total"]
    assert listed >= 50_000
    stage.wait(lambda: sum(stage.beat(name)["markets"] for name in names) >= listed, "all to be subscribed", 60)
    stage.notes |= {
        "markets": listed,
        "connectors": len(names),
        "subscribed_s": round(time.monotonic() - since, 1),
        "sync_mib": max(peaks),
    }
    stage.wait(lambda: not any(stage.beat(name)["snapshots_due"] for name in names), "all snapshots", 120)
    stage.flows()
    beats = {name: stage.beat(name) for name in names}
    assert {name: beat["pid"] for name, beat in beats.items()} == pids, "a connector was started again"
    assert [beat["markets_left_out"] for beat in beats.values()] == [0] * len(names)
    rss = {name: psutil.Process(pid).memory_info().rss >> 20 for name, pid in pids.items()}
    stage.notes["rss_mib"] = rss
    assert max(rss.values()) < 200
    assert max(peaks) < 300
    gaps = stage.shown()["gaps"]
    assert {gap["cause"] for gap in gaps} == {"not_subscribed"}, gaps
    assert all(gap["to_ns"] for gap in gaps), "a market is subscribed and its gap is open"


def _most_memory_mib(pid: int) -> list[int]:
    """Return the most memory that a living process has ever had, in MiB; nothing of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return []
    return [int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM:")]


@scenario("C14", "ten times the load, and a slow NATS", "the spool takes it, memory stays flat, nothing is lost")
def burst_with_slow_nats(stage: Stage) -> None:
    """Ten times as many messages, with the connector's line to NATS slowed down."""
    pid = stage.pid(CONNECTOR)
    stage.exchange("rate", {"rate": 5000})
    stage.to_nats.slow(100_000, "connector-a")
    stage.pause(12.0, 15.0)
    assert pid is not None
    rss = psutil.Process(pid).memory_info().rss >> 20
    stage.notes["rss_mib"] = rss
    assert rss < 200
    stage.exchange("rate", {"rate": 500})
    since = time.monotonic()
    stage.to_nats.heal()
    stage.recovered(since)
    assert stage.pid(CONNECTOR) == pid


@scenario("C5", "connector stopped and continued", "the gap is declared, or nothing is lost")
def connector_sleeps(stage: Stage) -> None:
    """SIGSTOP for longer than the exchange waits for a pong: the host was suspended."""
    stopped = stage.kill(CONNECTOR, signal.SIGSTOP)
    since = time.monotonic()
    stage.pause(33.0, 36.0)
    os.kill(stopped, signal.SIGCONT)
    stage.recovered(since)
