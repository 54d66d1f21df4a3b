"""Run by tracker_program.py: logs to wandb, offline, the lines of its input until it ends, [round, {name: value}] each.

The folder has no earlier start of the same run. What `wandb sync` uploads later has the same id after every start, so
that it is one run there too.
"""

import importlib
import json
import os
import sys
from typing import Any


def follow(project: str, name: str, group: str, about: dict[str, Any], mark: str, folder: str) -> None:
    wandb = importlib.import_module("wandb")  # an extra, which need not be there when this file is checked
    os.chdir(folder)
    run = wandb.init(
        project=project,
        id=mark,
        name=name,
        group=group,
        config=about,
        mode="offline",
        dir=".",
        # no output, source, git state, list of packages, name of the machine or figures of it
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
    )
    for line in sys.stdin:
        step, values = json.loads(line)
        run.log(values, step=step)
    run.finish()
