"""`training.gradient_checkpointing`: the same study to the bit, chosen by memory, kept on resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study

from fedmira.disk.folders import RunFolder
from fedmira.engine import cost
from fedmira.errors import ConfigError, ModelError
from fedmira.model import passes
from fedmira.study.face import resume, run
from fedmira.study.loading import check
from fedmira.study.run import Common


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("recompute")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def settings(made: tuple[Path, Path], output: Path, key: Any, *, cohort: Any = "auto") -> dict[str, Any]:
    training = {"gradient_checkpointing": key, "local_steps": 2}
    return small_study.settings(
        *made,
        output,
        methods=[{"name": "local"}],
        training=training,
        federation={"rounds": 2, "participation": 1.0, "cohort": cohort},
    )


def recomputing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take note of every pass whose blocks are computed again."""
    seen: list[int] = []
    inner = passes.recomputing

    def noted(blocks: Any) -> Any:
        seen.append(len(blocks))
        return inner(blocks)

    monkeypatch.setattr(passes, "recomputing", noted)
    return seen


def test_a_study_has_the_same_bits_with_it(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recomputing(monkeypatch)
    outcomes = {}
    for key, count in ((False, 0), (True, 2 * 2)):
        seen.clear()
        run(check(settings(made, tmp_path / str(key), key), "study.yaml"))
        assert len(seen) == count, "passes of two rounds, two steps"
        outcomes[key] = small_study.outcome(tmp_path / str(key))
    assert not small_study.differences(outcomes[False], outcomes[True])


def bytes_of(made: tuple[Path, Path], tmp_path: Path, key: bool) -> int:
    """What one client's pass takes."""
    prepared = Common().prepare(check(settings(made, tmp_path / "x", key), "study.yaml"), lambda event: None)
    (layout, section), *_ = prepared.passes()
    workplace = prepared.workplace
    return cost.plan_cohort(
        workplace.base, layout, workplace.clients, batch_size=section.batch_size, sampled=6, recompute=key
    ).bytes_each


@pytest.mark.slow
def test_auto_recomputes_where_more_clients_fit_and_a_resume_does_as_before(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, again = bytes_of(made, tmp_path, False), bytes_of(made, tmp_path, True)
    assert 3.5 * plain // again > 3, "more clients fit where blocks are computed again"
    for free, chosen in ((7 * plain, False), (int(3.5 * plain), True)):
        needed = int(free / cost.SHARE) + 2 * cost.CHUNK_BYTES + 16
        monkeypatch.setattr(cost, "_free_bytes", lambda device, needed=needed: needed)
        study = run(check(settings(made, tmp_path / str(chosen), "auto"), "study.yaml"))
        facts = study.runs[0].facts
        assert facts.recompute is chosen
        assert facts.cohort == (min(6, free // again) if chosen else 6)
    seen = recomputing(monkeypatch)
    monkeypatch.setattr(cost, "_free_bytes", lambda device: 1 << 40)
    resume(tmp_path / "True", ["federation.rounds=3"])
    assert seen, "a resumed run recomputes as it did"
    assert RunFolder(tmp_path / "True" / "local" / "seed-3").facts.recompute is True


def test_a_given_cohort_that_does_not_fit_is_recomputed_and_one_that_does_is_not(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = bytes_of(made, tmp_path, False)
    for free, chosen in ((3 * plain, False), (int(1.95 * plain), True)):
        needed = int(free / cost.SHARE) + 2 * cost.CHUNK_BYTES + 16
        monkeypatch.setattr(cost, "_free_bytes", lambda device, needed=needed: needed)
        config = check(settings(made, tmp_path / "y", "auto", cohort=2), "study.yaml")
        workplace = Common().prepare(config, lambda event: None).workplace
        assert (workplace.cohort, workplace.recompute) == (2, chosen)


def test_another_value_is_refused_by_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: found 'yes'"):
        check(settings(made, tmp_path / "z", "yes"), "study.yaml")


# ---------------------------------------------------------------- a batch that does not fit


def room_for(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Leave so many bytes for one client's pass."""
    needed = int(free / cost.SHARE) + 2 * cost.CHUNK_BYTES + 16
    monkeypatch.setattr(cost, "_free_bytes", lambda device: needed)


def test_a_batch_that_does_not_fit_is_cut_and_has_the_gradient_of_the_whole(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = bytes_of(made, tmp_path, True)
    whole = run(check(settings(made, tmp_path / "whole", True), "study.yaml"))
    room_for(monkeypatch, 0.8 * again)
    cut = run(check(settings(made, tmp_path / "cut", True), "study.yaml"))
    facts = cut.runs[0].facts
    assert (facts.cohort, facts.at_once) == (1, 1)
    assert whole.runs[0].facts.at_once is None
    for path in sorted(whole.path.glob("*/seed-3/adapters/*/adapter_model.safetensors")):
        other = load_file(cut.path / path.relative_to(whole.path))
        for name, value in load_file(path).items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(cost, "_free_bytes", lambda device: 1 << 40)
    resume(cut.path, ["federation.rounds=3"])
    assert RunFolder(cut.path / "local" / "seed-3").facts.at_once == 1


def test_an_example_that_does_not_fit_says_how_long_one_may_be(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Common().prepare(check(settings(made, tmp_path / "x", True), "study.yaml"), lambda event: None)
    (layout, _), *_ = prepared.passes()
    clients, base = prepared.workplace.clients, prepared.workplace.base
    longest = max(len(example.ids) for client in clients for example in client.train)
    own = 5 * layout.size * 4
    one = cost.plan_cohort(base, layout, clients, batch_size=1, sampled=1, recompute=True).bytes_each - own
    room_for(monkeypatch, own + one * 0.7)
    words = rf"an example of {longest} tokens needs .* about (\d+) tokens would fit \(data.max_length=\1\)$"
    with pytest.raises(ModelError, match=words) as caught:
        Common().prepare(check(settings(made, tmp_path / "x", True), "study.yaml"), lambda event: None)
    found = int(str(caught.value).rpartition("=")[2].rstrip(")"))
    assert found == pytest.approx(0.7 * longest, abs=1.5)
    with pytest.raises(ModelError, match="gradient_checkpointing: true needs less"):
        Common().prepare(check(settings(made, tmp_path / "x", False), "study.yaml"), lambda event: None)


def test_no_pass_is_made_that_would_not_fit(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps everything is never measured on more examples than have room."""
    prepared = Common().prepare(check(settings(made, tmp_path / "x", True), "study.yaml"), lambda event: None)
    (layout, section), *_ = prepared.passes()
    plain, again = bytes_of(made, tmp_path, False), bytes_of(made, tmp_path, True)
    sizes: list[int] = []
    inner = cost.gradients

    def noted(base: Any, adapters: Any, batch: Any, **options: Any) -> Any:
        sizes.append(int(batch.lengths.sum()))
        return inner(base, adapters, batch, **options)

    monkeypatch.setattr(cost, "gradients", noted)
    room_for(monkeypatch, (plain + again) / 2)
    plan = cost.plan_cohort(
        prepared.workplace.base, layout, prepared.workplace.clients, batch_size=section.batch_size, sampled=6
    )
    assert plan.recompute
    assert plan.examples is None, "with recomputation the whole batch fits"
    assert plan.bytes_each == pytest.approx(again, rel=0.1)
    assert sorted(sizes) == sizes
    longest = sorted((len(e.ids) for client in prepared.workplace.clients for e in client.train), reverse=True)
    assert sizes[-1] < sum(longest[: section.batch_size])
