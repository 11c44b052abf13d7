"""Runs `kalshi_sdk.py` where an environment with the SDK is named: `SSMD_SDK_PYTHON=sdk/bin/python`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ssmd_dagster.simulator.main import command

SCRIPT = Path(__file__).with_name("kalshi_sdk.py")
DEADLINE_S = 90


def test_the_public_sdk_takes_the_simulator_for_kalshi(tmp_path: Path) -> None:
    """It signs in, lists markets over pages, subscribes, adds markets and rebuilds the exchange's own books."""
    python = os.environ.get("SSMD_SDK_PYTHON")
    if not python:
        pytest.skip("SSMD_SDK_PYTHON names no Python with kalshi-sdk 22.4.0")
    line = command(home=tmp_path / "sim", ws_port=0, rest_port=0, seed=1, markets=100, rate=500, pauses=False)
    with subprocess.Popen(line, stdout=subprocess.PIPE) as exchange:
        try:
            assert exchange.stdout is not None
            ready = tmp_path / "ready.json"
            ready.write_bytes(exchange.stdout.readline())
            result = subprocess.run(
                [python, str(SCRIPT), str(ready)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
            )
        finally:
            exchange.terminate()
            exchange.wait(DEADLINE_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "books equal" in result.stdout
