"""Bad input through the real command line: one clear message, code 2, nothing written, no weights read."""

import csv
import gzip
import json
import math
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study, tiny
from tests.data.bad_rows import BAD_LINES, SECRET
from tests.marks import one_in
from tests.small_study import Ended, command, has_traceback

from fedmira.disk.folders import RunFolder
from fedmira.engine import probe

LOCAL = [{"name": "local"}]
Config = Callable[..., Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture(scope="module")
def weightless(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a sound config and tokenizer, and garbage for weights: reading them is an error of its own."""
    folder = tmp_path_factory.mktemp("weightless") / "base"
    shutil.copytree(inputs[0], folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    return folder


@pytest.fixture
def config(weightless: Path, tmp_path: Path) -> Config:
    """Write a config of one method on data of the test's own, with a base that nobody may read."""

    def make(data: Path, /, *, base: Path | None = None, **changes: Any) -> Path:
        options = {"methods": LOCAL, "federation": {"rounds": 1}, **changes}
        raw = small_study.settings(base or weightless, data, tmp_path / "study", **options)
        return small_study.save_config(tmp_path / "config.yaml", raw)

    return make


def save(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(client: str, index: int = 0, /, *, prompt: int = 4, answer: int = 2, **columns: object) -> dict[str, object]:
    """An example of so many tokens in prompt and answer; the end of text is one more."""
    words = [f"w{2 + (index + place) % (tiny.VOCABULARY - 2)}" for place in range(prompt + answer)]
    text = {"prompt": " ".join(words[:prompt]), "completion": " ".join(words[prompt:])}
    return {**text, "client": client, "group": "all", **columns}


def assert_refused(ended: Ended, folder: Path, *words: str) -> None:
    """Code 2, one message without a traceback, nothing on standard output, no study."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert len(re.findall(r"^error: ", ended.err, re.MULTILINE)) == 1, ended.err
    assert not has_traceback(ended.err), ended.err
    assert not (folder / "study").exists()
    for word in words:
        assert word in ended.err, ended.err


# ---------------------------------------------------------------- before any expensive work


def test_weights_that_cannot_be_read_are_an_error_of_their_own(
    config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    assert_refused(command("run", config(inputs[1])), tmp_path, "weights cannot be loaded")


def test_a_fault_of_the_config_is_told_before_data_or_base_are_looked_at(config: Config, tmp_path: Path) -> None:
    bad = config(tmp_path / "none.jsonl", base=tmp_path / "none", training={"batch_size": 0})
    ended = command("run", bad)
    assert_refused(ended, tmp_path, "1 fault\n", "training.batch_size: found 0")
    assert "none" not in ended.err


@pytest.mark.parametrize("what", ["run", "--dry-run", "--show-example"])
def test_a_fault_of_the_data_is_told_before_weights_are_read(what: str, config: Config, tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", [row("ada"), {**row("ada"), "completion": 7}])
    options = [what] if what.startswith("--") else []
    ended = command("run", config(data), *options)
    assert_refused(ended, tmp_path, "rows.jsonl:2: 'completion' is a number, not text")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.clients.by=sight", "data.clients.by: no column 'sight'"),
        ("data.template=none.jinja", "data.template 'none.jinja' is neither a template nor a file"),
        ("data.max_length=65", "data.max_length: found 65"),
        ("model.device=cuda:9", "model.device 'cuda:9'"),
        ("methods.0={name: mira, lambda: 9, normalise: none, graph: {kind: uniform}}", "eta x lambda = 9 must be"),
        ("methods.0={name: mira, graph: {kind: groups, column: colour}}", "graph column 'colour' has no single value"),
        ("methods.0={name: mira, graph: {kind: file, path: none.csv}}", "graph file 'none.csv' not found"),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_weights_are_read(
    override: str, words: str, config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    assert_refused(command("run", config(inputs[1], federation={"rounds": 4}), override), tmp_path, words)


def test_a_device_that_is_not_there_is_told_before_data_are_read(config: Config, tmp_path: Path) -> None:
    ended = command("run", config(tmp_path / "none.jsonl"), "model.device=cuda:9")
    assert_refused(ended, tmp_path, "model.device 'cuda:9'")
    assert "none.jsonl" not in ended.err


# ---------------------------------------------------------------- bad rows


@pytest.fixture
def thirty(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """63 good rows with 30 bad ones, each of another kind, after every second of them."""
    good = inputs[1].read_bytes().splitlines()
    bad = [line for line, _ in BAD_LINES.values()]
    lines = [line for place, own in enumerate(good) for line in (own, *bad[place // 2 : place // 2 + 1][: place % 2])]
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "mixed.jsonl"


def test_bad_rows_stop_the_run_with_their_number_and_the_first_five_by_file_and_line(
    thirty: Path, config: Config, tmp_path: Path
) -> None:
    ended = command("run", config(thirty))
    assert_refused(ended, tmp_path, "30 faults, the first 5:")
    assert re.findall(r"mixed\.jsonl:(\d+): ", ended.err) == ["3", "6", "9", "12", "15"]
    assert SECRET not in ended.err


def test_skipped_rows_are_warned_of_and_kept_and_skipped_ones_add_up(
    thirty: Path, config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    ended = command("run", config(thirty, base=inputs[0], data={"on_bad_row": "skip"}))
    assert ended.code == 0, ended.err
    assert "warning: 30 of 93 examples cannot be read and are skipped:" in ended.err
    assert re.findall(r"mixed\.jsonl:(\d+): ", ended.err) == ["3", "6", "9", "12", "15"]
    clients = json.loads((tmp_path / "study" / "local" / "seed-3" / "clients.json").read_text())
    assert sum(count for client in clients.values() for count in client["examples"].values()) == 63 == 93 - 30
    assert SECRET not in ended.err + ended.out


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "utf-16": (lambda text: text.decode().encode("utf-16"), "write data.encoding: utf-16"),
    "latin-1": (lambda text: text + '{"prompt": "é", "completion": "w2"}'.encode("latin-1"), "is not UTF-8"),
    "nul": (lambda text: text + b'{"prompt": "w2\0", "completion": "w2"}\n', "is NUL"),
    "huge": (lambda text: text + b'{"prompt": "' + b"w2 " * (23 << 20) + b'"}', "the line is longer than 64 MiB"),
    "deep": (lambda text: text + b"[" * 100_000, "JSON nested too deeply"),
    "pickle": (lambda text: pickle.dumps({"prompt": "w2", "completion": "w3"}), "is not UTF-8"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_text_are_told_with_file_and_line(
    kind: str, config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    spoil, words = BYTES[kind]
    (tmp_path / "rows.jsonl").write_bytes(spoil(inputs[1].read_bytes()))
    ended = command("run", config(tmp_path / "rows.jsonl"))
    assert_refused(ended, tmp_path, words, f"rows.jsonl:{1 if kind in ('utf-16', 'pickle') else 64}: ")
    assert len(ended.err) < 400


@pytest.mark.parametrize("kind", ["mark", "windows", "gzip"])
def test_marks_line_ends_and_compression_change_nothing_of_what_is_read(
    kind: str, config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    text = inputs[1].read_bytes()
    same = {"mark": b"\xef\xbb\xbf" + text, "windows": text.replace(b"\n", b"\r\n"), "gzip": gzip.compress(text)}
    path = tmp_path / f"rows.jsonl{'.gz' if kind == 'gzip' else ''}"
    path.write_bytes(same[kind])
    shown = [command("run", config(data), "--show-example", "--json") for data in (inputs[1], path)]
    assert shown[0].code == 0
    assert shown[1].out == shown[0].out


# ---------------------------------------------------------------- clients without examples, and with one


def test_a_client_without_an_example_to_train_on_is_named(config: Config, tmp_path: Path) -> None:
    rows = [row(name, split="test" if name == "site-3" else "train") for name in map("site-{}".format, range(5))]
    bad = config(save(tmp_path / "rows.jsonl", rows), data={"split_column": "split"})
    assert_refused(command("run", bad), tmp_path, "client 'site-3': none of its 1 records is for training")


def test_a_partitioner_that_leaves_a_client_empty_names_it(config: Config, tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", [row("x", index, label="a") for index in range(12)])
    dealt = {"name": "dirichlet", "num_partitions": 5, "partition_by": "label", "alpha": 0.05}
    clients = {"partitioner": {**dealt, "min_partition_size": 0}}
    ended = command("run", config(data, data={"clients": clients, "split": {"validation": 0, "test": 0}}))
    assert_refused(ended, tmp_path, "client 'client-", "': the partitioner gives it none of 12 records")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of one file per client, the fourth of which is empty."""
    (tmp_path / "files").mkdir()
    for number in range(5):
        save(
            tmp_path / "files" / f"site-{number}.jsonl", [row("x", index) for index in range(6)] if number != 3 else []
        )
    return tmp_path / "files"


def test_an_empty_file_of_a_client_is_named(files: Path, config: Config, tmp_path: Path) -> None:
    ended = command("run", config(files, data={"clients": {"by": "file"}}))
    assert_refused(ended, tmp_path, "1 fault:", "site-3.jsonl: holds no example")


def test_where_bad_rows_are_skipped_an_empty_file_is_still_warned_of(
    files: Path, config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    data = {"clients": {"by": "file"}, "on_bad_row": "skip"}
    ended = command("run", config(files, base=inputs[0], data=data))
    assert ended.code == 0, ended.err
    assert "; 4 clients, " in ended.err
    assert "warning: 1 file without an example" in ended.err


def test_more_clients_than_examples_name_the_first_one_without(config: Config, tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", [row("a\x1b[2J\nb"), row("a\x1b[2J\nb", 1)])
    ended = command("run", config(data), "data.clients.per_group=2147483647")
    assert_refused(ended, tmp_path, "client 'a?[2J?b-2': no record is left for it: 'a?[2J?b' has 2")


def test_a_client_of_one_example_trains_and_what_it_cannot_measure_is_in_no_mean(
    config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [row(name, place, n=place) for name in ("ada", "bo", "cy", "dee") for place in range(10)]
    data = save(tmp_path / "rows.jsonl", [*rows, row("lone", 3)])
    federation = {"rounds": 2, "participation": 1.0, "cohort": 3}
    methods = [*LOCAL, {"name": "fedavg"}, {"name": "mira", "lambda": 0.25}]
    ended = command("run", config(data, base=inputs[0], methods=methods, federation=federation))
    assert ended.code == 0, ended.err
    assert "warning: 1 client with one training example only, such as 'lone'" in ended.err
    study = tmp_path / "study"
    summary = json.loads((study / "summary.json").read_text())
    for run in small_study.run_folders(study):
        with (run / "results.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert {line["value"] for line in table if line["client"] == "lone"} == {""}
        assert all(math.isfinite(float(line["value"])) for line in table if line["client"] != "lone")
        for record in RunFolder(run).records():
            place = record["clients"].index("lone")
            assert (record["loss_before"][place], record["loss_after"][place]) == (None, None)
            assert math.isfinite(record["train_loss"][place])
            last = [line for line in table if line["split"] == "validation" and int(line["round"]) == record["round"]]
            others = [float(line["value"]) for line in last if line["client"] != "lone"]
            assert len(others) == 4
            assert record["validation_loss"] == pytest.approx(sum(others) / 4, rel=1e-12)
        for metric in ("loss", "exact_match"):
            tested = [
                line for line in table if line["metric"] == metric and line["split"] == "test" and line["round"] == "2"
            ]
            values = [float(line["value"]) for line in tested if line["client"] != "lone"]
            found = next(one for one in summary["metrics"][metric]["methods"] if one["method"] == run.parent.name)
            assert found["mean"] == pytest.approx(sum(values) / 4, rel=1e-12)
            assert (found["clients"], found["missing"]) == (4, 1)
        trained = (run / "adapters" / "lone" / "adapter_model.safetensors").read_bytes()
        assert (
            trained != (run / "adapters" / "ada" / "adapter_model.safetensors").read_bytes()
            or run.parent.name == "fedavg"
        )
    for path in (*study.rglob("*.json"), *study.rglob("*.jsonl"), *study.rglob("*.csv"), study / "report.html"):
        assert not re.search(r"\bnan\b", path.read_text(), re.IGNORECASE), path
    assert not re.search(r"\bnan\b", ended.out + ended.err, re.IGNORECASE)
    assert "n/a" in (study / "report.html").read_text()


# ---------------------------------------------------------------- lengths


def test_texts_around_and_far_over_the_greatest_length_are_cut_counted_and_never_nan(
    config: Config, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    most = 12
    shapes = {  # total = prompt + answer + 1 for the end of text
        "below": (8, 2),
        "exact": (9, 2),
        "above": (10, 2),
        "tenfold": (117, 2),
        "answer-exact": (1, 10),
        "answer-above": (1, 11),
        "answer-tenfold": (4, 120),
    }
    rows = [
        row(name, place, prompt=prompt, answer=answer, part=part)
        for name, (prompt, answer) in shapes.items()
        for place, part in enumerate(["train"] * 3 + ["validation"] * 2 + ["test"] * 2)
    ]
    assert [sum(shape) + 1 - most for shape in shapes.values()] == [-1, 0, 1, 108, 0, 1, 113]
    data = save(tmp_path / "rows.jsonl", rows)
    settings = {"max_length": most, "split_column": "part"}
    methods = [*LOCAL, {"name": "fedavg"}, {"name": "mira", "lambda": 0.25}]
    federation = {"rounds": 2, "participation": 1.0}
    ended = command("run", config(data, base=inputs[0], data=settings, methods=methods, federation=federation))
    assert ended.code == 0, ended.err
    counts = {  # prompts cut, answers cut, questions cut (4 of 7 examples are asked) of each client
        "below": (0, 0, 0),
        "exact": (0, 0, 0),
        "above": (7, 0, 0),
        "tenfold": (7, 0, 4),
        "answer-exact": (0, 0, 0),
        "answer-above": (0, 7, 0),
        "answer-tenfold": (7, 7, 0),
    }
    assert (
        "truncation: of 49 examples 21 prompts cut at their start, 14 answers cut at their end, 0 dropped" in ended.err
    )
    assert "truncation: 4 prompts cut at their start where an answer is written to them" in ended.err
    for run in small_study.run_folders(tmp_path / "study"):
        clients = json.loads((run / "clients.json").read_text())
        found = {name: (one["prompts_cut"], one["answers_cut"], one["questions_cut"]) for name, one in clients.items()}
        assert found == counts
        assert {one["dropped"] for one in clients.values()} == {0}
        with (run / "results.csv").open(newline="") as file:
            assert all(math.isfinite(float(line["value"])) for line in csv.DictReader(file))
        assert all(math.isfinite(loss) for record in RunFolder(run).records() for loss in record["train_loss"])
        assert not any(record["refused"] for record in RunFolder(run).records())


# ---------------------------------------------------------------- pickles


class Malice:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_the_pickle_of_these_tests_does_run_when_it_is_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "mark")))  # noqa: S301 - our own, to show that it bites
    torch.save(Malice(tmp_path / "other"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert {"mark", "other"} <= {path.name for path in tmp_path.iterdir()}


NAMES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.PT",
    "rng_state.pth",
    "model.pkl",
    "x.ckpt",
)


@pytest.mark.parametrize("name", one_in(3, [*NAMES, "tokenizer.pickle", "model.safetensors", "adapter_model.bin"]))
@pytest.mark.parametrize("save_pickle", [pytest.param(pickle.dump, marks=pytest.mark.slow), torch.save])
def test_a_base_with_a_pickle_is_refused_and_the_pickle_never_opened(
    name: str, save_pickle: Callable[..., object], inputs: tuple[Path, Path], config: Config, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(inputs[0], tmp_path / "base"))
    with (base / name).open("wb") as file:
        save_pickle(Malice(tmp_path / "mark"), file)
    if name == "adapter_model.bin":
        (base / "adapter_config.json").write_text("{}")
    ended = command("run", config(inputs[1], base=base))
    assert_refused(
        ended, tmp_path, "model.base_model", name if name != "model.safetensors" else "weights cannot be loaded"
    )
    (base / "model.safetensors").unlink()
    assert_refused(command("run", config(inputs[1], base=base)), tmp_path, "model.base_model")
    assert not (tmp_path / "mark").exists()


def test_an_adapter_with_a_pickle_is_not_handed_on(inputs: tuple[Path, Path], config: Config, tmp_path: Path) -> None:
    assert command("run", config(inputs[1], base=inputs[0]), "-q").code == 0
    run = tmp_path / "study" / "local" / "seed-3"
    with (run / "adapters" / "ada" / "adapter_model.bin").open("wb") as file:
        pickle.dump(Malice(tmp_path / "mark"), file)
    for options in ([], ["--client", "ada"]):
        ended = command("export", run, *options, "--out", tmp_path / "copies")
        assert (ended.code, ended.out) == (2, "")
        assert "holds pickles, which can run code: adapter_model.bin" in ended.err
    assert not (tmp_path / "copies").exists()
    (run / "adapters" / "ada" / "adapter_model.safetensors").unlink()
    talked = command("chat", run, "--client", "ada", "-p", "w2 w3")
    assert (talked.code, talked.out) == (2, "")
    assert "adapter_model.safetensors" in talked.err
    assert command("export", run, "--client", "bo", "--out", tmp_path / "copies").code == 0
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------- Ctrl-C before anything began


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--show-example"]])
def test_ctrl_c_while_data_are_read_ends_with_130_and_writes_nothing(
    options: list[str], inputs: tuple[Path, Path], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, left = json.JSONDecoder.raw_decode, iter(range(20, -1, -1))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if "completion" in arguments[1] and next(left) == 0:
            signal.raise_signal(signal.SIGINT)
        return read(*arguments, **options)

    written = config(inputs[1], base=inputs[0])
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(json.JSONDecoder, "raw_decode", interrupted)
        ended = command("run", written, *options)
    assert (ended.code, ended.out) == (130, "")
    assert "interrupted" in ended.err
    assert not has_traceback(ended.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_while_a_dry_run_measures_ends_with_130_and_writes_nothing(
    inputs: tuple[Path, Path], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = probe.local_phase

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return train(*arguments, **options)

    written = config(inputs[1], base=inputs[0])
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(probe, "local_phase", interrupted)
        ended = command("run", written, "--dry-run")
    assert (ended.code, ended.out) == (130, "")
    assert "measuring a few passes ..." in ended.err
    assert not has_traceback(ended.err)
    assert sorted(tmp_path.rglob("*")) == before
