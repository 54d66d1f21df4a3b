"""Fetch a data set of the Hugging Face hub into a folder; nothing stays in the libraries' own caches.

`datasets` runs in a separate process: four libraries choose their caches from the environment at their start, so that
none of them is missed, and neither their output nor their settings reach this process.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedmira.errors import DataError, nearest

_PROGRAM = Path(__file__).with_name("hub_program.py")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TRUE = ("1", "ON", "YES", "TRUE")

_ADVICE = {
    "offline": "the hub cannot be reached; check the network, or save the data set to a folder and name that",
    "missing": "the hub has no such data set, or you may not see it; check the name, or set HF_TOKEN",
    "gated": "the hub requires that you accept its terms; accept them there, and set HF_TOKEN",
    "revision": "the hub has no such revision of it; check data.revision",
    "kind": "it holds no tables of text (CSV, JSON, Parquet, Arrow, text)",
    "empty": "the hub has it, but it has no data file",
    "disk": "the temporary folder is full; set TMPDIR to a larger one",
}


def is_name(path: str) -> bool:
    """Could this be a data set on the hub? It is `owner/name`: the libraries no longer accept names without owner."""
    return _NAME.fullmatch(path) is not None and "--" not in path and ".." not in path


@contextmanager
def fetched(name: str, *, subset: str | None, revision: str | None) -> Iterator[Path]:
    """Give a temporary folder, as `datasets` saves it, with all splits of a data set on the hub.

    Raises DataError: the hub is switched off or cannot be reached, or refuses the data set.
    """
    hub_switch = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    for switch in ("HF_DATASETS_OFFLINE", hub_switch):  # starting the program to find this out takes seconds
        if os.environ.get(switch, "").upper() in _TRUE:
            raise _refused(name, f"the hub is switched off by {switch}; unset it, or name a local file or folder")
    if importlib.util.find_spec("datasets") is None:
        raise _refused(name, "reading it needs the package datasets; install it with pip install 'fedmira[hub]'")
    with tempfile.TemporaryDirectory(prefix="fedmira-hub-") as scratch:
        folder = Path(scratch) / "saved"
        request = json.dumps([name, subset, revision, str(folder)])
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), request],  # -P: no module of the current folder
            cwd=scratch,
            env={**os.environ, **_environment(Path(scratch))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        answer = _last_line(done.stdout)
        if answer.get("reason") != "done":
            raise _refused(name, _explain(answer, subset, done.returncode))
        yield folder


def _environment(scratch: Path) -> dict[str, str]:
    """Return variables that put every cache below one folder, keep the path of the token, and suppress output."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    token = os.environ.get("HF_TOKEN_PATH") or str(home.expanduser() / "token")
    caches = (
        *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HUGGINGFACE_ASSETS_CACHE"),
        *("HF_XET_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_DOWNLOADED_DATASETS_PATH"),
        *("HF_DATASETS_EXTRACTED_DATASETS_PATH", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP"),
    )
    for cache in caches:
        (scratch / cache).mkdir()
    folders = {cache: str(scratch / cache) for cache in caches}
    off = {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_DATASETS_IN_MEMORY_MAX_SIZE": "0"}
    on = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY")
    return {**folders, **off, **dict.fromkeys(on, "1"), "HF_TOKEN_PATH": token}


def _last_line(output: bytes) -> Mapping[str, object]:
    """Return the program's answer: its last line, a JSON object; {} if it ended without one."""
    try:
        answer = json.loads(output.decode("utf-8", "replace").strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _explain(answer: Mapping[str, object], subset: str | None, code: int) -> str:
    reason, names = str(answer.get("reason")), answer.get("names")
    if reason == "subset" and isinstance(names, list):
        return _choose_subset([str(name) for name in names], subset)
    if reason in _ADVICE:
        return _ADVICE[reason]
    return f"`datasets` could not read it ({answer.get('kind') or f'its process ended with {code}'})"


def _choose_subset(names: Sequence[str], subset: str | None) -> str:
    few = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if subset is None:
        return f"it has several subsets; name one of them in data.subset: {few}"
    return f"it has no subset '{subset}'{nearest(subset, names)}; data.subset may be {few}"


def _refused(name: str, why: str) -> DataError:
    return DataError(f"data.path '{name}': no such file or folder, and as a data set on the hub: {why}")
