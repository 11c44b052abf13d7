"""Files of tables: row groups that can be skipped, and Cap'n Proto that the published schema alone can read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import capnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ssmd_dagster.archive.difference import TableDifference, compare_tables
from ssmd_dagster.archive.sheets import ROW_GROUP_ROWS, TableWriter
from ssmd_dagster.archive.tables import COVERAGE, TRADE, table_from_rows
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster_tests.archive.rawdays import NS_NOON, S, normalized, record, rest_page, trade, trade_msg

SCHEMA = project_dir() / "exchanges" / "schemas" / "trade.capnp"


def test_capnp_files_are_read_back_by_the_published_schema_alone(tmp_path: Path) -> None:
    """Every trade of a market, as the table has it, and nothing else."""
    frames = [(NS_NOON + n, trade("B.1/x" if n % 3 else "A", n, NS_NOON + n * S)) for n in range(1, 30)]
    pages = [(NS_NOON + 100, rest_page([trade_msg("A", 90, NS_NOON)]))]
    segments = record(tmp_path / "raw", {"1-a-0": frames, "1-rest-0": pages})
    day = normalized(tmp_path / "out", segments, capnp_schema=str(SCHEMA))
    parser = capnp.SchemaParser()
    published = parser.load(str(SCHEMA)).Trade
    files = {file.ticker: file for file in day.result.files if file.ticker is not None}
    assert set(files) == {"A", "B.1/x"}
    for ticker, file in files.items():
        data = zstandard.ZstdDecompressor().decompressobj().decompress(Path(file.path).read_bytes())
        read = [message.to_dict() for message in published.read_multiple_bytes(data)]
        rows = [row for row in day.rows("trade") if row["ticker"] == ticker]
        assert len(read) == len(rows) == file.rows
        for message, row in zip(read, rows, strict=True):
            assert message == {
                "tradeId": row["trade_id"], "ticker": ticker, "yesPrice": row["yes_price"], "noPrice": row["no_price"],
                "count": row["count"], "takerSide": row["taker_side"], "eventNs": row["event_ns"],
                "recvNs": row["recv_ns"], "isBlockTrade": row["is_block_trade"], "source": row["source"],
                "conn": row["conn"], "n": row["n"],
            }  # fmt: skip


def test_the_capnp_tool_reads_the_files(tmp_path: Path) -> None:
    """The command that comes with Cap'n Proto decodes them."""
    tool = shutil.which("capnp")
    if tool is None:
        pytest.skip("the capnp command is not installed")
    segments = record(tmp_path / "raw", {"1-a-0": [(NS_NOON, trade("A", 1, NS_NOON))]})
    day = normalized(tmp_path / "out", segments, capnp_schema=str(SCHEMA))
    file = next(file for file in day.result.files if file.ticker == "A")
    data = zstandard.ZstdDecompressor().decompressobj().decompress(Path(file.path).read_bytes())
    done = subprocess.run([tool, "decode", str(SCHEMA), "Trade"], input=data, capture_output=True, check=True)
    assert b"yesPrice = 350000" in done.stdout


def test_a_schema_that_lacks_a_field_is_a_configuration_error(tmp_path: Path) -> None:
    """Nothing is written by a schema that cannot hold it."""
    schema = tmp_path / "trade.capnp"
    schema.write_text("@0xc7a1f05d93be4862;\nstruct Trade {\n  tradeId @0 :Text;\n}\n")
    segments = record(tmp_path / "raw", {"1-a-0": [(NS_NOON, trade("A", 1, NS_NOON))]})
    with pytest.raises(ConfigurationError, match="the schema lacks"):
        normalized(tmp_path / "out", segments, capnp_schema=str(schema))


def test_row_groups_are_of_one_size_however_rows_come(tmp_path: Path) -> None:
    """A reader of one market reads one row group; the bytes do not depend on how the rows came."""
    row = {
        "ticker": "T", "event_ns": 1, "recv_ns": 1, "conn": "1-a-0", "n": 1, "source": "live", "trade_id": "x",
        "yes_price": 1, "no_price": 1, "count": 1,
    }  # fmt: skip
    one = table_from_rows("trade", [row])
    many = pa.concat_tables([one] * (ROW_GROUP_ROWS + 5)).unify_dictionaries().combine_chunks()
    hashes = set()
    for parts in ([many], [many.slice(0, 70_000), many.slice(70_000, 1), many.slice(70_001)]):
        with TableWriter(tmp_path / "t.parquet", TRADE) as writer:
            for part in parts:
                writer.write(part)
        hashes.add(writer.sha256)
    metadata = pq.ParquetFile(tmp_path / "t.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP_ROWS, 5]
    assert len(hashes) == 1


def test_differences_are_counted_by_key(tmp_path: Path) -> None:
    """A row with the same key and other values is changed; others are added or removed."""
    rows = [
        {"channel": "trade", "market": None, "from_ns": n, "to_ns": n + 1, "state": "present"} for n in range(5)
    ]  # fmt: skip
    for name, content in (("old", rows[:4]), ("new", [rows[0] | {"state": "missing"}, *rows[2:]])):
        with TableWriter(tmp_path / name, COVERAGE) as writer:
            writer.write(table_from_rows("coverage", content))
    found = compare_tables("coverage", tmp_path / "old", tmp_path / "new")
    assert found == TableDifference(added=1, removed=1, changed=1)
