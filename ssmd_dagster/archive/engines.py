"""A selection of rows as Arrow, Polars, pandas or DuckDB have it, lazily where they can.

Not here: what is selected (`reader`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs

from ssmd_dagster.archive.selection import Selection
from ssmd_dagster.archive.tables import SCHEMAS
from ssmd_dagster.archive.units import DIGITS, places_of, with_decimals
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import ConfigurationError

Engine = Literal["arrow", "polars", "pandas", "duckdb"]


def library_of(engine: Engine) -> Any:
    """Import the package of an engine. Raises `ConfigurationError` where it is not installed."""
    name = "pyarrow" if engine == "arrow" else engine
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"the engine {name} needs the package {name}, which is not installed",
            do=f"Run: pip install {name} (or, from the project's folder, pip install -e '.[research]')"
            if (project_dir() / "pyproject.toml").exists()
            else f"Run: pip install {name} (or ssmd-dagster[research])",
        ) from error


def _to_arrow(_package: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> pa.Table:
    rows = selection.read(columns)
    return with_decimals(rows) if decimals else rows


def _to_pandas(pandas: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    rows = _to_arrow(None, selection, columns, decimals)
    return rows.to_pandas(types_mapper=pandas.ArrowDtype)


def _to_polars(polars: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    dataset, column = selection.dataset(), polars.col
    if not selection.files:
        frame = polars.from_arrow(dataset.schema.empty_table()).lazy()
    elif _is_local(selection):
        frame = polars.scan_parquet(selection.paths, missing_columns="insert", extra_columns="ignore")
    else:
        frame = polars.scan_pyarrow_dataset(dataset)
    if selection.tickers is not None:
        frame = frame.filter(
            polars.any_horizontal(polars.lit(False), *(column("ticker") == t for t in selection.tickers))
        )
    if selection.from_ns is not None:
        frame = frame.filter(column("event_ns") >= selection.from_ns)
    if selection.to_ns is not None:
        frame = frame.filter(column("event_ns") < selection.to_ns)
    frame = frame.select(columns if columns is not None else SCHEMAS[selection.table].names)
    if decimals:
        frame = frame.with_columns(
            (column(name).cast(polars.Decimal(DIGITS, 0)) * _smallest(places)).cast(polars.Decimal(DIGITS, places))
            for name, places in _scaled_columns(selection.table, columns)
        )
    return frame


def _to_duckdb(duckdb: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    dataset = selection.dataset()
    if selection.files and _is_local(selection):
        relation = duckdb.read_parquet(selection.paths, union_by_name=True)
    else:
        relation = duckdb.from_arrow(dataset)
    terms = []
    if selection.tickers is not None:
        quoted = ["'" + ticker.replace("'", "''") + "'" for ticker in selection.tickers]
        terms.append(f"ticker IN ({', '.join(quoted)})" if quoted else "false")
    if selection.from_ns is not None:
        terms.append(f"event_ns >= {selection.from_ns}")
    if selection.to_ns is not None:
        terms.append(f"event_ns < {selection.to_ns}")
    if terms:
        relation = relation.filter(" AND ".join(terms))
    shown = {name: f'"{name}"' for name in (columns if columns is not None else SCHEMAS[selection.table].names)}
    for name, places in _scaled_columns(selection.table, columns) if decimals else ():
        kind = f"DECIMAL({DIGITS}, {places})"
        shown[name] = f'CAST(CAST("{name}" AS DECIMAL({DIGITS}, 0)) * {_smallest(places):f} AS {kind}) AS "{name}"'
    return relation.project(", ".join(shown.values()))


def _smallest(places: int) -> Decimal:
    return Decimal(1).scaleb(-places)


def _is_local(selection: Selection) -> bool:
    return isinstance(selection.recorded.filesystem, fs.LocalFileSystem)


def _scaled_columns(table: str, columns: Sequence[str] | None) -> list[tuple[str, int]]:
    return [
        (field.name, places)
        for field in SCHEMAS[table]
        if (places := places_of(field)) is not None and (columns is None or field.name in columns)
    ]


ENGINES: dict[str, Callable[[Any, Selection, Sequence[str] | None, bool], Any]] = {
    "arrow": _to_arrow,
    "polars": _to_polars,
    "pandas": _to_pandas,
    "duckdb": _to_duckdb,
}
