"""What a federation costs beside the simulation: seconds of a round, bytes on the socket, memory of the server.

    python benchmarks/federation/costs.py [--sizes 1 12 200] [--json FILE] [--page FILE] [--only-page]

A server and three sites on this machine, over mutual TLS, started by the commands that organisations would type. Sites
reach the server through a forwarder that counts the bytes of their connections; the server's processes are sampled.
Adapters of about SIZES MB of float32; the base is random and small, so that little is computed. The same study is run
as a simulation. Writes benchmarks/results/federation.json and docs/results/federation.md; needs 10 GB of free disk.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from counting import ENGINE, JOB, OURS, SAMPLE_S, Forwarder, Watch

from fedmira.deploy.audit import read_audit
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.settings import installed_versions, read_agreement
from fedmira.disk.folders import RunFolder, StudyFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe
from stored import table

ROOT = Path(__file__).parents[2]
SITES = ("north", "south", "west")
WORDS = 64  # of the vocabulary
EXAMPLES = 8  # of each site
MB = 1e6


@dataclass(frozen=True)
class Size:
    """A base, and the rank of all its linear layers, that give an adapter of a size."""

    width: int
    depth: int
    rank: int
    rounds: int

    @property
    def row(self) -> int:
        """Numbers of an adapter: q, k, v, o are [d, d], gate and up [2d, d], down [d, 2d]."""
        return self.depth * self.rank * (4 * 2 * self.width + 3 * 3 * self.width)


SIZES = {1: Size(128, 2, 58, 10), 12: Size(256, 4, 172, 6), 200: Size(1024, 6, 480, 3)}  # MB -> what gives them


# ---------------------------------------------------------------- the study


def save_base(folder: Path, size: Size) -> None:
    """Write a random Llama and a tokenizer of one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1} | {f"w{word}": word for word in range(2, WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def save_rows(folder: Path) -> None:
    """Write each site's rows, and all of them in one file for the simulation."""
    draw = random.Random(0)
    whole = []
    for site in SITES:
        rows = []
        for _ in range(EXAMPLES):
            words = [f"w{draw.randrange(2, WORDS)}" for _ in range(8)]
            rows.append({"prompt": " ".join(words[:5]), "completion": " ".join(words[5:]), "client": site})
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{site}.jsonl").write_text("".join(lines), encoding="utf-8")
        whole += lines
    (folder / "all.jsonl").write_text("".join(whole), encoding="utf-8")


def save_study(folder: Path, size: Size) -> Path:
    """Write the study's config: MIRA, everyone in each round, one local step."""
    study = {
        "seeds": [0],
        "output_dir": str(folder / "simulation"),
        "model": {"base_model": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "lora": {"r": size.rank, "lora_alpha": size.rank, "target_modules": "all-linear"},
        "data": {
            "path": str(folder / "all.jsonl"),
            "format": "prompt_completion",
            "template": "none",
            "max_length": 16,
            "split": {"validation": 0.25, "test": 0.25},
            "clients": {"by": "client"},
        },
        "federation": {"rounds": size.rounds, "participation": 1.0, "cohort": 1},
        "training": {"local_steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        "methods": [{"name": "mira", "lambda": 0.25, "graph": {"kind": "uniform"}}],
        "evaluation": {"every": 1, "metrics": ["loss"]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


# ---------------------------------------------------------------- running it


def fedmira(*words: object) -> list[str]:
    return [sys.executable, "-m", "fedmira", *map(str, words)]


def found(folder: Path, study: Path, server_port: int, sites_port: int) -> ServerFolder:
    """Make the federation. Sites connect to another port than the server's, where the forwarder is."""
    federation = ServerFolder(folder / "federation")
    place = ("--server", f"localhost:{server_port}", "--sites", ",".join(SITES))
    terms = ("--quorum", 1, "--config", study)
    subprocess.run(fedmira("federation", "init", federation.path, *place, *terms), check=True, capture_output=True)
    for name in SITES:
        site = federation.site(name)
        settings = yaml.safe_load(site.settings.read_text(encoding="utf-8"))
        settings["data"]["path"] = str(folder / f"{name}.jsonl")
        site.settings.write_text(yaml.safe_dump({**settings, "threads": 1}), encoding="utf-8")
        kit = site.kit / "startup" / "fed_client.json"
        kit.write_text(kit.read_text().replace(f"localhost:{server_port}", f"localhost:{sites_port}"))
    return federation


@contextmanager
def sites_running(federation: ServerFolder, log: Path) -> Iterator[None]:
    with log.open("w") as output:
        running = [
            subprocess.Popen(fedmira("federation", "site", federation.site(name).path), stdout=output, stderr=output)
            for name in SITES
        ]
        try:
            yield
            for process in running:
                process.wait(120)
        finally:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Carry out the study in a federation and in a simulation; return what they cost."""
    save_base(folder / "base", size)
    save_rows(folder)
    study = save_study(folder, size)
    subprocess.run(fedmira("run", study, "-q"), check=True, stdout=subprocess.DEVNULL)
    simulated = records(StudyFolder(folder / "simulation"))
    shutil.rmtree(folder / "simulation")
    port = free_port()
    with Forwarder(port) as wire:
        federation = found(folder, study, port, wire.own_port)
        with sites_running(federation, folder / "sites.txt"), (folder / "server.txt").open("w") as output:
            server = subprocess.Popen(fedmira("federation", "server", federation.path), stdout=output, stderr=output)
            watch = Watch(server.pid, lambda: any(line["what"] == "start" for line in read_audit(federation.audit)))
            watch.start()
            code = server.wait()
            watch.stop()
        if code:
            raise SystemExit(f"the server ended with {code}:\n{(folder / 'server.txt').read_text()}")
        counted = {"up": wire.up, "down": wire.down}
    numbers = count_row(federation)
    frames = {
        "down": sum(line["bytes"] for line in read_audit(federation.audit)),
        "up": sum(line["bytes"] for name in SITES for line in read_audit(federation.site(name).audit)),
    }
    return {
        "row_numbers": numbers,
        "rounds": size.rounds,
        "base": {"width": size.width, "depth": size.depth, "rank": size.rank},
        "seconds_simulation": [record["seconds"] for record in simulated],
        "seconds_federation": [record["seconds"] for record in records(StudyFolder(federation.study))],
        "bytes_socket": counted,
        "bytes_frames": frames,
        "memory_before": dict(watch.before),
        "memory_peaks": watch.peaks,
        "memory_together": watch.together,
    }


def records(study: StudyFolder) -> list[dict[str, Any]]:
    folder = RunFolder(study.run("mira", 0).path)
    return list(folder.records())


def count_row(federation: ServerFolder) -> int:
    """Return the numbers of an adapter, by the shapes that server and sites have agreed on."""
    agreement = read_agreement(federation.agreement)
    (rank,) = {json.dumps(rank) for rank in agreement.ranks.values()}
    return sum(int(rank) * (inputs + outputs) for _, inputs, outputs in agreement.shapes)


# ---------------------------------------------------------------- the page

LIMIT = 2.0  # of the server's memory, in payloads of a round
SHARE = 0.02  # of the bytes on the socket, by which they may differ from the formula

TEXT = """# What a federation costs

Made by `python benchmarks/federation/costs.py` at commit {commit} on {date}; {cpu}, {cores} cores, {ram} GB,
Python {python}, {versions}.

A server and three sites on this one machine, over NVFlare with mutual TLS on the loopback, started by the commands that
organisations would type. MIRA, everyone in each round, one local step, losses each round; the base is a random Llama so
small that little is computed. Adapters in float32. What a network adds is not in the times.

## Seconds of a round

Beside a simulation of the same study with `federation.cohort: 1`, in which one process trains the sites in turn and
nothing travels. Median of all rounds but the first (from least to most).

{seconds}

The difference is the way of the bytes (TLS, two processes of NVFlare at each end, and the site's own), and files: every
answer is made durable at its site and at the server before it counts.

## Bytes

Counted by a forwarder between the sites and the server's port: all that their connections carried from the first to the
last, with TLS, gRPC, the start of the job and heartbeats. Frames are what `audit.jsonl` lists at the server and at the
sites. The formula: a site gets an adapter once in a round, and once more before the first; it sends one in a round. So
of R rounds with three sites 3 (R + 1) adapters go down and 3 R up, at 4 bytes a number. Wanted: within {share:.0f} %.

{bytes}

## Memory of the server

Anonymous memory (RssAnon), sampled every {sample:.0f} ms: of `fedmira federation server`, of NVFlare's server, and of
its job. "Before" is the sum when the sites have joined and nothing has travelled. The three have their peaks at other
moments, so the most of their sum is less than that of their peaks. A payload is one adapter of each site.

{memory}

{verdict}

The server's own process has most while a merge's result is written, which is one adapter of each site. The rows that it
keeps, what came, and the frame that it sends are in files, whose pages the system can take back. NVFlare copies each
frame some times, and would hold those of all sites at once: {in_flight:.0f} MB of large frames, or one frame, are under
way at one time, and each is made when its turn comes.
"""


def text_of(size: float) -> str:
    return f"{size / MB:,.1f}" if size < 100 * MB else f"{size / MB:,.0f}"


def spread(seconds: Sequence[float]) -> str:
    later = seconds[1:]
    return f"{statistics.median(later):.2f} ({min(later):.2f} to {max(later):.2f})"


def formula(row: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that adapters take on their way in the whole study."""
    one = 4 * len(SITES) * row["row_numbers"]
    return {"down": one * (row["rounds"] + 1), "up": one * row["rounds"]}


def payload(row: Mapping[str, Any]) -> int:
    """Return the bytes of one adapter of each site."""
    return 4 * len(SITES) * int(row["row_numbers"])


def judge(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say where the server's memory is below its limit, by what a payload may be taken to be."""
    said = [f"Wanted: less than {LIMIT:g} times the payload of a round."]
    for what, times in (("down and up, six adapters", 2), ("one way, three adapters", 1)):
        held = [row["memory_together"] < LIMIT * times * payload(row) for row in rows]
        reached = [text_of(4 * row["row_numbers"]) for row, holds in zip(rows, held, strict=True) if holds]
        where = "at no size" if not reached else "at each size" if all(held) else f"at {', '.join(reached)} MB only"
        said.append(f"If that is what travels {what}: {where}.")
    last = rows[-1]
    engine = sum(last["memory_peaks"][role] - last["memory_before"][role] for role in (ENGINE, JOB)) / payload(last)
    said.append(
        f"Of that NVFlare's two processes have, above what they take before, up to {engine:.1f} payloads "
        f"at {text_of(4 * last['row_numbers'])} MB."
    )
    return textwrap.fill(" ".join(said), 120, break_on_hyphens=False)


def page(found: Mapping[str, Any]) -> str:
    """Return the text of docs/results/federation.md."""
    rows, machine = found["rows"], found["machine"]
    names = [text_of(4 * row["row_numbers"]) for row in rows]
    seconds, carried, memory = [], [], []
    for name, row in zip(names, rows, strict=True):
        alone, real = row["seconds_simulation"], row["seconds_federation"]
        more = statistics.median(real[1:]) - statistics.median(alone[1:])
        seconds.append([name, str(row["rounds"]), spread(alone), spread(real), f"{more:.2f}"])
        for way in ("down", "up"):
            wanted, counted, frames = formula(row)[way], row["bytes_socket"][way], row["bytes_frames"][way]
            apart = counted / wanted - 1
            figures = [f"{frames / wanted - 1:+.2%}", f"{apart:+.2%}", "yes" if abs(apart) <= SHARE else "**no**"]
            carried.append([name, way, *(f"{size:,}" for size in (wanted, frames, counted)), *figures])
        peaks, before = row["memory_peaks"], sum(row["memory_before"].values())
        together, whole = row["memory_together"], payload(row)
        sizes = [whole, before, *(peaks.get(role, 0) for role in (OURS, ENGINE, JOB)), together]
        memory.append(
            [name, *map(text_of, sizes), f"{together / whole:.1f}", f"{(together - before) / whole:.1f}"]
        )  # fmt: skip
    return TEXT.format(
        commit=machine["commit"].replace("-dirty", " with changes on top"),
        date=machine["date"],
        cpu=machine["cpu"],
        cores=machine["cores"],
        ram=machine["memory_gb"],
        python=machine["python"],
        versions=", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        seconds=table(["adapter, MB", "rounds", "simulation", "federation", "difference"], seconds),
        share=100 * SHARE,
        bytes=table(
            ["adapter, MB", "way", "formula", "frames", "socket", "frames above", "socket above", "reached"], carried
        ),
        sample=1000 * SAMPLE_S,
        limit=LIMIT,
        memory=table(
            [
                *("adapter, MB", "payload, MB", "before, MB", "`fedmira`, MB", "NVFlare's server, MB", "its job, MB"),
                *("most of the sum, MB", "in payloads", "above before, in payloads"),
            ],
            memory,
        ),
        verdict=judge(rows),
        in_flight=found["in_flight_bytes"] / MB,
    )


def main() -> None:
    """Measure, store and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=[*SIZES], help="MB of an adapter")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/federation.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/federation.md")
    parser.add_argument("--only-page", action="store_true", help="write the page from the stored figures")
    options = parser.parse_args()
    if not options.only_page:
        from fedmira.deploy.nvflare.relay import IN_FLIGHT_BYTES

        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        rows = []
        for megabytes in options.sizes:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="fedmira-bench-") as folder:
                rows.append(measure(SIZES[megabytes], Path(folder)))
            print(f"{megabytes} MB: {time.monotonic() - began:.0f} s", file=sys.stderr)
        found = {"machine": describe(), "versions": installed_versions(), "in_flight_bytes": IN_FLIGHT_BYTES}
        options.json.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = page(json.loads(options.json.read_text(encoding="utf-8")))
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
