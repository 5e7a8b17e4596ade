"""Apprise, where it is installed: an event as a sentence on a phone, in a chat, in an e-mail."""

from __future__ import annotations

import json
import os
from importlib import import_module

from edge_client.events.courier import TargetError
from edge_client.events.queue import Message
from protos.errors import ConfigError, MissingDependencyError

URL_VARIABLE = "HEADTAIL_APPRISE_URL"
_WORDS = {"appeared": "{label} appeared", "still": "{label} is still there", "left": "{label} left"}


class AppriseTarget:
    """Whatever the address in ``HEADTAIL_APPRISE_URL`` reaches.

    Raises:
        MissingDependencyError: Apprise is not installed.
        ConfigError: there is no address, or Apprise does not know it.
    """

    shown = "apprise"

    def __init__(self) -> None:
        try:
            self._apprise = import_module("apprise").Apprise()
        except ImportError as error:
            raise MissingDependencyError("events to apprise need it: pip install apprise") from error
        if not self._apprise.add(os.environ.get(URL_VARIABLE, "")):
            raise ConfigError(f"set {URL_VARIABLE} to an address that Apprise knows")

    def send(self, messages: list[Message]) -> int:
        """See ``Target``; counts and the server's state are no news for a phone."""
        for number, message in enumerate(messages):
            event = json.loads(message.body)
            words = _WORDS.get(event["event"])
            text = words.format(label=event["object"]["label"]) if words else ""
            if text and not self._apprise.notify(body=f"{event['camera']}: {text} ({event['rule']})"):
                if number:
                    return number
                raise TargetError("it was not delivered")
        return len(messages)

    def close(self) -> None:
        """See ``Target``."""
