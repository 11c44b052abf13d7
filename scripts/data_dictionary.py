"""Write `docs/data-dictionary.md` from the tables' schemas. Run it after changing `ssmd_dagster/archive/tables.py`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ssmd_dagster.archive.tables import COMMON, SCHEMA_VERSION, SCHEMAS

INTRODUCTION = f"""# Data dictionary

Every table of a recorded day, as `ssmd_dagster.load` gives it and as the Parquet files hold it (schema version {SCHEMA_VERSION}).
Made from the schemas by `python scripts/data_dictionary.py`; the same descriptions and units are in each file's own metadata.

Times are nanoseconds since the Unix epoch, UTC. Prices are micro-dollars (`450000` is $0.45) and counts hundredths of a contract
(`1200` is 12 contracts): integers, never floats, so nothing is rounded. `load(…, decimals=True)` gives both as exact decimals in
dollars and contracts; `dollars` and `contracts` convert a single column. A table is sorted by ticker and event time. "may be
null" means that the exchange did not say it, or did not in those years.

A row belongs to the day whose window holds its `event_ns`. Source *exchange* is what the exchange sent, *recorder* what was noted
on receipt, *normaliser* what was worked out afterwards.
"""

ABOUT = {
    "trade": "One row for each trade, by trade id, whether it came off the socket or was fetched over REST.",
    "ticker": "The exchange's summary of a market whenever it changed.",
    "orderbook": "Changes of order books, one row for each level; `book_at`, `top_of_book` and `depth_of_book` fold them.",
    "lifecycle": "What happens to markets and events: created, activated, determined, settled.",
    "coverage": "What was recorded when. The rows of a channel without a market fill the day's window without overlap.",
    "security_master": "Markets known on the day.",
    "late": "Rows that arrived after the day was sealed; the next revision holds them in their own tables.",
}


def document() -> str:
    """Return the document."""
    common = [field.name for field in COMMON]
    parts = [INTRODUCTION]
    parts.append("## Common columns\n\nThe first columns of `trade`, `ticker`, `orderbook`, `lifecycle` and `late`.\n")
    parts.append(_columns(COMMON))
    for name, schema in SCHEMAS.items():
        own = [field for field in schema if schema.names[: len(common)] != common or field.name not in common]
        parts.append(f"## {name}\n\n{ABOUT[name]}\n")
        parts.append(_columns(own))
    return "\n".join(parts)


def _columns(fields: list[pa.Field] | tuple[pa.Field, ...]) -> str:
    lines = ["| column | type | unit | source | what |", "|---|---|---|---|---|"]
    for field in fields:
        stated = {key.decode(): value.decode() for key, value in field.metadata.items()}
        kind = str(field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        kind += ", may be null" if field.nullable else ""
        cells = (
            f"`{field.name}`",
            kind,
            stated["unit"] or "–",
            stated["source"],
            stated["description"].replace("|", "\\|"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[1] / "docs" / "data-dictionary.md"
    path.write_text(document(), encoding="utf-8")
