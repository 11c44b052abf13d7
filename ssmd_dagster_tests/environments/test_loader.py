"""Reading the folder of configuration: what is right, and one fault for each thing that is wrong."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.environments.loader import MAX_FILE_BYTES, Fault, load_registry
from ssmd_dagster.environments.models import SIMULATOR_HOST
from ssmd_dagster.errors import ConfigurationError, ExitCode, NotFoundError
from ssmd_dagster_tests.environments.folders import changed, copied

SIM = "environments/kalshi-sim.yaml"
FEED = "feeds/kalshi.yaml"
SCHEMA = "schemas/trade.yaml"


def faults_of(folder: Path) -> list[tuple[str, str, str, str]]:
    """All faults as (file inside the folder, key, value, expected)."""
    return [
        (str(Path(fault.file).relative_to(folder)), fault.key, fault.value, fault.expected)
        for fault in load_registry(folder).faults
    ]


def test_the_shipped_folder_has_no_fault() -> None:
    """kalshi-sim is enabled and needs nothing; the two with credentials are shipped disabled."""
    registry = load_registry()
    assert registry.faults == []
    assert {name: environment.enabled for name, environment in registry.environments.items()} == {
        "kalshi-demo": False,
        "kalshi-prod": False,
        "kalshi-sim": True,
    }
    simulated = registry.get("kalshi-sim")
    assert (simulated.transport.type, simulated.cache.type, simulated.storage.type) == ("embedded", "embedded", "local")
    assert simulated.simulator is not None
    assert (simulated.simulator.seed, simulated.simulator.markets, simulated.simulator.rate_per_second) == (7, 200, 200)
    assert simulated.first_day == date(2025, 12, 1)
    buckets = [environment.storage.buckets.raw for environment in registry.environments.values()]
    assert len(set(buckets)) == 3


def test_the_shipped_addresses_are_those_of_each_exchange() -> None:
    """Production, demo by override, and a name that never resolves for the simulator."""
    registry, day = load_registry(), date(2025, 12, 14)
    production = registry.get("kalshi-prod").feed_version(day)
    assert production.endpoint == "wss://external-api-ws.kalshi.com/trade-api/ws/v2"
    demo = registry.get("kalshi-demo").feed_version(day)
    assert demo.endpoint == "wss://external-api-ws.demo.kalshi.co/trade-api/ws/v2"
    assert demo.rest_endpoint == "https://external-api.demo.kalshi.co/trade-api/v2"
    simulated = registry.get("kalshi-sim").feed_version(day)
    assert simulated.endpoint == f"ws://{SIMULATOR_HOST}/trade-api/ws/v2"
    assert simulated.rest_endpoint == f"http://{SIMULATOR_HOST}/trade-api/v2"


@pytest.mark.parametrize(
    ("key", "written", "value", "expected"),
    [
        ("schedule.day_start", "25:10", "'25:10'", "HH:MM"),
        ("schedule.day_end", 0, "0", "HH:MM in quotes"),
        ("schedule.timezone", "Mars/Olympus", "'Mars/Olympus'", "IANA timezone"),
        ("schedule.timezne", "UTC", "'UTC'", "did you mean timezone?"),
        ("schedule.auto_roll", "yes please", "'yes please'", "true or false"),
        ("first_day", "2025-02-29", "'2025-02-29'", "a date YYYY-MM-DD"),
        ("first_day", date(2024, 12, 31), "2024-12-31", "from 2025-01-01 on"),
        ("first_day", date(1, 1, 1), "0001-01-01", "from 2000-01-01"),
        ("first_day", None, "nothing", "a value"),
        ("feed", "kraken", "'kraken'", "one of kalshi"),
        ("feed", "../../kalshi", "'../../kalshi'", "a name of a-z"),
        ("schema", "trade:v9", "'trade:v9'", "one of trade:v1"),
        ("schema", "quote:v1", "'quote:v1'", "one of trade:"),
        ("schema", "trade", "'trade'", "name:version"),
        ("capture.channels", [], "[]", "at least one entry"),
        ("capture.channels", ["trade", "trade"], "['trade', 'trade']", "none twice"),
        ("capture.channels", "trade", "'trade'", "a list"),
        ("capture.markets", {"all": True, "series": ["A"]}, "a mapping with the keys all, series", "exactly one of"),
        ("capture.markets", {"all": False}, "a mapping with the keys all", "exactly one of"),
        ("capture.markets", {"tickers": [], "all": True}, "[]", "at least one entry"),
        ("capture.markets", None, "nothing", "a value"),
        ("capture.markets.mve", "only", "'only'", "exclude or include"),
        ("capture.connections", 3, "3", "at most 2"),
        ("capture.connections", True, "True", "a whole number"),
        ("capture.linger_ms", "50", "'50'", "a whole number"),
        ("capture.spool_limit_mb", 0, "0", "at least 1"),
        ("keys.kalshi", None, "nothing", "since auth_method is api_key"),
        ("keys.other", {"source": "env", "fields": {}}, "it", "one of kalshi, nats, redis, s3"),
        ("transport", {"type": "nats"}, "nothing", "a value"),
        ("transport", {"type": "kafka"}, "'kafka'", "one of embedded, nats"),
        ("transport", {"url": "nats://h"}, "nothing", "one of embedded, nats"),
        ("transport", "embedded", "'embedded'", "keys with their values"),
        ("transport.url", "nats://h", "'nats://h'", "no such key"),
        ("cache", {"type": "redis", "url": "redis://h:99999"}, "'redis://h:99999'", "redis|rediss"),
        ("storage.path", "../objects", "'../objects'", "without .."),
        ("storage.buckets.raw", "../raw", "'../raw'", "a bucket name"),
        ("storage.buckets.raw", "ssmd-raw-demo", "'ssmd-raw-demo'", "than that of kalshi-demo"),
        ("formats", ["parquet", "parquet"], "['parquet', 'parquet']", "none twice"),
        ("retain_days", 0, "0", "at least 1"),
        ("simulator.rate_per_second", 0, "0", "more than 0"),
        ("endpoint", "wss://exchange.example/ws", "'wss://exchange.example/ws'", "beside simulator"),
        ("name", "kalshi-other", "'kalshi-other'", "the file's name, kalshi-sim"),
        ("name", "../kalshi-sim", "'../kalshi-sim'", "a name of a-z"),
        ("lease_ttl_s", float("inf"), "inf", "at most 3600"),
        ("auth_method", "basic", "'basic'", "api_key or none"),
    ],
)
def test_one_wrong_key_is_one_fault(tmp_path: Path, key: str, written: Any, value: str, expected: str) -> None:
    """A fault names file, dotted key, value and what was expected; nothing else is reported with it."""
    folder = copied(tmp_path)
    changed(folder / SIM, {key: written})
    ((file, fault_key, fault_value, fault_expected),) = faults_of(folder)
    assert file == SIM
    assert fault_key.startswith(key)
    assert fault_value == value
    assert expected in fault_expected
    with pytest.raises(ConfigurationError) as caught:
        load_registry(folder).get("kalshi-sim")
    assert caught.value.exit_code is ExitCode.CONFIGURATION
    assert load_registry(folder).get("kalshi-prod").name == "kalshi-prod"


def test_faults_read_as_sentences_with_their_place() -> None:
    """The form in which operators see a fault."""
    fault = Fault("exchanges/environments/x.yaml", "schedule.day_start", "'25:10'", "HH:MM")
    assert str(fault) == "exchanges/environments/x.yaml: schedule.day_start: got '25:10', expected HH:MM"


def test_several_faults_are_all_reported(tmp_path: Path) -> None:
    """Every wrong key of a file is listed at once, one a line."""
    folder = copied(tmp_path)
    changed(folder / SIM, {"schedule.day_start": "x", "retain_days": "2", "capture.channels": ["trade", "tikcer"]})
    assert [key for _, key, _, _ in faults_of(folder)] == ["schedule.day_start", "capture.channels.1", "retain_days"]
    with pytest.raises(ConfigurationError) as caught:
        load_registry(folder).get("kalshi-sim")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 faults in the configuration of kalshi-sim:"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("password", "hunter2"),
        ("api_key", "hunter2"),
        ("keys.kalshi.fields.key_id", "hunter2"),
        ("keys.kalshi.fields.key", "hunter2"),
        ("keys.kalshi", {"source": "hunter2", "fields": {}}),
        ("transport", {"type": "nats", "url": "nats://user:hunter2@host"}),
        ("cache", {"type": "redis", "url": "redis://:hunter2@host:bad"}),
        ("feed", "-----BEGIN PRIVATE KEY-----hunter2"),
    ],
)
def test_credentials_in_the_wrong_place_are_not_shown(tmp_path: Path, key: str, written: Any) -> None:
    """Somebody writes a password into the YAML: it is a fault, and the fault does not repeat it."""
    folder = copied(tmp_path)
    changed(folder / SIM, {key: written})
    faults = load_registry(folder).faults
    assert faults
    assert all("hunter2" not in str(fault) for fault in faults)


def test_wrong_feeds_break_the_environments_that_use_them(tmp_path: Path) -> None:
    """A fault of a feed is reported once, and every environment of that feed names it."""
    folder = copied(tmp_path)
    changed(folder / FEED, {"versions.0.endpoint": "https://x"})
    ((file, key, _, expected),) = faults_of(folder)
    assert (file, key) == (FEED, "versions.0.endpoint")
    assert "ws|wss" in expected
    registry = load_registry(folder)
    assert registry.environments == {}
    for name in ("kalshi-sim", "kalshi-prod"):
        with pytest.raises(ConfigurationError, match=r"versions\.0\.endpoint"):
            registry.get(name)


def test_feeds_must_be_active_and_support_what_is_recorded(tmp_path: Path) -> None:
    """A disabled feed or an unsupported channel is a fault of each environment that asks for it."""
    folder = copied(tmp_path)
    changed(folder / FEED, {"status": "disabled", "versions.0.supports_orderbook": False})
    found = {(key, expected.partition(";")[0]) for file, key, _, expected in faults_of(folder) if file == SIM}
    assert found == {
        ("feed", "an active feed"),
        ("capture.channels.2", "a channel that kalshi v2 supports"),
    }


def test_versions_of_a_feed_must_differ(tmp_path: Path) -> None:
    """Two versions from the same day on would make it a matter of chance."""
    folder = copied(tmp_path)
    content = yaml.safe_load((folder / FEED).read_text(encoding="utf-8"))
    changed(folder / FEED, {"versions": [content["versions"][0], content["versions"][0] | {"version": "v3"}]})
    ((file, _, _, expected),) = faults_of(folder)
    assert file == FEED
    assert "effective_from" in expected


def test_a_feed_that_nothing_here_can_record_is_a_fault(tmp_path: Path) -> None:
    """A feed's file alone does not teach this installation a protocol."""
    folder = copied(tmp_path)
    changed(folder / FEED, {"name": "kraken"})
    (folder / FEED).rename(folder / "feeds/kraken.yaml")
    for name in ("kalshi-demo", "kalshi-prod"):
        (folder / f"environments/{name}.yaml").unlink()
    changed(folder / SIM, {"feed": "kraken", "keys": None, "auth_method": "none"})
    ((_, key, value, expected),) = faults_of(folder)
    assert (key, value) == ("feed", "'kraken'")
    assert "this installation can record" in expected


def test_the_schema_must_be_the_one_that_was_meant(tmp_path: Path) -> None:
    """A changed or missing .capnp file is noticed by its SHA-256."""
    folder = copied(tmp_path)
    with (folder / "schemas/trade.capnp").open("a", encoding="utf-8") as file:
        file.write("\n")
    ((name, key, _, expected),) = faults_of(folder)
    assert (name, key) == (SCHEMA, "versions.0.sha256")
    assert "that of trade.capnp" in expected
    (folder / "schemas/trade.capnp").unlink()
    ((_, key, value, _),) = faults_of(folder)
    assert (key, value) == ("versions.0.file", "'trade.capnp'")
    assert load_registry(folder).environments == {}


@pytest.mark.parametrize("name", ["../environments/trade.capnp", "/etc/passwd", "Trade.capnp"])
def test_a_schema_does_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    """Only a plain file name beside the YAML is read."""
    folder = copied(tmp_path)
    changed(folder / SCHEMA, {"versions.0.file": name})
    ((_, key, _, expected),) = faults_of(folder)
    assert key == "versions.0.file"
    assert "in exchanges/schemas" in expected


@pytest.mark.parametrize("other", [{}, {"storage.path": "./objects/"}, {"storage.path": "elsewhere"}])
def test_environments_do_not_share_keys_of_the_store(tmp_path: Path, other: dict[str, Any]) -> None:
    """Equal buckets are a fault in the same folder, however it is written, and fine in another."""
    folder = copied(tmp_path)
    same = {"storage.buckets": {"raw": "ssmd-raw-sim", "normalized": "ssmd-normalized-sim"}}
    changed(folder / "environments/kalshi-demo.yaml", same | other)
    found = [(file, key) for file, key, _, _ in faults_of(folder)]
    apart = other.get("storage.path") == "elsewhere"
    assert found == ([] if apart else [(SIM, "storage.buckets.raw"), (SIM, "storage.buckets.normalized")])


def test_simulated_exchanges_do_not_share_variables(tmp_path: Path) -> None:
    """The second one's key would take the place of the first one's, whose exchange then refuses everything."""
    folder = copied(tmp_path)
    second = folder / "environments/kalshi-two.yaml"
    second.write_text((folder / SIM).read_text(encoding="utf-8"), encoding="utf-8")
    changed(second, {"name": "kalshi-two", "storage.buckets": {"raw": "raw-two", "normalized": "normalized-two"}})
    assert [(key, value) for _, key, value, _ in faults_of(folder)] == [
        ("keys.kalshi.fields.key_id", "the variable of kalshi-sim"),
        ("keys.kalshi.fields.private_key_path", "the variable of kalshi-sim"),
    ]
    assert load_registry(folder).get("kalshi-sim").name == "kalshi-sim"


def test_equal_buckets_of_s3_are_told_apart_by_their_prefix(tmp_path: Path) -> None:
    """Two environments in one bucket need different prefixes."""
    folder = copied(tmp_path)
    storage = yaml.safe_load((folder / "environments/kalshi-prod.yaml").read_text(encoding="utf-8"))["storage"]
    changed(folder / SIM, {"storage": storage})
    assert [key for _, key, _, _ in faults_of(folder)] == ["storage.buckets.raw", "storage.buckets.normalized"]
    changed(folder / SIM, {"storage": storage | {"prefix": "sim"}})
    assert faults_of(folder) == []


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("name: [", "line 1", "expected the node content"),
        ("name: kalshi-sim\n\tfeed: x\n", "line 2", "found character"),
        ("a: &x 1\nb: *x\n", "line 2", "an alias or a tag"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1", "an alias or a tag"),
        ("a: !!timestamp x\n", "line 1", "an alias or a tag"),
        ("", "", "no mapping"),
        ("- a\n", "", "no mapping"),
        ("1: a\n", "", "no mapping"),
        ("a: 1\n---\nb: 2\n", "line 2", "another document"),
        ("a: " + "[" * 5_000, "", "too deep"),
        ("#" * (MAX_FILE_BYTES + 1), "", "a larger file"),
        ("a: \x07", "", "unacceptable character"),
    ],
)
def test_broken_yaml_is_one_fault_with_its_line(tmp_path: Path, text: str, key: str, value: str) -> None:
    """What YAML itself refuses is named by line, and never runs, expands or raises."""
    folder = copied(tmp_path)
    (folder / SIM).write_text(text, encoding="utf-8")
    ((file, fault_key, fault_value, expected),) = faults_of(folder)
    assert (file, fault_key) == (SIM, key)
    assert value in fault_value
    assert expected


def test_bytes_that_are_no_text_are_a_fault(tmp_path: Path) -> None:
    """A binary file in the folder is named."""
    folder = copied(tmp_path)
    (folder / SIM).write_bytes(b"\xff\xfe\x00name")
    ((_, _, value, _),) = faults_of(folder)
    assert "UTF-8" in value


def test_a_key_that_stands_twice_is_a_fault(tmp_path: Path) -> None:
    """YAML would silently take the last one."""
    folder = copied(tmp_path)
    text = (folder / SIM).read_text(encoding="utf-8")
    (folder / SIM).write_text(text + "retain_days: 9\nschedule: {timezone: UTC, timezone: UTC}\n", encoding="utf-8")
    found = faults_of(folder)
    assert ("retain_days", "each key once") in [(key, expected) for _, key, _, expected in found]
    assert ("schedule.timezone", "each key once") in [(key, expected) for _, key, _, expected in found]
    assert "kalshi-sim" not in load_registry(folder).environments


@pytest.mark.parametrize("name", ["Kalshi", "kalshi sim", "9kalshi", "kalshi_sim", "kälshi"])
def test_a_file_is_named_as_an_environment_may_be(tmp_path: Path, name: str) -> None:
    """Names reach paths, subjects and keys, so the file's name is held to the same rule."""
    folder = copied(tmp_path)
    (folder / SIM).rename(folder / f"environments/{name}.yaml")
    ((file, _, _, expected),) = faults_of(folder)
    assert file == f"environments/{name}.yaml"
    assert "beginning with a letter" in expected


def test_missing_and_odd_files_are_faults(tmp_path: Path) -> None:
    """A missing folder, a folder named like a file, a dangling link and a .yml are named; notes beside them are not."""
    folder = copied(tmp_path)
    (folder / "environments/README.md").write_text("notes", encoding="utf-8")
    (folder / "environments/.hidden.yaml").write_text("x", encoding="utf-8")
    assert faults_of(folder) == []
    (folder / "environments/folder.yaml").mkdir()
    (folder / "environments/gone.yaml").symlink_to(folder / "nowhere.yaml")
    (folder / "environments/other.yml").write_text("x", encoding="utf-8")
    assert [(file, expected) for file, _, _, expected in faults_of(folder)] == [
        ("environments/folder.yaml", "a readable file"),
        ("environments/gone.yaml", "a readable file"),
        ("environments/other.yml", "the ending .yaml"),
    ]
    assert [file for file, _, _, _ in faults_of(tmp_path)] == ["feeds", "schemas", "environments"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_fault(tmp_path: Path) -> None:
    """A file without permission is named."""
    folder = copied(tmp_path)
    (folder / SIM).chmod(0)
    ((_, _, value, _),) = faults_of(folder)
    assert value == "Permission denied"


def test_an_unknown_environment_lists_the_known_ones(tmp_path: Path) -> None:
    """No such name is exit code 4, also where it tries to leave the folder."""
    for name in ("kalshi-prd", "../environments/kalshi-sim", ""):
        with pytest.raises(NotFoundError, match="Known: kalshi-demo, kalshi-prod, kalshi-sim") as caught:
            load_registry(copied(tmp_path / str(len(name)))).get(name)
        assert caught.value.exit_code is ExitCode.NOT_FOUND


def test_the_folder_is_that_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSMD_EXCHANGES replaces the project's folder."""
    folder = copied(tmp_path)
    (folder / "environments/kalshi-prod.yaml").unlink()
    monkeypatch.setenv("SSMD_EXCHANGES", str(folder))
    assert load_registry().names() == ["kalshi-demo", "kalshi-sim"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(st.data())
def test_no_content_makes_the_loader_raise(tmp_path: Path, data: st.DataObject) -> None:
    """Any value at any key gives a usable environment or faults that name file and expectation."""
    folder = tmp_path / "exchanges"
    if not folder.exists():
        copied(tmp_path)
    source = data.draw(st.sampled_from([SIM, "environments/kalshi-prod.yaml", FEED, SCHEMA]))
    original = (folder / source).read_text(encoding="utf-8")
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    anything = st.recursive(
        scalars | st.datetimes(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        ),
        max_leaves=5,
    )
    content: Any = yaml.safe_load(original)
    parent, here = None, content
    for _ in range(data.draw(st.integers(1, 4))):
        if not isinstance(here, dict | list) or not here:
            break
        key: Any = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else list(range(len(here)))))
        parent, here = (here, key), here[key]
    assert parent is not None
    parent[0][parent[1]] = data.draw(anything)
    try:
        (folder / source).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        registry = load_registry(folder)
        for fault in registry.faults:
            assert fault.file
            assert fault.value
            assert fault.expected
        assert set(registry.names()) == {"kalshi-demo", "kalshi-prod", "kalshi-sim"}
    finally:
        (folder / source).write_text(original, encoding="utf-8")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=75)
@given(st.text(alphabet="abk:-[]{}&*!|>'\"#%@`,?=<~ \n\t0123456789.é\x00", max_size=60))
def test_no_text_makes_the_loader_raise(tmp_path: Path, text: str) -> None:
    """Any text in a file is a fault of that file."""
    folder = tmp_path / "exchanges"
    if not folder.exists():
        copied(tmp_path)
    (folder / SIM).write_text(text, encoding="utf-8")
    registry = load_registry(folder)
    assert "kalshi-sim" in registry.broken
    assert "kalshi-prod" in registry.environments
