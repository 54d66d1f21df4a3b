"""A program, not a module: gives the lines of its input, [round, {name: value}] each, to a service, until they end.

trackers.py runs it. The process of an earlier start may still be writing what it was given: this one waits until that
has ended. The service talks on standard output, where nobody reads it.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

LOCK = ".lock"


def serve(program: str, folder: str, clear: bool, wait_s: float, request: list[Any]) -> None:
    """Call a service's `follow`, alone in its folder. clear: what is there is of an earlier start of the same run."""
    with FileLock(Path(folder, LOCK), mode=0o600, timeout=wait_s):
        os.write(1, b"ready\n")  # a closed pipe means that whoever started this is gone: then nothing is changed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for path in Path(folder).iterdir() if clear else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        runpy.run_path(program)["follow"](*request)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
