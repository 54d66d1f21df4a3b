"""A study small enough to be run for real in a second: a random two-layer Llama, six clients, two groups."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedmira.runs import RunFolder
from tests import tiny

CLIENTS = ("ada", "bo", "cy", "007", "no", "eve")  # of which YAML 1.1 would make a number and a truth value
ROUNDS = 4
METHODS: tuple[Mapping[str, Any], ...] = (
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}},
)


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the base model as transformers does, weights in safetensors."""
    import torch

    tiny.model("llama", dtype=torch.float32, seed=seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_data(path: Path, *, examples: int = 10, extra: Sequence[str] = ()) -> Path:
    """Write prompt/completion rows: every client its own words; `extra` goes into one prompt and answer each."""
    stream = np.random.default_rng(7)
    rows = []
    for place, client in enumerate(CLIENTS):
        for index in range(examples + place % 2):
            words = [f"w{word}" for word in stream.integers(2, tiny.VOCABULARY, 6)]
            row = {"prompt": " ".join(words[:4]), "completion": " ".join(words[4:])}
            if extra:
                row = {"prompt": f"{extra[index % len(extra)]} {row['prompt']}", "completion": f"{row['completion']} "}
                row["completion"] += extra[-1 - index % len(extra)]
            rows.append({**row, "client": client, "group": "even" if place % 2 == 0 else "odd"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The study's config as a mapping; `changes` replace whole sections, or single keys of a section given as a dict."""
    raw: dict[str, Any] = {
        "seeds": [3],
        "output_dir": str(output),
        "model": {"base_model": str(base), "dtype": "float32", "device": "cpu"},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "path": str(data),
            "format": "prompt_completion",
            "template": "none",
            "max_length": 12,
            "split": {"validation": 0.2, "test": 0.2},
            "clients": {"by": "client", "groups": "group"},
        },
        "federation": {"rounds": ROUNDS, "participation": 0.5, "cohort": 2},
        "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.05},
        "methods": [dict(method) for method in METHODS],
        "evaluation": {"metrics": ["loss", "exact_match"], "max_new_tokens": 2},
    }
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    return raw


def save_config(path: Path, raw: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(raw), sort_keys=False), encoding="utf-8")
    return path


def run_folders(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("*/seed-*/run.json"))


def outcome(study: Path) -> dict[str, Any]:
    """Everything a study found, to the bit: adapters' bytes, results.csv, metrics.jsonl without its seconds."""
    found: dict[str, Any] = {}
    for run in run_folders(study):
        name = f"{run.parent.name}/{run.name}"
        for path in sorted((run / "adapters").glob("*/*")):
            content = path.read_bytes()
            # adapter_config.json lists target_modules as a set: its order is PEFT's and means nothing
            found[f"{name}/{path.parent.name}/{path.name}"] = json.loads(content) if path.suffix == ".json" else content
            if path.suffix == ".json":
                found[f"{name}/{path.parent.name}/{path.name}"]["target_modules"].sort()
        found[f"{name}/results.csv"] = (run / "results.csv").read_text(encoding="utf-8")
        found[f"{name}/metrics.jsonl"] = [
            {key: value for key, value in record.items() if not key.startswith("seconds")}
            for record in RunFolder(run).records()
        ]
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what differs, so that a failing test says where and not with a megabyte of bytes."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def has_traceback(text: str) -> bool:
    return re.search(r"^Traceback|^bug:", text, re.MULTILINE) is not None
