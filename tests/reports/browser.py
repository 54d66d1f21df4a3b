"""A headless Chromium driven through pipes by its own protocol: no package, no driver, no socket.

Commands and answers are JSON objects that end with a NUL byte; Chromium reads file descriptor 3 and writes to 4.
Source: Chrome DevTools Protocol, --remote-debugging-pipe.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
PATIENCE_S = 30


def find_browser() -> str | None:
    """Return the path of a Chromium, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Browser:
    """One page. events: what Chromium said unasked, (method, parameters), oldest first."""

    reads: int
    writes: int
    session: str = ""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _rest: bytes = b""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return dict(found["result"])
            self.events.append((found["method"], found["params"]))

    def wait_for(self, method: str) -> dict[str, Any]:
        """Wait until Chromium has said something."""
        while True:
            for place, (said, params) in enumerate(self.events):
                if said == method:
                    del self.events[place]
                    return params
            found = self._receive()
            self.events.append((found["method"], found["params"]))

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Load a page in a window of so many CSS pixels."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def said(self, method: str) -> list[dict[str, Any]]:
        """List what Chromium has said of one kind so far."""
        self.evaluate("0")  # collects what is under way
        return [params for name, params in self.events if name == method]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            if not select.select([self.reads], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE_S} s")
            part = os.read(self.reads, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@contextmanager
def browsing(program: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile and one blank page; end it on leaving."""
    commands, answers = os.pipe(), os.pipe()

    def connect() -> None:  # in the child, between fork and exec
        reads, writes = (
            fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands[0], answers[1])
        )  # out of each other's way
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-extensions",
    )
    process = subprocess.Popen(
        [program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        browser = Browser(answers[0], commands[1])
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.send(f"{domain}.enable")
        yield browser
        browser.session = ""
        browser.send("Browser.close")
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(answers[0])
        os.close(commands[1])
