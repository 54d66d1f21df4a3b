"""Examples stay where they are: 200 secrets planted in the data are found nowhere else, and nobody is asked or told."""

import csv
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from tests import small_study
from tests.marks import one_in
from tests.small_study import Ended, command
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from fedmira.data.formats import read_records
from fedmira.disk.folders import RunFolder

SITES = ("north", "south", "west")
EACH = 5  # examples of a site: 3 to train on, 1 to validate, 1 to test
WINDOW = 8  # letters of a secret that give it away
METHODS = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "note"}},
]


def make_secrets() -> list[str]:
    dice = random.Random(200)
    return ["".join(dice.choices(string.ascii_letters + string.digits, k=32)) for _ in range(200)]


SECRETS = make_secrets()
PIECES = {secret.lower()[place : place + WINDOW] for secret in SECRETS for place in range(32 - WINDOW + 1)}


def leaks(content: bytes) -> list[str]:
    """Find pieces of secrets, whatever their case, and whether their letters stand together or one by one."""
    text = content.decode("latin-1").lower()
    found = []
    for shape in (text, re.sub(r"[^a-z0-9]+", "", text) if len(text) < 1 << 20 else ""):
        for run in re.findall(rf"[a-z0-9]{{{WINDOW},}}", shape):
            found += [piece for at in range(len(run) - WINDOW + 1) if (piece := run[at : at + WINDOW]) in PIECES]
    return found


def leaking_files(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if leaks(path.read_bytes()) or leaks(path.name.encode())]


def save_base(folder: Path) -> Path:
    """A base that knows every letter, so that whatever it decodes is readable."""
    letters = {"<unk>": 0, "</s>": 1, "\n": 2} | {chr(code): code - 29 for code in range(32, 127)}
    plain = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=98, max_position_embeddings=256, eos_token_id=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- where secrets are planted

Plant = Callable[[Path, Iterator[str]], dict[str, Any]]  # write data into a folder; return what `data` says of it


def jsonl(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    """Prompts, answers, and columns that nobody reads: one constant for a site, one free, nested ones."""
    with (folder / "rows.jsonl").open("w") as file:
        for site in SITES:
            note = next(word)
            for _ in range(EACH):
                text = {"prompt": f"{next(word)} w", "completion": next(word), "free": next(word)}
                nested = {"meta": {"who": next(word)}, "tags": [next(word)]}
                file.write(json.dumps({**text, **nested, "site": site, "note": note}) + "\n")
    return {"path": "rows.jsonl", "template": "none"}


def table(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output", "site", "note", "free"])
        for site in SITES:
            note = next(word)
            writer.writerows([next(word), next(word), next(word), site, note, next(word)] for _ in range(EACH))
    return {"path": "rows.csv", "template": "alpaca", "max_length": 256}


def chats(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    def turns() -> list[dict[str, str]]:
        return [{"role": role, "content": next(word)} for role in ("system", "user", "assistant", "user", "assistant")]

    notes = {site: next(word) for site in SITES}
    rows = [{"messages": turns(), "site": site, "note": notes[site]} for site in SITES for _ in range(EACH)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return {"path": "rows.parquet", "template": "chat.jinja", "max_length": 256}


def tasks(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    """Natural Instructions, one file per task, as upstream has them."""
    (folder / "tasks").mkdir()
    for site in SITES:
        shown = [{"input": next(word), "output": next(word), "explanation": next(word)}]
        instances = [{"id": f"{site}-{index}", "input": next(word), "output": [next(word)]} for index in range(EACH)]
        task = {"Definition": [next(word)], "Contributors": [next(word)], "Categories": ["QA"], "note": next(word)}
        task |= {"Positive Examples": shown, "Negative Examples": [], "Instances": instances, "site": site}
        (folder / "tasks" / f"{site}.json").write_text(json.dumps(task))
    return {"path": "tasks", "template": "alpaca", "max_length": 256}


def saved(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    import datasets

    notes = {site: next(word) for site in SITES}
    texts = ("instruction", "context", "response", "free")
    rows = [
        {**{key: next(word) for key in texts}, "category": "qa", "site": site, "note": notes[site]}
        for site in SITES
        for _ in range(EACH)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {"path": "saved", "template": "alpaca", "max_length": 256}


def texts(folder: Path, word: Iterator[str]) -> dict[str, Any]:
    notes = {site: next(word) for site in SITES}
    rows = [{"text": next(word), "site": site, "note": notes[site]} for site in SITES for _ in range(EACH)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"path": "rows.json", "template": "none", "format": "text"}


PLANTS: tuple[Plant, ...] = (jsonl, table, chats, tasks, saved, texts)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Plant, tuple[Path, dict[str, Any]]]:
    """Every kind of data, in a folder of its own, and what `data` says of it; all secrets are in use."""
    word = itertools.cycle(SECRETS)
    made = {}
    for plant in PLANTS:
        folder = tmp_path_factory.mktemp("planted")
        data = plant(folder, word)
        for key in ("path", "template"):
            data[key] = str(folder / data[key]) if (folder / data[key]).exists() else data[key]
        made[plant] = (folder, {"format": "auto", "clients": {"by": "site"}, **data})
    return made


def write_config(tmp_path: Path, base: Path, data: Mapping[str, Any], **changes: Any) -> Path:
    metrics = {"metrics": ["loss"] if data.get("format") == "text" else ["loss", "rouge_l"], "max_new_tokens": 4}
    options = {"methods": METHODS, "federation": {"rounds": 1, "participation": 1.0}, "evaluation": metrics, **changes}
    raw = small_study.settings(base, Path("-"), tmp_path / "study", **options)
    raw["data"] = {"max_length": 80, "split": {"validation": 0.2, "test": 0.2}, **data}
    return small_study.save_config(tmp_path / "config.yaml", raw)


def assert_silent(ended: Ended) -> None:
    assert leaks(ended.err.encode()) == []
    assert leaks(ended.out.encode()) == []


# ---------------------------------------------------------------- the search itself finds what there is to find


def test_a_secret_is_found_in_any_case_in_part_and_letter_by_letter() -> None:
    secret = SECRETS[77]
    for text in (
        secret,
        secret.lower(),
        secret.upper(),
        secret[5:15],
        " ".join(secret),
        f'x"{secret}"',
        f"%20{secret}",
    ):
        assert leaks(text.encode()), text
    assert leaks(b"".join(bytes([code]) for code in range(256)) * 40) == []


def test_every_secret_is_planted(planted: Mapping[Plant, tuple[Path, dict[str, Any]]]) -> None:
    records = [record for _, data in planted.values() for record in read_records(data["path"]).records]
    said = [repr(record) for record in records]  # a Parquet file is compressed
    files = [path for folder, _ in planted.values() for path in folder.rglob("*") if path.suffix != ".parquet"]
    said += [path.read_bytes().decode("latin-1") for path in files if path.is_file()]
    assert len([secret for secret in SECRETS if secret in "".join(said)]) == len(set(SECRETS)) == 200


# ---------------------------------------------------------------- whole studies


@pytest.mark.parametrize("plant", [PLANTS[0], *(pytest.param(plant, marks=pytest.mark.slow) for plant in PLANTS[1:])])
def test_no_file_and_no_output_of_a_study_holds_a_piece_of_a_secret(
    plant: Plant, planted: Mapping[Plant, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, base, planted[plant][1])
    study = tmp_path / "study"
    for arguments in (
        ("run", config, "--dry-run"),
        ("run", config, "-v", "--debug"),
        ("resume", study, "federation.rounds=2", "-v", "--debug"),
        ("report", study, "--json"),
        ("export", study / "mira" / "seed-3", "--out", study / "copies"),
        ("resume", study / "local" / "seed-3", "--json"),
    ):
        ended = command(*arguments)
        assert ended.code == 0, ended.err[-500:]
        assert_silent(ended)
    assert leaking_files(study) == []
    assert {run.parent.name for run in small_study.run_folders(study)} == {"local", "fedavg", "mira"}
    assert (study / "copies" / "north" / "README.md").is_file()


def test_the_same_search_finds_them_where_examples_are_asked_for(
    planted: Mapping[Plant, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, base, planted[jsonl][1], methods=METHODS[:1])
    assert_silent(command("run", config, "-v", "report.examples=true"))
    assert sorted(leaking_files(tmp_path / "study")) == ["local/seed-3/examples.jsonl", "report.html"]
    assert leaks((tmp_path / "study" / "report.html").read_bytes())
    for options in (["--show-example"], ["--show-example", "--json"]):
        shown = command("run", config, *options)
        assert len([secret for secret in SECRETS if secret in shown.out]) >= 2 * len(SITES)
        assert leaks(shown.err.encode()) == []


# ---------------------------------------------------------------- what goes wrong


def bad_rows(folder: Path, word: Iterator[str]) -> str:
    """Good rows, and as many ways to be bad as there are, each with a secret wherever it may hold a text."""
    from tests.data.bad_rows import BAD_LINES, SECRET

    good = [json.dumps({"prompt": next(word), "completion": next(word), "site": site}) for site in SITES * EACH]
    bad = [line.replace(SECRET.encode(), next(word).encode()) for line, _ in BAD_LINES.values()]
    (folder / "bad.jsonl").write_bytes(b"\n".join([*(line.encode() for line in good), *bad]))
    return str(folder / "bad.jsonl")


@pytest.mark.parametrize("options", [["-v"], ["--debug"], ["--dry-run"], ["--show-example", "-q"]])
def test_no_message_about_bad_rows_holds_a_piece_of_them(options: list[str], base: Path, tmp_path: Path) -> None:
    data = {"path": bad_rows(tmp_path, iter(SECRETS)), "clients": {"by": "site"}, "template": "none"}
    ended = command("run", write_config(tmp_path, base, data, methods=METHODS[:1]), *options)
    assert (ended.code, ended.out) == (2, "")
    assert "30 faults" in ended.err
    assert_silent(ended)
    if "--show-example" not in options:
        skipped = command("run", tmp_path / "config.yaml", "data.on_bad_row=skip", *options)
        assert skipped.code == 0
        assert "30 of 45 examples" in skipped.err
        assert_silent(skipped)
        assert not (tmp_path / "study").exists() or leaking_files(tmp_path / "study") == []


TEMPLATES = [
    "{{ instruction.no.such }}",
    "{{ instruction | nope }}",
    "{{ instruction[instruction] }}",
    "{{ instruction | int / 0 }}",
    "{{ instruction.index(instruction ~ 'x') }}",
    "{{ instruction.encode(instruction) }}",
    "{{ '%d' % instruction }}",
    "{{ cycler()[instruction] }}",
    "{{ instruction.__class__ }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(instruction) }}",
    "{% include instruction %}{{ instruction }}",
    "{{ messages[9].content }}",
    "{{ messages | nope }}",
    "{{ raise_exception(messages[0].content) }}",
    "{{ messages[0].content.index('none of it') }}",
    "{{ {}[messages[0].content].x }}",
    "{{ 1 / 0 }}{{ messages }}",
    "{{ messages[0].content | upper }}",
    "{{ messages",
]


@pytest.mark.parametrize("template", one_in(2, TEMPLATES))
def test_a_template_that_fails_is_a_bad_input_and_tells_nothing_of_the_text(
    template: str, planted: Mapping[Plant, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    config = write_config(tmp_path, base, {**planted[jsonl][1], "template": str(tmp_path / "own.jinja")})
    ended = command("run", config, "--debug")
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "own.jinja'" in ended.err
    assert not re.search("^bug:", ended.err, re.MULTILINE)
    assert_silent(ended)


PARTITIONER = "data.clients.partitioner={name: %s, num_partitions: %d, partition_by: %s}"
FAULTS = [
    "data.clients.by=nothing",
    "data.clients.groups=free",
    "data.split_column=free",
    "data.split_column=note",
    "data.columns={prompt: nothing}",
    "data.clients={by: meta}",
    "data.format=messages",
    "data.format=text",
    "data.clients.per_group=6",
    PARTITIONER % ("pathological, num_classes_per_partition: 9", 2, "note"),
    PARTITIONER % ("shard, shard_size: 9", 9, "free"),
    PARTITIONER % ("dirichlet, alpha: 0.01", 9, "free"),
    "methods=[{name: mira, graph: {kind: groups, column: free}}]",
    "methods=[{name: mira, lambda: 99, graph: {kind: uniform}, normalise: none}]",
]


@pytest.mark.parametrize("override", FAULTS, ids=lambda override: override[:50])
def test_no_message_about_clients_columns_or_graphs_holds_a_value(
    override: str, planted: Mapping[Plant, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    ended = command("run", write_config(tmp_path, base, planted[jsonl][1]), override, "-v", "--debug")
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert_silent(ended)


def test_a_table_without_its_header_is_refused_without_its_text(base: Path, tmp_path: Path) -> None:
    rows = "".join(",".join(SECRETS[at : at + 3]) + f",{SITES[at % 3]}\n" for at in range(12))
    (tmp_path / "rows.csv").write_text(rows)
    config = write_config(tmp_path, base, {"path": str(tmp_path / "rows.csv"), "clients": {"by": "site"}})
    for arguments in (("run", config), ("run", config, "data.format=alpaca"), ("run", config, "data.format=text")):
        ended = command(*arguments, "--debug")
        assert ended.code == 2
        assert_silent(ended)
    ended = command("init", "mine.yaml", "--data", tmp_path / "rows.csv", folder=tmp_path)
    assert ended.code == 0
    assert_silent(ended)
    written = (tmp_path / "mine.yaml").read_text()
    assert "the data cannot be read as it is" in written
    assert not [secret for secret in SECRETS if secret in written]


def test_refused_uploads_are_told_without_text(
    planted: Mapping[Plant, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, base, planted[jsonl][1], training={"learning_rate": 1e30, "optimizer": "sgd"})
    ended = command("run", config, "-v", "--debug")
    assert ended.code == 0
    assert "refused" in (tmp_path / "study" / "local" / "seed-3" / "log.txt").read_text()
    assert_silent(ended)
    assert leaking_files(tmp_path / "study") == []


@pytest.mark.parametrize(
    ("kind", "code", "state", "options"),
    [
        (KeyError, 1, "failed", []),
        (ValueError, 1, "failed", ["-v", "--debug"]),
        (MemoryError, 3, "interrupted", []),
        (OSError, 3, "interrupted", ["-v", "--debug"]),
    ],
)
def test_a_crash_in_the_middle_of_a_run_shows_where_it_was_and_not_what_a_library_said(
    kind: type[Exception],
    code: int,
    state: str,
    options: list[str],
    planted: Mapping[Plant, tuple[Path, dict[str, Any]]],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        try:
            raise LookupError(f"no such token: {SECRETS[3]}")
        except LookupError as error:
            raise kind(f"{SECRETS[4]} in the middle") from error

    config = write_config(tmp_path, base, planted[jsonl][1], methods=METHODS[:1])
    with monkeypatch.context() as patch:
        patch.setattr("fedmira.engine.tools.gradients", broken)  # not of the pass that is measured
        ended = command("run", config, *options)
    assert (ended.code, ended.out) == (code, "")
    assert ("phase.py" in ended.err) == (code == 1 or "--debug" in options)
    assert_silent(ended)
    run = RunFolder(tmp_path / "study" / "local" / "seed-3")
    assert run.facts.state == state
    assert f"{state}: {kind.__name__}" in ended.err
    resumed = command("resume", tmp_path / "study")
    assert resumed.code == 0, resumed.err
    assert_silent(resumed)
    assert leaking_files(tmp_path / "study") == []
