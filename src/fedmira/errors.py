"""Errors a user can act on: what was found, what was allowed, where it came from, what to do.

Every class carries the exit code of the command line: 2 bad input, nothing was started;
3 stopped and can be resumed. Anything that is not a FedMiraError is a bug of ours and exits with 1.
"""

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path


class FedMiraError(Exception):
    """Base of all errors that FedMira raises on purpose."""

    exit_code = 2


class ConfigError(FedMiraError):
    """One or more faults in a config, all reported together."""

    def __init__(self, faults: Sequence[str], source: str = "config") -> None:
        self.faults = list(faults)
        self.source = source
        count = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class DataError(FedMiraError):
    """Data that cannot be read, or clients that cannot be formed from it."""


class ModelError(FedMiraError):
    """A base model that cannot be loaded or cannot be used."""


class ShapeError(FedMiraError):
    """Rows, weights or ids whose shapes do not agree."""


class MethodError(FedMiraError):
    """A method that is unknown, or whose settings cannot work on this federation."""


class WireError(FedMiraError):
    """A message that the gate refuses; `reason` is one of the wire's fixed words (contracts)."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class StoreError(FedMiraError):
    """A run folder that is missing, damaged, in use, or cannot be written."""


class Stopped(FedMiraError):
    """A run that stopped part-way; what was saved is intact and `fedmira resume` goes on."""

    exit_code = 3


def resume_command(path: Path) -> str:
    """Return the command that goes on with a study or a run, as a shell takes it."""
    return shlex.join(["fedmira", "resume", str(path)])


def nearest(word: str, allowed: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed word, or an empty string."""
    match = get_close_matches(word.lower(), [name.lower() for name in allowed], n=1, cutoff=0.5)
    if not match:
        return ""
    original = next(name for name in allowed if name.lower() == match[0])
    return f" (did you mean '{original}'?)"
