"""FedMira from Python: a small study, its results as a table, one adapter in PEFT, and then more rounds.

    python examples/api.py

Runs in seconds on the tasks and the base model that come with FedMira, and writes runs/api.
"""

import sys
from pathlib import Path

import pandas as pd
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmira
from fedmira import bundled

BASE = bundled.resolve("bundled:model")  # of your own config: its model.base_model


def scores_of(study: fedmira.Study, metric: str) -> pd.DataFrame:
    """Return the test scores after the last round as a table [clients, methods]."""
    results = study.results
    last = int(results["round"].max())
    rows = results[(results["split"] == "test") & (results["metric"] == metric) & (results["round"] == last)]
    return rows.pivot(index="client", columns="method", values="value")


def answer(adapter: Path, prompt: str) -> str:
    """Return what the base writes with one client's adapter: transformers and PEFT alone, nothing of FedMira."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    asked = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()


def main(folder: Path) -> pd.DataFrame:
    """Run three rounds, look at them, run two more; return the mean test scores before and after."""
    config = fedmira.load_config("demo", [f"output_dir={folder}", "data.clients.first=8", "federation.rounds=3"])
    study = fedmira.run(config, overwrite=True)
    for run in study.runs:
        seconds = sum(record["seconds"] for record in run.rounds)
        print(f"{run.facts.label}: {run.facts.state} after {run.facts.rounds} rounds, {seconds:.1f} s")

    scores = scores_of(study, "word_accuracy")
    print(scores.round(3))

    mira = next(run for run in study.runs if run.facts.method == "mira")
    print("north-1 answers:", answer(mira.adapters("north-1"), "translate sime zovu dugu :"))

    longer = fedmira.resume(study.path, ["federation.rounds=5"])
    means = pd.DataFrame({"3 rounds": scores.mean(), "5 rounds": scores_of(longer, "word_accuracy").mean()})
    print(means.round(3))
    print("report:", longer.path / "report.html")
    return means


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/api"))
