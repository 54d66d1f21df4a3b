"""A first config: what the data say is found, what is said is written, what is missing is asked for."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedmira import bundled
from fedmira.cli.init import UNDECIDED, draft_config
from fedmira.config.edits import add_comment, set_value
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.config.yaml_text import parse_yaml, read_config
from fedmira.data.owners import find_owners
from fedmira.data.records import Record
from fedmira.errors import ConfigError

TEMPLATE = (Path(bundled.__file__).parent / "init.yaml").read_text(encoding="utf-8").replace("@", "")


def save(path: Path, **columns: list[str]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def cycle(values: int, rows: int = 60, letter: str = "v") -> list[str]:
    return [f"{letter}{row % values}" for row in range(rows)]


def texts(rows: int = 60) -> dict[str, list[str]]:
    return {
        "prompt": [f"question {row}" for row in range(rows)],
        "completion": [f"answer {row}" for row in range(rows)],
    }


def draft(folder: Path, *overrides: str, **options: Any) -> tuple[Config, dict[str, Any], str]:
    """The config that is written, what is said, and its text."""
    found = draft_config(folder / "c.yaml", overrides=overrides, **options)
    return check_config(read_config(folder / "c.yaml")), found, (folder / "c.yaml").read_text(encoding="utf-8")


# ---------------------------------------------------------------- who the clients are


def test_conversations_with_a_column_of_six_hospitals_have_six_clients(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 60
    data = save(tmp_path / "rows.jsonl", hospital=cycle(6), messages=messages)  # type: ignore[arg-type]
    config, found, _ = draft(tmp_path, data=str(data))
    assert (config.data.clients.by, config.data.clients.partitioner) == ("hospital", None)
    assert found["notes"][0].startswith("the clients are the 6 values of 'hospital'")


@pytest.mark.parametrize("column", ["hospital", "Hospital", "customer_id", "author", "x7"])
def test_a_single_column_with_few_values_names_the_clients(column: str, tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", **{column: cycle(6), "label": cycle(2)}, **texts())
    config, found, _ = draft(tmp_path, data=str(data))
    assert config.data.clients.by == column
    assert "6 values" in found["notes"][0]


def test_a_usual_name_comes_first_and_the_others_are_in_a_comment(tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", hospital=cycle(6), client=cycle(3), **texts())
    config, found, text = draft(tmp_path, data=str(data))
    assert config.data.clients.by == "client"
    assert found["notes"] == []
    assert "    # other columns that may name the clients: hospital (6 values)\n    by: client " in text


def test_several_columns_are_listed_with_their_counts_and_one_is_asked_for(tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", hospital=cycle(6), region=cycle(3), **texts())
    config, found, text = draft(tmp_path, data=str(data))
    assert (config.data.clients.by, config.data.clients.partitioner) == (UNDECIDED, None)
    assert "    # choose one: hospital (6 values), region (3 values)\n" in text
    assert "write one of them: data.clients.by=hospital" in found["notes"][0]


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"number": [str(row) for row in range(60)]},
        {"note": [f"a long text of a row, which is not an owner {row % 6} and goes on and on" for row in range(60)]},
        {"one": ["v"] * 60},
        {"flag": ["true", "false"] * 30},
        {"holes": ["a", "b", ""] * 20},
        {"label": cycle(4)},
        {"difficulty_level": cycle(4)},
        {"split": ["train", "test"] * 30},
    ],
)
def test_where_no_column_fits_examples_are_dealt(columns: dict[str, list[str]], tmp_path: Path) -> None:
    config, _, _ = draft(tmp_path, data=str(save(tmp_path / "rows.jsonl", **columns, **texts())))
    assert config.data.clients.partitioner is not None
    assert config.data.clients.partitioner.name == "iid"


@pytest.mark.parametrize(("others", "by"), [({}, None), ({"clinic": cycle(4)}, "clinic")])
def test_a_column_user_that_asks_is_not_the_owner(others: dict[str, list[str]], by: str | None, tmp_path: Path) -> None:
    asked = {"user": texts()["prompt"], "reply": texts()["completion"], **others}
    config, _, _ = draft(
        tmp_path, "data.columns={prompt: user, completion: reply}", data=str(save(tmp_path / "rows.jsonl", **asked))
    )
    clients = config.data.clients
    assert (clients.by if clients.partitioner is None else None) == by


@given(st.integers(2, 12), st.integers(2, 9), st.randoms())
def test_a_column_of_owners_is_found_in_any_order_of_the_rows(owners: int, each: int, dice: Any) -> None:
    records = [
        Record(f"p{row}", "", (f"c{row}",), {"id": str(row), "clinic": f"k{row % owners}"}, "f:1")
        for row in range(owners * each)
    ]
    dice.shuffle(records)
    assert find_owners(records).chosen == "clinic"
    assert find_owners(records).fitting == [("clinic", owners)]


def test_an_owner_that_some_examples_lack_is_named_before_examples_are_dealt(tmp_path: Path) -> None:
    holes = ["" if row % 10 == 0 else f"h{row % 3}" for row in range(60)]
    data = save(tmp_path / "rows.jsonl", hospital=holes, other=holes, **texts())
    config, found, text = draft(tmp_path, data=str(data))
    assert config.data.clients.partitioner is not None
    assert found["notes"][0].startswith("'hospital' (3 values) may name the clients, but 6 of 60 examples have none")
    assert found["notes"][0].endswith("data.clients.by=hospital data.clients.partitioner=null")
    assert "    # may name the clients, if every example had a value: hospital (3 values)\n    by: task " in text


@pytest.mark.parametrize("holes", [["h1", "h2", "", "", ""] * 12, ["h1", ""] * 30])
def test_an_owner_of_few_examples_or_of_one_value_is_not_named(holes: list[str], tmp_path: Path) -> None:
    _, found, _ = draft(tmp_path, data=str(save(tmp_path / "rows.jsonl", hospital=holes, **texts())))
    assert found["notes"] == []


def test_an_answer_with_few_values_is_not_an_owner(tmp_path: Path) -> None:
    columns = {"prompt": texts()["prompt"], "completion": cycle(2)}
    config, _, _ = draft(tmp_path, data=str(save(tmp_path / "rows.jsonl", **columns)))
    assert config.data.clients.partitioner is not None


# ---------------------------------------------------------------- splits, templates, data that cannot be read yet


def test_own_splits_are_used_in_any_spelling(tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", client=cycle(3), Set=["Training", "dev"] * 30, **texts())
    assert draft(tmp_path, data=str(data))[0].data.split_column == "Set"
    (tmp_path / "c.yaml").unlink()
    odd = save(tmp_path / "odd.jsonl", client=cycle(3), split=["train", "extra"] * 30, **texts())
    config, _, text = draft(tmp_path, data=str(odd))
    assert config.data.split_column is None
    assert "# splits of 'split', not all known: extra, train\n" in text


@pytest.mark.parametrize(
    ("base", "template", "said"),
    [({}, "plain", True), ({"chat_template": "{{ messages }}"}, "auto", False), (None, "auto", False)],
)
def test_conversations_get_a_plain_template_where_the_base_has_none(
    base: dict[str, str] | None, template: str, said: bool, tmp_path: Path
) -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 60
    data = save(tmp_path / "rows.jsonl", client=cycle(3), messages=messages)  # type: ignore[arg-type]
    model = "owner/unknown"
    if base is not None:
        model = str(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(base))
    config, found, text = draft(tmp_path, data=str(data), model=model)
    assert config.data.template == template
    assert any("no chat template" in note for note in found["notes"]) == said
    assert ("if it has none, write plain, chatml, zephyr or a file" in text) == (base is None)


def test_a_csv_that_needs_its_columns_named_gets_a_config_with_them(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text("hospital,question,answer\n" + "".join(f"h{row % 6},q {row},a {row}\n" for row in range(60)))
    config, found, text = draft(tmp_path, data=str(path))
    assert "  # the data cannot be read as it is: qa.csv:2: 'question' and 'answer' are read as" in text
    assert "'data.columns={prompt: ..., completion: ...}'" in found["notes"][0]
    assert config.data.clients.by == UNDECIDED
    (tmp_path / "c.yaml").unlink()
    config, _, _ = draft(tmp_path, "data.columns={prompt: question, completion: answer}", data=str(path))
    assert config.data.columns == {"prompt": "question", "completion": "answer"}
    assert (config.data.format, config.data.clients.by) == ("prompt_completion", "hospital")


@pytest.mark.parametrize(
    ("text", "encoding", "missing"),
    [
        ("prompt,completion\né,b\n", "latin-1", "data.encoding=cp1252"),
        ("prompt,completion\na,b\n", "utf-16-le", "data.encoding=utf-16-le"),
        ("prompt,completion\na,b\n", "utf-8", None),
        ("frage,antwort\na,b\n", "utf-8", "data.columns={prompt: ..., completion: ...}"),
    ],
)
def test_init_asks_for_what_the_data_lack_in_a_command_that_can_be_copied(
    text: str, encoding: str, missing: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "my data.csv"
    path.write_text(text, encoding=encoding)
    found = draft_config(tmp_path / "my study.yaml", data=str(path))
    asked = [note.split("what is missing: ")[1] for note in found["notes"] if "what is missing: " in note]
    words = ["fedmira", "init", str(tmp_path / "my study.yaml"), "--data", str(path), missing]
    assert [shlex.split(command) for command in asked] == ([] if missing is None else [words])


def test_data_that_no_option_makes_readable_have_no_remedy_but_their_correction(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    _, found, _ = draft(tmp_path, data=str(tmp_path / "rows.jsonl"))
    assert found["notes"][0].endswith("correct the data")


def test_bad_rows_are_reported_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    data = save(tmp_path / "rows.jsonl", client=cycle(3), **texts())
    data.write_text(data.read_text() + "{}\n")
    config, found, _ = draft(tmp_path, data=str(data))
    assert config.data.clients.by == "client"
    assert "rows.jsonl:61" in found["notes"][0]
    assert "data.on_bad_row=skip" in found["notes"][0]


# ---------------------------------------------------------------- overrides


def test_own_data_get_none_of_the_bundled_tasks_settings(tmp_path: Path) -> None:
    """Also where the path is changed by hand afterwards."""
    config, _, text = draft(tmp_path)
    assert config.data.path == "bundled:tasks"
    usual = {name: field.default for name, field in type(config.data).model_fields.items()}
    for key in ("max_length", "split_column", "format", "columns", "template", "encoding", "delimiter"):
        assert getattr(config.data, key) == usual[key], key
    assert "As it is, it runs in seconds" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.rounds=7", ("federation", "rounds")),
        ("training.local_steps=5", ("training", "local_steps")),
        ("training.warm=1", None),
        ("data.split.test=0.3", ("data", "split", "test")),
        ("data.clients.partitioner={name: iid, num_partitions: 3}", ("data", "clients", "partitioner")),
        ("methods.mira.lambda=0.3", ("methods", "2", "lambda")),
        ("methods.mira.graph.kind=random", ("methods", "2", "graph", "kind")),
        ("methods=[local]", ("methods",)),
        ("lora.target_modules=[q_proj, v_proj]", ("lora", "target_modules")),
        ("data.path=a: b", None),
        ("seeds=[1, 2, 3]", ("seeds",)),
        ("report.examples=true", ("report", "examples")),
    ],
)
def test_an_override_is_written_and_nothing_else_is_changed(
    override: str, words: tuple[str, ...] | None, tmp_path: Path
) -> None:
    data = save(tmp_path / "rows.jsonl", client=cycle(3), **texts())
    if words is None:
        with pytest.raises(ConfigError):
            draft(tmp_path, override, data=str(data))
        assert not (tmp_path / "c.yaml").exists()
        return
    config, _, text = draft(tmp_path, override, data=str(data))
    value: Any = read_config(tmp_path / "c.yaml")
    for word in words:
        value = value[int(word) if word.isdecimal() else word]
    assert value == parse_yaml(override.partition("=")[2], "test")
    assert text.count("#") >= TEMPLATE.count("#") - 8  # of `methods`, which is replaced whole
    assert config.data.path == str(data)


def test_a_key_takes_out_the_one_that_it_replaces_unless_both_are_given(tmp_path: Path) -> None:
    """init.yaml has local_epochs: 1, and warm-ups of 0."""
    config, _, _ = draft(tmp_path, "training.local_steps=5")
    assert (config.training.local_steps, config.training.local_epochs) == (5, None)
    (tmp_path / "c.yaml").unlink()
    _, _, text = draft(tmp_path, "training.local_epochs=3")
    assert "local_epochs: 3 " in text
    assert "local_steps: null" not in text
    (tmp_path / "c.yaml").unlink()
    with pytest.raises(ConfigError, match="exactly one of local_steps and local_epochs"):
        draft(tmp_path, "training.local_steps=5", "training.local_epochs=3")


def test_what_is_said_of_the_data_is_used_to_read_it_and_beats_what_is_found(tmp_path: Path) -> None:
    path = tmp_path / "fragen.csv"
    path.write_bytes("Klinik#Frage#Antwort\nCharité#Wie groß?#3 cm\nZürich#Wie schwer?#5 g\n".encode("cp1252"))
    config, _, _ = draft(
        tmp_path,
        f"data.path={path}",
        "data.encoding=cp1252",
        "data.delimiter='#'",
        "data.columns={prompt: Frage, completion: Antwort}",
        "data.clients.by=Klinik",
    )
    assert (config.data.format, config.data.clients.by) == ("prompt_completion", "Klinik")


VALUES = st.one_of(st.booleans(), st.integers(), st.none(), st.text(max_size=8), st.lists(st.integers(), max_size=3))


@pytest.mark.slow
@given(
    st.sampled_from(
        [
            ("seeds",),
            ("model", "base_model"),
            ("data", "split", "test"),
            ("data", "columns", "prompt"),
            ("data", "clients", "partitioner", "name"),
            ("training", "local_steps"),
            ("methods", "mira", "lambda"),
            ("methods", "0", "label"),
            ("methods",),
            ("report_to",),
        ]
    ),
    VALUES,
)
def test_a_value_set_in_a_text_is_the_only_one_that_changes(words: tuple[str, ...], value: Any) -> None:
    changed = set_value(TEMPLATE, words, value)
    before, after = yaml.safe_load(TEMPLATE), parse_yaml(changed, "test")
    before = parse_yaml(TEMPLATE, "test")
    node = before
    for word in words[:-1]:
        if isinstance(node, list):
            node = node[int(word) if word.isdecimal() else [entry["name"] for entry in node].index(word)]
        else:
            node[word] = {} if node.get(word) is None else node[word]
            node = node[word]
    node[words[-1]] = value
    assert after == before
    kept = [line.rpartition("#")[2] for line in TEMPLATE.splitlines() if "#" in line]
    assert words == ("methods",) or all(comment in changed for comment in kept)


def test_a_comment_is_above_its_key_in_its_indentation() -> None:
    text = "a:\n  b: 1   # one\n  c: 2\n"
    assert add_comment(text, ("a", "c"), "two\nlines") == "a:\n  b: 1   # one\n  # two lines\n  c: 2\n"
    assert set_value(text, ("a", "b"), "long word") == "a:\n  b: long word  # one\n  c: 2\n"
