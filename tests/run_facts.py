"""What run.json says of a run that no test has carried out."""

from dataclasses import replace
from typing import Any

from fedmira.disk.run_facts import SCHEMA, RunFacts

BEGUN = RunFacts(
    schema=SCHEMA,
    state="running",
    method="local",
    label="local",
    settings={},
    seed=3,
    rounds=2,
    clients=6,
    sampled=3,
    personal=True,
    base_model="base",
    template="none",
    base_fingerprint="0" * 64,
    architecture="LlamaForCausalLM",
    layout_fingerprint="1" * 64,
    graph_sha256=None,
    parameters=8,
    dtype="float32",
    device="cpu",
    cohort=2,
    threads=1,
    pull_percent=None,
    versions={"fedmira": "0.1.0"},
    command=["fedmira", "run", "study.yaml"],
    started="2026-01-02T03:04:05+00:00",
)


def run_facts(**changes: Any) -> RunFacts:
    """Return the facts of a run of `local` that has begun, or of another."""
    return replace(BEGUN, **changes)
