"""Numbers and times as exact integers, against `decimal` and `datetime` as judges."""

from __future__ import annotations

import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.kalshi.scaled import (
    cents_micros,
    count_centis,
    milliseconds_ns,
    price_micros,
    rfc3339_ns,
    seconds_ns,
    whole,
)

UTC_TIMES = st.datetimes(
    datetime.datetime(1970, 1, 1),
    datetime.datetime(2200, 1, 1),
    timezones=st.just(datetime.UTC),
)


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
def test_prices_of_up_to_six_places_come_back_exactly(number: int, places: int) -> None:
    """Whatever Kalshi writes with at most six places is the integer that `decimal` computes."""
    exact = Decimal(number).scaleb(-places)
    text = f"{exact:.{places}f}"
    assert price_micros(text) == exact * 1_000_000
    assert price_micros(exact) == exact * 1_000_000
    assert Decimal(price_micros(text)).scaleb(-6) == exact


@given(st.integers(-(10**15), 10**15), st.integers(0, 2))
def test_counts_of_up_to_two_places_come_back_exactly(number: int, places: int) -> None:
    """The same for contracts, signs included."""
    exact = Decimal(number).scaleb(-places)
    assert count_centis(f"{exact:.{places}f}") == exact * 100
    assert count_centis(f"{exact:.{places}f}".replace(".", ".") + ("0000" if places else "")) == exact * 100


@given(st.integers(-(10**9), 10**9))
def test_integers_of_the_cents_era_are_scaled(number: int) -> None:
    """Cents are hundredths of a dollar, counts are whole contracts, and JSON numbers mean the same as strings."""
    assert cents_micros(number) == price_micros(f"{Decimal(number).scaleb(-2):f}")
    assert count_centis(number) == count_centis(str(number))
    assert whole(str(number)) == number == whole(number)
    assert whole(f"{number}.0") == number


@given(st.text() | st.none() | st.floats() | st.booleans() | st.lists(st.integers()) | st.decimals())
def test_what_is_no_number_is_an_error_and_nothing_else(value: Any) -> None:
    """Either it is the same number, exactly, or a `ValueError`."""
    try:
        micros = price_micros(value)
    except ValueError:
        return
    assert Fraction(micros, 10**6) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        ".",
        "1.",
        "1e3",
        "0x1",
        " 1",
        "1 ",
        "1_0",
        "\u0661",
        "--1",
        "+-1",
        "1.2.3",
        "NaN",
        "9" * 41,
        "0.0000001",
    ],
)
def test_odd_texts_are_not_numbers(text: str) -> None:
    """Nothing is guessed, and nothing rounded."""
    with pytest.raises(ValueError, match=r"decimal"):
        price_micros(text)


@pytest.mark.parametrize(
    ("text", "micros"), [("-.5", -500_000), ("+1", 1_000_000), ("0.000001", 1), ("1.0000000", 10**6)]
)
def test_signs_and_zeros_are_read(text: str, micros: int) -> None:
    """Zeros beyond the last place lose nothing."""
    assert price_micros(text) == micros


@pytest.mark.parametrize("value", [True, 0.5, [], {}, Decimal("Infinity"), Decimal("1e100"), Decimal("1e-100")])
def test_other_types_are_not_numbers(value: Any) -> None:
    """Floats above all: they would no longer be what was on the wire."""
    with pytest.raises(ValueError, match=r"number|decimal"):
        price_micros(value)


@given(UTC_TIMES, st.integers(0, 999), st.integers(-14 * 60, 14 * 60))
def test_rfc3339_times_come_back_to_the_nanosecond(moment: datetime.datetime, nanos: int, offset_min: int) -> None:
    """Microseconds by `datetime`, three more digits, in any zone."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    expected_ns = (moment - epoch) // datetime.timedelta(microseconds=1) * 1000 + nanos
    zone = datetime.timezone(datetime.timedelta(minutes=offset_min))
    local = moment.astimezone(zone)
    text = f"{local:%H:%M:%S}.{local.microsecond:06d}{nanos:03d}"
    sign, minutes = ("-", -offset_min) if offset_min < 0 else ("+", offset_min)
    zone_text = f"{sign}{minutes // 60:02d}:{minutes % 60:02d}"
    assert rfc3339_ns(f"{local.date().isoformat()}T{text}{zone_text}") == expected_ns


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:01.5z", 1_500_000_000),
        ("2026-05-15T03:09:50.838972Z", 1_778_814_590_838_972_000),
        ("1970-01-01T00:00:00.0000000019Z", 1),
    ],
)
def test_times_as_kalshi_writes_them(text: str, expected_ns: int) -> None:
    """With and without fraction; digits beyond nanoseconds are cut."""
    assert rfc3339_ns(text) == expected_ns


@pytest.mark.parametrize(
    "value", ["", "2026-05-15", "2026-05-15T03:09:50", "2026-13-15T03:09:50Z", "x", None, 5, "\uff12026"]
)
def test_what_is_no_time_is_an_error(value: Any) -> None:
    """No zone, no such month, no time at all."""
    with pytest.raises(ValueError, match=r"time|month"):
        rfc3339_ns(value)


def test_seconds_and_milliseconds_are_nanoseconds() -> None:
    """Kalshi has both, some as text."""
    assert seconds_ns(1_669_149_841) == seconds_ns("1669149841") == milliseconds_ns(1_669_149_841_000)
