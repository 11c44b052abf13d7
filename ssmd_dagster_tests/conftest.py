"""Servers that tests share: one of each per session, and an environment's name of its own for each test."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from ssmd_dagster_tests import servers
from ssmd_dagster_tests.house import House

settings.register_profile("ordinary", derandomize=True)
settings.load_profile("ordinary")  # the same examples every time; `make test-long` looks for new ones

_numbers = itertools.count()


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.NatsServer]:
    """A running NATS server that no test kills."""
    with servers.nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.ValkeyServer]:
    """A running Valkey server that no test kills or flushes."""
    with servers.valkey_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """A running S3 server that no test kills."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def env_name() -> str:
    """An environment's name that no other test of this process uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A home with running servers; tests add environments of their own to it."""
    built = House.build(tmp_path_factory.mktemp("house"))
    try:
        yield built
    finally:
        built.down()


@pytest.fixture(autouse=True)
def quiet_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no simulated exchange running behind a test: each takes a share of a core."""
    yield
    if "house" in request.fixturenames:
        request.getfixturevalue("house").quiet()


@pytest.fixture
def simulated(house: House, env_name: str) -> str:
    """The name of an environment of its own, with its own simulated exchange up."""
    house.add(env_name, simulator={"seed": 7, "markets": 40, "rate_per_second": 400})
    house.up(env_name)
    return env_name


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """Have children heed SIGINT and SIGHUP although the tests themselves may run in the background or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
