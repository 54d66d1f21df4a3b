"""audit.jsonl: a line for every message that left a site or the server: its size and hash, never its content."""

import hashlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmira.deploy.channel import Data
from fedmira.disk.files import append_lines


class Audit:
    """Appends to one file; lines are durable before a message leaves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def note(self, *, to: str, what: str, run: str, number: int, data: Data) -> None:
        """Note a message before it leaves. number: of the round."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "to": to,
            "what": what,
            "run": run,
            "round": number,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with self._lock:
            append_lines(self.path, [json.dumps(line)])


def read_audit(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of audit.jsonl; what a crash has left half-written is left out, and nothing after it."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
