"""What Ray's actors bring and cost: seconds of a round in one process and in actors, bytes, and the rest on paper.

    python benchmarks/scale/actors.py [--base FOLDER ...] [--rounds 6] [--clients 12]

Every row is a real study in a separate process, by the Python API: the bundled tasks, fedavg (one row for all) and
ditto (a memory of each client). Rows of a base are measured in turn. Writes benchmarks/results/scale.json and
docs/results/scale.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STORED = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "results" / "scale.md"
ROWS: Mapping[str, Mapping[str, Any]] = {
    "one process, 1 thread": {"threads": 1, "workers": 0},
    "one process, 2 threads": {"threads": 2, "workers": 0},
    "1 actor, 1 thread": {"threads": 1, "workers": 1},
    "2 actors, 1 thread each": {"threads": 1, "workers": 2},
}
FIRST, THIRD = "one process, 1 thread", "1 actor, 1 thread"
METHODS = ("fedavg", "ditto")
ORDERS = 200  # without work
LARGE = 1 << 22  # numbers of the rows of one order that measures bandwidth


def settings(base: str, folder: Path, *, clients: int, rounds: int) -> dict[str, Any]:
    """Return a study whose passes have a quarter of the clients each."""
    return {
        "seeds": [0],
        "output_dir": str(folder / "study"),
        "model": {"base_model": base, "dtype": "float32", "device": "cpu"},
        "lora": {"r": 8, "lora_alpha": 16},
        "data": {
            "path": "bundled:tasks",
            "template": "none",
            "split_column": "split",
            "max_length": 128,
            "subsample": 0.5,
            "clients": {"by": "client", "first": clients},
        },
        "federation": {"rounds": rounds, "cohort": max(1, clients // 4)},
        "training": {"local_steps": 4, "batch_size": 8, "learning_rate": 1e-3},
        "methods": [{"name": name} for name in METHODS],
        "evaluation": {"every": rounds, "metrics": ["loss"]},
    }


def carry_out(raw: Mapping[str, Any], *, threads: int, workers: int, count_bytes: bool) -> dict[str, Any]:
    """Run one row in this process; return seconds of training by method and round, and bytes of an order."""
    import torch

    import fedmira
    from fedmira.study.loading import check

    torch.set_num_threads(threads)
    sent: list[tuple[str, int, int, int]] = []
    if count_bytes:
        watch_orders(sent)
    place = {"engine": "ray", "workers": workers} if workers else {}
    config = check({**raw, "federation": {**raw["federation"], **place}}, "scale")
    study = fedmira.run(config)
    rounds = {run.facts.label: [record["seconds_training"] for record in run.rounds] for run in study.runs}
    facts = study.runs[0].facts
    return {"seconds": rounds, "threads": facts.threads, "cohort": facts.cohort, "orders": sent}


def watch_orders(sent: list[tuple[str, int, int, int]]) -> None:
    """Note of each order what it is for, its clients, and the bytes of it and of its answer."""
    from dataclasses import replace

    from ray import cloudpickle

    from fedmira.engine.spread.crew import Crew

    original = Crew.carry_out

    def watched(crew: Crew, tasks: Any) -> Any:
        orders: dict[int, tuple[int, int]] = {}

        def noting(number: int, build: Any) -> Any:
            def noted() -> Any:
                order = build()
                orders[number] = len(order.clients), len(cloudpickle.dumps(order))
                return order

            return noted

        tasks = [replace(task, build=noting(number, task.build)) for number, task in enumerate(tasks)]
        for number, answer in original(crew, tasks):
            sent.append((tasks[number].what, *orders[number], len(cloudpickle.dumps(answer))))
            yield number, answer

    Crew.carry_out = watched  # type: ignore[assignment, method-assign]


def measure_orders(base: str) -> dict[str, float]:
    """Return what orders cost that have no work: seconds of each, of each byte, and bytes of a token in the store."""
    import torch
    from ray import cloudpickle

    from fedmira.adapters import lora_layout
    from fedmira.data.batches import Encoded
    from fedmira.engine.spread.actor import Rows, ScoreOrder
    from fedmira.engine.spread.cluster import opened
    from fedmira.engine.spread.crew import Crew, Post, Task
    from fedmira.model.base.load import load_base

    layout = lora_layout([("layer", 512, 512)], 8)
    base_here = load_base(base, dtype="float32", device="cpu")

    def load() -> Any:
        return load_base(base, dtype="float32", device="cpu")

    def task(count: int) -> Task:
        rows = torch.randn(count, layout.size)
        order = ScoreOrder([], Rows(layout, rows, torch.full((count,), 8), torch.ones(count), None), None, "test")
        return Task(1, "score", lambda: order)

    with opened(None, cpus=1) as _:
        crew = Crew(Post(1, 1), load, [], fingerprint=base_here.fingerprint)
        crew.await_first()
        list(crew.carry_out([task(1)] * 20))
        began = time.perf_counter()
        list(crew.carry_out([task(1)] * ORDERS))
        small = (time.perf_counter() - began) / ORDERS
        large = task(LARGE // layout.size)
        began = time.perf_counter()
        list(crew.carry_out([large] * 20))
        each = (time.perf_counter() - began) / 20
        crew.close()
    tokens = 10_000
    example = [Encoded(tuple(range(1000 + k, 1100 + k)), 50, ("an answer",)) for k in range(tokens // 100)]
    return {
        "order_s": small,
        "byte_s": max(0.0, each - small) / (4 * LARGE),
        "token_bytes": len(cloudpickle.dumps(tuple(example))) / tokens,
    }


def in_a_process(order: Mapping[str, Any]) -> Any:
    """Carry out one measurement in a separate process; return what it found."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(order.get("threads", 1))}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps({**order, "folder": folder})]
        subprocess.run([*command, "--out", str(out)], env=environment, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def one(order: Mapping[str, Any], out: Path) -> None:
    """Do what a separate process is for."""
    if order["what"] == "orders":
        found: Any = measure_orders(str(Path(order["base"]).resolve()))
    else:
        raw = settings(order["base"], Path(order["folder"]), clients=order["clients"], rounds=order["rounds"])
        found = carry_out(raw, threads=order["threads"], workers=order["workers"], count_bytes=order["count_bytes"])
    out.write_text(json.dumps(found), encoding="utf-8")


def measure(bases: Sequence[str], *, clients: int, rounds: int) -> dict[str, Any]:
    """Return what was found for every base."""
    from fedmira import bundled

    found: dict[str, Any] = {}
    for base in bases:
        common = {"what": "study", "base": base, "clients": clients, "rounds": rounds}
        rows = {name: in_a_process({**common, **row, "count_bytes": False}) for name, row in ROWS.items()}
        counted = in_a_process({**common, **ROWS[THIRD], "rounds": 1, "count_bytes": True})
        found[Path(base).name if Path(base).is_dir() else base] = {"rows": rows, "orders": counted["orders"]}
    constants = in_a_process({"what": "orders", "base": str(bundled.MODEL_PATH)})
    return {"clients": clients, "rounds": rounds, "bases": found, "constants": constants}


def median(seconds: Sequence[float]) -> float:
    """Return the median over rounds but the first, which fills caches."""
    return statistics.median(seconds[1:] or seconds)


def page(found: Mapping[str, Any]) -> str:
    """Return the text of docs/results/scale.md."""
    machine, constants = found["machine"], found["constants"]
    order_ms, mb_ms = 1e3 * constants["order_s"], 1e9 * constants["byte_s"]
    lines = [
        "# Passes in Ray's actors",
        "",
        "What `federation.engine: ray` brings and costs ([how to use it](../scale.md)): seconds of training in a",
        f"round, the median of {found['rounds'] - 1} rounds, {found['clients']} clients in 4 passes, 4 steps of 8",
        "examples. The results of all rows with one thread are the same to the bit.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}; load of the machine when",
        f"it began: {found['load']:.1f}. Where that is above 1, other programs were computing too, and seconds and",
        "speed-ups say little.",
        "",
        "| base | where | threads used | fedavg: s a round | ditto: s a round | times as fast, fedavg |",
        "|---|---|---|---|---|---|",
    ]
    for base, of in found["bases"].items():
        first = median(of["rows"][FIRST]["seconds"]["fedavg"])
        for name, row in of["rows"].items():
            seconds = {method: median(row["seconds"][method]) for method in METHODS}
            lines.append(
                f"| {base} | {name} | {row['threads']} | {seconds['fedavg']:.2f} | {seconds['ditto']:.2f} "
                f"| {first / seconds['fedavg']:.2f} |"
            )
    lines += [
        "",
        "A base of less than a million parameters runs on one thread whatever is allowed.",
        "",
        "## What an order costs",
        "",
        "An order is one pass of training or scoring with the clients that share it. `ditto` has one more row of each",
        "client, its memory, both ways; of `fedavg` one row goes to all clients of a pass.",
        "",
        "| base | order | clients | bytes there | bytes back |",
        "|---|---|---|---|---|",
    ]
    for base, of in found["bases"].items():
        for what, clients, there, back in _kinds(of["orders"]):
            lines.append(f"| {base} | {what} | {clients} | {there:,} | {back:,} |")
    lines += [
        "",
        f"An order without work takes {order_ms:.1f} ms from and to an actor on the same machine, and {mb_ms:.2f} ms",
        f"more for each megabyte of rows. A token of the clients' data is {constants['token_bytes']:.1f} bytes in the",
        "store of Ray.",
        "",
        *_paper(constants),
        "Made by `python benchmarks/scale/actors.py`.",
        "",
    ]
    return "\n".join(lines)


def _kinds(orders: Sequence[Sequence[Any]]) -> list[tuple[str, int, int, int]]:
    """Return the largest order of each kind and number of clients."""
    largest: dict[tuple[str, int], tuple[int, int]] = {}
    for what, clients, there, back in orders:
        largest[what, clients] = max(largest.get((what, clients), (0, 0)), (there, back))
    return [(what, clients, *sizes) for (what, clients), sizes in sorted(largest.items(), reverse=True)]


def _paper(constants: Mapping[str, float]) -> list[str]:
    """Return the part on 8 GPUs and 1,000,000 clients, which is computed and not measured."""
    order, byte, token = constants["order_s"], constants["byte_s"], constants["token_bytes"]
    numbers, sampled, cohort, clients = 4_194_304, 1_000, 32, 1_000_000
    row = 4 * numbers
    shared = order + byte * (row + cohort * row)  # one row there, one of each client back
    private = order + byte * 3 * cohort * row  # row and memory of each client there, memory back, row back
    passes = -(-sampled // cohort)
    return [
        "## On paper: 8 GPUs and 1,000,000 clients",
        "",
        "Nothing here was run. Letters: K clients, S of them in a round, c of these in a pass, P numbers of a row",
        f"(4 P bytes), o = {1e3 * order:.1f} ms for an order, m = {1e9 * byte:.2f} ms for a megabyte, t seconds",
        "that a pass computes. The driver, the process of the study, builds orders and takes answers one at a time;",
        "actors compute at the same time.",
        "",
        "    seconds of a round = merge + max(A, B)",
        "    A = ceil(S / c) / actors x (t + o)            actors compute",
        "    B = ceil(S / c) x (o + m x bytes of an order)  the driver sends and takes",
        "",
        "| what | grows with | of LoRA on q and v of a 7B base, r = 8 (P = 4.2 million), S = 1,000, c = 32 |",
        "|---|---|---|",
        f"| rows on the driver's disk, one row for all | P | {_size(row)} |",
        f"| rows on the driver's disk, a row of each client | K P | {_size(clients * row)} once all have trained |",
        f"| bytes to actors in a round, one row for all | ceil(S / c) P | {_size(passes * row)} |",
        f"| bytes to actors in a round, a row of each | S P, and S P for each memory | {_size(sampled * row)} |",
        f"| bytes from actors in a round | S P, and S P for each memory | {_size(sampled * row)} |",
        f"| seconds of the driver for an order, one row for all | o + m c P | {shared:.2f} s |",
        f"| the same with one memory | o + 3 m c P | {private:.2f} s |",
        f"| clients' data in the store | tokens of all | {_size(int(clients * 10_000 * token))}, 10,000 tokens each |",
        "| merge | S P, in the driver | see [Speed and memory](speed.md) |",
        "",
        "So 8 actors are busy as long as a pass computes for longer than 8 orders take:",
        "",
        f"    t > 8 x (o + m x bytes) = 8 x {shared:.2f} s = {8 * shared:.1f} s   (one row for all)",
        f"    t > 8 x {private:.2f} s = {8 * private:.1f} s   (one memory of each client)",
        "",
        "Below that the driver is what takes the time, and more actors bring nothing: take more local steps, fewer",
        "numbers in a row or fewer clients that are scored. K itself costs a round nothing; it costs disk where each",
        "client has a row, memory for the clients' data in the driver (about 36 bytes a token) and in the store, and",
        "the scoring of all clients at the start, the end and every `evaluation.every` rounds, which is spread too.",
        "",
    ]


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def main() -> None:
    """Measure every row, store what was found and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="*", default=["bundled:model"], help="bases: folders or names")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=12, help="of the bundled tasks, at most 12")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(json.loads(options.one), Path(options.out))
        return
    sys.path.insert(0, str(HERE.parent))
    from machine import describe

    load = os.getloadavg()[0]
    found = {"machine": describe(), "load": load}
    found |= measure(options.base, clients=options.clients, rounds=options.rounds)
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
