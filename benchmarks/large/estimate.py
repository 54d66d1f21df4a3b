"""What `--dry-run` expects of a study with a base of 0.5 billion parameters, and what the study takes."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from shapes import WORDS, make_base

import fedmira
from fedmira.study.dry_run import plan_study

CLIENTS, EXAMPLES = 8, 6  # of each client; 4 are trained on
CONFIG = """
seeds: [0]
model: {{base_model: "{base}", dtype: auto, device: {device}}}
lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
data:
  path: "{data}"
  format: prompt_completion
  template: none
  max_length: 512
  clients: {{by: client}}
  split: {{validation: 0.2, test: 0.2}}
federation: {{rounds: 2, participation: 1.0}}
training: {{local_steps: 2, batch_size: 1}}
methods: [mira]
evaluation: {{every: 2, metrics: [loss, exact_match], max_new_tokens: 8}}
output_dir: "{output}"
"""


def make_texts(path: Path) -> Path:
    """Write texts of random words, of 40 to 300 words."""
    stream = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in stream.integers(1, WORDS, count))

    lines = [
        json.dumps({"client": f"c{k}", "prompt": words(int(stream.integers(40, 300))), "completion": " " + words(8)})
        for k in range(CLIENTS)
        for _ in range(EXAMPLES)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def compare_estimate(folder: Path, *, device: str, base: str = "0.5B") -> dict[str, Any]:
    """Return CPU seconds of the dry run's passes, those that it expects of the study, and those that it took."""
    place = folder.resolve()
    text = CONFIG.format(
        base=make_base(base, place), device=device, data=make_texts(place / "texts.jsonl"), output=place / "study"
    )
    path = place / "study.yaml"
    path.write_text(text)
    config = fedmira.load_config(path)
    marks = [time.process_time()]
    began = time.monotonic()
    plan = plan_study(config, overwrite=True, observer=lambda event: marks.append(time.process_time()))
    dry, dry_passes, dry_seconds = (
        time.process_time() - marks[0],
        time.process_time() - marks[-1],
        time.monotonic() - began,
    )
    began, began_cpu = time.monotonic(), time.process_time()
    fedmira.run(config, overwrite=True)
    return {
        "clients": CLIENTS,
        "dry_run": {"cpu": dry, "cpu_of_passes": dry_passes, "seconds": dry_seconds},
        "expected": {"cpu": plan.cpu_seconds, "seconds": plan.total_seconds},
        "study": {"cpu": time.process_time() - began_cpu, "seconds": time.monotonic() - began},
    }
