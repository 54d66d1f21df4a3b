"""Facts of a study: data, sampling, costs, and limits of its figures."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedmira.reports.axes import spread_out
from fedmira.reports.record import Metric, RunRecord, StudyRecord
from fedmira.reports.stats import base_values, client_values, gains
from fedmira.reports.wording import between, clean, count, listed, number, plural, seconds, size, spread

CLIENTS_LISTED = 300  # in a table; of more clients the ends are listed
ENDS_LISTED = 25
NAMES_LISTED = 20
EXAMPLES_SHOWN = 30  # clients
LENGTH = ("local_steps", "local_epochs", "batch_size", "gradient_accumulation_steps")  # how much a method trains
CUTS = {
    "prompts_cut": "prompts cut at their start",
    "questions_cut": "test prompts cut to leave room for an answer",
    "answers_cut": "answers cut at their end",
    "dropped": "examples dropped",
}


class RunLine(NamedTuple):
    """One run's costs, as text."""

    folder: str
    state: str
    rounds: str
    time: str
    training: str
    merging: str
    speed: str
    up: str
    down: str
    each: str
    pull: str
    never: str
    adapters: int


class ClientTable(NamedTuple):
    """One metric, client by client. lines: (client, its name, [untouched base, each method's value]); None = n/a."""

    metric: Metric
    methods: list[str]
    lines: list[tuple[str, str, list[float | None]]]
    note: str


def notices(record: StudyRecord) -> list[str]:
    """List what limits the figures, the most serious first."""
    said = []
    unfinished = [f"{clean(run.folder)} ({clean(run.state)})" for run in record.runs if run.state != "complete"]
    if unfinished:
        said.append(f"Not complete, so read with care: {listed(unfinished, NAMES_LISTED)}.")
    rounds = sorted({turn for metric in record.metrics for item in metric.methods for turn in item.rounds})
    tested_after = "tested after"
    if record.results.kept:  # clients keep adapters of different rounds: no run is shorter for that
        rounds, tested_after = sorted({len(run.rounds) for run in record.runs if run.rounds}), "trained for"
    if len(rounds) > 1:
        said.append(f"The runs were {tested_after} different numbers of rounds: {', '.join(map(str, rounds))}.")
    early = [f"{clean(run.folder)} {clean(run.stopped_early)}" for run in record.runs if run.stopped_early]
    if early:
        said.append(f"Stopped early, as the config asks: {listed(early, NAMES_LISTED)}.")
    tested = {item.method for metric in record.metrics for item in metric.methods}
    untested = [label for label in record.labels if label not in tested]
    if tested and untested:
        said.append(f"Not tested yet, and not in the tables: {listed(untested, NAMES_LISTED)}.")
    for metric in record.metrics:
        values = client_values(record.results, metric=metric.name)
        for label, value_of in values.items():
            diverged = sum(map(math.isinf, value_of.values()))
            if diverged:
                said.append(
                    f"{clean(label)} diverged: {plural(diverged, 'client')} without a finite {metric.title.lower()}."
                )
    missing = max((item.missing for metric in record.metrics for item in metric.methods), default=0)
    if missing:
        said.append(
            f"{plural(missing, 'client')} without a value (n/a; no test example, or not measured) "
            f"{'is' if missing == 1 else 'are'} left out of means and tests."
        )
    return said + _privacy_notices(record) + _training_notices(record) + _sampling_notices(record)


def _privacy_notices(record: StudyRecord) -> list[str]:
    """Say what epsilon does not count."""
    said = []
    noised = [run for run in record.runs if _mapping(run.facts.client_privacy).get("epsilon") is not None]
    if noised:
        more = "; whoever gets what several runs sent has the sum of their epsilons" if len(noised) > 1 else ""
        said.append(
            "Epsilon of clients does not cover losses, scores and the signal-to-noise ratio of a round, which only a "
            f"simulation computes: from data and updates without noise{more}."
        )
    private = [run for run in record.runs if run.facts.privacy]
    if not private:
        return said
    if len(private) > 1:
        said.append(
            f"Each of the {len(private)} private runs trained on the same examples: whoever gets the adapters of "
            "several has the sum of their epsilons."
        )
    losses = "losses on validation examples, and what was chosen by them" if _validated(private) else ""
    scores = f"test scores, {losses}" if losses else "test scores"
    return [*said, f"Not private, for they are of examples that were not trained on: {scores}."]


def _validated(runs: Sequence[RunRecord]) -> bool:
    return any(_mapping(run.facts.privacy).get("validation") for run in runs)


def _training_notices(record: StudyRecord) -> list[str]:
    """Say where methods train for another length than each other, or a schedule was lengthened on the way."""
    lengths: dict[str, list[str]] = {}
    said = []
    for label in record.labels:
        run = record.first_run(label)
        training = _mapping(run.facts.training) if run is not None and run.total("tokens") else {}
        if training:
            length = ", ".join(f"{key} {clean(training[key])}" for key in LENGTH if training.get(key) is not None)
            lengths.setdefault(length, []).append(clean(label))
    if len(lengths) > 1:
        each = "; ".join(f"{listed(labels, NAMES_LISTED)}: {length}" for length, labels in lengths.items())
        said.append(f"Not compared at equal compute, the methods train for different lengths. {each}.")
    grown = [
        run for run in record.runs if any(_mapping(start).get("rounds_before") for start in _items(run.facts.resumed))
    ]
    if grown:
        names = listed([clean(run.folder) for run in grown], NAMES_LISTED)
        said.append(
            f"Rounds were added to a schedule of the learning rate; the first ones followed a shorter one: {names}."
        )
    return said


def _sampling_notices(record: StudyRecord) -> list[str]:
    said = []
    never = max((run.never_sampled or 0 for run in record.runs), default=0)
    if never:
        said.append(
            f"{plural(never, 'client')} {'was' if never == 1 else 'were'} never sampled (most, over the seeds). Under "
            "a personal method such a client is scored at the common start: it can neither gain nor lose."
        )
    joined = {(name, number) for run in record.runs for name, number in _mapping(run.facts.joined).items()}
    if joined:
        each = listed(
            [f"{clean(name)} (from round {clean(number)} on)" for name, number in sorted(joined)], NAMES_LISTED
        )
        said.append(
            f"Not all clients were there from round 1; means of earlier rounds are without them. Joined: {each}."
        )
    refused = sum(int(run.total("refused_uploads") or 0) for run in record.runs)
    if refused:
        said.append(f"{plural(refused, 'upload')} refused, and not merged: see log.txt of the run.")
    replies = sum(int(run.total("refused_replies") or 0) for run in record.runs)
    if replies:
        said.append(f"{replies:,} {'reply' if replies == 1 else 'replies'} refused by clients whose loss got worse.")
    return said


def basis(record: StudyRecord) -> str:
    """Describe what the figures are based on: split, rounds, clients, seeds."""
    items = [item for metric in record.metrics for item in metric.methods]
    rounds = sorted({turn for item in items for turn in item.rounds})
    seeds = sorted({seed for item in items for seed in item.seeds})
    if not rounds:
        return f"{plural(len(record.results.clients), 'client')}; not tested yet."
    after = plural(rounds[0], "round") if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds"
    said = f"Test split after {after}; "
    if record.results.kept:
        said = f"Test split with the adapters of the best round by validation loss ({after}); "
    said += f"{plural(len(record.results.clients), 'client')}; "
    if len(seeds) == 1:
        return f"{said}one seed ({seeds[0]}): chance in training and sampling is not averaged out."
    return f"{said}{len(seeds)} seeds. A client counts once: its seeds are averaged first."


def data_facts(record: StudyRecord) -> list[tuple[str, str]]:
    """Describe the clients' data from clients.json; empty if there is none."""
    clients = record.clients
    if not clients:
        return []
    groups = {group for client in clients if (group := record.group(client)) is not None}
    counts = [_mapping(client.get("examples")) for client in clients.values()]
    train = [_whole(splits.get("train")) for splits in counts]
    facts = [
        ("Clients", f"{len(clients):,}" + (f" in {plural(len(groups), 'group')}" if len(groups) > 1 else "")),
        (
            "Examples",
            f"{sum(train):,} to train on ({between(min(train), max(train))} a client), "
            f"{sum(_whole(splits.get('validation')) for splits in counts):,} for validation, "
            f"{sum(_whole(splits.get('test')) for splits in counts):,} for the test",
        ),
    ]
    tokens = sum(_whole(client.get("trained_tokens")) for client in clients.values())
    facts.append(("Tokens with a loss", f"{tokens:,} in the training split"))
    cuts = []
    for key, what in CUTS.items():
        numbers = [number for client in clients.values() if (number := _whole(client.get(key)))]
        if numbers:
            cuts.append(f"{sum(numbers):,} {what} ({plural(len(numbers), 'client')})")
    facts.append(("Cut to fit", "; ".join(cuts) if cuts else "nothing: every prompt and answer is whole"))
    without = [name for name, splits in zip(clients, counts, strict=True) if not _whole(splits.get("test"))]
    if without:
        names = listed(map(record.called, without), NAMES_LISTED)
        facts.append(("No test example", f"{plural(len(without), 'client')}: {names}"))
    return facts


def sampling_facts(record: StudyRecord) -> list[tuple[str, str]]:
    """Describe, seed by seed, how often clients were sampled and which never were; methods share one schedule."""
    facts = []
    for seed in sorted({run.seed for run in record.runs}):
        run = max((run for run in record.runs if run.seed == seed), key=lambda run: len(run.rounds))
        if not run.rounds:
            continue
        clients = list(record.clients) or record.results.clients
        times = [run.sampled.get(client, 0) for client in clients]
        never = [client for client, often in zip(clients, times, strict=True) if not often]
        said = (
            f"{count(run.facts.sampled)} of {len(clients):,} clients a round, "
            f"{plural(len(run.rounds), 'round')}; each took part {between(min(times), max(times))} times"
            f"{'' if min(times) == max(times) else f', {sum(times) / len(times):.1f} on average'}; "
        )
        names = listed(map(record.called, never), NAMES_LISTED)
        said += f"never: {len(never):,} ({names})" if never else "nobody was left out"
        facts.append((f"Seed {seed}", said))
    return facts


def setup_facts(record: StudyRecord) -> list[tuple[str, str]]:
    """List base, adapter, machine and versions of the first run."""
    first_run = record.runs[0].facts
    facts = []
    if first_run.base_model is not None:
        mark = str(first_run.base_fingerprint or "")[:12]
        facts.append(("Base model", clean(first_run.base_model) + (f", sha256 {clean(mark)}…" if mark else "")))
    sizes: dict[Any, list[str]] = {}  # number of parameters -> methods
    for run in record.runs:
        if run.facts.parameters is not None:
            names = sizes.setdefault(run.facts.parameters, [])
            names += [] if run.label in names else [run.label]
    if sizes:
        each = [
            f"{count(size)}" + (f" ({', '.join(names)})" if len(sizes) > 1 else "") for size, names in sizes.items()
        ]
        facts.append(("Adapter", f"{' or '.join(each)} parameters a client"))
    computed = [clean(value) for value in (first_run.device, first_run.dtype) if value is not None]
    passes = {"threads": first_run.threads, "cohort": first_run.cohort}
    computed += [f"{name}: {clean(value)}" for name, value in passes.items() if value is not None]
    if computed:
        facts.append(("Computed on", ", ".join(computed)))
    for label in record.labels:
        first = record.first_run(label)
        changed = _mapping(_mapping(first.facts.settings).get("training")) if first is not None else {}
        if changed:
            keys = ", ".join(f"{clean(key)} {clean(json.dumps(value))}" for key, value in changed.items())
            facts.append((f"Training of {clean(label)}", f"{keys}; otherwise as in config.yaml"))
    facts += [(f"Privacy of {clean(run.folder)}", said) for run in record.runs if (said := _privacy(run))]
    facts += [(f"Privacy of clients, {clean(run.folder)}", said) for run in record.runs if (said := _of_clients(run))]
    versions = _mapping(first_run.versions)
    if versions:
        facts.append(("Versions", ", ".join(f"{clean(name)} {clean(version)}" for name, version in versions.items())))
    for metric in record.metrics:
        last = [
            f"{clean(item.method)} {number(item.mean)}"
            for item in record.of_last_round.get(metric.name, [])
            if item.mean is not None
        ]
        if last:
            facts.append((f"{metric.title} of the last round", f"{', '.join(last)} (mean over clients; not kept)"))
    times = [str(run.facts.started) for run in record.runs if run.facts.started]
    if times:
        facts.append(("Begun", clean(min(times))))
    return facts


def _privacy(run: RunRecord) -> str:
    """Say what a run promises of each training example; empty if nothing."""
    said = _mapping(run.facts.privacy)
    if not said:
        return ""
    return (
        f"epsilon {_epsilon(said.get('epsilon'))} at delta {clean(said.get('delta'))} (the largest of all clients; "
        f"budget {clean(said.get('budget'))}): {clean(said.get('adjacency'))}; {clean(said.get('sampling'))} sampling, "
        f"{plural(_whole(said.get('steps')), 'local step')} at most, noise {clean(said.get('noise_multiplier'))}, clip "
        f"{clean(said.get('clip'))}; {clean(said.get('accountant'))}"
    )


def _of_clients(run: RunRecord) -> str:
    """Say what noise on uploads promises each client, or why nothing; empty if there is none."""
    said = _mapping(run.facts.client_privacy)
    if not said:
        return ""
    if said.get("none"):
        return f"none is promised by the noise on uploads: {clean(said['none'])}"
    return (
        f"epsilon {_epsilon(said.get('epsilon'))} at delta {clean(said.get('delta'))} (the largest of all clients, of "
        f"{plural(_whole(said.get('uploads')), 'upload')}): {clean(said.get('adjacency'))}; "
        f"sampling {clean(said.get('sampling'))}; clip {clean(said.get('clip'))}, noise {clean(said.get('sigma'))} on "
        f"each number; covered: "
        f"{clean(said.get('covers'))}; {clean(said.get('accountant'))}"
    )


def _epsilon(value: object) -> str:
    """Round up: what is promised is no less."""
    return f"{math.ceil(1000 * value) / 1000:g}" if isinstance(value, int | float) else "n/a"


def run_lines(record: StudyRecord) -> list[RunLine]:
    """List every run's state and costs."""
    return [_run_line(run) for run in record.runs]


def _run_line(run: RunRecord) -> RunLine:
    uploads = sum(run.sampled.values())
    up, down, tokens = run.total("bytes_up"), run.total("bytes_down"), run.total("tokens")
    training = run.total("seconds_training")
    planned = run.facts.rounds
    never = run.never_sampled
    rounds = f"{len(run.rounds)} of {planned}{', stopped early' if run.stopped_early else ''}"
    return RunLine(
        folder=run.folder,
        state=run.state,
        rounds=rounds if isinstance(planned, int) and run.logged else "n/a",
        time=seconds(run.total("seconds")),
        training=seconds(training),
        merging=seconds(run.total("seconds_merge")),
        speed=f"{tokens / training:,.0f}" if tokens and training else "n/a",
        up=size(up),
        down=size(down),
        each=size(up / uploads) if up is not None and uploads else "n/a",
        pull=spread(run.facts.pull_percent),
        never="n/a" if never is None else f"{never:,}",
        adapters=run.adapters,
    )


def client_tables(record: StudyRecord) -> list[ClientTable]:
    """List each metric client by client, the judged metric first; of many clients only the two ends."""
    tables = []
    for metric in sorted(record.metrics, key=lambda metric: metric is not record.judged):
        values = client_values(record.results, metric=metric.name)
        base = base_values(record.results, metric=metric.name, baseline=record.baseline)
        clients, note = record.results.clients, ""
        if len(clients) > CLIENTS_LISTED:
            clients, note = _ends(record, metric, clients)
        lines = []
        for client in clients:
            line = [value_of[client] for value_of in (base, *values.values())]
            values_shown = [None if math.isnan(value) else value for value in line]
            lines.append((client, record.called(client), values_shown))
        tables.append(ClientTable(metric, list(values), lines, note))
    return tables


def _ends(record: StudyRecord, metric: Metric, clients: Sequence[str]) -> tuple[list[str], str]:
    """Choose the clients with the least and the greatest gain under the last method that has gains."""
    said = f"Of {len(clients):,} clients, "
    rest = "results.csv of each run has all."
    reference, table = gains(record.results, metric=metric.name, baseline=record.baseline)
    known = {
        label: {client: gain for client, gain in gain_of.items() if not math.isnan(gain)}
        for label, gain_of in table.items()
    }
    label = next((label for label, gain_of in reversed(known.items()) if gain_of), None)
    if label is None:
        return list(clients[: 2 * ENDS_LISTED]), f"{said}the first {2 * ENDS_LISTED}; {rest}"
    ranked = sorted(known[label], key=lambda client: known[label][client])
    ends = ranked[:ENDS_LISTED] + ranked[ENDS_LISTED:][-ENDS_LISTED:]
    return ends, (
        f"{said}those with the {ENDS_LISTED} smallest and the {ENDS_LISTED} greatest gains of {clean(label)} over "
        f"{clean(reference)}, ascending; {rest}"
    )


def shown_examples(record: StudyRecord) -> tuple[dict[str, Any], str]:
    """Return the test examples to show, by client, and a note on those that are left out."""
    examples = record.examples()
    clients = list(examples)
    shown = {clients[index]: examples[clients[index]] for index in spread_out(len(clients), EXAMPLES_SHOWN)}
    note = f" {len(shown)} of {len(clients):,} clients, at even steps; examples.jsonl of each run has all."
    return shown, note if len(shown) < len(clients) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
