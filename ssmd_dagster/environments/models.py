"""The models of `exchanges/feeds|schemas|environments/*.yaml`: strict, frozen, without unknown keys.

A model knows its own file only; what two files must agree on, and the texts of faults, are the loader's. Each key's
meaning is in its description or in the class; units are in the names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from ssmd_dagster.day.calendar import TradingCalendar, parse_time, parse_timezone
from ssmd_dagster.environments.home import objects_dir
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.exchange import MarketSelection

Channel = Literal["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"]
AuthMethod = Literal["api_key", "none"]

SIMULATOR_HOST = "simulator.invalid"
"""Stands in for a simulated exchange until the running stack's address replaces it; never resolves (RFC 2606)."""

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}\Z")
_WORD = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
_VERSION = re.compile(r"v[0-9]{1,6}\Z")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?\Z")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}\Z")


def wrong(expected: str) -> PydanticCustomError:
    """Make the error of a value that is not what was `expected`; the loader turns it into a fault."""
    return PydanticCustomError("expected", "{expected}", {"expected": expected})


def _matching(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.match(text):
            raise wrong(expected)
        return text

    return AfterValidator(check)


def _address(*schemes: str) -> AfterValidator:
    expected = f"an address {'|'.join(schemes)}://host[:port][/…] without credentials (they belong under keys)"

    def check(text: str) -> str:
        try:
            parts = urlsplit(text)
            _ = parts.port
        except ValueError as error:
            raise wrong(expected) from error
        if parts.scheme not in schemes or not parts.hostname or "@" in parts.netloc or not text.isprintable():
            raise wrong(expected)
        return text

    return AfterValidator(check)


def _local_time(text: object) -> object:
    expected = 'HH:MM in quotes, "00:00" to "23:59"'
    if not isinstance(text, str):  # without quotes YAML reads 00:10 as the number 10
        raise wrong(expected)
    try:
        parse_time(text)
    except ValueError as error:
        raise wrong(expected) from error
    return text


def _timezone(text: str) -> str:
    try:
        parse_timezone(text)
    except ValueError as error:
        raise wrong("an IANA timezone such as UTC or America/New_York") from error
    return text


def _calendar_date(day: date) -> date:
    if not date(2000, 1, 1) <= day <= date(2199, 12, 31):
        raise wrong("a date YYYY-MM-DD from 2000-01-01 to 2199-12-31")
    return day


def _ticker(text: str) -> str:
    if not text or len(text) > 200 or not text.isprintable() or text != text.strip():
        raise wrong("a ticker of 1 to 200 printable characters")
    return text


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values or len(set(values)) != len(values):
        raise wrong("a list with at least one entry and none twice")
    return values


def _differing(*keys: str) -> AfterValidator:
    def check(models: tuple[BaseModel, ...]) -> tuple[BaseModel, ...]:
        # not Field(min_length): pydantic would count an entry with a fault as missing, and report both
        if not models or any(len({getattr(model, key) for model in models}) < len(models) for key in keys):
            raise wrong(f"at least one entry, and entries that differ in {' and in '.join(keys)}")
        return models

    return AfterValidator(check)


def _path(text: str) -> str:
    if not text or not text.isprintable() or ".." in Path(text).parts:
        raise wrong("a folder, absolute or relative to SSMD_HOME, without ..")
    return text


Name = Annotated[str, _matching(_NAME, "a name of a-z, 0-9 and -, beginning with a letter")]
Ticker = Annotated[str, AfterValidator(_ticker)]
CalendarDate = Annotated[date, AfterValidator(_calendar_date)]
LocalTime = Annotated[str, BeforeValidator(_local_time)]
WebSocketAddress = Annotated[str, _address("ws", "wss")]
HttpAddress = Annotated[str, _address("http", "https")]
Bucket = Annotated[str, _matching(_BUCKET, "a bucket name of 3 to 63 characters a-z, 0-9 and -")]
Tickers = Annotated[tuple[Ticker, ...], AfterValidator(_distinct), Field(strict=False)]


class Model(BaseModel):
    """Base of all models: what the YAML says is taken literally, and nothing else is let in."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class FeedVersion(Model):
    """How an exchange is reached from `effective_from` on."""

    version: Annotated[str, _matching(_VERSION, "v1, v2, …")]
    effective_from: CalendarDate
    endpoint: WebSocketAddress
    rest_endpoint: HttpAddress
    auth_method: AuthMethod
    rate_limit_per_second: int = Field(ge=1, le=100_000)
    max_symbols_per_connection: int = Field(ge=1, le=500_000)
    supports_orderbook: bool
    supports_trades: bool


class Feed(Model):
    """An exchange's feed. The version with the latest `effective_from` not after a day counts for that day."""

    name: Name
    display_name: str = Field(min_length=1)
    type: Literal["websocket"]
    status: Literal["active", "disabled"]
    versions: Annotated[tuple[FeedVersion, ...], _differing("version", "effective_from"), Field(strict=False)]

    def version_of(self, day: date) -> FeedVersion | None:
        """Return the version that counts for a day, None before the first."""
        in_force = [version for version in self.versions if version.effective_from <= day]
        return max(in_force, key=lambda version: version.effective_from, default=None)


class SchemaVersion(Model):
    """One version of a normalised row: the Cap'n Proto file beside the YAML, and the SHA-256 of its bytes."""

    version: Annotated[str, _matching(_VERSION, "v1, v2, …")]
    status: Literal["active", "retired"]
    file: Annotated[str, _matching(re.compile(r"[a-z][a-z0-9_-]*\.capnp\Z"), "a .capnp file in exchanges/schemas")]
    sha256: Annotated[str, _matching(re.compile(r"[0-9a-f]{64}\Z"), "64 hexadecimal digits, lower case")]


class Schema(Model):
    """A normalised row's schema and its versions."""

    name: Name
    versions: Annotated[tuple[SchemaVersion, ...], _differing("version"), Field(strict=False)]


class Schedule(Model):
    """When days start and end: local times in `timezone`. A `day_end` at or before `day_start` is on the next date."""

    timezone: Annotated[str, AfterValidator(_timezone)]
    day_start: LocalTime
    day_end: LocalTime
    auto_roll: bool = True


class Markets(Model):
    """Which markets to record: exactly one of `series`, `tickers` and `all`; `max` is the most that are accepted."""

    series: Tickers | None = None
    tickers: Tickers | None = None
    all: bool = False
    mve: Literal["exclude", "include"] = "exclude"
    max: int = Field(default=20_000, ge=1, le=500_000)

    @model_validator(mode="after")
    def _one_selection(self) -> Markets:
        if (self.series is not None) + (self.tickers is not None) + self.all != 1:
            raise wrong("exactly one of series: [...], tickers: [...], all: true")
        return self

    def selection(self) -> MarketSelection:
        """Return the selection as an exchange's room takes it."""
        return MarketSelection(
            series=self.series,
            tickers=self.tickers,
            include_multivariate=self.mve == "include",
            max_markets=self.max,
        )


class Capture(Model):
    """What is recorded and how. `connections: 2` records everything twice, over two sockets.

    `linger_ms` is the longest time a record waits for its batch; `spool_limit_mb` bounds a connector's unacknowledged
    bytes; `stream_limit_mb` is the room that the raw stream may take in NATS; `use_yes_price` is passed
    on with the order book subscription; `trades_settle_s` is how long after the close the exchange's own list of trades is
    taken to be complete.
    """

    channels: Annotated[tuple[Channel, ...], AfterValidator(_distinct), Field(strict=False)]
    markets: Markets
    connections: int = Field(default=1, ge=1, le=2)
    linger_ms: int = Field(default=50, ge=1, le=5_000)
    use_yes_price: bool = False
    spool_limit_mb: int = Field(default=2_048, ge=1, le=1_048_576)
    stream_limit_mb: int = Field(default=4_096, ge=16, le=16_777_216)
    trades_settle_s: int = Field(default=60, ge=0, le=3_600)


class Keys(Model):
    """A set of credentials: for each field the environment variable that holds it."""

    source: Literal["env"]
    fields: dict[
        Annotated[str, _matching(_WORD, "a field's name")],
        Annotated[str, _matching(_VARIABLE, "the name of an environment variable, A-Z, 0-9 and _")],
    ]


class Embedded(Model):
    """A server of the embedded stack of `ssmd up`."""

    type: Literal["embedded"]


class NatsTransport(Model):
    """A NATS server with JetStream. Optional credentials: `keys.nats` with `user` and `password`."""

    type: Literal["nats"]
    url: Annotated[str, _address("nats", "tls")]


class RedisCache(Model):
    """A Redis server. Optional credentials: `keys.redis` with `password`."""

    type: Literal["redis"]
    url: Annotated[str, _address("redis", "rediss")]


class Buckets(Model):
    """Buckets of the raw files and of the tables."""

    raw: Bucket
    normalized: Bucket


class LocalStorage(Model):
    """A folder whose subfolders are the buckets; relative to `SSMD_HOME`, and `objects` in it by default."""

    type: Literal["local"]
    path: Annotated[str, AfterValidator(_path)] | None = None
    buckets: Buckets

    def folder(self, home: Path) -> Path:
        """Return the absolute folder that holds the buckets."""
        return objects_dir(home) if self.path is None else home / Path(self.path).expanduser()


class S3Storage(Model):
    """An S3 service; `endpoint` null is AWS. Optional credentials: `keys.s3`, else those of the host."""

    type: Literal["s3"]
    endpoint: HttpAddress | None = None
    region: Annotated[str, _matching(re.compile(r"[a-z0-9-]{1,63}\Z"), "a region such as us-east-1")]
    buckets: Buckets
    prefix: Annotated[str, _matching(_PREFIX, "nothing, or folders such as team/ssmd, without / at the ends")] = ""


class Simulator(Model):
    """Settings of the embedded exchange. It has the environment's credentials and its own clock.

    `pauses`: trading rests on Thursdays from 03:00 to 05:00 Eastern, as at the real exchange. `trades_per_day` is how many
    trades each day before the first start has, `reads_per_second` how many REST requests are taken (0: any number).
    """

    seed: int = Field(default=7, ge=0)
    markets: int = Field(default=200, ge=1, le=50_000)
    rate_per_second: float = Field(default=500, gt=0, le=1_000_000)
    pauses: bool = True
    trades_per_day: int = Field(default=20_000, ge=0, le=100_000_000)
    reads_per_second: float = Field(default=0, ge=0, le=1_000_000)


class SlackAlerts(Model):
    """A channel of Slack. The token is `keys.slack` with the field `token`."""

    channel: Annotated[str, _matching(re.compile(r"[#@]?[A-Za-z0-9._-]{1,80}\Z"), "a channel such as #market-data")]


class Alerts(Model):
    """Where messages about the environment go beside the log."""

    slack: SlackAlerts | None = None


KEY_FIELDS: dict[str, frozenset[str]] = {
    "nats": frozenset({"user", "password"}),
    "redis": frozenset({"password"}),
    "s3": frozenset({"access_key_id", "secret_access_key"}),
    "slack": frozenset({"token"}),
}
"""Fields of the credentials of servers; those of an exchange are `EXCHANGE_KEY_FIELDS`, under the feed's name."""

EXCHANGE_KEY_FIELDS = frozenset({"key_id", "private_key_path"})


class Environment(Model):
    """One configured capture. Made by the loader, which also gives it its feed; see `contracts` for each key."""

    name: Name
    enabled: bool = False
    feed: Name
    schema_ref: Annotated[str, _matching(re.compile(r"[a-z][a-z0-9-]*:v[0-9]+\Z"), "name:version such as trade:v1")] = (
        Field(alias="schema")
    )
    first_day: CalendarDate
    endpoint: WebSocketAddress | None = None
    rest_endpoint: HttpAddress | None = None
    auth_method: AuthMethod | None = None
    schedule: Schedule
    capture: Capture
    keys: dict[str, Keys] = {}
    transport: Annotated[Embedded | NatsTransport, Field(discriminator="type")]
    cache: Annotated[Embedded | RedisCache, Field(discriminator="type")]
    storage: Annotated[LocalStorage | S3Storage, Field(discriminator="type")]
    formats: Annotated[tuple[Literal["parquet", "capnp"], ...], AfterValidator(_distinct), Field(strict=False)] = (
        "parquet",
    )
    retain_days: int = Field(default=2, ge=1, le=3_650)
    simulator: Simulator | None = None
    alerts: Alerts = Alerts()
    lease_ttl_s: float = Field(default=30.0, gt=0, le=3_600)

    _feed: Feed | None = PrivateAttr(default=None)

    @property
    def slug(self) -> str:
        """Return the name as Dagster's definitions carry it: `kalshi_prod`."""
        return self.name.replace("-", "_")

    @property
    def embedded(self) -> bool:
        """Say whether the environment needs anything of the embedded stack."""
        parts = (self.transport.type, self.cache.type)
        return "embedded" in parts or self.simulator is not None

    def bind(self, feed: Feed) -> None:
        """Give the environment its feed; called once, by the loader."""
        self._feed = feed

    def feed_version(self, day: date) -> FeedVersion:
        """Return how the exchange is reached on a day, with the environment's overrides applied.

        A simulated exchange's addresses have the host `SIMULATOR_HOST`, to be replaced with those of the running stack.

        Raises:
            ConfigurationError: The feed has no version for that day.
        """
        assert self._feed is not None, "the loader binds the feed"
        version = self._feed.version_of(day)
        if version is None:
            raise ConfigurationError(
                f"the feed {self.feed} has no version for {day.isoformat()}",
                where=self.name,
                do="Add a version with an earlier effective_from to the feed's file",
            )
        changes: dict[str, str] = {}
        if self.simulator is not None:
            changes = {
                "endpoint": f"ws://{SIMULATOR_HOST}{urlsplit(version.endpoint).path}",
                "rest_endpoint": f"http://{SIMULATOR_HOST}{urlsplit(version.rest_endpoint).path}",
            }
        overrides = {
            "endpoint": self.endpoint,
            "rest_endpoint": self.rest_endpoint,
            "auth_method": self.auth_method,
        }
        changes |= {key: value for key, value in overrides.items() if value is not None}
        return version.model_copy(update=changes)

    def secret_variables(self) -> dict[str, str]:
        """Return the environment variables that hold credentials, each with what it is: `kalshi.key_id`."""
        return {
            variable: f"{name}.{field}" for name, keys in self.keys.items() for field, variable in keys.fields.items()
        }

    def secret(self, name: str, field: str, secrets: Mapping[str, str]) -> str:
        """Return one credential.

        Args:
            name: Key of `keys`, such as `kalshi`.
            field: Field of it, such as `key_id`.
            secrets: What `secrets.load_secrets` returned.

        Raises:
            ConfigurationError: The environment names no variable for it, or the variable is not set.
        """
        variable = self.keys[name].fields.get(field) if name in self.keys else None
        if variable is None:
            raise ConfigurationError(
                f"no variable is named for the credential {name}.{field}",
                where=self.name,
                do=f"Add keys.{name}.fields.{field} to the environment's file",
            )
        value = secrets.get(variable)
        if not value:
            raise ConfigurationError(
                f"the credential {name}.{field} is not set: {variable}",
                where=self.name,
                do=f"Set {variable} in the environment or in secrets.env of SSMD_HOME",
            )
        return value

    def calendar(self) -> TradingCalendar:
        """Return the calendar of the environment's days."""
        return TradingCalendar(
            timezone=self.schedule.timezone,
            day_start=self.schedule.day_start,
            day_end=self.schedule.day_end,
            auto_roll=self.schedule.auto_roll,
            first_day=self.first_day,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of what is configured, feed included, for manifests. It holds no credential."""
        feed = "" if self._feed is None else self._feed.model_dump_json()
        return hashlib.sha256(f"{self.model_dump_json(by_alias=True)}\n{feed}".encode()).hexdigest()
