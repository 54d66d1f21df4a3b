"""What loading takes of memory at its worst moment, beside the weights in their final form; in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ONE = Path(__file__).parents[2] / "benchmarks/large/one.py"
MOST = 1.3  # times the weights
LAYER = 512 * 2048 * 4 / 2**20  # MiB of the largest layer of this base in float32
COPIES = 8  # of a layer that bitsandbytes makes while it packs one
TRIALS = 30  # MiB of the passes that try a base, and of what they import

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc"),
]


@pytest.mark.parametrize("words", [(), ("--nf4",)], ids=["plain", "4 bits"])
def test_loading_peaks_little_above_the_weights(words: tuple[str, ...], tmp_path: Path) -> None:
    if words:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (an extra of fedmira)")
    command = [sys.executable, str(ONE), "--base", "50M", "--tokens", "8", "--threads", "1", "--dtype", "float32"]
    done = subprocess.run(
        [*command, *words, "--folder", str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loading"] <= MOST * found["weights"] + TRIALS + (COPIES * LAYER if words else 0)


def test_weights_in_the_type_of_their_files_are_mapped_and_shared_by_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(ONE), "--base", "50M", "--tokens", "8", "--threads", "1"]
    done = subprocess.run(
        [*command, "--dtype", "bfloat16", "--folder", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, check=True, timeout=300,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 80
    assert found["loading"] < TRIALS + 0.3 * found["weights"], "a copy of its own"
