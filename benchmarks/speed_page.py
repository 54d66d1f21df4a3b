"""docs/results/speed.md from the stored JSON of the benchmarks and the prose of notes.md; nothing is measured here.

Missing results are shown as "not measured yet". bench.py calls `write_page`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from speed_aims import aims_table
from speed_figures import client_figure, cohort_figure
from stored import (
    GB,
    MB,
    UNITS,
    Result,
    Results,
    read_results,
    resume_row,
    row_parts,
    spread,
    study_rows,
    table,
    unit_row,
)

NOTES = Path(__file__).resolve().parent / "notes.md"
LOOPS = ("plain fp32", "plain bf16", "fedmira fp32", "fedmira bf16")

INTRODUCTION = """# Speed and memory

Made by `python benchmarks/bench.py page` from what the benchmarks stored in `benchmarks/results/`. `make bench`
measures the quick rows on the CPU again, `make bench-full` the others. The yardstick is a plain PEFT loop: one
resident model, one client after another, its adapter swapped in, torch's AdamW. The sides of a comparison were
measured interleaved in one process. A ratio is the median over the pairs, then (least to most)."""


# ---------------------------------------------------------------- words and tables


def listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def machine_facts(result: Result) -> dict[str, str]:
    """Return the machine and versions of a result."""
    machine = result["machine"]
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"
        + (f", {' and '.join(machine['bf16'])}" if machine["bf16"] else ", no bf16 instructions"),
        "GPU": machine["gpu"] or "none",
        "threads": str(result.get("threads", machine["threads"])),
        "Python": machine["python"],
        **machine["versions"],
        "commit": str(machine["commit"]).replace("-dirty", " with changes on top"),
        "date": machine["date"],
    }


def head(results: Results) -> str:
    """Return the machine of the first result; sections name differences."""
    if not results:
        return "Nothing is measured yet."
    facts = machine_facts(next(iter(results.values())))
    return table(list(facts), [list(facts.values())]) + "\n\nSections list their differences from this table."


def differences(name: str, results: Results) -> str:
    """Return how a result's machine, versions and commit differ from the head; "" if they do not."""
    usual, facts = machine_facts(next(iter(results.values()))), machine_facts(results[name])
    other = [f"{key} {value}" for key, value in facts.items() if value != usual.get(key)]
    return f"Differences, {name}: {', '.join(other)}." if other else ""


# ---------------------------------------------------------------- sections


def training(results: Results, docs: Path) -> str:
    """One line per unit."""
    rows = []
    for row in (unit_row(results, unit) for unit in UNITS):
        if row is None:
            continue
        speeds = row["tokens_per_second"]
        rows.append(
            [
                f"({row['unit']}) {row['title']}",
                *(f"{speeds[name]:,.0f}" for name in LOOPS),
                spread(row["ratio"]),
                f"{speeds['fedmira bf16'] / speeds['plain bf16']:.2f}",
                f"{row['useful_gflops']:.0f}",
                f"{row['bf16_matmul_gflops']:.0f}",
                f"{100 * row['share']:.0f} %",
                f"{row['peak_rss_mb']:,.0f}",
            ]
        )
    names = [f"{name}, tokens/s" for name in LOOPS]
    titles = ["unit", *names, "fedmira bf16 to plain fp32", "to plain bf16", "useful GFLOP/s", "bf16 matmul GFLOP/s"]
    return (
        "8 clients x 5 steps x batch 4, up to 256 tokens, rank 8, loss on the response; real (unpadded) tokens per "
        "second. plain bf16 is the loop under autocast. FedMira trains the 8 clients in one cohort; one client per "
        "pair represents the sequential loop. The ratio to plain bf16 is that of the medians. (A) and (B) are (a) and "
        "(b) with random ids: their examples have no common prefixes.\n\n"
        + table([*titles, "share", "peak RSS, MiB"], rows)
        + "\n\nUseful FLOP/s count what the mathematics needs: 4 per frozen weight of the blocks and real token, the "
        "vocabulary at labelled positions only. The matmul rate was measured in the same run. Peak RSS is that of the "
        "whole process, which holds the base of the loop and FedMira's two (bf16 and fp32)."
    )


def cohorts(results: Results, docs: Path) -> str:
    """Figure 1 and its numbers."""
    rows = results["cohorts"]["rows"]
    save(docs / "images" / "speed-cohorts.svg", cohort_figure(rows))
    counts = sorted({int(count) for row in rows for count in row["tokens_per_second"]})
    lines = []
    for row in rows:
        speeds = {int(count): value for count, value in row["tokens_per_second"].items()}
        cells = [f"{speeds[count]:,.0f}" if count in speeds else "" for count in counts]
        lines.append([row["text"], *cells, *(f"{row['plain'][name]:,.0f}" for name in LOOPS[:2])])
    names = [f"{name} loop" for name in LOOPS[:2]]
    return (
        "Unit (c), batch 4 per client, 2 steps; FedMira in bf16. The plain loop trains one client at a time: its speed "
        "is the same at any number.\n\n"
        "![Tokens per second against clients per pass](../images/speed-cohorts.svg)\n\n"
        "Tokens per second by clients per pass:\n\n" + table(["text", *map(str, counts), *names], lines)
    )


def generation(results: Results, docs: Path) -> str:
    """Answers and losses, and how much they agree."""
    result = results["generation"]
    lines = []
    titles = {"answers": "greedy answers", "long": "the same, every answer as long as it may be", "losses": "losses"}
    for kind, title in titles.items():
        speeds, ratio = result[kind]["tokens_per_second"], result[kind]["ratio"]
        ratios = [
            f"fedmira {ours} to plain {other}" for ours, other in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32"))
        ]
        lines.append([title, *(f"{speeds[name]:,.0f}" for name in LOOPS), *(spread(ratio[name]) for name in ratios)])
    heads = [f"{name}, tokens/s" for name in LOOPS]
    pairs = ["fedmira bf16 to plain fp32", "bf16 to bf16", "fp32 to fp32"]
    return (
        f"Unit (c), 8 clients with separate adapters, {result['prompts']} prompts of {result['prompt_tokens']:,} "
        f"tokens in all, at most {result['max_new_tokens']} new tokens. The yardstick calls `generate` per client, "
        "4 prompts at a time; here plain bf16 has its weights in bf16. Rates are the tokens of the answers over the "
        f"whole time, prompts included: {result['answer_tokens']['plain fp32']:,}, so that prompts take most of it; in "
        "the second row no token ends an answer. For losses, the tokens of the examples.\n\n"
        + table(["work", *heads, *pairs], lines)
        + f"\n\nSame text as plain fp32: FedMira in fp32 {result['same_text_fp32']:.1%}, in bf16 "
        f"{result['same_text_bf16']:.1%} (plain bf16: {result['same_text_plain_bf16']:.1%}); the adapters change "
        f"{result['changed_by_adapters']:.0%} of the answers. Losses in fp32 differ by at most "
        f"{result['loss_error_fp32']:.1e}. Peak RSS of the whole process, with two bases of each side: "
        f"{result['peak_rss_mb']:,.0f} MiB."
    )


def merge(results: Results, docs: Path) -> str:
    """Merge against copy and loop."""
    lines = []
    for row in results["merge"]["rows"]:
        taken = row["seconds"]
        by = [f"{row[key]:.2f}" if key in row else "" for key in ("loop_s", "joined_loop_s")]
        times = [f"{row[key] / taken['merge']:,.0f}" if key in row else "" for key in ("loop_s", "joined_loop_s")]
        lines.append(
            [
                str(row["sampled"]),
                f"{row['neighbours']} ({row['outside']} not sampled)",
                f"{row['gb_per_second']:.1f}",
                *(f"{1000 * taken[key]:.1f}" for key in ("copy", "fresh", "merge")),
                spread(row["to_copy"]),
                f"{1000 * taken['plain']:.1f}",
                spread(row["plain_to_copy"]),
                *(part for pair in zip(by, times, strict=True) for part in pair),
            ]
        )
    titles = ["S", "neighbours", "copy, GB/s", "copy, ms", "copy into new memory, ms", "merge, ms", "merge to copy"]
    titles += ["without numba, ms", "to copy"]
    return (
        "Rows are GPT2-large adapters (36 layers, c_attn and both c_proj, rank 8: 4,055,040 parameters); 10 neighbours "
        "a client (7 of 8). A copy reads and writes the sampled rows once; where neighbours that were not sampled are "
        "read, the ratio counts that reading too. The merge has numba (`fedmira[fast]`); beside it the same without. "
        "The loop reloads two files for each pair, for every pair as the public code does or for joined pairs only; it "
        "ran once.\n\n" + table([*titles, "loop, s", "loop to merge", "loop of joined pairs, s", "to merge"], lines)
    )


def flexlora(results: Results, docs: Path) -> str:
    """The method's merge, and its low-rank kernel."""
    result = results["flexlora"]
    rows = [("kernel, one module", result)]
    if "merge" in result:
        rows.insert(0, (f"merge, {result['merge']['modules']} modules", result["merge"]))
    lines = [
        [
            what,
            f"{row['width']:,}",
            f"{row['clients']} of rank {row['rank']}",
            f"{1000 * row['ours_s']:.1f}",
            f"{1000 * row['dense_s']:,.0f}",
            f"{statistics.median(row['ratio']):.0f} ({min(row['ratio']):.0f} to {max(row['ratio']):.0f})",
            f"{row['difference']:.1e}",
        ]
        for what, row in rows
    ]
    titles = [
        "what",
        "d",
        "clients",
        "ours, ms",
        "dense SVD, ms",
        "dense to ours",
        "products differ by, of the largest",
    ]
    missing = "" if "merge" in result else "\n\nNot measured yet: the method's merge."
    return (
        "One round: the sum of low-rank products through QR, against the SVD of the dense d x d sum. The merge is the "
        "method's own on the clients' rows, the kernel alone without it.\n\n"
        + table(titles, lines)
        + missing
        + f"\n\nAt d = {4 * result['width']:,} one call of the kernel lifts the largest resident size by "
        f"{result['peak_rise_mb']:.0f} MiB; one d x d in float32 is {result['dense_matrix_mb']:.0f} MiB."
    )


def clients(results: Results, docs: Path) -> str:
    """Figure 2, studies by number of clients, and a state whose rows are all written."""
    parts = []
    rows = study_rows(results)
    mira_rows = [row for row in rows if row["name"] == "mira"]
    if mira_rows:
        save(docs / "images" / "speed-clients.svg", client_figure(mira_rows))
        parts.append(
            "Each row is a study in a separate process; every client has an adapter of GPT-2's size (c_attn, rank 8: "
            "294,912 parameters, 1.18 MB). Memory is above that of a process that only loads the base.\n\n"
            "![Time and memory of a round against the number of clients](../images/speed-clients.svg)"
        )
    if rows:
        parts.append(table(*time_lines(rows)))
        parts.append(table(*memory_lines(rows)))
    if ended := resume_row(results):
        parts.append(
            f"At K = {ended['clients']:,}: killed (SIGKILL) after round {ended['killed_after']} and resumed in "
            f"{ended['resume_s']:.0f} s; {len(ended['different'])} files differ from the run that was not stopped."
        )
    if "rows" in results:
        state = results["rows"]
        lines = [
            [name, f"{part['seconds']:.1f}", f"{part['RssAnon'] / MB:,.0f}", f"{part['RssFile'] / MB:,.0f}"]
            for name, part in row_parts(state).items()
        ]
        parts.append(
            f"A run's state without model or training, until each of {state['clients']:,} clients has a separate row "
            f"({state['rows_bytes'] / GB:.1f} GB); memory above the process's own before each part:\n\n"
            + table(["part", "seconds", "RssAnon, MB", "RssFile, MB"], lines)
        )
    return "\n\n".join(parts)


def natural_instructions(results: Results, docs: Path) -> str:
    """One real study: its cost and its scores."""
    result = results["natural-instructions"]
    names = list(result["scores"])
    metrics = sorted({metric for values in result["scores"].values() for metric in values})
    lines = [[name, *(f"{result['scores'][name].get(metric, 0.0):.4f}" for metric in metrics)] for name in names]
    return (
        f"{result['clients']} tasks, a client each, nano with rank 8 on every linear layer, {result['rounds']} rounds "
        f"of {result['sampled']:.0f} clients and 5 steps of 4 examples: "
        f"{result['seconds'] / 60:.1f} minutes in all, scoring and generation included ({result['prepare_s']:.0f} s "
        f"to load and encode; a round {result['round_s']:.1f} s, {result['training_s']:.1f} of it training, "
        f"{result['merge_s']:.2f} MIRA's merge). Peak of memory: RssAnon {result['anon_peak'] / MB:,.0f} MB, RssFile "
        f"{result['file_peak'] / MB:,.0f} MB; the study takes {result['study_bytes'] / MB:,.0f} MB on disk.\n\n"
        "Mean over clients on the test split (two or three examples of each; the base has seen other instances of "
        "these tasks, so this says little about the methods):\n\n" + table(["adapters", *metrics], lines)
    )


def time_lines(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of seconds."""
    parts = ("round_cpu_s", "training_s", "merge_s", "measuring_s", "saving_s")
    starts = ("prepare_s", "score_start_s", "export_s", "report_s")
    lines = []
    for row in rows:
        least, most = row["round_spread_s"]
        lines.append(
            [
                f"{row['clients']:,}",
                row["name"],
                str(row["sampled"]),
                f"{row['round_s']:.2f} ({least:.2f} to {most:.2f})",
                *(f"{row[key]:.2f}" for key in parts),
                *(f"{row[key]:.1f}" for key in starts),
            ]
        )
    titles = ["K", "method", "S", "round, s", "CPU s", "training", "merge", "measuring", "saving"]
    return [*titles, "once: preparing", "scoring the start", "writing adapters", "report"], lines


def memory_lines(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of memory and disk."""
    keys = ("anon_rounds", "file_rounds", "anon_peak", "file_peak")
    lines = [
        [
            f"{row['clients']:,}",
            row["name"],
            *(f"{row[key] / MB:,.0f}" for key in keys),
            f"{row['checkpoint_bytes'] / MB:.2f}",
            f"{row['changed_bytes'] / MB:.2f}",
            f"{row['study_bytes'] / GB:.2f}",
        ]
        for row in rows
    ]
    titles = [
        "K",
        "method",
        "RssAnon in rounds, MB",
        "RssFile in rounds, MB",
        "RssAnon, whole run",
        "RssFile, whole run",
    ]
    return [*titles, "checkpoint, MB", "rows changed, MB", "study on disk, GB"], lines


def gpu(results: Results, docs: Path) -> str:
    """The table of a GPU."""
    result = results["gpu"]
    lines = []
    for row in result["rows"]:
        speeds, peaks = row["tokens_per_second"], row["peak_device_gb"]
        lines.append(
            [
                row["shape"],
                *(f"{speeds[name]:,.0f}" for name in ("plain bf16", "fedmira bf16")),
                spread(row["ratio"]),
                f"{row['useful_tflops']:.1f}",
                f"{row['bf16_matmul_tflops']:.1f}",
                f"{100 * row['share']:.0f} %",
                *(f"{peaks[name]:.1f}" for name in ("plain bf16", "fedmira bf16")),
            ]
        )
    titles = [
        "shape",
        "plain bf16, tokens/s",
        "fedmira bf16, tokens/s",
        "ratio",
        "useful TFLOP/s",
        "bf16 matmul TFLOP/s",
    ]
    device = result["machine"]["gpu"] or "no GPU: a trial on the CPU"
    return f"{device}; random weights, 8 clients, batch 8, rank 16, up to 1,024 tokens, both in bf16.\n\n" + table(
        [*titles, "share", "plain bf16, peak GiB", "fedmira bf16, peak GiB"], lines
    )


@dataclass(frozen=True)
class Section:
    """A part of the page: the results it needs, the command that measures them, and the function that writes it."""

    title: str
    names: tuple[str, ...]
    what: str
    write: Callable[[Results, Path], str]

    @property
    def command(self) -> str:
        return f"python benchmarks/bench.py {self.what} --only {' '.join(self.names)}"


SECTIONS = (
    Section("Training", tuple(UNITS.values()), "core", training),
    Section("Clients per pass", ("cohorts",), "core", cohorts),
    Section("Generation and scoring", ("generation",), "core", generation),
    Section("Server: MIRA's merge", ("merge",), "core", merge),
    Section("Server: FlexLoRA's merge", ("flexlora",), "core", flexlora),
    Section("Ten thousand clients", ("clients", "rows"), "full", clients),
    Section("555 real clients", ("natural-instructions",), "full", natural_instructions),
    Section("GPU", ("gpu",), "full", gpu),
)


# ---------------------------------------------------------------- the page


def section_text(section: Section, results: Results, docs: Path) -> str:
    """A section: its command, what differs from the head, its figures, and what is not measured yet."""
    there = [name for name in section.names if name in results]
    missing = [name for name in section.names if name not in results]
    parts = [f"## {section.title}", f"    {section.command}"]
    parts += [words for name in there if (words := differences(name, results))]
    if there:
        parts.append(section.write(results, docs))
    if missing:
        parts.append(f"Not measured yet: {listed(missing)}." if there else "Not measured yet.")
    return "\n\n".join(parts)


def save(path: Path, words: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words, encoding="utf-8")


def write_page(results: Path, docs: Path) -> list[Path]:
    """Write the page and its figures below `docs` from the results; return the page and the figures it shows."""
    by_name = read_results(results)
    sections = [section_text(section, by_name, docs) for section in SECTIONS]
    parts = [INTRODUCTION, head(by_name), f"## Targets and measurements\n\n{aims_table(by_name)}", *sections]
    page = docs / "results" / "speed.md"
    save(page, "\n\n".join([*parts, NOTES.read_text(encoding="utf-8").strip()]) + "\n")
    shown = [docs / "images" / f"speed-{name}.svg" for name in ("cohorts", "clients")]
    text = page.read_text(encoding="utf-8")
    return [page, *(path for path in shown if f"/{path.name})" in text)]
