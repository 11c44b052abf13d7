"""A sealed day in a folder, without a server: frames through a real recorder, segments, events and a manifest that fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from ssmd_dagster.archive.layout import manifest_key, table_key
from ssmd_dagster.archive.proofs import BookProofs
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.day.condition import condition
from ssmd_dagster.day.events import DayEvent
from ssmd_dagster.day.ledger import TradesLedger
from ssmd_dagster.day.payloads import ChannelCount, Checkpoint, Completed
from ssmd_dagster.day.seal import JournalEntry, Manifest, TableEntry, root_hash, sha256_hex
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.stores.objects import LocalObjectStore
from ssmd_dagster.workflows.sealing import connection_entries, segment_entries
from ssmd_dagster.workflows.verify import draw_up
from ssmd_dagster_tests.capture import recordings
from ssmd_dagster_tests.capture.recordings import DATE, FEED, START_NS, Recording, build_segments, read_segments
from ssmd_dagster_tests.day import builders

ENV = builders.ENV
NO_TRADES = TradesLedger(exchange=0, captured=0, repaired=0, missing=0, extra=0)
BOOK_SID, TRADE_SID = 2, 1


def book_frame(seq: int, kind: str, **msg: Any) -> bytes:
    """A frame of the order book's subscription."""
    return json.dumps({"type": kind, "sid": BOOK_SID, "seq": seq, "msg": {"market_ticker": "KX-1", **msg}}).encode()


def book_frames(rounds: int = 6) -> list[bytes]:
    """A snapshot, deltas, and after each round the snapshot that they make."""
    frames = [book_frame(1, "orderbook_snapshot", yes_dollars_fp=[["0.4000", "5.00"]])]
    levels = {"0.4000": 500}
    for number in range(rounds):
        price = f"0.{41 + number % 5}00"
        levels[price] = levels.get(price, 0) + 150
        delta = book_frame(
            len(frames) + 1, "orderbook_delta", side="yes", price_dollars=price, delta_fp="1.50", ts_ms=1
        )
        frames.append(delta)
        sides = [[price, f"{size / 100:.2f}"] for price, size in sorted(levels.items())]
        frames.append(book_frame(len(frames) + 1, "orderbook_snapshot", yes_dollars_fp=sides))
    return frames


def trade_frames(count: int = 20) -> list[bytes]:
    """Trades of one market, one a millisecond."""
    return [
        json.dumps(
            {
                "type": "trade",
                "sid": TRADE_SID,
                "seq": seq,
                "msg": {
                    "trade_id": f"00000000-0000-4000-8000-{seq:012x}",
                    "market_ticker": "KX-1",
                    "ts_ms": START_NS // 1_000_000 + seq,
                },
            }
        ).encode()
        for seq in range(1, count + 1)
    ]


def a_day(books: Iterable[bytes] = (), trades: Iterable[bytes] = ()) -> Recording:
    """Return the recording of a connection that saw these frames."""
    recording = Recording(env=ENV)
    recording.recorder._channel_of_type = {**recordings.CHANNEL_OF_TYPE, "orderbook_snapshot": "orderbook_delta"}
    recording.recorder.note({"event": "connected", "channels": ["trade", "orderbook_delta"], "tickers": ["KX-1"]})
    recording.recorder.note({"event": "subscribed", "sids": {"trade": TRADE_SID, "orderbook_delta": BOOK_SID}})
    for number, frame in enumerate([*trades, *books]):
        recording.raw(frame)
        if number % 5 == 4:
            recording.recorder.flush()
    recording.end()
    return recording


class StoredDay:
    """A sealed day: its stores, its environment, and what a test may change."""

    def __init__(self, folder: Path, recording: Recording, *, per_segment: int = 3) -> None:
        self.folder = folder
        self.raw = LocalObjectStore(folder / "raw")
        self.normalized = LocalObjectStore(folder / "normalized")
        (folder / "build").mkdir()
        self.segments = build_segments(folder / "build", recording.batches(), env=ENV, per_segment=per_segment)
        for key, (_, _, data) in self.segments.items():
            self.write(key, data)
        self.table = table_key(FEED, "trade", DATE)
        (folder / "normalized" / self.table).parent.mkdir(parents=True)
        (folder / "normalized" / self.table).write_bytes(b"a table")
        self.readback = read_segments(self.segments, env=ENV)
        self.manifest = self._manifest(self.readback)
        self.write(self.key, self.manifest.encode())

    @property
    def key(self) -> str:
        """Return the manifest's key."""
        return manifest_key(FEED, DATE)

    def path(self, key: str) -> Path:
        """Return where an object of the raw bucket lies."""
        return self.folder / "raw" / key

    def write(self, key: str, data: bytes) -> None:
        """Put an object's bytes there, whatever was there."""
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(data)

    def rewrite(self, **changes: Any) -> None:
        """Write the manifest with other claims, in the form that manifests have."""
        self.write(self.key, msgspec.structs.replace(self.manifest, **changes).encode())

    def environment(self) -> Environment:
        """Return an environment of that name."""
        registry = load_registry(project_dir() / "exchanges")
        plain = Environment.model_validate(
            {
                "name": ENV,
                "feed": FEED,
                "auth_method": "none",
                "schema": "trade:v1",
                "first_day": date(2025, 12, 1),
                "schedule": {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00"},
                "capture": {"channels": ["trade", "orderbook_delta"], "markets": {"all": True}},
                "transport": {"type": "embedded"},
                "cache": {"type": "embedded"},
                "storage": {"type": "local", "buckets": {"raw": "raw", "normalized": "normalized"}},
            }
        )
        plain.bind(registry.feeds[FEED])
        return plain

    def _manifest(self, readback: Readback) -> Manifest:
        log = builders.started()
        counts = {
            conn: {name: ChannelCount(records=n, batches=1, bytes=1, last_n=n) for name, n in channels.items()}
            for conn, channels in readback.by_connection.items()
        }
        log.add(
            EventName.CHECKPOINT,
            data=msgspec.to_builtins(Checkpoint(component="spool", final=True, connections=counts)),
        )
        log.add(EventName.END_REQUESTED, epoch=log.day().epoch)
        proofs = BookProofs(FEED)
        for _key, (channel, _, data) in sorted(self.segments.items(), key=lambda item: item[1][0] != "session"):
            proofs.feed(channel, data)
        ledger, holes = draw_up(
            log.day(), readback, proofs.finish(), published=dict(readback.archived), trades=NO_TRADES, why_not={}
        )
        assert holes == ()
        filed = {"normalised": 0, "duplicates": 0, "rejected": {}, "other_day": 0, "opening_fold": 0}
        sheets = tuple(msgspec.structs.replace(sheet, **filed, control=sheet.archived) for sheet in ledger.channels)
        ledger = msgspec.structs.replace(ledger, channels=sheets)
        judged = condition(ledger=ledger, gaps=(), archived_records=readback.records)
        completed = Completed(
            condition=judged.value,
            condition_reasons=judged.reasons,
            ledger=ledger.to_json(),
            messages=1,
            gaps=0,
            archive_url="/raw/",
        )
        log.add(EventName.COMPLETED, data=msgspec.to_builtins(completed))
        entries, before = [], None
        for seq, event in log.events:
            linked: DayEvent = msgspec.structs.replace(event, prev_sha256=before)
            raw = linked.encode()
            before = sha256_hex(raw)
            entries.append(JournalEntry(seq=seq, event=msgspec.Raw(raw)))
        day = log.day()
        assert day.condition is not None
        segments = segment_entries(readback)
        return Manifest(
            env=ENV,
            feed=FEED,
            date=DATE,
            open_ns=START_NS,
            close_ns=START_NS + 86_400_000_000_000,
            revision=1,
            epochs=day.epochs,
            segments=segments,
            root_hash=root_hash(segments),
            tables=(TableEntry(key=self.table, size=7, sha256=sha256_hex(b"a table"), rows=1),),
            connections=connection_entries(readback),
            gaps=(),
            ledger=ledger.to_json(),
            condition=day.condition,
            condition_reasons=day.condition_reasons,
            rules_version=1,
            journal_seq=len(entries),
            events=tuple(entries),
            versions={"ssmd_dagster": "test"},
            created_at="2025-12-15T00:00:00Z",
        )
