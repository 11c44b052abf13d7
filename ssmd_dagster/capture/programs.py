"""Which programs the supervisor runs for a day and for an environment. Names only; starting them is the verbs' business."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import Any

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.supervisor import Program
from ssmd_dagster.day.payloads import Mode
from ssmd_dagster.environments.home import exchanges_dir
from ssmd_dagster.environments.models import Environment

ARCHIVER = "archiver"
REPLAYER = "replayer"
PLAYER = "player"
LIVE = "live"
"""Stands for the date in the heartbeat of what outlives days: the gateway."""
_CONNECTOR = "connector-"
_SHARE = 0.9
"""How full the shards are when all markets are there: a hash spreads them evenly, but not exactly."""


def day_group(env: str, date: str) -> str:
    """Return the supervisor's group of one trading day."""
    return f"{env}-{date}"


def play_group(env: str, date: str) -> str:
    """Return the supervisor's group of a day that is played to clients."""
    return f"{env}-{played(date)}"


def played(date: str) -> str:
    """Return what stands for the date where a played day must not be taken for the recorded one: in heartbeats."""
    return f"play-{date}"


def shard_count(env: Environment) -> int:
    """Return over how many sockets the markets are spread: by configuration alone, so that whoever asks gets one answer.

    One where all of `capture.markets.max` fit into the feed's `max_symbols_per_connection`; else enough of them that none
    is full when the markets are spread a little unevenly.
    """
    most, per_connection = env.capture.markets.max, _per_connection(env)
    return 1 if most <= per_connection else math.ceil(most / (_SHARE * per_connection))


def markets_per_shard(env: Environment) -> int:
    """Return how many markets one shard takes up at most."""
    return min(env.capture.markets.max, _per_connection(env))


def _per_connection(env: Environment) -> int:
    return env.feed_version(Date.max).max_symbols_per_connection


def shard_number(shard: str) -> int:
    """Return which share of the markets a shard records: 1 for `a` and `b`, 2 for `a2` and `b2`."""
    return int(shard[1:] or 1)


def connector_names(env: Environment) -> tuple[str, ...]:
    """Return the components that record: one per shard, and as many again with `connections: 2`."""
    return tuple(
        f"{_CONNECTOR}{replica}{number if number > 1 else ''}"
        for replica in "ab"[: env.capture.connections]
        for number in range(1, shard_count(env) + 1)
    )


def is_connector(program: str) -> bool:
    """Tell whether a program of a day's group is one of its connectors, of which the environment may have had more before."""
    return program.startswith(_CONNECTOR)


def markets_subscribed(env: Environment, beats: Mapping[str, Mapping[str, Any]]) -> int:
    """Return over how many markets the connectors' heartbeats say that they record; what two record counts once."""
    of_replica: dict[str, int] = {}
    for name in connector_names(env):
        replica = name.removeprefix(_CONNECTOR)[0]
        of_replica[replica] = of_replica.get(replica, 0) + int(beats.get(name, {}).get("markets", 0))
    return max(of_replica.values(), default=0)


def day_components(env: Environment, mode: Mode = "live") -> tuple[str, ...]:
    """Return every component that a running day must hear from; a replay's fetcher ends before the day is ACTIVE."""
    return (*connector_names(env), ARCHIVER) if mode == "live" else (ARCHIVER,)


def day_programs(setting: Setting, date: str) -> list[Program]:
    """Return the programs of one trading day: its connectors and its archiver."""
    name = setting.env.name
    connectors = [
        _python(component, "connector", name, date, component.removeprefix(_CONNECTOR))
        for component in connector_names(setting.env)
    ]
    return [*connectors, _python(ARCHIVER, "archiver", name, date)]


def replay_programs(setting: Setting, date: str, share: int = 1) -> list[Program]:
    """Return the programs of a day that is replayed, of `share` at once: who fetches it, and its archiver."""
    name = setting.env.name
    replayer = _python(REPLAYER, REPLAYER, name, date, str(share))
    return [replayer, _python(ARCHIVER, "archiver", name, date)]


def audit_program(setting: Setting, date: str) -> Program:
    """Return the program that audits a day's spool once."""
    return _python("audit", "audit", setting.env.name, date)


def gateway_program(setting: Setting) -> Program:
    """Return the program of an environment's gateway."""
    return _python("gateway", "gateway", setting.env.name)


def player_program(setting: Setting, date: str, speed: float) -> Program:
    """Return the program that plays a recorded day to clients."""
    return _python(PLAYER, PLAYER, setting.env.name, date, f"{speed:g}")


def _python(name: str, module: str, *arguments: str) -> Program:
    return Program(
        name=name,
        command=(sys.executable, "-m", f"ssmd_dagster.capture.{module}", *arguments),
        # Always said, so that the program is the same whoever asks for it: another one would replace it.
        # Blocks that one thread allocates and another frees stay in glibc's arenas: few arenas, little memory.
        environment={"SSMD_EXCHANGES": str(exchanges_dir()), "MALLOC_ARENA_MAX": "2"},
    )
