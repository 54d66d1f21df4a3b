"""The examples run as they are written, and the bare loop and the engine are the same algorithm."""

from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from tests.pages import ROOT, load_script

import fedmira
from fedmira import bundled

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load_example(name: str) -> ModuleType:
    return load_script(f"examples/{name}.py")


@pytest.mark.slow
def test_the_bare_loop_gives_the_engines_adapters_to_1e_5(tmp_path: Path) -> None:
    bare = load_example("bare_loop")
    config = fedmira.load_config(
        "demo",
        [
            f"output_dir={tmp_path / 'study'}",
            f"federation.rounds={bare.ROUNDS}",
            f"training.local_steps={bare.STEPS}",
            f"training.batch_size={bare.BATCH}",
            f"training.learning_rate={bare.LR}",
            f"training.eps={bare.EPS}",
            f"methods=[{{name: mira, lambda: {bare.COUPLING}, graph: {{kind: groups, column: family}}}}]",
            "evaluation.metrics=[loss]",
        ],
    )
    (run,) = fedmira.run(config).runs
    alone = bare.mira(str(bundled.MODEL_PATH), str(bundled.TASKS_PATH))
    assert len(alone) == 16
    for client, adapter in alone.items():
        ours = load_file(run.adapters(client) / "adapter_model.safetensors")
        assert len(ours) == len(adapter)
        for name, value in adapter.items():
            assert (ours[name.replace(".default", "")] - value).abs().max() < 1e-5


@pytest.mark.slow  # 17 s; the bare loop and the quickstart stay
def test_the_example_in_python_ends_with_mira_ahead_of_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example("api")
    means = example.main(tmp_path / "api")
    assert means.shape == (3, 2)
    assert means.loc["mira", "5 rounds"] > means.loc["local", "5 rounds"]
    told = capsys.readouterr().out
    assert "mira: complete after 3 rounds" in told
    assert "north-1 answers: " in told
    study = fedmira.Study(tmp_path / "api")
    assert [len(run.rounds) for run in study.runs] == [5, 5, 5]
    assert example.scores_of(study, "word_accuracy").shape == (8, 3)


@pytest.mark.parametrize("name", [pytest.param("quickstart", marks=pytest.mark.slow), "own_data"])
def test_an_example_config_runs_to_a_report_and_an_adapter_per_client(name: str, tmp_path: Path) -> None:
    length = "training.local_steps=1" if name == "quickstart" else "training.local_epochs=1"
    short = ["federation.rounds=2", length]
    config = fedmira.load_config(EXAMPLES / f"{name}.yaml", [f"output_dir={tmp_path / name}", *short])
    study = fedmira.run(config)
    assert (study.path / "report.html").is_file()
    for run in study.runs:
        assert run.facts.state == "complete"
        assert len(list((run.path / "adapters").iterdir())) == run.facts.clients


def test_the_bundled_configs_are_valid() -> None:
    assert fedmira.bundled.presets() == ["demo", "mira-paper"]
    for name in fedmira.bundled.presets():
        fedmira.load_config(name)
