"""A study small enough to be run for real in a second: a random two-layer Llama, six clients, two groups."""

import importlib
import itertools
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tests import tiny

import fedmira
from fedmira.cli.main import main as cli_main
from fedmira.disk.folders import RunFolder

# Commands import what they need when they run. A forked one finds it here, and need not wait for it again.
for _room in pkgutil.walk_packages(fedmira.__path__, "fedmira."):
    if not _room.name.endswith(("_program", "__main__", "pretrain")):
        importlib.import_module(_room.name)
for _library in ("datasets", "jinja2", "pandas", "rapidfuzz.distance", "scipy.stats"):
    importlib.import_module(_library)

CLIENTS = ("ada", "bo", "cy", "007", "no", "eve")  # of which YAML 1.1 would make a number and a truth value
ROUNDS = 4
METHODS: tuple[Mapping[str, Any], ...] = (
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}},
)


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the base model as transformers does, weights in safetensors."""
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


def settings(base: Path, data: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """The config as a mapping; `changes` replace whole values, or single keys of a section given as a dict."""
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
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
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
            if path.name == "README.md":  # says on which day it was made
                content = b"".join(line for line in content.splitlines(keepends=True) if b"By FedMira" not in line)
            found[f"{name}/{path.parent.name}/{path.name}"] = json.loads(content) if path.suffix == ".json" else content
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


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, negative for the signal that killed it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """`fedmira ARGUMENTS` in a process of its own, forked so that torch need not be imported again (6 seconds)."""

    process: int
    folder: Path

    def signal(self, number: int) -> None:
        os.kill(self.process, number)

    def wait(self) -> Ended:
        _, status = os.waitpid(self.process, 0)
        out, err = ((self.folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return Ended(os.waitstatus_to_exitcode(status), out, err)


def start(*arguments: object, folder: Path | None = None, die_at: int | None = None) -> Command:
    """Start `fedmira ARGUMENTS` in `folder` (default: here). die_at: SIGKILL itself at its n-th fsync or rename."""
    streams = Path(tempfile.mkdtemp(prefix="fedmira-test-"))
    process = os.fork()
    if process:
        return Command(process, streams)
    code = 97
    torch.set_num_threads(1)  # mends torch's pool after the fork; left to several threads at once, they race for it
    try:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        if folder is not None:
            os.chdir(folder)
        if die_at is not None:
            _die_at(die_at)
        sys.argv = ["fedmira", *map(str, arguments)]
        cli_main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*arguments: object, folder: Path | None = None, die_at: int | None = None) -> Ended:
    return start(*arguments, folder=folder, die_at=die_at).wait()


def ended_well(*arguments: object) -> str:
    """Run `fedmira ARGUMENTS`, which must succeed; return what it said on stderr."""
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    return ended.err


def kill_at_random(config: Path, study: Path, *, seed: int, attempts: int, within: int) -> int:
    """Run and resume a study, each time killed at one of its first `within` durable steps; return how often it was.

    In the end it is resumed to its end.
    """
    dice, kills = random.Random(seed), 0
    for _ in range(attempts):
        begun = (study / "config.yaml").is_file()
        ended = command(*(("resume", study) if begun else ("run", config)), die_at=dice.randrange(1, within))
        assert ended.code in (-signal.SIGKILL, 0)
        kills += ended.code == -signal.SIGKILL
    ended_well("resume", study)
    return kills


def _die_at(count: int) -> None:
    """Die just before the count-th moment at which something becomes durable."""
    left = itertools.count(count - 1, -1)

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
