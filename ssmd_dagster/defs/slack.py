"""Messages to Slack, through `dagster-slack` (the extra `slack`). Imported only where an environment asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dagster_slack import SlackResource
from slack_sdk.errors import SlackClientError

from ssmd_dagster.errors import SsmdError
from ssmd_dagster.workflows.alerts import Alert

TIMEOUT_S = 5
QUIET_S = 60.0
"""How long a Slack that did not answer is left alone: a sensor has 60 s for its tick, and every message waits."""

_log = logging.getLogger(__name__)


class SlackTarget:
    """A channel of Slack. The token is read when a message is sent, so that a missing one is no fault of the definitions."""

    def __init__(self, channel: str, token: Callable[[], str]) -> None:
        self._channel, self._token = channel, token
        self._quiet_until = 0.0

    def send(self, alert: Alert) -> None:
        """Post the message; a Slack that does not take it is logged: the log has had the message already."""
        if time.monotonic() < self._quiet_until:
            return
        try:
            client = SlackResource(token=self._token()).get_client()
            client.timeout = TIMEOUT_S
            client.chat_postMessage(channel=self._channel, text=alert.text)
        except (SlackClientError, SsmdError, OSError) as error:
            if isinstance(error, OSError):
                self._quiet_until = time.monotonic() + QUIET_S
            _log.error("a message did not reach Slack's %s: %s", self._channel, error)
