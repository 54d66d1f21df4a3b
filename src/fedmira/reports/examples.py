"""Answers of all methods to the same test prompts; a run stores them only if report.examples is true."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedmira.disk.folders import RunFolder


class Example(NamedTuple):
    """One test example of a client: its prompt, reference answers, and the answer of each method."""

    prompt: str
    references: list[str]
    written: list[tuple[str, str]]  # (untouched base or method, answer)


def read_examples(runs: Mapping[str, Path]) -> dict[str, list[Example]]:
    """Collect the answers of runs (label -> folder) to the same prompts, by client."""
    examples: dict[tuple[str, str], Example] = {}
    for label, folder in runs.items():
        for stored in RunFolder(folder).examples():
            example = examples.setdefault(
                (stored["client"], stored["prompt"]),
                Example(stored["prompt"], stored["references"], [("untouched base", stored["base"])]),
            )
            example.written.append((label, stored["answer"]))
    by_client: dict[str, list[Example]] = {}
    for (client, _), example in examples.items():
        by_client.setdefault(client, []).append(example)
    return by_client
