"""What MIRA's paper leaves open: which graph, how strong, at which rank, with how many clients, and when it hurts.

    python benchmarks/questions/write.py [--only graphs rank-4 clients-550 ...] [--seeds 5] [--methods LABEL ...]
                                         [--only-page] [--folder FOLDER] [--page FILE] [--json FOLDER]

Studies of ni.yaml beside this file, each with the methods that its question needs. Runs are kept in
benchmarks/results/questions-STUDY.json; what is kept there is not run again. Writes docs/results/questions.md.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import evidence
import kept
from evidence import Options, Study, number
from stored import table

CONFIG = Path(__file__).with_name("ni.yaml")
GRAPHS = {
    "task": "the same task (the truth)",
    "task-shuffled": "the same, clients permuted",
    "category": "the same category",
    "learned": "learned from adapters, cosine",
    "learned-shuffled": "the same, clients permuted",
    "distance": "learned from adapters, distance",
    "prompts": "nearest by embedded prompts",
    "random": "random weights (the paper)",
    "all": "everybody alike",
}
FORMS = {
    "task": "factors, stored neighbours",
    "sampled": "factors, sampled neighbours (the paper)",
    "product": "products, stored neighbours",
    "product-sampled": "products, sampled neighbours",
}
PULLS = {"pull-001": "0.01", "pull-01": "0.1", "task": "0.5", "pull-1": "1"}
OTHERS = {"fedavg": "one adapter for all", "auto": "`lambda: auto`", "task": "true groups, pull 1/2"}
RANKS, COUNTS, ALPHAS = (4, 8, 16, 32), (10, 50, 150, 550), ("0.3", "1", "10")
TASKS_A_CLIENT = 5  # clients that share a task, whatever their number


def of_clients(count: int) -> Study:
    """A study of more tasks, each dealt to 5 clients; every client takes part about twice."""
    words = ("data.clients={by: task, per_group: 5}", "data.subsample=1.0", "training.local_steps=2",
             "federation={rounds: 20, participation: 0.1}", "evaluation.every=20")  # fmt: skip
    return Study(f"clients-{count}", CONFIG, words, ("local", *OTHERS), seeds=2 if count > 200 else 3)


def of_dirichlet(alpha: str) -> Study:
    """A study of the same examples, dealt to 24 clients by a Dirichlet distribution over tasks."""
    dealt = f"{{name: dirichlet, num_partitions: 24, partition_by: task, alpha: {alpha}, min_partition_size: 10}}"
    words = (f"data.clients={{partitioner: {dealt}}}", "data.subsample=1.0")
    return Study(f"dirichlet-{alpha}", CONFIG, words, ("local", "fedavg", "auto", "learned", "all"), seeds=3)


STUDIES = (
    Study("graphs", CONFIG, labels=("local", "fedavg", "auto", *GRAPHS, *(one for one in FORMS if one != "task"))),
    *(
        Study(f"rank-{rank}", CONFIG, (f"lora.r={rank}", f"lora.lora_alpha={2 * rank}"), ("local", *PULLS), seeds=3)
        for rank in RANKS
    ),
    *map(of_clients, COUNTS),
    *map(of_dirichlet, ALPHAS),
)
HEAD = """\
# What the paper leaves open

Made by `python benchmarks/questions/write.py`; {machines}.

The base is `nano` (6.9 M parameters) in float32, LoRA on all linear layers. Unless a section says otherwise: 8 tasks of
Natural Instructions, 2 of each of 4 categories, each dealt at random to 3 clients; a third of the clients in a round, 8
rounds of 3 steps of 4 examples, rank 8, one learning rate for all. Test loss in nats: means over clients of each
client's mean over seeds. Better / equal / worse, p: against training alone, signed-rank test over clients with Holm's
correction over the rows of a table.
"""


def compared(found: kept.Kept, words: Mapping[str, str]) -> str:
    """Write a line for each method: its loss, and how it compares with training alone."""
    labels = [label for label in words if label in found["methods"]]
    items = evidence.summaries(found, labels)
    rows = [["training alone", evidence.interval(items["local"]), *[""] * 4]]
    for label in labels:
        against = items[label].against
        assert against is not None
        rows.append(
            [
                words[label],
                evidence.interval(items[label]),
                number(against.difference),
                *evidence.against(against),
                number(against.effect, 2),
            ]
        )
    return table(["", "test loss", "minus alone", "better / equal / worse", "p", "effect size"], rows)


def seeds(found: kept.Kept) -> str:
    return f"{len(found['clients'])} clients, {len(evidence.seeds_of(found, list(found['methods'])))} seeds."


def graphs(found: kept.Kept) -> list[str]:
    """Which graph, and is the gain due to what it says? Factors or products, sampled or stored neighbours?"""
    pairs = [("task", "task-shuffled"), ("learned", "learned-shuffled")]
    said = []
    for one, control in pairs:
        if not {one, control} <= set(found["methods"]):
            continue
        item = evidence.summaries(found, [one, control], baseline=control)[one].against
        assert item is not None
        said.append(
            f"- {GRAPHS[one]}: {number(item.difference)} nats against its own permutation, better for {item.wins} of "
            f"{item.pairs} clients (p {evidence.chance(item.p)})"
        )
    return [
        "## Which graph",
        seeds(found),
        compared(found, {**GRAPHS, "fedavg": "one adapter for all", "auto": "`lambda: auto`"}),
        "Is it what the graph says? The same weights between other clients:",
        "\n".join(said),
        "## Factors or products, sampled or stored neighbours",
        "Along the true groups, pull 1/2:",
        compared(found, FORMS),
    ]


def ranks(found: Mapping[str, kept.Kept]) -> list[str]:
    """Rank against pull."""
    rows = []
    for rank in RANKS:
        if (one := found.get(f"rank-{rank}")) is None:
            continue
        items = evidence.summaries(one, list(PULLS))
        cells = [number(items["local"].mean)]
        for label in PULLS:
            against = items[label].against
            assert against is not None
            clear = against.p_holm is not None and against.p_holm < evidence.CLEAR
            cells.append(f"{number(items[label].mean)}{' *' if clear else ''}")
        rows.append([str(rank), *cells])
    return [
        "## Rank and pull",
        "Along the true groups, stored neighbours; lora_alpha is twice the rank. A star: different from training alone "
        "at p < 0.05 over clients.",
        table(["rank", "alone", *(f"pull {pull}" for pull in PULLS.values())], rows),
    ]


def counts(found: Mapping[str, kept.Kept]) -> list[str]:
    """From 10 to 550 clients, of which 5 always share a task."""
    parts = [
        "## From 10 to 550 clients",
        "Five clients share a task of 120 examples, whatever their number: what grows is the number of strangers. A "
        "tenth of the clients in a round, 20 rounds of 2 steps: each client takes part about twice.",
    ]
    return [*parts, *in_turn(found, "clients", COUNTS, OTHERS), *unseen(found)]


def in_turn(
    found: Mapping[str, kept.Kept], kind: str, values: Sequence[float | str], words: Mapping[str, str]
) -> list[str]:
    """A table for each study of a kind that there is."""
    parts = []
    for value in values:
        if (one := found.get(f"{kind}-{value}")) is not None:
            parts += [f"{kind} {value}: {seeds(one)}", compared(one, words)]
    return parts


def unseen(found: Mapping[str, kept.Kept]) -> list[str]:
    """What those get whom no round sampled: the common start, or their own choice at the end."""
    words = {"local": "training alone: the base", **OTHERS}
    rows = []
    for count in COUNTS:
        one = found.get(f"clients-{count}", {"methods": {}})
        shared = {label: entry["runs"] for label, entry in one["methods"].items() if label in words}
        pairs = {
            label: [run["loss"][place] for run in runs.values() for place in run.get("never", ())]
            for label, runs in shared.items()
        }
        if pairs.get("local"):
            cells = (number(statistics.fmean(pairs[label])) if pairs.get(label) else "" for label in words)
            rows.append([str(count), str(len(pairs["local"])), *cells])
    return [
        "## Clients that were never sampled",
        "With a tenth of the clients in each of 20 rounds some are never drawn. Along a graph such a client keeps the "
        "common start, by (9); with `lambda: auto` it ends with its own choice after the last round. Mean test loss of "
        "these clients, over seeds:",
        table(["clients", "never sampled, all seeds", *words.values()], rows),
    ]


def mixtures(found: Mapping[str, kept.Kept]) -> list[str]:
    """From clients with one task each to clients that are alike."""
    words = {"fedavg": "one adapter for all", "auto": "`lambda: auto`", "learned": "learned graph, pull 1/2",
             "all": "everybody alike, pull 1/2"}  # fmt: skip
    parts = [
        "## From unlike to alike clients",
        "The same examples dealt to 24 clients by a Dirichlet distribution over the 8 tasks: alpha 0.3, few tasks "
        "a client; alpha 10, nearly the same mixture for all.",
    ]
    return [*parts, *in_turn(found, "dirichlet", ALPHAS, words)]


def hurt(found: Mapping[str, kept.Kept]) -> list[str]:
    """Where cooperation costs: the share of clients with a higher loss than alone, and the largest increase."""
    rows = []
    for name, one in found.items():
        for label in [label for label in one["methods"] if label != "local"]:
            shared = evidence.seeds_of(one, ["local", label])
            alone, other = (evidence.values(one, which, shared) for which in ("local", label))
            changes = [other[client] - alone[client] for client in alone]
            worse = sum(change > 0 for change in changes) / len(changes)
            rows.append((worse, max(changes), [name, label, f"{100 * worse:.0f} %", number(max(changes))]))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    return [
        "## When cooperation hurts",
        "Clients whose test loss is higher than alone, and the largest increase, most first; the twelve worst and the "
        "twelve best of all rows above.",
        table(["study", "method", "clients worse than alone", "largest increase, nats"],
              [row for _, _, row in (rows if len(rows) <= 24 else [*rows[:12], *rows[-12:]])]),
    ]  # fmt: skip


def page(found: Mapping[str, kept.Kept]) -> str:
    """Write the page from what is kept."""
    parts = [HEAD.format(machines=evidence.machines(found)).rstrip()]
    parts += graphs(found["graphs"]) if "graphs" in found else []
    for kind, write in (("rank", ranks), ("clients", counts), ("dirichlet", mixtures)):
        if any(name.startswith(kind) for name in found):
            parts += write(found)
    return "\n\n".join([*parts, *hurt(found)]) + "\n"


def places(study: Study, options: Options) -> Sequence[str]:
    """Return where the data and the base of a study are; the tasks are written there first."""
    if study.name.startswith("clients-"):
        count = int(study.name.removeprefix("clients-")) // TASKS_A_CLIENT
        path = options.folder / f"tasks-{count}.jsonl"
        evidence.save_tasks(path, categories=11, tasks=-(-count // 11), most=count)
    else:
        path = evidence.save_tasks(options.folder / "tasks.jsonl", categories=4, tasks=2)
    return evidence.places(path)


def main() -> None:
    options = evidence.options(__doc__ or "", "questions", STUDIES)
    for study in [] if options.only_page else STUDIES:
        if study.name in options.only:
            evidence.measure([study], options, places(study, options))
    options.file.write_text(page(evidence.read(STUDIES, options)), encoding="utf-8")


if __name__ == "__main__":
    main()
