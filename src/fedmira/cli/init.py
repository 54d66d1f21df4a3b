"""Write a first config for a user: every key, with a comment, filled in from their data."""

import json
import re
from pathlib import Path

from fedmira import bundled
from fedmira.config.yaml_text import parse_yaml
from fedmira.data.formats import read_records
from fedmira.data.partition import SPLITS, known_columns
from fedmira.disk.files import write_atomic
from fedmira.errors import ConfigError, StoreError

OWNERS = ("client", "site", "user", "task", "file", "category")  # columns that may name an example's client, best first
MOST_PARTITIONS = 10  # clients of a partitioner, where no column names them
PARTITION_SIZE = 20  # examples of each of them, at least


def draft_config(file: Path, *, data: str | None = None, model: str | None = None) -> dict[str, str]:
    """Write a commented config to a new file; return what was found in the data.

    data: path or hub name, read once to find its format and clients; None = the bundled tasks.
    Raises StoreError if the file exists, ConfigError if its folder does not, DataError if data cannot be read.
    """
    if file.exists():
        raise StoreError(f"'{file}' exists already; choose another name: fedmira init my_study.yaml")
    if not file.absolute().parent.is_dir():
        raise ConfigError([f"no such folder: '{file.parent}'; create it, or choose another folder"], str(file))
    settings = {"format": "prompt_completion", "by": "client", "split_column": "split", "max_length": "16"}
    partitioner = "null"
    if data is not None:
        reading = read_records(bundled.resolve(data))
        columns = known_columns(reading.records)
        owner = next((name for name in OWNERS if name in columns), None)
        if owner is None:
            partitions = min(MOST_PARTITIONS, max(1, len(reading.records) // PARTITION_SIZE))
            partitioner = f"{{name: iid, num_partitions: {partitions}}}"
        splits = {record.columns.get("split") for record in reading.records}
        column = "split" if splits <= set(SPLITS) else "null"
        settings = {"format": reading.format, "by": owner or "task", "split_column": column, "max_length": "512"}
        if reading.template == "chat":
            settings["note"] = "conversations need a base with a chat template, or data.template: FILE (docs/data.md)"
    text = (Path(bundled.__file__).parent / "init.yaml").read_text(encoding="utf-8")
    words = {
        "NAME": re.sub(r"[^\w-]", "-", file.stem),
        "MODEL": model or "bundled:model",
        "DATA": data or "bundled:tasks",
        "FORMAT": settings["format"],
        "LENGTH": settings["max_length"],
        "SPLIT": settings["split_column"],
        "BY": settings["by"],
    }
    for name, value in words.items():
        text = text.replace(f"@{name}@", _scalar(value))
    text = text.replace("@FILE@", re.sub(r"[^\w./ -]", "?", str(file)))
    text = text.replace("partitioner: null ", f"partitioner: {partitioner} ", 1)
    if data is not None or model is not None:
        text = re.sub(r"# As written it runs .*\n", "", text)
    write_atomic(file, text.encode(), shared=True)
    return {**settings, "partitioner": partitioner}


def _scalar(text: str) -> str:
    """Quote text where YAML would read it as something else; `null` and numbers stay as they are."""
    plain = re.fullmatch(r"[\w./][\w./:-]*", text) and not text.endswith(":")
    return text if text.isdecimal() or (plain and parse_yaml(text, "init") in (text, None)) else json.dumps(text)
