"""The archive's trades against the exchange's list, held against plain sets."""

from __future__ import annotations

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.archive.trade_ids import Matching, ids_bytes

IDS = st.lists(
    st.one_of(
        st.integers(0, 40).map(lambda number: str(UUID(int=number << 64 | 7))),  # alike at the end, with repetitions
        st.integers(0, 40).map(lambda number: str(UUID(int=number))),
        st.uuids().map(str),
        st.text(st.characters(codec="ascii"), min_size=1, max_size=5),
    ),
    max_size=80,
)
LISTED = st.lists(st.tuples(IDS, st.booleans()), max_size=3)


@given(inside=IDS, outside=IDS, pages=IDS, listed=LISTED)
def test_matching_is_what_sets_say(
    inside: list[str], outside: list[str], pages: list[str], listed: list[tuple[list[str], bool]]
) -> None:
    """Captured, repaired, missing and extra are the set differences, whatever the ids look like and repeat."""
    matching = Matching(*(bytearray(ids_bytes(ids)) for ids in (inside, outside, pages)))
    everything = {*inside, *outside, *pages}
    missing, wanted, proven = set(), set(), set()
    for ids, of_window in listed:
        lacking = [ids[i] for i in matching.take(ids, [of_window] * len(ids))]
        assert lacking == [id_ for id_ in ids if of_window and id_ not in everything]
        missing |= set(lacking)
        wanted |= set(ids) if of_window else set()
        proven |= set(ids)
    result = matching.result()
    inner, outer = set(inside) & proven, (set(outside) - set(inside)) & wanted
    assert (result.captured, result.missing) == (len(inner) + len(outer), len(missing))
    assert result.repaired == len((set(pages) - set(inside) - set(outside)) & wanted)
    assert result.exchange == result.captured + result.repaired + result.missing
    assert result.extra == len(set(inside) - inner) + len(set(pages) - set(inside) - set(outside) - wanted)
    assert set(matching.missing_ids(len(missing))) == {str(UUID(bytes=ids_bytes([id_]))) for id_ in missing}
