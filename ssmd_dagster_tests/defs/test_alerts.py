"""Messages: which events are worth one, what they say, and that Slack is given them without ever standing in the way."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import dagster_slack.resources
import pytest
from slack_sdk import WebClient

from ssmd_dagster.day.states import EventName
from ssmd_dagster.defs.build import targets_of
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.workflows.alerts import Alert, of_event, send
from ssmd_dagster_tests.day.builders import DATE, ENV, Log, started
from ssmd_dagster_tests.environments.folders import changed, copied

POSTED: list[dict[str, Any]] = []


class _Slack(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode()
        posted = (
            json.loads(text) if text.startswith("{") else {name: values[0] for name, values in parse_qs(text).items()}
        )
        POSTED.append({**posted, "token": self.headers["authorization"]})
        body = b'{"ok": true}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


def _send_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(dagster_slack.resources, "WebClient", lambda token: WebClient(token, base_url=url))


@pytest.fixture
def slack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes messages as Slack does, in place of Slack."""
    POSTED.clear()
    server = HTTPServer(("127.0.0.1", 0), _Slack)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    _send_to(monkeypatch, f"http://127.0.0.1:{server.server_port}/api/")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def told(log: Log, *, over: bool = False) -> Alert | None:
    """Return the message of a log's last event; `over`: the day's window has closed."""
    return of_event(log.events[-1][1], log.book.days.get(DATE), over=over)


def test_every_failure_is_told_with_the_command_to_run() -> None:
    """FAILED, ERROR and degraded days say environment, day, cause and command; a good end says nothing."""
    log = started()
    assert told(log) is None
    log.add(EventName.ERROR_RAISED)
    alert = told(log)
    assert alert is not None
    assert alert.text == f"[ERROR] {ENV} {DATE}: no heartbeat | run: ssmd day recover {ENV} --date {DATE}"
    log.add(EventName.GAVE_UP)
    alert = told(log)
    assert alert is not None
    assert alert.text.startswith(
        f"[FAILED] {ENV} {DATE}: gave_up at recover: connector dies at once | run: ssmd day recover "
    )
    alert = told(log, over=True)
    assert alert is not None
    assert alert.command == f"ssmd day end {ENV} --date {DATE}"
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.MISSED, reason="nobody started it, and it is over")
    alert = told(log, over=True)
    assert alert is not None
    assert alert.text.endswith(
        f"nobody started it, and it is over | run: ssmd day backfill {ENV} --from {DATE} --to {DATE}"
    )
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED)
    assert told(log) is None
    log.add(EventName.CONDITION_CHANGED)
    alert = told(log)
    assert alert is not None
    assert alert.text == f"[DEGRADED] {ENV} {DATE}: degraded: late rows | run: ssmd day show {ENV} {DATE}"


@pytest.mark.parametrize("over", [False, True])
def test_a_start_that_failed_is_named_again_only_while_the_day_is_open(over: bool) -> None:
    """A start of a day that is over would replay it and leave it ACTIVE."""
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.START_REQUESTED)
    log.add(EventName.START_FAILED)
    alert = told(log, over=over)
    assert alert is not None
    backfill = f"ssmd day backfill {ENV} --from {DATE} --to {DATE}"
    assert alert.command == (backfill if over else f"ssmd day start {ENV} --date {DATE}")


def test_a_replay_that_failed_is_done_again_by_a_replay() -> None:
    """A start of a day that is over would leave it ACTIVE."""
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.START_REQUESTED, data={"mode": "replay"})
    log.add(EventName.START_FAILED)
    alert = told(log)
    assert alert is not None
    assert alert.command == f"ssmd day backfill {ENV} --from {DATE} --to {DATE}"


def test_a_month_of_replays_sends_no_alerts_but_for_what_a_replay_need_not_lack() -> None:
    """That a day was replayed is no news; that it was, and holds trades that nobody lists, is."""
    gap = {"gap_id": "gap-replay-ticker", "cause": "not_captured", "from_ns": 0, "scope": {"channel": "ticker"}}
    usual = ["gap gap-replay-ticker (not_captured) stays", "replayed source"]
    for reasons, sent in ((usual, False), ([*usual, "3 trades that the exchange does not list"], True), ([], True)):
        log = Log()
        log.add(EventName.DEFINED)
        log.add(EventName.START_REQUESTED, data={"mode": "replay"})
        log.add(EventName.STARTED)
        log.add(EventName.GAP_OPENED, data=gap)
        log.add(EventName.GAP_CLOSED, data={"gap_id": gap["gap_id"], "outcome": "stays"})
        log.add(EventName.END_REQUESTED)
        log.add(EventName.COMPLETED, data={"condition": "degraded", "condition_reasons": reasons})
        assert (told(log) is not None) is sent


@pytest.mark.usefixtures("slack")
def test_slack_is_given_what_the_log_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With `alerts.slack` a message goes to the channel under the environment's own token; a Slack that is away is logged."""
    folder = copied(tmp_path)
    keys = {"slack": {"source": "env", "fields": {"token": "TEST_SLACK_TOKEN"}}}
    changed(folder / "environments/kalshi-sim.yaml", {"alerts": {"slack": {"channel": "#markets"}}})
    assert "keys.slack: got nothing" in str(load_registry(folder).broken["kalshi-sim"][0])
    changed(folder / "environments/kalshi-sim.yaml", {"keys.slack": keys["slack"]})
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "home"))
    targets = targets_of(load_registry(folder).get("kalshi-sim"))
    alert = Alert(env="kalshi-sim", date="2025-12-14", kind="failed", cause="no answer", command="ssmd day start")
    with caplog.at_level(logging.WARNING):
        send([alert], targets)
    assert "the credential slack.token is not set" in caplog.text
    monkeypatch.setenv("TEST_SLACK_TOKEN", "xoxb-1")
    caplog.clear()
    send([alert], targets)
    (posted,) = POSTED
    assert (posted["channel"], posted["text"], posted["token"]) == ("#markets", alert.text, "Bearer xoxb-1")
    assert "xoxb-1" not in caplog.text
    _send_to(monkeypatch, "http://127.0.0.1:9/api/")
    with caplog.at_level(logging.WARNING):
        send([alert], targets)
    assert "a message did not reach Slack's #markets" in caplog.text
    caplog.clear()
    send([alert], targets)
    assert "did not reach" not in caplog.text, "every message that waits for a Slack that is away holds the sensor up"


def test_an_environment_without_the_extra_is_no_trouble_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slack is configured and `dagster-slack` is not installed: the code location loads, and says what to install."""
    folder = copied(tmp_path)
    keys = {"slack": {"source": "env", "fields": {"token": "TEST_SLACK_TOKEN"}}}
    changed(
        folder / "environments/kalshi-sim.yaml",
        {"alerts": {"slack": {"channel": "#markets"}}, "keys.slack": keys["slack"]},
    )
    monkeypatch.setitem(sys.modules, "dagster_slack", None)
    monkeypatch.delitem(sys.modules, "ssmd_dagster.defs.slack", raising=False)
    assert len(targets_of(load_registry(folder).get("kalshi-sim"))) == 1
    assert "pip install 'ssmd-dagster[slack]'" in caplog.text
