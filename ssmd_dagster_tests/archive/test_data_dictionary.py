"""The data dictionary is what the schemas say."""

from __future__ import annotations

import importlib.util

from ssmd_dagster.archive.tables import SCHEMAS
from ssmd_dagster.environments.home import project_dir


def test_the_data_dictionary_is_up_to_date() -> None:
    """docs/data-dictionary.md is what `python scripts/data_dictionary.py` writes, with every column of every table."""
    path = project_dir() / "scripts" / "data_dictionary.py"
    spec = importlib.util.spec_from_file_location("data_dictionary", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = (project_dir() / "docs" / "data-dictionary.md").read_text(encoding="utf-8")
    assert document == module.document()
    for name, schema in SCHEMAS.items():
        assert f"## {name}\n" in document
        for field in schema:
            assert f"| `{field.name}` |" in document
            assert field.metadata[b"description"], (name, field.name)
