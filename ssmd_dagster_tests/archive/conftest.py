"""Fixtures of the archive's tests."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def zstd_tool() -> str:
    """Return the path of the `zstd` command."""
    path = shutil.which("zstd")
    if path is None:
        pytest.skip("the zstd command is not installed")
    return path
