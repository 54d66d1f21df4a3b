"""What methods wrote to the same test prompts, side by side; runs keep it only where report.examples asks for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedmira.disk.folders import RunFolder


class Example(NamedTuple):
    """One test example of a client: its prompt, reference answers, and who wrote what."""

    prompt: str
    references: list[str]
    written: list[tuple[str, str]]  # (untouched base or method, answer)


def read_examples(runs: Mapping[str, Path]) -> dict[str, list[Example]]:
    """Put what some runs (label -> folder) wrote to the same prompts side by side, by client."""
    found: dict[tuple[str, str], Example] = {}
    for label, folder in runs.items():
        for one in RunFolder(folder).examples():
            example = found.setdefault(
                (one["client"], one["prompt"]),
                Example(one["prompt"], one["references"], [("untouched base", one["base"])]),
            )
            example.written.append((label, one["answer"]))
    by_client: dict[str, list[Example]] = {}
    for (client, _), example in found.items():
        by_client.setdefault(client, []).append(example)
    return by_client
