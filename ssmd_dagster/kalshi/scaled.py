"""Kalshi's numbers and times as exact integers: micro-dollars, hundredths of a contract, nanoseconds.

Prices have up to 4 decimal places on the WebSocket and up to 6 in REST answers, so the unit is 1e-6 dollars: one unit
for both, and nothing is ever rounded. Counts have 2 decimal places, so the unit is 1e-2 contracts. A number that needs
more places than its unit has is an error, not an approximation.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from operator import itemgetter
from typing import Any

PRICE_PLACES = 6
COUNT_PLACES = 2
MICROS_PER_CENT = 10_000
_NS_PER_S = 1_000_000_000
_MAX_CHARS = 40
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|z|[+-]\d\d:\d\d)", re.ASCII)
# The three forms that Kalshi's own messages have, for which the standard library's parser is right and quick.
_PLAIN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.(?:\d{3}|\d{6}))?Z", re.ASCII)
_MICROSECONDS_LENGTH = 27
_PLAIN_LENGTHS = frozenset({20, 24, _MICROSECONDS_LENGTH})
_CACHED_NUMBERS = 1 << 16
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def price_micros(value: Any) -> int:
    """Read dollars (`"0.0800"`, or a JSON number as int or Decimal) as micro-dollars. Raises `ValueError`."""
    return _price_of_text(value) if type(value) is str else _scaled(value, PRICE_PLACES)


def count_centis(value: Any) -> int:
    """Read contracts (`"-54.00"`, or a JSON number: whole until 2026-03-12) as hundredths. Raises `ValueError`."""
    return _count_of_text(value) if type(value) is str else _scaled(value, COUNT_PLACES)


def cents_micros(value: Any) -> int:
    """Read integer cents, as the wire had them until 2026-03-12, as micro-dollars. Raises `ValueError`."""
    return whole(value) * MICROS_PER_CENT


def rfc3339_ns(text: Any) -> int:
    """Read an RFC 3339 time as nanoseconds since the epoch; digits beyond nanoseconds are cut. Raises `ValueError`."""
    if type(text) is str and len(text) in _PLAIN_LENGTHS and _PLAIN.fullmatch(text):
        elapsed = datetime.datetime.fromisoformat(text) - _EPOCH
        return ((elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds) * 1_000
    match = _RFC3339.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {_quoted(text)}")
    day, time, fraction, zone = match.groups()
    moment = datetime.datetime.fromisoformat(f"{day}T{time}{'+00:00' if zone in 'Zz' else zone}")
    elapsed = moment - _EPOCH
    fraction_ns = int(fraction.ljust(9, "0")) if fraction else 0
    return (elapsed.days * 86_400 + elapsed.seconds) * _NS_PER_S + fraction_ns


def sort_as_text(times: Sequence[str]) -> bool:
    """Tell whether all are of the form `2026-10-26T12:00:00.123456Z`, in which earlier times are lesser texts."""
    return {*map(len, times)} == {_MICROSECONDS_LENGTH} and {*map(itemgetter(-1), times)} == {"Z"}


def whole(value: Any) -> int:
    """Read an integer, be it a JSON number or a string. Raises `ValueError`."""
    return value if type(value) is int else _scaled(value, 0)


def seconds_ns(value: Any) -> int:
    """Read whole seconds since the epoch as nanoseconds. Raises `ValueError`."""
    return whole(value) * _NS_PER_S


def milliseconds_ns(value: Any) -> int:
    """Read whole milliseconds since the epoch as nanoseconds. Raises `ValueError`."""
    return whole(value) * 1_000_000


def _scaled(value: Any, places: int) -> int:
    if type(value) is int:
        scaled: int = value * 10**places
        return scaled
    if isinstance(value, Decimal):
        if not value.is_finite() or abs(value.adjusted()) > _MAX_CHARS:
            raise ValueError(f"not a number of a sensible size: {_quoted(value)}")
        value = f"{value:f}"
    if not isinstance(value, str) or len(value) > _MAX_CHARS or not value.isascii():
        raise ValueError(f"not a decimal number: {_quoted(value)}")
    unsigned = value[1:] if value[:1] in ("-", "+") else value
    units, point, fraction = unsigned.partition(".")
    if not (units + fraction).isdigit() or (point and not fraction):
        raise ValueError(f"not a decimal number: {_quoted(value)}")
    if len(fraction) > places:
        if fraction[places:].strip("0"):
            raise ValueError(f"more than {places} decimal places: {_quoted(value)}")
        fraction = fraction[:places]
    number = int(units + fraction + "0" * (places - len(fraction)) or "0")
    return -number if value[0] == "-" else number


@functools.lru_cache(_CACHED_NUMBERS)
def _price_of_text(text: str) -> int:
    return _scaled(text, PRICE_PLACES)


@functools.lru_cache(_CACHED_NUMBERS)
def _count_of_text(text: str) -> int:
    return _scaled(text, COUNT_PLACES)


def _quoted(value: Any) -> str:
    return repr(value)[:_MAX_CHARS]
