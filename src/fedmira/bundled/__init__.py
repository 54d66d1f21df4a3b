"""What the demo needs and a wheel can carry: a generator of tasks and a small base model the project pretrained."""

from pathlib import Path

from fedmira.errors import DataError

MODEL_PATH = Path(__file__).parent / "model"
TASKS_PATH = Path(__file__).parent / "tasks.jsonl"
PREFIX = "bundled:"
_THINGS = {"model": MODEL_PATH, "tasks": TASKS_PATH}


def resolve(path: str) -> str:
    """Turn `bundled:model` and `bundled:tasks` into paths inside the package; other paths stay as they are.

    Raises DataError for another name behind `bundled:`.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in _THINGS:
        raise DataError(f"'{path}': bundled are {', '.join(PREFIX + thing for thing in _THINGS)}")
    return str(_THINGS[name])


def preset(name: str) -> Path | None:
    """Return the bundled config of that name (`demo`, `mira-paper`), or None."""
    path = Path(__file__).parent / "presets" / f"{name}.yaml"
    return path if path.name == f"{name}.yaml" and path.is_file() else None


def presets() -> list[str]:
    """List the bundled configs."""
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.yaml"))
