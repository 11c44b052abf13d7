"""Small batches for the tests of the archive's formats."""

from __future__ import annotations

import hashlib

from ssmd_dagster.archive.batch import BatchHeader, encode_batch


def make_batch(records: bytes, *, batch: int = 0, conn: str = "812-a-0", channel: str = "trade") -> bytes:
    """Return an encoded batch whose header tells the truth about `records`."""
    header = BatchHeader(
        v=1,
        env="kalshi-sim",
        day="2025-12-14",
        epoch=812,
        conn=conn,
        channel=channel,
        batch=batch,
        records=records.count(b"\n"),
        n_first=batch * 10,
        n_last=batch * 10 + 9,
        recv_first_ns=1,
        recv_last_ns=2,
        bytes=len(records),
        sha256=hashlib.sha256(records).hexdigest(),
        seq={"1": (batch * 10, batch * 10 + 9, 10)},
    )
    return encode_batch(header, records)
