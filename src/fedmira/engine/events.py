"""What happens while a run is carried out, as an observer gets it; a study adds its own in study/events.py.

A new event is a dataclass here or there, the line that raises it, and the reader that wants it: others ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmira.disk.folders import RoundRecord


@dataclass(frozen=True)
class Event:
    """Something that has happened."""


Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore every event."""


@dataclass(frozen=True)
class ClientsDone(Event):
    """A step that goes client by client has finished `done` of `clients`."""

    done: int
    clients: int


@dataclass(frozen=True)
class AnswersWritten(ClientsDone):
    """Clients' answers to their test prompts are written, for their scores."""


@dataclass(frozen=True)
class ClientsTuned(ClientsDone):
    """Clients have fine-tuned what they were sent, after the last round."""


@dataclass(frozen=True)
class RoundDone(Event):
    """A round is durable, applied and measured. record: its line of metrics.jsonl; rounds: of the whole run."""

    record: RoundRecord
    rounds: int


@dataclass(frozen=True)
class StoppedEarly(Event):
    """A run ends after `round` of `rounds`, because its validation loss no longer falls. reason: in words."""

    round: int
    rounds: int
    reason: str
