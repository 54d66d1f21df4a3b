"""How a command ends, whenever it is stopped and wherever its output goes.

Ctrl-C and SIGTERM end with one line that names the command which goes on, and a stream that cannot be written (a closed
pipe, a full disk, letters that its encoding does not have) never changes the exit code of work that is done.
"""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from fedmira.errors import Stopped, resume_command

INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"  # a live bar hides it


class Terminated(SystemExit):
    """SIGTERM was received; unlike other exits it is reported as a stop."""


class Course:
    """What a signal handler has to know of the command under way, which gives it no argument.

    study: the folder where finished rounds are saved; None before a study was begun. again: the words of the command
    that goes on, where that is not `resume`; None = it is.
    """

    study: Path | None = None
    again: Sequence[str] | None = None
    interrupted = False

    @property
    def command(self) -> str | None:
        """Return the command that goes on; None before a study was begun."""
        if self.again is not None:
            return shlex.join(self.again)
        return None if self.study is None else resume_command(self.study)

    def how_to_go_on(self) -> str:
        """Say what is saved and which command goes on."""
        if self.command is None:
            return "no study was begun"
        return f"finished rounds are saved; continue with: {self.command}"


course = Course()


def catch_signals() -> None:
    """Let Ctrl-C raise KeyboardInterrupt and SIGTERM raise Terminated; a signal that is ignored stays ignored."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _terminate)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt; during an import end at once.

    There libraries turn the exception into others, or swallow it. What a run has saved survives any end.
    """
    course.interrupted = True
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End a run that a scheduler stops as Ctrl-C does: SystemExit passes every `except Exception`."""
    raise Terminated(Stopped.exit_code)


def leave() -> NoReturn:
    """End this process now, with the line and the exit code of Ctrl-C."""
    cursor = _SHOW_CURSOR if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{cursor}interrupted: {course.how_to_go_on()}\n".encode(errors="backslashreplace"))
    os._exit(INTERRUPTED)


class Steady:
    """A text stream whose writes do not fail: once it cannot be written, what follows is dropped.

    failed: the reason, once there is one.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed: OSError | ValueError | None = None
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        if self.failed is None:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.failed is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        """Remember why, and let what the stream still holds go nowhere: Python writes it out when it ends."""
        self.failed = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def steady_streams() -> None:
    """Make standard output and standard error steady; one that is closed goes nowhere."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # else the next file that is opened gets this number, and what libraries print there
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = os.fdopen(number, "w", closefd=False)
        if not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))


def output_failed() -> bool:
    """Can standard output no longer be written? Then nobody waits for what comes next."""
    return isinstance(sys.stdout, Steady) and sys.stdout.failed is not None


def flush_streams() -> None:
    """Write out what is left, and warn where standard output could not be written; a reader that left is no fault."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reason = sys.stdout.failed if isinstance(sys.stdout, Steady) else None
    if reason is not None and getattr(reason, "errno", None) != errno.EPIPE:
        why = reason.strerror if isinstance(reason, OSError) else reason
        print(f"warning: standard output could not be written ({why}): it is not complete", file=sys.stderr)
        sys.stderr.flush()
