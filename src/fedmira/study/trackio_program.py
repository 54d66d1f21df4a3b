"""A program, not a module: logs to trackio the lines of its input, [round, {name: value}] each, until that ends.

trackers.py runs it. A run of that name that is there already is an earlier start of the same one, and is replaced. The
process of an earlier start may still be writing what it was given: this one waits until that has ended.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

WAIT_S = 60


def follow(project: str, name: str, group: str, about: dict[str, Any]) -> None:
    trackio = importlib.import_module("trackio")  # an extra, which need not be there when this file is checked
    try:
        earlier = [run for run in trackio.Api().runs(project) if run.name == name]
    except ValueError:  # the project does not exist yet
        earlier = []
    for run in earlier:
        run.delete()
    trackio.init(
        project=project,
        name=name,
        group=group,
        config=about,
        resume="never",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in sys.stdin:
        step, values = json.loads(line)
        trackio.log(values, step=step)
    trackio.finish()


if __name__ == "__main__":
    with FileLock(Path(os.environ["TRACKIO_DIR"], ".lock"), mode=0o600, timeout=WAIT_S):
        os.write(1, b"ready\n")  # a closed pipe means that whoever started this is gone: then nothing is changed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # trackio talks, and nobody reads it
        follow(*json.loads(sys.argv[1]))
