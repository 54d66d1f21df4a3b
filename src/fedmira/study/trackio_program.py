"""Run by tracker_program.py: logs to trackio the lines of its input, [round, {name: value}] each, until that ends.

A run of that name that is there already is an earlier start of the same one, and is replaced.
"""

import importlib
import json
import sys
from typing import Any


def follow(project: str, name: str, group: str, about: dict[str, Any], mark: str, folder: str) -> None:
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
