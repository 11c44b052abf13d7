"""The simulated exchange's truth log against a day's archive: what was sent, and what of it is there."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ssmd_dagster.archive.batch import Batch, decode_records, scan
from ssmd_dagster.archive.records import parse_record, payload_of
from ssmd_dagster.exchange import REST
from ssmd_dagster.simulator.truth import Frame, Note, read_truth


class Verdict(NamedTuple):
    """Frames by the SHA-256 of their bytes: `lost` were sent and are not archived, `phantom` the other way round."""

    sent: int
    archived: int
    lost: list[Frame]
    phantom: int
    duplicated: int


def judge(truth: Path, *folders: Path) -> Verdict:
    """Compare all that an exchange has sent with the raw archives of the days that recorded it."""
    sent = [entry for entry in read_truth(truth) if not isinstance(entry, Note)]
    archived = Counter(hashlib.sha256(payload).digest() for folder in folders for payload in archived_payloads(folder))
    wanted = Counter(frame.sha256 for frame in sent)
    missing = wanted - archived
    lost = []
    for frame in sent:
        if missing[frame.sha256] > 0:
            missing[frame.sha256] -= 1
            lost.append(frame)
    phantom = archived - wanted
    return Verdict(
        sent=len(sent),
        archived=archived.total(),
        lost=lost,
        phantom=sum(count for digest, count in phantom.items() if digest not in wanted),
        duplicated=sum(count for digest, count in phantom.items() if digest in wanted),
    )


def archived_payloads(folder: Path) -> list[bytes]:
    """Return every frame of a day's archive as it came off the socket, connections one after another, each in order.

    Pages that were fetched over REST are none.
    """
    found: dict[tuple[str, int], bytes] = {}
    for path in sorted(folder.glob("*.jsonl.zst")):
        data = path.read_bytes()
        for item in scan(data):
            if isinstance(item, Batch) and item.header.channel != REST:
                for line in decode_records(data, item).splitlines():
                    record = parse_record(line)
                    payload = payload_of(record)
                    if payload is not None:
                        assert (item.header.conn, record.n) not in found
                        found[item.header.conn, record.n] = payload
    return [payload for _, payload in sorted(found.items())]
