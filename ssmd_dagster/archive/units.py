"""Scaled integers of the tables as exact decimals in their whole unit: dollars, contracts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ssmd_dagster.archive.tables import CONTRACTS, DOLLARS
from ssmd_dagster.errors import SsmdError

PLACES = {DOLLARS: 6, CONTRACTS: 2}
"""Units that are scaled integers, with the decimal places that their numbers have."""
DIGITS = 18


def dollars(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return micro-dollars as exact decimals in dollars, `decimal128(18, 6)`."""
    return _scaled(values, PLACES[DOLLARS])


def contracts(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return hundredths as exact decimals in contracts, `decimal128(18, 2)`."""
    return _scaled(values, PLACES[CONTRACTS])


def with_decimals(rows: pa.Table) -> pa.Table:
    """Return the table with every scaled integer as an exact decimal in its whole unit; metadata says so."""
    for index, field in enumerate(rows.schema):
        places = places_of(field)
        if places is not None:
            metadata = {**field.metadata, b"unit": field.metadata[b"unit"].partition(b" ")[2]}
            column = _scaled(rows.column(index), places)
            rows = rows.set_column(index, pa.field(field.name, column.type, field.nullable, metadata), column)
    return rows


def places_of(field: pa.Field) -> int | None:
    """Return the decimal places of a column of scaled integers, None for any other."""
    return PLACES.get((field.metadata or {}).get(b"unit", b"").decode())


def _scaled(values: pa.Array | pa.ChunkedArray, places: int) -> pa.Array | pa.ChunkedArray:
    """Give 64-bit integers a decimal point by widening them to 128 bits: no arithmetic, so nothing is rounded."""
    kind = pa.decimal128(DIGITS, places)
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([_scaled(chunk, places) for chunk in values.chunks], kind)
    low = values.fill_null(0).to_numpy()
    if len(low) and max(int(low.max()), -int(low.min())) >= 10**DIGITS:
        raise SsmdError(f"a number of more than {DIGITS} digits", do="Use the integers")
    wide = np.stack([low, low >> 63], axis=1)
    valid = None
    if values.null_count:
        valid = pa.py_buffer(np.packbits(values.is_valid().to_numpy(zero_copy_only=False), bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(np.ascontiguousarray(wide))])
