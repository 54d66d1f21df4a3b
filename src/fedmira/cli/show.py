"""Results on standard output: examples as the model gets them, and the cost of a study."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmira.engine.cost import Plan
    from fedmira.study.dry_run import Shown

CLIENTS_SHOWN = 32  # more than this are in --json
NAME_CELLS = 34  # columns of a terminal for a client's name


def show_examples(shown: Sequence[Shown], as_json: bool) -> None:
    """Print examples as the model gets them; tokens with loss are green, or in brackets where there is no colour."""
    if as_json:
        print(json.dumps([asdict(example) for example in shown]))
        return
    from rich.console import Console
    from rich.text import Text

    from fedmira.names import shown_name

    console = Console()
    for example in shown:
        title = f"--- {shown_name(example.name)}: {plural(example.tokens, 'token')}, loss on {example.labels}"
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        text = Text()
        for piece, trained in example.pieces:
            marked = piece if console.is_terminal and not console.no_color else f"[[{piece}]]"
            text.append(visible(marked) if trained else visible(piece), style="green" if trained else "dim")
        console.print(text, soft_wrap=True)
    console.print("loss is taken on what is green, or in [[ ]]", highlight=False, markup=False)


def plural(count: int, word: str) -> str:
    """Write a number and a noun: 1 client, 2 clients."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def override(key: str, value: str) -> str:
    """Write an override that sets a key to a text, as a shell takes it: data.split_column=split."""
    plain = re.fullmatch(r"[^\W\d][\w./-]*", value) and value.lower() not in ("true", "false", "null")
    return shlex.quote(f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}")


def visible(text: str) -> str:
    """Replace control characters, so that data and names from others cannot control the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print what a study would cost."""
    if as_json:
        print(json.dumps(asdict(plan)))
        return
    memory, disk, cut = plan.memory, plan.disk, plan.truncation
    each = ", ".join(f"{label} {time_of(seconds)}" for label, seconds in plan.run_seconds.items())
    travels = ", ".join(f"{label} {_size(count)}" for label, count in plan.bytes_per_round.items())
    speeds = [f"{1 / plan.speeds.trained:,.0f} tokens/s trained"]
    if plan.speeds.scored:
        speeds.append(f"{1 / plan.speeds.scored:,.0f} tokens/s scored")
    if plan.speeds.answer:
        speeds.append(f"{1 / plan.speeds.answer:,.1f} answers/s written")
    lines = {
        "clients": f"{plan.clients}, {plan.sampled} in each of {plan.rounds} rounds, {plan.cohort} in one pass"
        f"{'' if plan.workers is None else f', computed by {plan.workers} actors of Ray (time: by one)'}",
        "examples": f"{plan.examples:,} to train on, {plan.tokens:,} tokens, loss on {plan.trained_tokens:,} of them",
        "truncation": f"{cut['prompts_cut']} prompts and {cut['answers_cut']} answers cut, {cut['questions_cut']} "
        f"prompts cut where answers are written, {cut['dropped']} of {cut['examples']} examples dropped",
        "adapter": f"{plan.parameters:,} parameters, {_size(4 * plan.parameters)}",
        "memory": f"base {_size(memory['base'])}, rows {_size(memory['rows'])}, one pass "
        f"{_size(memory['cohort'])}; free {_size(memory['free'])}",
        "disk": f"adapters {_size(disk['adapters'])}, checkpoints at most {_size(disk['checkpoints'])}"
        f"{f', rows while a run lasts {_size(rows)}' if (rows := disk['rows']) else ''}; free {_size(disk['free'])}",
        "travels": f"per round, up and down: {travels}",
        "speed": f"{', '.join(speeds)} (measured just now)",
        "time": f"about {time_of(plan.total_seconds)}, of which {time_of(plan.cpu_seconds)} CPU time, for {plan.runs} "
        f"runs (each: {each}; reading data and base {time_of(plan.prepare_seconds)}; scoring the untouched base "
        f"{time_of(plan.start_seconds)})",
        "assumed": "the machine stays as busy as in these seconds. Counted are training, scoring and answers; merges, "
        "checkpoints and files of adapters come on top. A running study says how long it will still take",
    }
    for label, keys in plan.training.items():
        said = ", ".join(f"{key} {json.dumps(value)}" for key, value in keys.items())
        lines[f"training of {label}"] = f"{said}; the rest as the study's"
    lines |= {f"privacy of clients, {label}": said for label, said in plan.client_privacy.items()}
    for name, line in lines.items():
        print(f"{name:12s}{line}" if len(name) < 12 else f"{name}: {line}")
    if len(plan.by_client) <= CLIENTS_SHOWN:
        print(f"\n{'client':{NAME_CELLS}s}{'train':>8s}{'validation':>12s}{'test':>8s}{'trained tokens':>16s}")
        from fedmira.names import shown_name

        for client, counts in plan.by_client.items():
            print(
                f"{in_cells(shown_name(plan.names[client]), NAME_CELLS)}"
                f"{counts['train']:8d}{counts['validation']:12d}{counts['test']:8d}"
                f"{counts['trained_tokens']:16d}"
            )
    stored = disk["adapters"] + disk["checkpoints"] + disk["rows"]
    for what, need in (("memory", memory["base"] + memory["rows"]), ("disk", stored)):
        free = {"memory": memory["free"] + memory["base"], "disk": disk["free"]}[what]
        if need > free:
            print(f"warning: {what} for {_size(need)} is needed and {_size(free)} is free")


def in_cells(text: str, width: int) -> str:
    """Return a text that takes this many columns of a terminal, where a letter may take two, or none; cut if longer."""
    from rich.cells import cell_len, set_cell_size

    from fedmira.names import writable

    text = writable(text, sys.stdout.encoding)
    if cell_len(text) >= width:
        text = f"{set_cell_size(text, width - 4).rstrip()}..."
    return text + " " * (width - cell_len(text))


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def time_of(seconds: float) -> str:
    """Write a time, rounded."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def questions() -> Iterator[str]:
    """Yield the lines that are typed, or those of a file, until they end."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip():
            yield text


def side_by_side(replies: Mapping[str, str]) -> str:
    """Return answers below one another, each after its speaker's name."""
    from rich.cells import cell_len

    from fedmira.names import shown_name, writable

    names = [writable(shown_name(name), sys.stdout.encoding) for name in replies]
    width = max(map(cell_len, names)) + 2
    lines = []
    for name, reply in zip(names, replies.values(), strict=True):
        first, *more = visible(reply).split("\n")
        lines += [in_cells(f"{name}:", width) + first, *(" " * width + line for line in more)]
    return "\n".join(lines)
