"""What a choice costs: the share of a round's training time that clients spend on scoring their candidates.

    python benchmarks/choosing/cost.py [--rounds 4] [--json FILE]

The setting ni-8x4 with 1 and with 5 local epochs (as MIRA's authors have it), a tenth of the examples for validation,
nine candidates scored, or five and a parabola through them. Time is taken inside the same rounds: of the choice, and of
the local phase that it is a part of. Round 1, in which nobody has anybody to meet, is left out. Writes
benchmarks/results/choosing-cost.json, which write.py puts on its page.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fedmira
from fedmira.engine.events import Event, RoundDone
from fedmira.methods.choosing import Choice
from fedmira.study.loading import load_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("ni-8x4.yaml")


class Clocked:
    """Seconds spent on choices, by round."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.rounds: list[dict[str, float]] = []
        self.begin = Choice.begin

    def __call__(self, choice: Choice, *arguments: Any) -> Any:
        began = time.perf_counter()
        found = self.begin(choice, *arguments)
        self.spent += time.perf_counter() - began
        return found

    def observe(self, event: Event) -> None:
        if isinstance(event, RoundDone):
            record = event.record
            self.rounds.append(
                {"choice": self.spent, "training": record.seconds_training, "round": record.seconds,
                 "tokens": record.tokens, "scored": record.scored}
            )  # fmt: skip
            self.spent = 0.0


def measure(epochs: int, scored: str, rounds: int) -> dict[str, Any]:
    """Run a few rounds; return what a choice took of them."""
    clocked = Clocked()
    choice = f"methods=[{{name: mira, lambda: auto, choice: {{scored: {scored}}}}}]"
    with tempfile.TemporaryDirectory() as folder:
        words = ["seeds=[0]", f"output_dir={folder}/study", choice, f"federation.rounds={rounds}"]
        words += [
            f"training.local_epochs={epochs}",
            "data.split={validation: 0.1, test: 0.1}",
            "evaluation.metrics=[loss]",
        ]
        config = load_config(CONFIG, words)
        Choice.begin = lambda choice, *arguments: clocked(choice, *arguments)  # type: ignore[method-assign]
        try:
            fedmira.run(config, observer=clocked.observe)
        finally:
            Choice.begin = clocked.begin  # type: ignore[method-assign]
    later = clocked.rounds[1:]
    total = {key: sum(one[key] for one in later) for key in later[0]}
    return {
        "epochs": epochs,
        "scored": scored,
        "share_of_training": total["choice"] / total["training"],
        "share_of_round": total["choice"] / total["round"],
        "tokens": total["scored"] / total["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "choosing-cost.json")
    options = parser.parse_args()
    rows = [measure(epochs, scored, options.rounds) for epochs in (1, 5) for scored in ("all", "parabola")]
    for row in rows:
        print(row)
    found = {"machine": describe(), "rows": rows}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
