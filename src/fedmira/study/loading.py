"""A config, read and checked whole. It imports neither folders nor events, so a refused config is answered at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmira import bundled
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.errors import ConfigError
from fedmira.methods import entry_faults

BASELINE = "local"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, or a bundled one by name (`demo`, `mira-paper`), and apply `a.b=c` overrides.

    Raises one ConfigError that lists every fault, those of the methods' own settings included.
    """
    source = Path(path)
    preset = bundled.preset(str(path))
    if preset is not None and not source.is_file():  # a folder of that name is in nobody's way
        source = preset
    return check(read_config(source, overrides), str(path))


def load_compared(
    path: str | Path, overrides: Sequence[str], *, methods: Sequence[str] | None, seeds: int | None, budget: int
) -> Config:
    """Read a config for `fedmira compare`: with these methods (None: its own), and so many seeds from its first on.

    Raises as load_config does, with the faults of the options among them.
    """
    faults = []
    if seeds is not None and seeds < 1:
        faults.append(f"--seeds {seeds}: need at least 1")
    if budget < 1:
        faults.append(f"--budget {budget}: need at least 1, which tunes nothing")
    config = load_config(path, overrides)
    chosen = [entry.as_written for entry in config.methods]
    if methods is not None:
        chosen = []
        for name in methods:
            found = [entry for entry in config.methods if name in (entry.folder, entry.name)]
            exact = [entry for entry in found if entry.folder == name]
            if len(found) > 1 and len(exact) != 1:
                labels = ", ".join(entry.folder for entry in found)
                faults.append(f"--methods {name}: the config has {labels}: name one of these")
            chosen.append((exact or found)[0].as_written if found else {"name": name})
    if BASELINE not in [entry["name"] for entry in chosen]:
        chosen.insert(0, {"name": BASELINE})  # everything is compared with it
    if faults:
        raise ConfigError(faults, "compare")
    raw = {**config.model_dump(by_alias=True), "methods": chosen}
    if seeds is not None:
        raw["seeds"] = list(range(config.seeds[0], config.seeds[0] + seeds))
    return check(raw, str(path))


def check(raw: Mapping[str, Any], source: str) -> Config:
    """Check a config and its methods' own settings. Raises as load_config does."""
    return check_config(raw, source, entry_faults)
