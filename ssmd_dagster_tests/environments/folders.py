"""Folders of configuration for tests: the shipped one, copied and changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ssmd_dagster.environments.home import project_dir


def copied(tmp_path: Path) -> Path:
    """Return a copy of the shipped folder that a test may spoil."""
    target = tmp_path / "exchanges"
    shutil.copytree(project_dir() / "exchanges", target)
    return target


def changed(path: Path, changes: Mapping[str, Any]) -> None:
    """Set (or, with None, remove) dotted keys of a YAML file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner[int(parent)] if isinstance(inner, list) else inner.setdefault(parent, {})
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    path.write_text(yaml.dump(content, Dumper=_NoAliases, sort_keys=False), encoding="utf-8")


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
