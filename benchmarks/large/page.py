"""Writes docs/results/large.md from what measure.py has kept.

python benchmarks/large/page.py [--page FILE] [--json FOLDER]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from large_rows import ROWS, STUDY
from shapes import RESPONSE, SHAPES, Shape

sys.path.insert(0, str(Path(__file__).parent.parent))
from stored import table

ROOT = Path(__file__).resolve().parents[2]
Kept = Mapping[str, Any]
RANK, CLIENTS, TOKENS = 16, 8, 2048  # of the count on paper
LIMIT = 0.6  # of the rate of products: from here on a loop that computes little more cannot take twice as long
STATE = 16  # bytes of a trained number: itself, its gradient, two moments of AdamW
NF4 = 0.5 + 4 / 64  # bytes of a weight: 4 bits, and a scale for 64 of them
HEAD = """# Bases of 0.5 billion parameters and more

Made by `python benchmarks/large/page.py` from what `benchmarks/large/measure.py` has kept; `make bench-large` measures
what is not kept yet. The bases have random weights in the shape of Qwen2.5; rank 16 on all linear layers. A pass is one
local step of every client, one text each; its last fifth is the response. Beside it, in the same run: the loop that
everybody writes with PEFT, one client after another, its adapter swapped in, with `gradient_checkpointing_enable()`
where FedMira recomputes and bitsandbytes' nf4 where FedMira has it. Each side has a process of its own.

Kept: what a pass keeps for its backward pass, which is there when that begins and was not when the forward pass began;
so without rows, moments, and what comes and goes in between. Peak: the most of the whole process. Both are memory that
the system cannot take back (anonymous). Weights in the type that the files have are mapped from them, shared by all
processes of a machine, and not in it.
"""
PAPER = """## What fits, on paper

Bytes of one GPU for S clients of n tokens, with recomputation:

    weights + S x P x 16 + S n b (L d + c (d + f))

P: adapter parameters of rank 16, with gradient and two moments of AdamW in float32; L layers of width d, inner width f,
b bytes of a number: 2 in bfloat16, the weights 2 or, in nf4, 0.5625. c is measured: of one client at 512 and 2,048
tokens, by the blocks of memory in use: {measured}. Here c = {constant}, S = {clients} and n = {tokens:,}.
"""
LOADING = """Weights in bfloat16 are mapped from the files, and not in the peak, which has bitsandbytes and torch's own
tables, and what the trials of a base take. "With adapters": they are in the peaks of both sides too."""


def make_page(kept: Mapping[str, Kept]) -> str:
    """Write the page from what is kept of each row, by the type of numbers in large-TYPE.json."""
    parts, found = [HEAD.rstrip()], {kind: rows for kind, rows in kept.items() if known(rows)}
    if not found:
        return "\n\n".join([*parts, "## Loading", "Nothing is measured yet."]) + "\n"
    for kind, of_kind in found.items():
        rows = known(of_kind)
        parts += [f"## Passes in {kind}", machines(rows), passes(rows), *findings(rows)]
        if missing := [row.name for row in ROWS if row.name not in of_kind]:
            parts.append(f"Not measured: {', '.join(missing)}.")
    parts += ["## Loading", LOADING, loading([row for of_kind in found.values() for row in known(of_kind)])]
    if dry_runs := [estimate(kind, of_kind[STUDY]) for kind, of_kind in found.items() if STUDY in of_kind]:
        parts += ["## The estimate of a dry run", "\n".join(dry_runs)]
    constants = {kind: constant for kind, rows in found.items() if (constant := block_constant(known(rows)))}
    return "\n\n".join([*parts, *([on_paper(constants)] if constants else [])]) + "\n"


def known(of_kind: Kept) -> list[Kept]:
    """What is kept of rows, in their order."""
    return [of_kind[row.name] for row in ROWS if row.name in of_kind]


def machines(rows: Sequence[Kept]) -> str:
    """Say where the rows were measured."""
    found = {
        f"{one['machine']['cpu']}, {one['machine']['cores']} cores, {one['machine']['gpu'] or 'no GPU'}, "
        f"{one['machine']['threads']} threads, torch {one['machine']['versions']['torch']}, numbers in {one['dtype']}"
        for one in rows
    }
    commits = sorted({one["machine"]["commit"] for one in rows})
    rates = [one["matmul"] / 1e9 for one in rows]
    return (
        f"Measured on {'; '.join(sorted(found))}; commits {', '.join(commits)}. Matrix products in that type reach "
        f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s, measured after each row."
    )


def passes(rows: Sequence[Kept]) -> str:
    """The table of passes."""
    head = ["base", "weights", "recomputed", "clients x tokens"]
    head += [
        "FedMira, tokens/s",
        "PEFT, tokens/s",
        "times",
        "FedMira kept, MiB",
        "PEFT kept",
        "FedMira peak",
        "PEFT peak",
    ]
    lines = []
    for one in rows:
        ours, peft = one["fedmira"], one["peft"]
        lines.append(
            [
                one["base"],
                "nf4" if one["nf4"] else one["dtype"],
                "yes" if one["recompute"] else "no",
                f"{one['clients']} x {one['tokens']}",
                f"{speed(one, ours):,.0f}",
                f"{speed(one, peft):,.0f}",
                f"{speed(one, ours) / speed(one, peft):.2f}",
                *(f"{side['kept']:,.0f}" for side in (ours, peft)),
                *(f"{side['peak']:,.0f}" for side in (ours, peft)),
            ]
        )
    return table(head, lines)


def whole(side: Kept) -> float:
    """MiB of the peak with all weights, those mapped from files too: what was not held once they were loaded."""
    return float(side["peak"] + max(0.0, side["weights"] - side["loading"]))


def speed(row: Kept, side: Kept) -> float:
    """Tokens a second."""
    return float(row["clients"] * row["tokens"] / statistics.median(side["seconds"]))


def findings(rows: Sequence[Kept]) -> list[str]:
    """The aims beside what was measured."""
    lines = []
    for one in rows:
        if (
            one["clients"] == 1
            and one["recompute"]
            and not one["nf4"]
            and one["base"] == "0.5B"
            and one["tokens"] > 256
        ):
            share = one["fedmira"]["kept"] / one["peft"]["kept"]
            lines.append(
                f"- One client of {one['tokens']:,} tokens: a pass keeps {share:.2f} of what the PEFT loop keeps with "
                f"its checkpointing (asked: at most 0.2): {'reached' if share <= 0.2 else '**not reached**'}."
            )
        if one["clients"] == 8 and one["recompute"]:
            times = speed(one, one["fedmira"]) / speed(one, one["peft"])
            peaks = whole(one["fedmira"]) / whole(one["peft"])
            what = f"{one['base']} in {'nf4' if one['nf4'] else one['dtype']}"
            lines.append(
                f"- Eight clients, {what}, both sides recomputing: {times:.2f} times the loop's speed (aim 2), "
                f"{peaks:.2f} of its peak with the weights (aim at most 1.5)."
            )
    if eight := [one for one in rows if one["clients"] == 8 and one["recompute"]]:
        counts = [products(one, 1 / RESPONSE) for one in eight]
        less = [products(one, 1.0) / count for one, count in zip(eight, counts, strict=True)]
        rates = [speed(one, one["fedmira"]) * count / one["matmul"] for one, count in zip(eight, counts, strict=True)]
        lines.append(
            f"- By count of matrix products the loop, which takes logits of every token, computes {min(less):.2f} to "
            f"{max(less):.2f} times as much there; what is above that is what it spends outside of products. FedMira's "
            f"passes reach {min(rates):.2f} to {max(rates):.2f} of the rate of products measured after the row"
            + (", so that 2 times is not to be had." if min(rates) > LIMIT else ".")
        )
    few = [one for one in rows if one["recompute"] and not one["nf4"] and (one["base"], one["tokens"]) == ("0.5B", 256)]
    if few:
        said = [f"{one['fedmira']['kept']:,.0f} MiB of {one['clients']} ({stream(one):,.0f})" for one in few]
        lines.append(
            f"- Kept where it recomputes, in brackets the residual stream alone, S n L d numbers: {', '.join(said)}."
        )
    return ["\n".join(lines)] if lines else []


def products(row: Kept, labelled: float) -> float:
    """Operations of matrix products for a token, forward, again and back, where this share of tokens has logits."""
    shape = SHAPES[row["base"]]
    return 2.0 * (3 * shape.linear + 2 * labelled * shape.vocabulary * shape.width)


def stream(row: Kept) -> float:
    """MiB of the residual stream: what each block is given."""
    shape, size = SHAPES[row["base"]], 4 if row["dtype"] == "float32" else 2
    return float(row["clients"] * row["tokens"] * shape.layers * shape.width * size / 2**20)


def loading(rows: Sequence[Kept]) -> str:
    """The memory that loading takes, beside the weights in their final form."""
    first = {(one["base"], one["dtype"], one["nf4"]): one for one in reversed(rows)}
    lines = []
    for (base, dtype, nf4), one in sorted(first.items()):
        kind = f"nf4 and {dtype}" if nf4 else dtype
        kind += ", with adapters" if one["peft"]["weights"] > one["fedmira"]["weights"] else ""
        for title, side in (("FedMira", one["fedmira"]), ("PEFT", one["peft"])):
            ratio = side["loading"] / side["weights"]
            lines.append(
                [
                    base,
                    kind,
                    title,
                    f"{side['weights']:,.0f}",
                    f"{side['loading']:,.0f}",
                    f"{ratio:.2f}",
                    f"{side['files']:,.0f}",
                ]
            )
    head = ["base", "weights", "side", "weights, MiB", "peak of loading", "ratio (at most 1.3)", "pages of files"]
    return table(head, lines)


def estimate(kind: str, found: Kept) -> str:
    """The dry run's estimate beside the study."""
    ratio = found["expected"]["cpu"] / found["study"]["cpu"]
    study, dry_run = found["study"], found["dry_run"]
    return (
        f"- In {kind} a study of {found['clients']} clients and 2 rounds of mira, 0.5B, took {study['cpu']:,.0f} CPU "
        f"seconds ({study['seconds']:,.0f} seconds); `--dry-run` expected {found['expected']['cpu']:,.0f}, {ratio:.2f} "
        f"of that (asked: within a factor of 1.5). The dry run itself took {dry_run['cpu']:,.0f} CPU seconds, "
        f"{dry_run['cpu_of_passes']:,.0f} of them in passes after loading (asked: half a minute on 2 cores, 60)."
    )


def block_constant(rows: Sequence[Kept]) -> float | None:
    """Return c: numbers that a pass holds of a token beside the residual stream, for each of d + f of a block."""
    one = {row["tokens"]: row for row in rows if row["clients"] == 1 and row["recompute"] and not row["nf4"]}
    if not {512, 2048} <= one.keys() or not all("used" in one[tokens]["fedmira"] for tokens in (512, 2048)):
        return None
    shape, size = SHAPES[one[512]["base"]], 4 if one[512]["dtype"] == "float32" else 2
    each = (one[2048]["fedmira"]["used"] - one[512]["fedmira"]["used"]) * 2**20 / (2048 - 512)
    return (each / size - shape.layers * shape.width) / (shape.width + shape.inner)


def on_paper(constants: Mapping[str, float]) -> str:
    """What fits on GPUs of 24 and 80 GB."""
    constant, lines = constants.get("bfloat16", max(constants.values())), []
    for name in ("1.5B", "3B", "8B"):
        shape = SHAPES[name]
        for kind, size in (("bfloat16", 2.0), ("nf4", NF4)):
            need = bytes_needed(shape, size, constant) / 2**30
            fits = ["yes" if need < 0.9 * room else "no" for room in (24, 80)]
            lines.append([name, kind, f"{need:.1f}", *fits])
    measured = ", ".join(f"{value:.1f} in {kind}" for kind, value in constants.items())
    text = PAPER.format(measured=measured, constant=f"{constant:.1f}", clients=CLIENTS, tokens=TOKENS).rstrip()
    check = f"python benchmarks/large/one.py --base 8B --clients {CLIENTS} --tokens {TOKENS} --recompute --device cuda"
    return "\n\n".join(
        [
            text,
            table(["base", "weights", "GiB", "24 GB, a tenth left free", "80 GB"], lines),
            f"The command that checks a row on a GPU (with --nf4 for the others), not run yet:\n\n    {check}",
        ]
    )


def bytes_needed(shape: Shape, weight: float, constant: float) -> float:
    """Return the bytes of the formula."""
    each = shape.layers * (
        2 * (shape.width + shape.width) + 2 * (shape.width + shape.width * shape.groups // shape.heads)
    )
    rows = RANK * (each + shape.layers * 3 * (shape.width + shape.inner))
    tokens = CLIENTS * TOKENS * 2 * (shape.layers * shape.width + constant * (shape.width + shape.inner))
    return shape.linear * weight + shape.embeddings * 2 + CLIENTS * rows * STATE + tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "large.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results", help="of large-TYPE.json")
    options = parser.parse_args()
    files = sorted(options.json.glob("large-*.json"))
    kept = {path.stem.removeprefix("large-"): json.loads(path.read_text(encoding="utf-8")) for path in files}
    options.page.write_text(make_page(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
