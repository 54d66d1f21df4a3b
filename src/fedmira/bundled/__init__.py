"""What the demo needs: a generator of tasks and a small base model pretrained by the project."""

from pathlib import Path

from fedmira.errors import DataError

MODEL_PATH = Path(__file__).parent / "model"
TASKS_PATH = Path(__file__).parent / "tasks.jsonl"
PREFIX = "bundled:"
TASKS = f"{PREFIX}tasks"
_PATHS = {"model": MODEL_PATH, "tasks": TASKS_PATH}


def resolve(path: str) -> str:
    """Turn `bundled:model` and `bundled:tasks` into paths inside the package; other paths stay as they are.

    Raises DataError for another name after `bundled:`.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in _PATHS:
        raise DataError(f"'{path}' is unknown; bundled: {', '.join(PREFIX + known for known in _PATHS)}")
    return str(_PATHS[name])


def preset(name: str) -> Path | None:
    """Return the bundled config of that name (`demo`, `mira-paper`), or None."""
    path = Path(__file__).parent / "presets" / f"{name}.yaml"
    return path if path.name == f"{name}.yaml" and path.is_file() else None


def presets() -> list[str]:
    """List the bundled configs."""
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.yaml"))
