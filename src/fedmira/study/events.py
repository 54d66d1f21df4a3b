"""What happens in a study, as an observer gets it; engine/events.py has what happens while a run is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmira.engine.events import ClientsDone, Event

if TYPE_CHECKING:
    from fedmira.disk.run_facts import RunFacts
    from fedmira.study.assemble import Prepared
    from fedmira.study.intake import Intake


@dataclass(frozen=True)
class ClientsEncoded(ClientsDone):
    """Clients' examples are token ids."""


@dataclass(frozen=True, eq=False)
class DataRead(Event):
    """All data are read, given to clients, split and encoded."""

    intake: Intake


@dataclass(frozen=True, eq=False)
class StudyPrepared(Event):
    """Every check is passed: the base is loaded, the methods are built."""

    prepared: Prepared


@dataclass(frozen=True)
class StudyBegun(Event):
    """The study's folder has what a resume needs. runs: how many are to be carried out."""

    folder: Path
    runs: int


@dataclass(frozen=True)
class StepBegun(Event):
    """Something that takes a while has begun. what: in words, such as `scoring the untouched base`."""

    what: str


@dataclass(frozen=True)
class RunBegun(Event):
    """One method with one seed begins or goes on. facts: run.json, as this start would write it."""

    folder: Path
    facts: RunFacts


@dataclass(frozen=True)
class AdaptersWritten(ClientsDone):
    """Clients' adapters are in the run's folder."""


@dataclass(frozen=True)
class RunDone(Event):
    """A run is complete. refused: uploads that were not merged."""

    folder: Path
    refused: int


@dataclass(frozen=True)
class Tracked(Event):
    """The runs of a study are in a tracker. command: which shows them or, of wandb, uploads them."""

    tracker: str
    command: str


@dataclass(frozen=True)
class ReportBegun(Event):
    """No run is left to carry out; the report is about to be written."""
