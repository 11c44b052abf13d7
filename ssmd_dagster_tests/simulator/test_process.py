"""The simulator as a process: its command line, its end, its restart, and recordings."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from ssmd_dagster.simulator.main import WS_PATH, command, sim_command
from ssmd_dagster.simulator.truth import Frame, Note, read_truth
from ssmd_dagster_tests.simulator.conftest import DEADLINE_S, running, sign
from ssmd_dagster_tests.simulator.schemas import DATA


@contextmanager
def process(home: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """Run the command that a supervisor runs; yield the process and what it says when it is ready."""
    line = command(home=home, ws_port=0, rest_port=0, seed=3, markets=30, rate=500, pauses=False)
    running_process = subprocess.Popen([*line, "--key-type", "ed25519", *more], stdout=subprocess.PIPE)
    try:
        assert running_process.stdout is not None
        yield running_process, json.loads(running_process.stdout.readline())
    finally:
        running_process.kill()
        running_process.wait(DEADLINE_S)
        assert running_process.stdout is not None
        running_process.stdout.close()


async def _read(ready: dict[str, Any], home: Path, frames: int) -> list[bytes]:
    headers = sign(home, "GET", WS_PATH)
    received: list[bytes] = []
    async with aiohttp.ClientSession() as http, http.ws_connect(ready["endpoint"], headers=headers) as socket:
        await socket.send_json({"id": 1, "cmd": "subscribe", "params": {"channels": ["trade", "ticker"]}})
        while len(received) < frames:
            received.append((await socket.receive_str(timeout=DEADLINE_S)).encode())
    return received


async def _trades(ready: dict[str, Any]) -> list[str]:
    async with aiohttp.ClientSession() as http, http.get(f"{ready['rest_endpoint']}/markets/trades?limit=1000") as page:
        return [row["trade_id"] for row in (await page.json())["trades"]]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_an_end_loses_no_truth_and_a_restart_goes_on(tmp_path: Path, ending: signal.Signals) -> None:
    """Cleanly stopped or killed, the log and the trades hold everything that was sent; the next start repeats nothing."""
    received = []
    with process(tmp_path) as (simulator, ready):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
        received += await _read(ready, tmp_path, 150)
        simulator.send_signal(ending)
        code = await asyncio.to_thread(simulator.wait, DEADLINE_S)
        assert code == (0 if ending is signal.SIGTERM else -signal.SIGKILL)
    traded = [json.loads(raw)["msg"]["trade_id"] for raw in received if b'"type":"trade","sid"' in raw]
    with process(tmp_path) as (_, ready):
        listed = await _trades(ready)
        assert set(traded) <= set(listed)
        received += await _read(ready, tmp_path, 50)
    entries = list(read_truth(tmp_path / "truth"))
    logged = {entry.sha256 for entry in entries if isinstance(entry, Frame)}
    assert all(hashlib.sha256(raw).digest() in logged for raw in received)
    opened = [entry.data["connection"] for entry in entries if isinstance(entry, Note) and entry.note == "opened"]
    assert len(set(opened)) == len(opened) == 2
    ids = [json.loads(raw)["msg"]["trade_id"] for raw in received if b'"type":"trade","sid"' in raw]
    assert len(set(ids)) == len(ids)
    assert any(isinstance(entry, Note) and entry.note == "stopped" for entry in entries) == (ending is signal.SIGTERM)


def test_the_supervisors_command_line_is_understood(tmp_path: Path) -> None:
    """Every option that `command` writes is one of the program's."""
    line = command(
        home=tmp_path, ws_port=1, rest_port=2, seed=3, markets=4, rate=5.5, host="::1", series=["A", "B"], auth=False,
        pauses=False,
    )  # fmt: skip
    context = sim_command.make_context("sim", line[3:])
    assert context.params["series"] == ("A", "B")
    assert context.params["auth"] is False
    assert context.params["pauses"] is False
    assert context.params["home"] == tmp_path


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    """A recording that is none and a port out of range end with a message and a code, not with a trace."""
    broken = tmp_path / "broken.frames.jsonl"
    broken.write_text("no json\n")
    home = str(tmp_path / "home")
    result = CliRunner().invoke(sim_command, ["--home", home, "--play", str(broken)])
    assert result.exit_code == 8
    assert "line 1" in result.output
    assert CliRunner().invoke(sim_command, ["--home", home, "--ws-port", "70000"]).exit_code == 2


async def test_a_taken_port_is_an_error(tmp_path: Path) -> None:
    """The second simulator on a port says so and ends with code 1."""
    with process(tmp_path / "one") as (_, ready):
        port = ready["rest_endpoint"].split(":")[2].split("/")[0]
        line = command(home=tmp_path / "two", ws_port=0, rest_port=int(port), seed=1, markets=1, rate=1)
        second = await asyncio.to_thread(subprocess.run, line, capture_output=True, timeout=DEADLINE_S, check=False)
    assert second.returncode == 1
    assert b"error:" in second.stderr
    assert b"Traceback" not in second.stderr


async def test_a_recording_is_played_byte_for_byte(tmp_path: Path) -> None:
    """Every frame comes as it was recorded, after the acknowledgements; REST lists its markets; the log has the hashes."""
    raws = [
        '{"type":"trade","sid":2,"seq":1,"msg":{"market_ticker":"KXA-26-B1.5"}}\n',
        "not json at all",
        '{"a":"\\u00e9é"}',
    ]
    path = tmp_path / "x.frames.jsonl"
    path.write_text(
        "".join(json.dumps({"recv_ns": 10**9 + n * 1_000_000, "raw": raw}) + "\n" for n, raw in enumerate(raws))
    )
    async with running(tmp_path / "sim", play=path, play_speed=0.0) as exchange:
        client = await exchange.connect()
        await client.subscribe("trade", "orderbook_delta", market_tickers=["KXA-26-B1.5"])
        await client.wait(lambda: len(client.raw) == 2 + len(raws))
        page = await exchange.get("/markets", status="open")
        assert [market["ticker"] for market in page["markets"]] == ["KXA-26-B1.5"]
        assert (await exchange.get("/events/KXA-26"))["event"]["series_ticker"] == "KXA"
    played = [raw for raw in client.raw if b'"subscribed"' not in raw]
    assert played == [raw.encode() for raw in raws]
    logged = [entry.sha256 for entry in read_truth(tmp_path / "sim" / "truth") if isinstance(entry, Frame)]
    assert logged == [hashlib.sha256(raw).digest() for raw in client.raw]


@pytest.mark.parametrize("name", ["ws-kxbtc-2026-04", "ws-kxbtc15m-2026-05", "ws-sports-2026-08"])
async def test_real_captures_are_played_byte_for_byte(tmp_path: Path, name: str) -> None:
    """The public captures come off the socket as they were recorded."""
    path = DATA / f"{name}.frames.jsonl"
    if not path.exists():
        pytest.skip("the captures are not beside this checkout")
    async with running(tmp_path, play=path, play_speed=0.0) as exchange:
        client = await exchange.connect()
        wanted = [json.loads(line)["raw"].encode() for line in path.read_text().splitlines()]
        await client.send("subscribe", channels=["orderbook_delta"], market_ticker="ANY")
        await client.wait(lambda: len(client.raw) == 1 + len(wanted))
        assert client.raw[1:] == wanted
