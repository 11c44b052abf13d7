"""What an environment answers once it is loaded."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Feed, LocalStorage, Markets
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.exchange import MarketSelection
from ssmd_dagster_tests.environments.folders import changed, copied

SIM = "environments/kalshi-sim.yaml"
VERSION = {
    "endpoint": "wss://exchange.example/ws",
    "rest_endpoint": "https://exchange.example/v2",
    "auth_method": "none",
    "rate_limit_per_second": 20,
    "max_symbols_per_connection": 100,
    "supports_orderbook": True,
    "supports_trades": True,
}


@given(st.lists(st.dates(date(2000, 1, 1), date(2199, 12, 31)), min_size=1, unique=True, max_size=8), st.dates())
def test_the_latest_version_not_after_the_day_counts(starts: list[date], day: date) -> None:
    """Whatever their order in the file, versions hold from their day on until the next one's."""
    versions = [
        VERSION | {"version": f"v{number}", "effective_from": start} for number, start in enumerate(starts, start=1)
    ]
    feed = Feed.model_validate(
        {"name": "x", "display_name": "X", "type": "websocket", "status": "active", "versions": versions}
    )
    found = feed.version_of(day)
    before = [start for start in starts if start <= day]
    assert (found and found.effective_from) == max(before, default=None)


def test_overrides_apply_to_every_version(tmp_path: Path) -> None:
    """endpoint, rest_endpoint and auth_method of the environment win over those of the feed, on every day."""
    folder = copied(tmp_path)
    content = yaml.safe_load((folder / "feeds/kalshi.yaml").read_text(encoding="utf-8"))
    later = VERSION | {"version": "v3", "effective_from": date(2026, 1, 1)}
    changed(folder / "feeds/kalshi.yaml", {"versions": [later, *content["versions"]]})
    changed(folder / "environments/kalshi-demo.yaml", {"auth_method": "none", "rest_endpoint": None})
    environment = load_registry(folder).get("kalshi-demo")
    old, new = environment.feed_version(date(2025, 12, 31)), environment.feed_version(date(2026, 1, 1))
    assert (old.version, new.version) == ("v2", "v3")
    assert old.endpoint == new.endpoint == "wss://external-api-ws.demo.kalshi.co/trade-api/ws/v2"
    assert (old.auth_method, new.auth_method) == ("none", "none")
    assert old.rest_endpoint == "https://external-api.kalshi.com/trade-api/v2"
    assert new.rest_endpoint == "https://exchange.example/v2"
    with pytest.raises(ConfigurationError, match="no version for 2024-12-31"):
        environment.feed_version(date(2024, 12, 31))


def test_an_exchange_without_signatures_needs_no_keys(tmp_path: Path) -> None:
    """auth_method none makes the credentials optional."""
    folder = copied(tmp_path)
    changed(
        folder / SIM,
        {
            "auth_method": "none",
            "keys": None,
            "simulator": None,
            "endpoint": "ws://127.0.0.1:9/x",
            "rest_endpoint": None,
        }
        | {"rest_endpoint": "http://127.0.0.1:9/x"},
    )
    environment = load_registry(folder).get("kalshi-sim")
    assert environment.feed_version(date(2025, 12, 14)).endpoint == "ws://127.0.0.1:9/x"
    assert environment.secret_variables() == {}


def test_a_missing_credential_names_variable_and_environment() -> None:
    """What to set, and for whom; a value is returned as it is."""
    environment = load_registry().get("kalshi-prod")
    assert environment.secret("kalshi", "key_id", {"KALSHI_API_KEY": "abc"}) == "abc"
    for secrets in ({}, {"KALSHI_API_KEY": ""}):
        with pytest.raises(ConfigurationError, match=r"KALSHI_API_KEY \(kalshi-prod\)"):
            environment.secret("kalshi", "key_id", secrets)
    with pytest.raises(ConfigurationError, match=r"nats\.user"):
        environment.secret("nats", "user", {})
    assert environment.secret_variables()["KALSHI_PRIVATE_KEY_PATH"] == "kalshi.private_key_path"


def test_names_and_calendar_of_an_environment() -> None:
    """The slug for Dagster, and the calendar with the schedule's values."""
    environment = load_registry().get("kalshi-prod")
    assert environment.slug == "kalshi_prod"
    assert not environment.embedded
    assert load_registry().get("kalshi-sim").embedded
    calendar = environment.calendar()
    day = date(2025, 12, 14)
    assert calendar.close_ns(day) - calendar.open_ns(day) == timedelta(days=1).total_seconds() * 1e9
    assert calendar.first_day == date(2025, 12, 1)


def test_the_fingerprint_follows_the_configuration(tmp_path: Path) -> None:
    """Any change of environment or feed changes it; reading again does not."""
    folder = copied(tmp_path)
    first = load_registry(folder).get("kalshi-sim").fingerprint()
    assert load_registry(folder).get("kalshi-sim").fingerprint() == first
    changed(folder / SIM, {"retain_days": 3})
    second = load_registry(folder).get("kalshi-sim").fingerprint()
    changed(folder / "feeds/kalshi.yaml", {"versions.0.rate_limit_per_second": 30})
    assert len({first, second, load_registry(folder).get("kalshi-sim").fingerprint()}) == 3


def test_a_selection_of_markets_as_the_exchange_takes_it() -> None:
    """Series, tickers with odd characters, or everything."""
    assert Markets(series=("A",), mve="include").selection() == MarketSelection(
        series=("A",), include_multivariate=True
    )
    odd = "KXBTCD-26FEB07-T98249.99 é/..%"
    assert Markets(tickers=(odd,), max=5).selection() == MarketSelection(tickers=(odd,), max_markets=5)
    assert Markets(all=True).selection() == MarketSelection()


@pytest.mark.parametrize(
    ("path", "folder"),
    [(None, "/home/x/objects"), ("bucketry", "/home/x/bucketry"), ("/data/ssmd", "/data/ssmd")],
)
def test_local_buckets_lie_under_the_home_unless_said_otherwise(path: str | None, folder: str) -> None:
    """Default, relative and absolute folders."""
    storage = LocalStorage.model_validate(
        {"type": "local", "path": path, "buckets": {"raw": "raw", "normalized": "normalized"}}
    )
    assert storage.folder(Path("/home/x")) == Path(folder)
