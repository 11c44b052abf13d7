"""Whether somebody else still has a batch that the store does not give back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssmd_dagster.archive.losses import Loss
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.stores.stream import BatchId
from ssmd_dagster.workflows.damage import sort_out
from ssmd_dagster_tests.capture.recordings import DATE, a_recording, header_of

TRADES = [data for data in a_recording(frames=60).batches() if header_of(data).header.channel == "trade"]
ENV = "kalshi-sim"


def spoilt(encoded: bytes) -> bytes:
    """Flip a bit in a batch's records."""
    content = bytearray(encoded)
    content[header_of(encoded).data_end // 2] ^= 1
    return bytes(content)


class Stream:
    """Holds batches of the trade channel by number."""

    def __init__(self, held: dict[int, bytes]) -> None:
        self.held = {BatchId("812-a-0", "trade", number): data for number, data in held.items()}

    async def batches(self, _date: str) -> dict[BatchId, int]:
        """Name them."""
        return dict.fromkeys(self.held, 1)

    async def copies(self, _date: str, wanted: Collection[BatchId]) -> AsyncIterator[tuple[BatchId, bytes]]:
        """Yield those that are wanted."""
        for batch in wanted:
            yield batch, self.held[batch]


@pytest.mark.parametrize("last", [1, None])
@pytest.mark.parametrize(
    ("in_stream", "in_spool", "there"),
    [
        ("whole", "spoilt", True),
        ("spoilt", "whole", True),
        ("spoilt", "spoilt", False),
        ("", "spoilt", False),
        ("spoilt", "", False),
    ],
)
async def test_a_spoilt_copy_is_no_copy(
    tmp_path: Path, in_stream: str, in_spool: str, there: bool, last: int | None
) -> None:
    """Of what nobody can read, somebody is told that it is lost; where one copy is whole, it is not."""
    as_it_is = {"whole": TRADES[1], "spoilt": spoilt(TRADES[1])}
    folder = spool_dir(tmp_path, ENV, DATE)
    folder.mkdir(parents=True)
    (folder / "812-a-0.batches").write_bytes(TRADES[0] + as_it_is.get(in_spool, b""))
    stream = Stream({0: TRADES[0], **({1: as_it_is[in_stream]} if in_stream else {})})
    desk: Any = SimpleNamespace(
        env=ENV, setting=SimpleNamespace(home=tmp_path), stores=SimpleNamespace(raw_stream=stream)
    )
    loss = Loss(conn="812-a-0", channel="trade", first=0, last=last, from_ns=1, to_ns=2, seq={})
    found = await sort_out(desk, DATE, [loss])
    assert (found.gone, found.elsewhere) == (((), (loss,)) if there else ((loss,), ()))
