"""Which days' batches may go: sealed ones, by time, and by the room that the next day wants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.retention import WARN_SHARE, Kept, dates_to_let_go, nearly_full_words

kept_days = st.lists(
    st.builds(Kept, st.dates().map(str), st.integers(0, 100), st.integers(0, 100), st.booleans()),
    unique_by=lambda day: day.date,
    max_size=8,
)


@given(kept_days, st.integers(0, 200), st.integers(0, 100), st.integers(0, 300))
def test_only_sealed_days_go_and_no_more_than_time_or_room_ask_for(
    kept: list[Kept], now_ns: int, keep_ns: int, free: int
) -> None:
    """All whose time is up, then the oldest; afterwards there is room for another day, or nothing sealed is left."""
    gone = dates_to_let_go(kept, now_ns, keep_ns, free)
    known = {day.date: day for day in kept}
    proved = {day.date for day in kept if day.proved}
    expired = {date for date in proved if known[date].close_ns + keep_ns < now_ns}
    wanted = max((day.size for day in kept), default=0)
    assert list(gone) == sorted(gone)
    assert expired <= set(gone) <= proved
    freed = free + sum(known[date].size for date in gone)
    assert freed >= wanted or set(gone) == proved
    for date in set(gone) - expired:  # each was needed when its turn came
        assert free + sum(known[earlier].size for earlier in gone if earlier < date) < wanted


def test_a_stream_that_is_nearly_full_is_told() -> None:
    """With what to change and which command brings it in."""
    assert nearly_full_words(WARN_SHARE - 0.001) is None
    words = nearly_full_words(0.87)
    assert words is not None
    assert words.startswith("the raw stream is 87% full")
    assert "stream_limit_mb" in words
