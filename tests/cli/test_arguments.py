"""Arguments arrive as typer would give them: each kind that the commands have, given and absent."""

import os
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from fedmira.cli.arguments import PlainGroup


def parse(words: list[str], *, plainly: bool) -> dict[str, Any]:
    """Return what a command gets for these words; plainly: without pydantic."""
    app = typer.Typer(cls=PlainGroup) if plainly else typer.Typer()
    seen: dict[str, Any] = {}

    @app.callback()
    def top() -> None:
        pass

    @app.command()
    def show(
        path: Path,
        texts: Annotated[list[str] | None, typer.Argument()] = None,
        folders: Annotated[list[Path] | None, typer.Option("--folder")] = None,
        name: Annotated[str | None, typer.Option()] = None,
        file: Annotated[str, typer.Option()] = "a.yaml",
        count: Annotated[int | None, typer.Option()] = None,
        quiet: Annotated[bool, typer.Option("-q")] = False,
    ) -> None:
        seen.update(locals())

    app(["show", *words], standalone_mode=False)
    return {name: value for name, value in seen.items() if name != "seen"}


@pytest.mark.parametrize(
    "words",
    [
        ["somewhere"],
        ["somewhere", "a=1", "b=2", "-q"],
        ["", "--name", "", "--file", "b.yaml"],
        [".", "--folder", "x", "--folder", "y/z", "--count", "3"],
    ],
)
def test_values_are_those_of_typer(words: list[str]) -> None:
    assert parse(words, plainly=True) == parse(words, plainly=False)


@pytest.mark.parametrize("words", [[], ["x", "--count", "three"], ["x", "--nothing"], ["x", "--name"]])
def test_faults_are_those_of_typer(words: list[str]) -> None:
    said = []
    for plainly in (True, False):
        with pytest.raises(Exception) as fault:  # noqa: PT011 - of typer's own click, or of the package
            parse(words, plainly=plainly)
        said.append((type(fault.value), str(fault.value)))
    assert said[0] == said[1]


def test_a_path_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    for plainly in (True, False):
        with pytest.raises(typer.BadParameter, match="is not readable"):
            parse([str(tmp_path)], plainly=plainly)
