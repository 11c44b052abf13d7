"""Trading-day management for exchange market data: start, record, prove and roll each day.

What researchers need is here (`load`, `coverage`, `book_at`, …) and is imported when it is first used: importing the package
itself brings in neither Dagster nor NATS nor Redis, and neither does reading a day.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmd_dagster.archive.books import Book, BookUnknownError, book_at, depth_of_book, top_of_book
    from ssmd_dagster.archive.reader import GapError, GapWarning, NoRowsWarning, coverage, load
    from ssmd_dagster.archive.recorded import BrokenFileError, DayNotFoundError, DayNotReadyError
    from ssmd_dagster.archive.selection import FutureVersionError
    from ssmd_dagster.archive.units import contracts, dollars

__version__ = "0.1.0"

__all__ = [
    "Book",
    "BookUnknownError",
    "BrokenFileError",
    "DayNotFoundError",
    "DayNotReadyError",
    "FutureVersionError",
    "GapError",
    "GapWarning",
    "NoRowsWarning",
    "book_at",
    "contracts",
    "coverage",
    "depth_of_book",
    "dollars",
    "load",
    "top_of_book",
]

_ROOM_OF = {
    **dict.fromkeys(
        ("Book", "BookUnknownError", "book_at", "depth_of_book", "top_of_book"), "ssmd_dagster.archive.books"
    ),
    **dict.fromkeys(("GapError", "GapWarning", "NoRowsWarning", "coverage", "load"), "ssmd_dagster.archive.reader"),
    "FutureVersionError": "ssmd_dagster.archive.selection",
    **dict.fromkeys(("contracts", "dollars"), "ssmd_dagster.archive.units"),
    **dict.fromkeys(("BrokenFileError", "DayNotFoundError", "DayNotReadyError"), "ssmd_dagster.archive.recorded"),
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
