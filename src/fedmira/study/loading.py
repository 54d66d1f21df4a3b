"""A config, read and checked whole. It imports neither folders nor events, so a refused config is answered at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmira import bundled
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.methods import entry_faults


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, or a bundled one by name (`demo`, `mira-paper`), and apply `a.b=c` overrides.

    Raises one ConfigError that lists every fault, those of the methods' own settings included.
    """
    source = Path(path)
    preset = bundled.preset(str(path))
    if preset is not None and not source.is_file():  # a folder of that name is in nobody's way
        source = preset
    return check(read_config(source, overrides), str(path))


def check(raw: Mapping[str, Any], source: str) -> Config:
    """Check a config and its methods' own settings. Raises as load_config does."""
    return check_config(raw, source, entry_faults)
