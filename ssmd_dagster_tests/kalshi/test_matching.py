"""What identifies the trades of a page is the same, read all at once and one by one."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.archive.trade_ids import id_bytes, ids_bytes
from ssmd_dagster.kalshi.matching import page_ids, rows_within
from ssmd_dagster.kalshi.scaled import rfc3339_ns

DAY_NS = int(datetime(2026, 5, 29, tzinfo=UTC).timestamp()) * 1_000_000_000
IDS = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda one: str(one).upper()),
    st.sampled_from(["", "é" * 36, "7fe81802-5024-493e-8d4f-00000000001", "7fe81802-5024-493e-8d4f 000000000001"]),
    st.text("0123456789abcdef- ", min_size=36, max_size=36),
)
EDGES = st.one_of(st.integers(-5_000, 5_000), st.integers(-2 * 86_400 * 10**9, 2 * 86_400 * 10**9))


def rows(ids: list[str], times: list[str]) -> bytes:
    """Return rows as REST lists them."""
    return json.dumps(
        [{"trade_id": one, "ticker": "T.1", "created_time": at} for one, at in zip(ids, times, strict=True)]
    ).encode()


@given(st.lists(IDS, max_size=4))
def test_ids_are_the_same_together_and_alone(ids: list[str]) -> None:
    """Whatever an exchange uses as ids, each is 16 bytes, and those of a UUID its own."""
    assert ids_bytes(ids) == b"".join(id_bytes(one) for one in ids)
    assert all(len(id_bytes(one)) == 16 for one in ids)


@given(st.lists(st.tuples(EDGES, st.sampled_from(["%fZ", "%f+00:00"])), max_size=4), EDGES)
def test_a_row_is_of_the_day_by_its_time(forms: list[tuple[int, str]], edge_ns: int) -> None:
    """At the microsecond, whatever form the times have and wherever the day's ends lie."""
    times = [
        datetime.fromtimestamp((DAY_NS + offset_ns) // 1_000 / 1_000_000, UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{form}")
        for offset_ns, form in forms
    ]
    ids = [str(number) for number in range(len(times))]
    open_ns, close_ns = DAY_NS, DAY_NS + 86_400 * 10**9 + edge_ns
    assert rows_within(rows(ids, times), open_ns, close_ns) == [
        open_ns <= rfc3339_ns(text) < close_ns for text in times
    ]


def test_what_is_no_page_has_no_trades() -> None:
    """A page has ids and markets; another frame has none, and a row that cannot be read is an error of the list."""
    page = b'{"type":"rest_trades","msg":{"trades":%b}}' % rows(["a", "b"], ["2026-05-29T00:00:00Z"] * 2)
    assert page_ids(page) == (["a", "b"], {"T.1"})
    assert page_ids(b'{"type":"ok","msg":{}}') == ([], set())
    assert page_ids(b"[]") == ([], set())
    with pytest.raises(ValueError, match="not an RFC 3339 time"):
        rows_within(rows(["a"], ["yesterday"]), 0, 1)
