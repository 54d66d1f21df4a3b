"""Rounds, memory, disk and checkpoints against the number of clients: 10 to 10,000 with a GPT-2 adapter each.

    python benchmarks/scale/clients.py [--clients 10 100 1000 10000] [--rounds 6] [--sampled 8] [--full] [--json FILE]

Every row is a real study in a separate process, by the Python API: tiny texts that this script makes, a GPT-2 with
random weights whose adapter has GPT-2 small's size (c_attn, r 8, 12 layers: 294,912 parameters, 1.18 MB a row) and
whose vocabulary and MLPs are small, so that a round takes seconds; method mira, families of 10 clients. The process is
watched from outside (/proc/PID/status every 20 ms); memory is given above that of a process which only loads the base.
CPU seconds of a round are there because seconds mean little where other programs run.
--full adds, at the largest K: the same run killed (SIGKILL) in a round and resumed by `fedmira resume`, compared with
the first to the bit; fedavg (one shared row); mira on the authors' random graph.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_inner": 64, "vocab_size": 64, "n_positions": 32}
RANK, FAMILY, EXAMPLES = 8, 10, 3
GROUPS = {"name": "mira", "lambda": 0.1, "graph": {"kind": "groups", "column": "family"}}
RANDOM = {"name": "mira", "lambda": 0.1, "graph": {"kind": "random"}}


def make_base(folder: Path) -> Path:
    """Save the base and a tokenizer that knows w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, utils

    utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=None, eos_token_id=0)).save_pretrained(folder)
    words = {"<eos>": 0, **{f"w{k}": k for k in range(1, GPT2["vocab_size"])}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="w1").save_pretrained(folder)
    return folder


def make_data(path: Path, clients: int) -> Path:
    """Write three short examples per client; families of ten share their words."""
    with path.open("w", encoding="utf-8") as file:
        for k in range(clients):
            for place in range(EXAMPLES):
                words = [f"w{1 + (7 * (k // FAMILY) + 3 * place + step) % 63}" for step in range(3)]
                row = {"prompt": " ".join(words[:2]), "completion": words[2]}
                file.write(json.dumps({**row, "client": f"c{k:05d}", "family": f"f{k // FAMILY}"}) + "\n")
    return path


def make_config(folder: Path, base: Path, data: Path, *, clients: int, method: Mapping[str, Any], options: Any) -> Path:
    """Write the config of one study."""
    raw = {
        "seeds": [0],
        "output_dir": str(folder / "study"),
        "model": {"base_model": str(base), "dtype": "float32", "device": "cpu"},
        "lora": {"r": RANK, "lora_alpha": 16, "target_modules": ["c_attn"]},
        "data": {
            "path": str(data),
            "format": "prompt_completion",
            "template": "none",
            "max_length": 16,
            "split": {"validation": 0.34, "test": 0.0},
            "clients": {"by": "client", "groups": "family"},
        },
        "federation": {"rounds": options.rounds, "participation": options.sampled / clients, "cohort": options.sampled},
        "training": {"local_steps": 4, "batch_size": 2, "learning_rate": 0.001},
        "methods": [method],
        # one shared row: a validation scores every client, and is not a cost of a round
        "evaluation": {"metrics": ["loss"], "every": options.rounds if method["name"] == "fedavg" else 1},
    }
    folder.mkdir(parents=True)
    path = folder / "config.json"  # JSON is YAML
    path.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the process that is watched


def child(config: str) -> None:
    """Run a study and print when each thing happened; with an empty name, load nothing but the base."""
    import fedmira
    from fedmira.engine import run as rounds
    from fedmira.engine.events import Event, RoundDone
    from fedmira.engine.ledger import commit
    from fedmira.study.events import RunBegun, RunDone, StepBegun

    def say(what: str, **facts: Any) -> None:
        print(json.dumps({"what": what, "time": time.monotonic(), **facts}), flush=True)

    if config.startswith("base:"):
        from fedmira.model.base.load import load_base

        base = load_base(config.removeprefix("base:"), dtype="float32", device="cpu", targets=["c_attn"])
        say("base", parameters=sum(one.numel() for one in base.model.parameters()))
        time.sleep(1)
        return
    loaded = fedmira.load_config(config)
    run: dict[str, Path] = {}
    saving: list[float] = []

    def timed(*arguments: Any) -> None:
        began = time.monotonic()
        commit(*arguments)
        saving.append(time.monotonic() - began)

    patch.object(
        rounds, "commit", timed
    ).start()  # a round's record has the seconds of its checkpoint, and does not tell them apart

    def observer(event: Event) -> None:
        match event:
            case StepBegun():
                say("start")
            case RunBegun():
                run["folder"] = event.folder
                say("run")
            case RoundDone(record=record):
                place = run["folder"] / "checkpoints" / f"round-{record.round:06d}"
                size = sum(path.stat().st_size for path in place.iterdir())
                say(
                    "round",
                    training=record.seconds_training,
                    merge=record.seconds_merge,
                    cpu=time.process_time(),
                    saving=saving[-1],
                    whole=record.seconds,
                    checkpoint_bytes=size,
                    full=json.loads((place / "manifest.json").read_bytes())["full"],
                    answered=len(record.answered),
                )
            case RunDone():
                say("complete")

    say("begin")
    fedmira.run(loaded, observer=observer)
    say("end")


# ---------------------------------------------------------------- watching it


def status(pid: int | str) -> dict[str, int]:
    """RssAnon and RssFile of a process now, in bytes; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = [line.split() for line in lines if line.startswith(("RssAnon", "RssFile"))]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in pairs}


def watch(config: str) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Run a child; return what it said, and samples of its memory with their time."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", config]
    samples: list[dict[str, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None

        def sample() -> None:
            while process.poll() is None:
                if found := status(process.pid):
                    samples.append({"time": time.monotonic(), **found})
                time.sleep(0.02)

        thread = threading.Thread(target=sample)
        thread.start()
        said = [json.loads(line) for line in process.stdout if line.startswith("{")]
        process.wait()
        thread.join()
    if process.returncode:
        raise SystemExit(f"{config}: the study ended with exit code {process.returncode}")
    return said, samples


def between(said: list[dict[str, Any]], first: str, last: str) -> float:
    """Seconds from the first time something was said to the last time another was."""
    begin = next(one["time"] for one in said if one["what"] == first)
    return max(one["time"] for one in said if one["what"] == last) - begin


def peaks(samples: list[dict[str, float]], start: float, stop: float) -> dict[str, float]:
    chosen = [one for one in samples if start <= one["time"] <= stop] or [{}]
    return {name: max(one.get(name, 0.0) for one in chosen) for name in ("RssAnon", "RssFile")}


def measure(name: str, config: Path, clients: int, alone: Mapping[str, float]) -> dict[str, Any]:
    """Run one study and return its figures; bytes and seconds."""
    said, samples = watch(str(config))
    rounds = [one for one in said if one["what"] == "round"]
    moments = [next(one["time"] for one in said if one["what"] == "run"), *(one["time"] for one in rounds)]
    lasted = [after - before for before, after in itertools.pairwise(moments)][1:]  # the first warms up
    at = {what: next(one["time"] for one in said if one["what"] == what) for what in ("begin", "start", "run")}
    in_rounds = peaks(samples, at["run"], moments[-1])
    whole = peaks(samples, 0.0, float("inf"))
    study = config.parent / "study"
    deltas = [one for one in rounds if not one["full"]] or rounds
    median = statistics.median
    return {
        "name": name,
        "clients": clients,
        "sampled": rounds[0]["answered"],
        "round_s": median(lasted),
        "round_spread_s": [min(lasted), max(lasted)],
        "round_cpu_s": median(after["cpu"] - before["cpu"] for before, after in itertools.pairwise(rounds)),
        "training_s": median(one["training"] for one in rounds[1:]),
        "merge_s": median(one["merge"] for one in rounds[1:]),
        "measuring_s": median(one["whole"] - one["training"] - one["merge"] - one["saving"] for one in rounds[1:]),
        "saving_s": median(one["saving"] for one in rounds[1:]),
        "prepare_s": at["start"] - at["begin"],
        "score_start_s": at["run"] - at["start"],
        "export_s": said_gap(said, "round", "complete"),
        "report_s": between(said, "complete", "end"),
        "anon_rounds": in_rounds["RssAnon"] - alone["RssAnon"],
        "file_rounds": in_rounds["RssFile"] - alone["RssFile"],
        "anon_peak": whole["RssAnon"] - alone["RssAnon"],
        "file_peak": whole["RssFile"] - alone["RssFile"],
        "checkpoint_bytes": median(one["checkpoint_bytes"] for one in deltas),
        "changed_bytes": (1 if name == "fedavg" else median(one["answered"] for one in deltas)) * 294_912 * 4,
        "study_bytes": disk(study),
        "checkpoints_bytes": sum(disk(path) for path in study.glob("*/*/checkpoints")),
    }


def said_gap(said: list[dict[str, Any]], before: str, after: str) -> float:
    """Seconds from the last time something was said to the first time another was."""
    last = max(one["time"] for one in said if one["what"] == before)
    return next(one["time"] for one in said if one["what"] == after) - last


def disk(folder: Path) -> int:
    """Bytes on disk below a folder; a file with several names counts once."""
    found = {path.stat().st_ino: path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


def shown(row: Mapping[str, Any]) -> str:
    """One line for a reader."""
    mb = 1e6
    return (
        f"{row['name']} K = {row['clients']}: round {row['round_s']:.2f} s (training {row['training_s']:.2f}, merge "
        f"{row['merge_s']:.3f}, measuring {row['measuring_s']:.2f}, saving {row['saving_s']:.2f}; CPU "
        f"{row['round_cpu_s']:.2f}); start {row['prepare_s']:.1f} + scoring {row['score_start_s']:.1f} s; adapters "
        f"{row['export_s']:.1f} s; report {row['report_s']:.1f} s; rounds: RssAnon +{row['anon_rounds'] / mb:.0f} MB, "
        f"RssFile +{row['file_rounds'] / mb:.0f} MB (whole run +{row['anon_peak'] / mb:.0f}, "
        f"+{row['file_peak'] / mb:.0f}); checkpoint {row['checkpoint_bytes'] / mb:.2f} MB for "
        f"{row['changed_bytes'] / mb:.2f} MB changed; study {row['study_bytes'] / 1e9:.2f} GB"
    )


# ---------------------------------------------------------------- killed and resumed


def files(study: Path) -> Iterator[tuple[str, bytes]]:
    """What a study found, to the bit: rows of every client and every number but seconds."""
    for path in sorted(study.glob("*/*/adapters/*/adapter_model.safetensors")):
        yield str(path.relative_to(study)), path.read_bytes()
    for path in sorted(study.glob("*/*/results.csv")):
        yield str(path.relative_to(study)), path.read_bytes()
    for path in sorted(study.glob("*/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        plain = [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]
        yield str(path.relative_to(study)), json.dumps(plain).encode()


def kill_and_resume(config: Path, whole: Path, *, after: int) -> dict[str, Any]:
    """SIGKILL in the round after `after`, resume, and compare with a run that was not stopped."""
    study = config.parent / "study"
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "-m", "fedmira", "run", str(config), "-q"], env=quiet) as process:
        while process.poll() is None:
            done = [path.read_bytes().count(b"\n") for path in study.glob("*/*/metrics.jsonl")]
            if done and done[0] >= after:
                time.sleep(0.3)  # into the next round
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "fedmira", "resume", str(study), "-q"], check=True, env=quiet)
    pairs = zip(files(study), files(whole), strict=True)
    different = [one[0] for one, other in pairs if one != other]
    return {"name": "resume", "killed_after": after, "resume_s": time.monotonic() - began, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sampled", type=int, default=8)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=None, help="where the studies go; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    work = Path(tempfile.mkdtemp(prefix="fedmira-scale-", dir=options.folder))
    rows: list[dict[str, Any]] = []
    try:
        base = make_base(work / "base")
        _, samples = watch(f"base:{base}")
        alone = peaks(samples, 0.0, float("inf"))
        print(f"the base alone: RssAnon {alone['RssAnon'] / 1e6:.0f} MB, RssFile {alone['RssFile'] / 1e6:.0f} MB")

        def run(name: str, method: Mapping[str, Any], clients: int, data: Path) -> Path:
            folder = work / f"{name}-{clients}"
            config = make_config(folder, base, data, clients=clients, method=method, options=options)
            rows.append(measure(name, config, clients, alone))
            print(shown(rows[-1]), flush=True)
            return folder / "study"

        for clients in options.clients:
            data = make_data(work / f"data-{clients}.jsonl", clients)
            study = run("mira", GROUPS, clients, data)
            if not options.full or clients != max(options.clients):
                shutil.rmtree(study)
                continue
            folder = work / "killed"
            config = make_config(folder, base, data, clients=clients, method=GROUPS, options=options)
            row = {**kill_and_resume(config, study, after=options.rounds // 2), "clients": clients}
            rows.append(row)
            print(
                f"killed after round {row['killed_after']}, resumed in {row['resume_s']:.0f} s: differs from the run "
                f"that was not stopped in {len(row['different'])} files",
                flush=True,
            )
            shutil.rmtree(folder)
            shutil.rmtree(study)
            shutil.rmtree(run("fedavg", {"name": "fedavg"}, clients, data))
            shutil.rmtree(run("mira, random graph", RANDOM, clients, data))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        result = {"name": "scale/clients", "base_alone": alone, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
