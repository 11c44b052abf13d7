"""The simulator's process: `python -m ssmd_dagster.simulator`, `ssmd sim`, and the command line a supervisor runs."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import date
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop
from aiohttp import web
from picows import WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener, ws_create_server

from ssmd_dagster.errors import SsmdError
from ssmd_dagster.simulator.catalog import SECOND_NS
from ssmd_dagster.simulator.engine import Engine
from ssmd_dagster.simulator.faults import ALL_KINDS
from ssmd_dagster.simulator.frames import compact
from ssmd_dagster.simulator.history import History
from ssmd_dagster.simulator.keys import KeyRing, RefusedSignatureError, write_file
from ssmd_dagster.simulator.playback import Recording
from ssmd_dagster.simulator.rest import Rest
from ssmd_dagster.simulator.session import Connection, Limits
from ssmd_dagster.simulator.shift import SimulatorClock
from ssmd_dagster.simulator.tradebook import TradeBook
from ssmd_dagster.simulator.truth import TruthLog
from ssmd_dagster.simulator.world import World

WS_PATH = "/trade-api/ws/v2"
_CONNECTIONS_A_BOOT = 1 << 16
_MAX_COMMAND_BYTES = 64 << 20
_STOP_S = 2.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How one simulated exchange runs. Ports of 0 are chosen by the system; `rate` 0 is full speed.

    Its past begins on `history_from` and has about `trades_per_day`; the live lists hold `cutoff_days`; `reads_per_second`
    is how many REST requests an account may make, 0 for no limit.
    """

    home: Path
    ws_port: int = 0
    rest_port: int = 0
    host: str = "127.0.0.1"
    seed: int = 1
    markets: int = 200
    rate: float = 200.0
    series: tuple[str, ...] = ()
    auth: bool = True
    key_type: str = "rsa"
    pauses: bool = True
    play: Path | None = None
    play_speed: float = 1.0
    fault_seed: int = 1
    faults_per_minute: float = 0.0
    faults: tuple[str, ...] = ()
    limits: Limits = Limits()
    history_from: date = date(2025, 6, 1)
    trades_per_day: int = 20_000
    cutoff_days: float = 60.0
    reads_per_second: float = 0.0


class Simulator:
    """One running exchange: `await start()`, then `await stop()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        home = settings.home
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        self.boot = _count_boot(home / "boot.json")
        self.clock = SimulatorClock(home / "clock.json")
        self.keys = KeyRing(home, self.clock, kind=settings.key_type) if settings.auth else None
        now_ns = self.clock()
        self.trades = TradeBook(home / "trades")
        recording = Recording(settings.play, settings.play_speed) if settings.play else None
        played = tuple(recording.tickers) if recording else ()
        self.world = World(settings.seed, settings.markets, self.boot, now_ns, series=settings.series, played=played)
        self.history = History(
            home,
            self.world,
            now_ns // SECOND_NS,
            trades_per_day=0 if played else settings.trades_per_day,
            first=settings.history_from,
            pauses=settings.pauses,
        )
        self.truth = TruthLog(home / "truth", now_ns, self.world.names)
        self.engine = Engine(
            self.world,
            self.trades,
            self.truth,
            self.clock,
            rate=settings.rate,
            limits=settings.limits,
            seed=settings.seed,
            pauses=settings.pauses,
            recording=recording,
        )
        self.ws_port = settings.ws_port
        self.rest_port = settings.rest_port
        self._connections = self.boot * _CONNECTIONS_A_BOOT
        self._breaking: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._server: Any = None
        self.running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and let time begin."""
        settings = self.settings
        about: dict[str, Any] = {"seed": settings.seed, "boot": self.boot, "truth": str(settings.home / "truth")}
        self.truth.note("started", self.clock(), seed=settings.seed, boot=self.boot)
        self._server = await ws_create_server(
            self._admit, settings.host, settings.ws_port, enable_auto_pong=False, max_frame_size=_MAX_COMMAND_BYTES
        )
        self.ws_port = self._server.sockets[0].getsockname()[1]
        rest = Rest(
            self.engine,
            self.history,
            self.keys,
            about,
            cutoff_days=settings.cutoff_days,
            reads_per_second=settings.reads_per_second,
        )
        self._runner = web.AppRunner(rest.application(), access_log=None, shutdown_timeout=_STOP_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, settings.host, settings.rest_port)
        await site.start()
        self.rest_port = self._runner.addresses[0][1]
        about |= {"endpoint": self.endpoint, "rest_endpoint": self.rest_endpoint}
        self.running = asyncio.create_task(self.engine.run())
        if settings.faults_per_minute:
            kinds = settings.faults or ALL_KINDS
            plan = self.engine.faults.schedule(settings.fault_seed, settings.faults_per_minute, kinds)
            self._breaking = asyncio.create_task(plan)

    @property
    def endpoint(self) -> str:
        """The WebSocket's URL."""
        return f"ws://{self.settings.host}:{self.ws_port}{WS_PATH}"

    @property
    def rest_endpoint(self) -> str:
        """The base URL of REST."""
        return f"http://{self.settings.host}:{self.rest_port}/trade-api/v2"

    def _admit(self, request: WSUpgradeRequest) -> Connection | WSUpgradeResponseWithListener | None:
        path = request.path.decode("latin-1").split("?", 1)[0]
        if path != WS_PATH:
            return None
        fault = self.engine.faults.over_http(("refuse_handshake",), "")
        maintained = self.engine.maintenance.at(self.engine.clock() // SECOND_NS) is not None
        if fault is not None or maintained:
            status = HTTPStatus(fault.order.status if fault is not None else HTTPStatus.SERVICE_UNAVAILABLE)
            response = WSUpgradeResponse.create_error_response(
                status, compact({"code": "refused", "message": status.phrase})
            )
            return WSUpgradeResponseWithListener(response, None)
        if self.keys is not None:
            try:
                self.keys.check(request.headers, "GET", path)
            except RefusedSignatureError as refused:
                body = {"code": refused.code, "message": refused.code.replace("_", " "), "details": refused.details}
                response = WSUpgradeResponse.create_error_response(
                    HTTPStatus.UNAUTHORIZED, compact(body), {"Content-Type": "application/json"}
                )
                return WSUpgradeResponseWithListener(response, None)
        self._connections += 1
        return Connection(self.engine, self._connections, request.headers.get("User-Agent", ""))

    async def stop_moving(self) -> None:
        """Stop time: no market moves any more, commands are still answered."""
        tasks = [task for task in (self.running, self._breaking) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Close every connection and file."""
        await self.stop_moving()
        if self._server is not None:
            self._server.close()
        for connection in list(self.engine.connections.values()):
            connection.close()
        deadline_s = asyncio.get_running_loop().time() + _STOP_S
        while self.engine.connections and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.01)
        for connection in list(self.engine.connections.values()):
            connection.cut()
        await asyncio.sleep(0)
        if self._runner is not None:
            await self._runner.cleanup()
        self.truth.note("stopped", self.clock())
        self.trades.close()
        self.truth.close()


def _count_boot(path: Path) -> int:
    """Count the starts of this home; exchange clocks, trade ids and connection numbers never repeat because of it."""
    try:
        boots = int(json.loads(path.read_bytes())["boots"]) + 1
    except FileNotFoundError:
        boots = 1
    write_file(path, json.dumps({"boots": boots}).encode())
    return boots


async def _serve(settings: Settings) -> None:
    gc.disable()
    simulator = Simulator(settings)
    # The markets live as long as the process: what is made here need never be looked at for garbage.
    gc.freeze()
    gc.enable()
    await simulator.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    ready = {"message_type": "ready", "endpoint": simulator.endpoint, "rest_endpoint": simulator.rest_endpoint}
    click.echo(json.dumps({**ready, "pid": os.getpid(), "home": str(settings.home)}))
    sys.stdout.flush()
    stopping = asyncio.create_task(stop.wait())
    assert simulator.running is not None
    await asyncio.wait([stopping, simulator.running], return_when=asyncio.FIRST_COMPLETED)
    crashed = simulator.running.done()
    await simulator.stop()
    if crashed:
        simulator.running.result()


def command(
    *,
    home: Path,
    ws_port: int,
    rest_port: int,
    seed: int,
    markets: int,
    rate: float,
    host: str = "127.0.0.1",
    series: Sequence[str] = (),
    auth: bool = True,
    pauses: bool = True,
    trades_per_day: int = 20_000,
    reads_per_second: float = 0.0,
) -> list[str]:
    """Return the command line that runs a simulator; a supervisor starts it as it is."""
    line = [sys.executable, "-m", "ssmd_dagster.simulator", "--home", str(home), "--host", host]
    line += ["--ws-port", str(ws_port), "--rest-port", str(rest_port)]
    line += ["--seed", str(seed), "--markets", str(markets), "--rate", str(rate)]
    line += ["--trades-per-day", str(trades_per_day), "--reads-per-second", str(reads_per_second)]
    for name in series:
        line += ["--series", name]
    if not auth:
        line.append("--no-auth")
    if not pauses:
        line.append("--no-pause")
    return line


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a date YYYY-MM-DD") from error


@click.command("sim", context_settings={"show_default": True})
@click.option(
    "--home", type=click.Path(path_type=Path), required=True, help="Folder of clock, keys, trades, truth log."
)
@click.option("--ws-port", type=click.IntRange(0, 65_535), default=0, help="WebSocket port; 0 chooses a free one.")
@click.option("--rest-port", type=click.IntRange(0, 65_535), default=0, help="REST port; 0 chooses a free one.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--seed", type=int, default=1, help="The same seed makes the same markets.")
@click.option("--markets", type=click.IntRange(1, 1_000_000), default=200, help="About how many markets are open.")
@click.option("--rate", type=click.FloatRange(0), default=200.0, help="Messages a second; 0: all that sockets take.")
@click.option("--series", multiple=True, help="List only these series (may be repeated).")
@click.option("--auth/--no-auth", default=True, help="Ask for Kalshi's signed handshake.")
@click.option(
    "--key-type", type=click.Choice(["rsa", "ed25519"]), default="rsa", help="Kind of key to make in a new home."
)
@click.option("--pause/--no-pause", "pauses", default=True, help="Thursday's trading pause, 03:00 to 05:00 Eastern.")
@click.option(
    "--play", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Play a *.frames.jsonl instead."
)
@click.option("--play-speed", type=click.FloatRange(0), default=1.0, help="Times as fast as recorded; 0 is at once.")
@click.option("--faults-per-minute", type=click.FloatRange(0), default=0.0, help="Break something this often.")
@click.option(
    "--fault", "faults", multiple=True, type=click.Choice(ALL_KINDS), help="Break only this (may be repeated)."
)
@click.option("--fault-seed", type=int, default=1, help="The same seed breaks the same things.")
@click.option("--ping-interval", type=click.FloatRange(0.05), default=10.0, help="Seconds between pings.")
@click.option("--pong-timeout", type=click.FloatRange(0.05), default=20.0, help="Seconds to wait for a pong.")
@click.option("--buffer-bytes", type=click.IntRange(1_024), default=32 << 20, help="Unread bytes before error 25.")
@click.option("--subscription-markets", type=click.IntRange(1), default=500_000, help="Markets before error 26.")
@click.option("--command-rate", type=click.IntRange(1), default=1_000, help="Commands a second before error 27.")
@click.option(
    "--answer-delay", type=click.FloatRange(0), default=0.003, help="Seconds an answer may take; 0 keeps order."
)
@click.option(
    "--history-from", metavar="DATE", default="2025-06-01", callback=lambda _c, _p, text: _date(text), help="First day."
)
@click.option(
    "--trades-per-day", type=click.IntRange(0), default=20_000, help="Trades of a day before the first start."
)
@click.option("--cutoff-days", type=click.FloatRange(0), default=60.0, help="Days that the live lists reach back.")
@click.option(
    "--reads-per-second", type=click.FloatRange(0), default=20.0, help="REST requests an account may make; 0: any."
)
def sim_command(**options: Any) -> None:
    """Run a Kalshi-protocol exchange with a log of the truth, until SIGTERM."""
    limits = Limits(
        ping_interval_s=options.pop("ping_interval"),
        pong_timeout_s=options.pop("pong_timeout"),
        buffer_bytes=options.pop("buffer_bytes"),
        markets_per_subscription=options.pop("subscription_markets"),
        commands_per_second=options.pop("command_rate"),
        answer_delay_s=options.pop("answer_delay"),
    )
    home = options.pop("home").absolute()
    try:
        uvloop.run(_serve(Settings(home=home, limits=limits, **options)))
    except SsmdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"error: {error.strerror} ({error.filename or home})", err=True)
        sys.exit(1)
