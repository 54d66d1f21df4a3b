"""Write a first config for a user: every key, commented, filled in with what their data show."""

import json
import re
from pathlib import Path

from fedmira import bundled
from fedmira.config.yaml_text import parse_yaml
from fedmira.data.formats import read_records
from fedmira.data.partition import SPLITS, known_columns
from fedmira.disk.files import write_atomic
from fedmira.errors import ConfigError, StoreError

OWNERS = ("client", "site", "user", "task", "file", "category")  # columns that may say whose an example is, best first
DEALT = 10  # clients of a partitioner, at most, where no column says it
EACH = 20  # examples that each of them should have


def draft_config(file: Path, *, data: str | None = None, model: str | None = None) -> dict[str, str]:
    """Write a commented config to a new file; return what was found in the data.

    data: path or hub name, read once to find its format and who its clients can be; None = the bundled tasks.
    Raises StoreError if the file is there already, ConfigError if its folder is not, DataError if data cannot be read.
    """
    if file.exists():
        raise StoreError(f"'{file}' exists already; choose another name: fedmira init my_study.yaml")
    if not file.absolute().parent.is_dir():
        raise ConfigError([f"no such folder: '{file.parent}'; make it first, or choose another place"], str(file))
    found = {"format": "prompt_completion", "by": "client", "split_column": "split", "max_length": "16"}
    partitioner = "null"
    if data is not None:
        reading = read_records(bundled.resolve(data))
        columns = known_columns(reading.records)
        owner = next((name for name in OWNERS if name in columns), None)
        if owner is None:
            partitioner = f"{{name: iid, num_partitions: {min(DEALT, max(1, len(reading.records) // EACH))}}}"
        splits = {record.columns.get("split") for record in reading.records}
        column = "split" if splits <= set(SPLITS) else "null"
        found = {"format": reading.format, "by": owner or "task", "split_column": column, "max_length": "512"}
        if reading.template == "chat":
            found["note"] = "conversations need a base with a chat template, or data.template: FILE (docs/data.md)"
    text = (Path(bundled.__file__).parent / "init.yaml").read_text(encoding="utf-8")
    words = {
        "NAME": re.sub(r"[^\w-]", "-", file.stem),
        "MODEL": model or "bundled:model",
        "DATA": data or "bundled:tasks",
        "FORMAT": found["format"],
        "LENGTH": found["max_length"],
        "SPLIT": found["split_column"],
        "BY": found["by"],
    }
    for name, value in words.items():
        text = text.replace(f"@{name}@", _scalar(value))
    text = text.replace("@FILE@", re.sub(r"[^\w./ -]", "?", str(file)))
    text = text.replace("partitioner: null ", f"partitioner: {partitioner} ", 1)
    if data is not None or model is not None:
        text = re.sub(r"# As written it runs .*\n", "", text)
    write_atomic(file, text.encode())
    return {**found, "partitioner": partitioner}


def _scalar(text: str) -> str:
    """Write a text as YAML reads it back; `null` and numbers are meant as such."""
    plain = re.fullmatch(r"[\w./][\w./:-]*", text) and not text.endswith(":")
    return text if text.isdecimal() or (plain and parse_yaml(text, "init") in (text, None)) else json.dumps(text)
