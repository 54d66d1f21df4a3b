"""Run by tracker_program.py: logs to MLflow the lines of its input until it ends, [round, {name: value}] each.

A run of that name that is there already is an earlier start of the same one, and goes to MLflow's trash, which `mlflow
gc` empties.
"""

import importlib
import json
import os
import sys
from typing import Any

STORE = "sqlite:///mlflow.db"


def follow(project: str, name: str, group: str, about: dict[str, Any], mark: str, folder: str) -> None:
    mlflow = importlib.import_module("mlflow")  # an extra, which need not be there when this file is checked
    os.chdir(folder)  # an address of the database by its folder would have to be quoted
    client = mlflow.MlflowClient(tracking_uri=STORE)  # without the user's name and command, which mlflow.start_run adds
    experiment = client.get_experiment_by_name(project)
    known = client.create_experiment(project) if experiment is None else experiment.experiment_id
    for earlier in client.search_runs([known], f"attributes.run_name = '{name}'"):
        client.delete_run(earlier.info.run_id)
    run = client.create_run(known, run_name=name, tags={"group": group}).info.run_id
    for key, value in about.items():
        client.log_param(run, key, value)
    for line in sys.stdin:
        step, values = json.loads(line)
        for key, value in values.items():
            client.log_metric(run, key, value, step=step)
    client.set_terminated(run)
