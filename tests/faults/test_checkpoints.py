"""Checkpoints on bad days: flipped bits, a process that dies while it saves, a disk that is full at any write."""

import itertools
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import small_study
from tests.faults.figures import Note
from tests.small_study import command, differences, outcome

from fedmira.disk.checkpoints import Checkpoint, load_chain, prune, save_checkpoint
from fedmira.disk.files import remove_temporaries
from fedmira.errors import StoreError

ROWS = (40, 64)  # of a checkpoint: 10 kB
FULL_EVERY = 4  # rounds


def save(folder: Path, number: int) -> None:
    """Save round `number`, and remove what a ledger would: all before the full checkpoint before the newest one."""
    files = {
        "state": {"rows": torch.full(ROWS, float(number))},
        "engine": {"validation": torch.full((9,), 1.0 / number)},
    }
    full = number % FULL_EVERY == 1
    save_checkpoint(folder, number, files, full=full, facts={"round": number})
    if full:
        prune(folder, number - FULL_EVERY)


def assert_whole(chain: list[Checkpoint]) -> None:
    """Fail unless each checkpoint has what was saved in its round."""
    for one in chain:
        assert torch.equal(one.files["state"]["rows"], torch.full(ROWS, float(one.round)))
        assert torch.equal(one.files["engine"]["validation"], torch.full((9,), 1.0 / one.round))
        assert one.facts == {"round": one.round}


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("flips", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_found_and_the_checkpoint_before_is_used(
    flips: int, tmp_path: Path, note: Note, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    files = {path: path.read_bytes() for path in sorted((tmp_path / "round-000002").iterdir())}
    bits = list(itertools.accumulate(8 * len(content) for content in files.values()))
    dice = random.Random(1)
    for _ in range(flips):
        place = dice.randrange(bits[-1])
        path, begin = next(
            (path, end - 8 * len(files[path])) for path, end in zip(files, bits, strict=True) if place < end
        )
        damaged = bytearray(files[path])
        damaged[(place - begin) // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        caplog.clear()
        chain = load_chain(tmp_path)
        path.write_bytes(files[path])
        assert [one.round for one in chain] == [1]
        assert_whole(chain)
        assert any("resuming from round 1" in record.getMessage() for record in caplog.records)
    assert [one.round for one in load_chain(tmp_path)] == [1, 2]
    note("single bits flipped in a checkpoint", flips, {"found": flips, "the one before used": flips})


# ---------------------------------------------------------------- kills


def save_until_killed(folder: Path, begin: int, pipe: int) -> None:
    """Save round after round; tell the number of each that is saved."""
    for number in itertools.count(begin):
        save(folder, number)
        os.write(pipe, number.to_bytes(4, "little"))


@pytest.mark.parametrize("kills", [25, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_no_torn_file_that_is_loaded_and_loses_nothing(
    kills: int, tmp_path: Path, note: Note, caplog: pytest.LogCaptureFixture
) -> None:
    dice, saved, unfinished = random.Random(2), 0, 0
    for _ in range(kills):
        heard, told = os.pipe()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # mends torch's pool after the fork
            save_until_killed(tmp_path, saved + 1, told)
        os.close(told)
        os.read(heard, 4)  # it has begun
        time.sleep(dice.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        rest = os.read(heard, 1 << 16)
        os.close(heard)
        last = int.from_bytes(rest[-4:], "little") if rest else saved + 1
        caplog.clear()
        chain = load_chain(tmp_path)
        assert_whole(chain)
        assert caplog.records == []  # nothing was damaged: what is not finished does not count
        assert chain[-1].round in (last, last + 1)  # killed between the manifest and what it tells
        saved = chain[-1].round
        unfinished += (tmp_path / f"round-{saved + 1:06d}").is_dir()
        for path in tmp_path.glob("round-*"):
            remove_temporaries(path)
    assert unfinished > kills / 10  # kills fell into saving
    newest = saved + FULL_EVERY - (saved - 1) % FULL_EVERY
    save(tmp_path, newest)
    assert min(int(path.name.removeprefix("round-")) for path in tmp_path.iterdir()) >= newest - FULL_EVERY
    note("kills while saving", kills, {"torn files loaded": 0, "lost": 0, "left unfinished": unfinished})


# ---------------------------------------------------------------- a disk that is full

PAGE = 4096  # bytes that a small file system in memory gives out at once
SIZE = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "none", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, free_bytes: int) -> None:
    """Fill a disk so that so many bytes are free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    facts = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, facts.f_bavail * facts.f_frsize - free_bytes))


def test_a_disk_that_is_full_at_any_write_leaves_the_last_checkpoint_and_says_what_it_needs(
    small_disk: Path, note: Note
) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1)
    refused = 0
    for pages in itertools.count():
        leave(small_disk, pages * PAGE)
        try:
            save(folder, 2)
            break
        except StoreError as error:  # an OSError fails the test
            said = str(error)
        refused += 1
        assert re.search(rf"cannot write '{folder}/.*' \(\d+ bytes\): No space left on device", said)
        assert [one.round for one in load_chain(folder)] == [1]
        assert [path for path in folder.rglob("*") if path.is_file() and not path.stat().st_size] == []
    assert [one.round for one in load_chain(folder)] == [1, 2]
    assert refused >= 4
    note("a disk full at each page of a checkpoint", refused, {"last good one loaded": refused})


@pytest.mark.slow
def test_a_study_on_a_disk_that_fills_stops_and_goes_on_to_the_same_bits(
    small_disk: Path, tmp_path: Path, note: Note
) -> None:
    """With a little more room each time: it gets further, until it is complete."""
    base, data = small_study.save_base(tmp_path / "base"), small_study.save_data(tmp_path / "data.jsonl")
    options = {"training": {"keep_optimizer": True}, "methods": [dict(small_study.METHODS[2])]}
    undisturbed, study = tmp_path / "undisturbed", small_disk / "study"
    configs = [
        small_study.save_config(path.with_suffix(".yaml"), small_study.settings(base, data, place, **options))
        for path, place in ((undisturbed, undisturbed), (tmp_path / "study", study))
    ]
    assert command("run", configs[0]).code == 0
    stopped = 0
    for pages in range(0, 400, 6):
        leave(small_disk, pages * PAGE)
        ended = command("resume", study) if (study / "config.yaml").is_file() else command("run", configs[1])
        if ended.code == 0:
            break
        stopped += 1
        assert ended.code in (2, 3), ended.err
        assert "No space left on device" in ended.err
        assert not small_study.has_traceback(ended.err)
    assert stopped >= 5
    assert differences(outcome(study), outcome(undisturbed)) == []
    note("a study on a disk that fills", stopped, {"other bits in the end": 0})
