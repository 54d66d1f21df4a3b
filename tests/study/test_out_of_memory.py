"""A run whose memory runs out saves, and goes on with fewer clients in a pass if it is told so."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study

from fedmira.disk.folders import RunFolder
from fedmira.engine import tools
from fedmira.errors import ConfigError, Stopped
from fedmira.study.face import resume, run
from fedmira.study.loading import check


def settings(folder: Path, output: str) -> dict[str, Any]:
    federation = {"rounds": 3, "participation": 1.0, "cohort": "auto"}
    methods = [{"name": "fedavg"}]
    return small_study.settings(
        folder / "base", folder / "data.jsonl", folder / output, methods=methods, federation=federation
    )


def test_it_goes_on_with_fewer_clients_in_a_pass_and_says_what_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_study.save_base(tmp_path / "base")
    small_study.save_data(tmp_path / "data.jsonl")
    whole = run(check(settings(tmp_path, "whole"), "study.yaml"))
    inner, calls = tools.gradients, []

    def short_of_memory(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second step of round 2
            torch.empty(2**46)  # the CPU's allocator says no in its own words
        return inner(*arguments, **options)

    monkeypatch.setattr(tools, "gradients", short_of_memory)
    with pytest.raises(Stopped, match=r"out of memory; finished rounds are saved; .* resume with federation\.cohort=N"):
        run(check(settings(tmp_path, "short"), "study.yaml"))
    monkeypatch.setattr(tools, "gradients", inner)
    only = RunFolder(tmp_path / "short" / "fedavg" / "seed-3")
    assert (only.facts.state, only.facts.cohort, len(only.records())) == ("interrupted", 6, 1)
    for words in ("federation.cohort=7", "federation.cohort=0", "federation.cohort=auto"):
        with pytest.raises(ConfigError, match=r"federation\.cohort, from 6 down"):
            resume(tmp_path / "short", [words])
    shutil.copytree(tmp_path / "short", tmp_path / "again")
    again = resume(tmp_path / "again")  # not told so: passes are what they were, and so are the bits
    assert again.runs[0].facts.cohort == 6
    for name in small_study.CLIENTS:
        one, other = (load_file(study.runs[0].adapters(name) / "adapter_model.safetensors") for study in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)
    caplog.clear()
    done = resume(tmp_path / "short", ["federation.cohort=2"])
    assert "passes of 2 clients now, and of 6 before: results agree up to rounding, and not to the bit" in caplog.text
    assert (only.facts.state, only.facts.cohort) == ("complete", 2)
    for name in small_study.CLIENTS:
        one, other = (load_file(study.runs[0].adapters(name) / "adapter_model.safetensors") for study in (whole, done))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-5)
    caplog.clear()
    resume(tmp_path / "short", ["federation.rounds=4"])
    assert only.facts.cohort == 2, "it stays so"


def test_with_one_client_in_a_pass_other_ways_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_study.save_base(tmp_path / "base")
    small_study.save_data(tmp_path / "data.jsonl")

    def short_of_memory(*arguments: Any, **options: Any) -> Any:
        torch.empty(2**46)

    monkeypatch.setattr(tools, "gradients", short_of_memory)
    raw = settings(tmp_path, "one")
    raw["federation"]["cohort"] = 1
    with pytest.raises(Stopped, match=r"one client already: .* with training\.gradient_checkpointing: true, or"):
        run(check(raw, "study.yaml"))
