"""What became of a day, by the exchange's log of the truth, the archive's bytes, the journal and the cache.

Frames are matched one by one, connection by connection, by their SHA-256. A frame that is not archived is declared if it was
sent within a gap of the journal; a gap begins where the last archived frame before it was sent, since the recorder can only
know when that one was received. Nobody has to answer for what was sent before the day's window or behind it.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ssmd_dagster.archive.batch import Batch, decode_records, scan
from ssmd_dagster.archive.records import parse_record, payload_of
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.simulator.truth import Frame, Note, read_truth

NS = 1_000_000_000
SLACK_NS = 150_000_000
"""How far apart the two ends of a socket may see its beginning or end on a busy machine."""


class Received(NamedTuple):
    """One archived frame."""

    n: int
    recv_ns: int
    digest: bytes


class Verdict(msgspec.Struct, kw_only=True):
    """The counts of a run; all but `sent`, `archived`, `lost_declared`, `declared_s` and `down_s` must be 0.

    `phantoms` are archived frames of connections that never were, `byte_mismatch` those that a connection never carried.
    `undeclared_s` are seconds of the days' windows in which no connection of ours was open and no gap says so, `down_s` all
    of those, `declared_s` what the gaps cover, `starting_s` those of a start by hand before its first connection was open.
    `misfiled` is None where there are no tables.
    """

    sent: int = 0
    archived: int = 0
    lost_declared: int = 0
    lost_undeclared: int = 0
    phantoms: int = 0
    byte_mismatch: int = 0
    duplicates: int = 0
    order_violations: int = 0
    jumps_undeclared: int = 0
    undeclared_s: float = 0.0
    declared_s: float = 0.0
    down_s: float = 0.0
    starting_s: float = 0.0
    misfiled: int | None = None
    ledger_imbalance: int = 0
    illegal_transitions: int = 0
    double_transitions: int = 0
    cache_differs: int = 0
    examples: list[str] = []

    def faults(self) -> dict[str, float]:
        """Return what must be 0 and is not."""
        must = (
            *("lost_undeclared", "phantoms", "byte_mismatch", "duplicates", "order_violations", "jumps_undeclared"),
            *("undeclared_s", "misfiled", "ledger_imbalance", "illegal_transitions", "double_transitions"),
            "cache_differs",
        )
        return {name: value for name in must if (value := getattr(self, name))}


def received_in(objects: Mapping[str, bytes]) -> dict[str, list[Received]]:
    """Return every archived frame per connection, in order, from a day's segments."""
    found: dict[str, list[Received]] = defaultdict(list)
    for name, data in sorted(objects.items()):
        if not name.endswith(".jsonl.zst"):
            continue
        for item in scan(data):
            if isinstance(item, Batch):
                for line in decode_records(data, item).splitlines():
                    record = parse_record(line)
                    payload = payload_of(record)
                    if payload is not None:
                        digest = hashlib.sha256(payload).digest()
                        found[item.header.conn].append(Received(record.n, record.recv_ns, digest))
    return {conn: sorted(frames) for conn, frames in found.items() if "-rest-" not in conn}


class Span(NamedTuple):
    """An interval in nanoseconds, its end open."""

    start: int
    end: int


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the same time as spans that are sorted and apart."""
    merged: list[Span] = []
    for span in sorted(span for span in spans if span.end > span.start):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def minus(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return the part of `spans` that lies in none of `others`; both sorted and apart."""
    left: list[Span] = []
    for span in spans:
        start = span.start
        for other in others:
            if other.end <= start or other.start >= span.end:
                continue
            if other.start > start:
                left.append(Span(start, other.start))
            start = max(start, other.end)
        if start < span.end:
            left.append(Span(start, span.end))
    return left


def seconds(spans: Iterable[Span]) -> float:
    """Return how long spans are."""
    return round(sum(span.end - span.start for span in spans) / NS, 3)


class Day(NamedTuple):
    """One recorded day: what the command line shows of it, its window, and its objects by file name."""

    shown: dict[str, Any]
    window: Span
    objects: dict[str, bytes]


def judge(truth: Path, days: Sequence[Day]) -> Verdict:
    """Compare what the exchange has sent with what the days hold and declare."""
    verdict = Verdict()
    frames: dict[int, list[Frame]] = defaultdict(list)
    life: dict[int, list[int]] = {}
    kinds: dict[int, str] = {}
    withheld: list[tuple[int, Note]] = []
    last_ns = 0
    for entry in read_truth(truth):
        if isinstance(entry, Frame):
            frames[entry.connection].append(entry)
            last_ns = entry.send_ns
            continue
        connection = entry.data.get("connection")
        if entry.note == "opened" and connection is not None:
            life[connection] = [entry.at_ns, 0]
        elif entry.note == "closed" and connection in life:
            life[connection][1] = entry.at_ns
        elif entry.note == "fault":
            kinds[entry.data.get("number", 0)] = str(entry.data.get("fault", ""))
        elif entry.note == "withheld":
            withheld.append((int(entry.data.get("fault", 0) or 0), entry))
        elif entry.note in ("stopped", "started"):  # the exchange itself went away, with every connection
            for ends in life.values():
                ends[1] = ends[1] or last_ns
        last_ns = max(last_ns, entry.at_ns)
    verdict.sent = sum(map(len, frames.values()))

    members = {connection: {frame.sha256 for frame in sent} for connection, sent in frames.items()}
    day_of: dict[int, Day] = {}
    matched: dict[int, Counter[bytes]] = {number: Counter() for number in frames}
    starts: dict[str, list[tuple[int, int]]] = {}  # per connection of ours: receive and send time of what is archived
    for day in days:
        for conn, received in received_in(day.objects).items():
            verdict.archived += len(received)
            votes = Counter({number: sum(r.digest in sent for r in received) for number, sent in members.items()})
            number = max(votes, key=lambda n: (votes[n], n), default=0)
            if not votes.get(number):
                verdict.phantoms += len(received)
                continue
            day_of[number] = day
            starts[conn] = _match(conn, received, frames[number], matched[number], verdict)

    gaps = [gap for day in days for gap in day.shown["gaps"]]
    declared = union(_declared(gap, starts) for gap in gaps)
    window = union(day.window for day in days)
    for number, sent in frames.items():
        limit = day_of[number].window if number in day_of else Span(window[0].start, window[-1].end)
        left = Counter(frame.sha256 for frame in sent) - matched[number]
        for frame in sent:
            if left[frame.sha256] > 0:
                left[frame.sha256] -= 1
                if limit.start <= frame.send_ns < limit.end:
                    _lost(frame, declared, verdict)
    up = union(Span(ends[0], ends[1] or last_ns + NS) for ends in life.values())
    down = minus(window, up)
    if down and up and down[0].start == window[0].start and down[0].end == up[0].start:
        verdict.starting_s = seconds(down[:1])
        down = down[1:]
    slack = union(Span(gap.start - SLACK_NS, gap.end + SLACK_NS) for gap in declared)
    undeclared = [span for span in minus(down, slack) if span.end - span.start > SLACK_NS]
    verdict.down_s, verdict.undeclared_s = seconds(down), seconds(undeclared)
    verdict.declared_s = seconds(minus(declared, minus([Span(0, 1 << 62)], window)))
    for span in undeclared[:3]:
        verdict.examples.append(f"no connection and no gap for {(span.end - span.start) / NS:.2f} s at {span.start}")
    jumps = [(gap["from_ns"] - NS, (gap["to_ns"] or 1 << 62) + NS) for gap in gaps if gap["cause"] == "sequence_jump"]
    for fault, note in withheld:
        if kinds.get(fault) == "sequence_jump" and not any(low <= note.at_ns <= high for low, high in jumps):
            verdict.jumps_undeclared += 1
    for day in days:
        if day.shown["ledger"]:
            ledger = Ledger.from_json(day.shown["ledger"])
            verdict.ledger_imbalance += sum(abs(d.size) for d in ledger.unexplained())
    return verdict


def _match(
    conn: str, received: list[Received], sent: list[Frame], matched: Counter[bytes], verdict: Verdict
) -> list[tuple[int, int]]:
    """Match a connection's archived frames with what was sent on it; return when each was received and sent."""
    places: dict[bytes, deque[int]] = defaultdict(deque)
    for index, frame in enumerate(sent):
        places[frame.sha256].append(index)
    times: list[tuple[int, int]] = []
    last = -1
    ordinals = Counter(frame.n for frame in received)
    verdict.duplicates += sum(count - 1 for count in ordinals.values())
    for record in received:
        if record.digest not in places:
            verdict.byte_mismatch += 1
            verdict.examples.append(f"{conn}: record {record.n} is not as it was sent")
            continue
        if not places[record.digest]:
            verdict.duplicates += 1
            continue
        index = places[record.digest].popleft()
        if index < last:
            verdict.order_violations += 1
        last = max(last, index)
        matched[record.digest] += 1
        times.append((record.recv_ns, sent[index].send_ns))
    return times


def _declared(gap: Mapping[str, Any], starts: Mapping[str, list[tuple[int, int]]]) -> Span:
    """Return a gap on the exchange's side: from when the last archived frame before it was sent."""
    start, end = int(gap["from_ns"]), gap["to_ns"] if gap["to_ns"] is not None else 1 << 62
    times = starts.get(str(gap["scope"].get("conn", "")), [])
    place = bisect_right(times, (start, 1 << 62))
    if place:
        start = min(start, times[place - 1][1])
    return Span(start, int(end))


def _lost(frame: Frame, declared: Sequence[Span], verdict: Verdict) -> None:
    if any(span.start <= frame.send_ns < span.end + 1 for span in declared):
        verdict.lost_declared += 1
        return
    verdict.lost_undeclared += 1
    if len(verdict.examples) < 20:
        verdict.examples.append(
            f"lost: connection {frame.connection} sid {frame.sid} seq {frame.seq} {frame.type} sent at {frame.send_ns}"
        )


def judge_journal(events: Sequence[tuple[int, dict[str, Any]]], states: Mapping[str, str], verdict: Verdict) -> None:
    """Count transitions that do not follow one another, epochs that start or end twice, and days that the cache has otherwise."""
    at: dict[str, str] = {}
    seen: Counter[tuple[str, int, str]] = Counter()
    for seq, event in events:
        date, name = event["date"], event["event"]
        if event.get("to") is not None and event.get("to") != event.get("from"):
            if event.get("from") != at.get(date):
                verdict.illegal_transitions += 1
                verdict.examples.append(f"journal {seq}: {name} from {event.get('from')}, but it was {at.get(date)}")
            if name in ("started", "completed", "recovered") and event.get("epoch") is not None:
                seen[date, int(event["epoch"]), name] += 1
        if event.get("to") is not None:
            at[date] = event["to"]
    verdict.double_transitions += sum(count - 1 for count in seen.values())
    for date, state in at.items():
        if states.get(date) != state:
            verdict.cache_differs += 1
            verdict.examples.append(f"the cache says {states.get(date)} of {date}, the journal {state}")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a `fault_report.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=msgspec.to_builtins) + "\n", encoding="utf-8")
