"""How one table differs from another of the same schema: rows added, removed and changed. Not for what follows from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_ROWS = 20_000_000
"""Of larger tables only the numbers of rows are compared: hashes of all rows are held in memory, 16 bytes each."""
KEYS = {
    "trade": ("trade_id",),
    "coverage": ("channel", "market", "from_ns"),
    "security_master": ("ticker",),
    "late": ("table", "conn", "n", "row"),
}
"""What names a row; elsewhere it is the raw record that it comes from."""
_RECORD = ("conn", "n", "msg", "source", "ticker")

_Hashes = npt.NDArray[np.uint64]


class TableDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that only the new table has, that only the old one had, and that have the same key but say something else."""

    added: int
    removed: int
    changed: int


def compare_tables(table: str, old: Path, new: Path) -> TableDifference:
    """Compare two Parquet files of one table, row by row whatever their order."""
    rows = [pq.ParquetFile(path).metadata.num_rows for path in (old, new)]
    if max(rows) > MAX_ROWS:
        return TableDifference(added=max(rows[1] - rows[0], 0), removed=max(rows[0] - rows[1], 0), changed=0)
    keys, contents = zip(*(_hashes(table, path) for path in (old, new)), strict=True)
    before, after = (_only(contents[i], contents[1 - i]) for i in (0, 1))
    changed = int(np.isin(keys[1][after], keys[0][before]).sum())
    return TableDifference(added=int(after.sum()) - changed, removed=int(before.sum()) - changed, changed=changed)


def _only(these: _Hashes, others: _Hashes) -> npt.NDArray[np.bool_]:
    only: npt.NDArray[np.bool_] = ~np.isin(these, others)
    return only


def _hashes(table: str, path: Path) -> tuple[_Hashes, _Hashes]:
    keys: list[_Hashes] = [np.zeros(0, np.uint64)]
    contents: list[_Hashes] = [np.zeros(0, np.uint64)]
    with pq.ParquetFile(path) as file:
        wanted = KEYS.get(table, tuple(name for name in _RECORD if name in file.schema_arrow.names))
        for batch in file.iter_batches(1 << 17):
            columns = {field.name: _mixed(batch.column(i), field.name) for i, field in enumerate(batch.schema)}
            keys.append(np.sum([columns[name] for name in wanted], axis=0, dtype=np.uint64))
            contents.append(np.sum(list(columns.values()), axis=0, dtype=np.uint64))
    return np.concatenate(keys), np.concatenate(contents)


def _mixed(column: pa.Array, name: str) -> _Hashes:
    """Hash values so that the sum over a row's columns tells rows apart."""
    if pa.types.is_string(column.type):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        texts = column.dictionary.to_pylist()
        of_text = np.array([_text_hash(text) for text in texts] + [0], np.uint64)
        values = of_text[column.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)]
    else:
        integers = pc.fill_null(column.cast(pa.int64()), -(2**62)).to_numpy(zero_copy_only=False)
        values = integers.view(np.uint64)
    seed = _text_hash(name)
    with np.errstate(over="ignore"):  # splitmix64
        mixed = (values ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed: _Hashes = mixed ^ (mixed >> np.uint64(31))
    return hashed


def _text_hash(text: str | None) -> int:
    return int.from_bytes(hashlib.blake2b((text or "").encode(), digest_size=8).digest(), "little")
