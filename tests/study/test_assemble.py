"""From a config to clients: what each setting of `data` does to real files, before any weights are read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from transformers import AutoTokenizer

from fedmira.config.faults import check_config
from fedmira.engine.events import silent
from fedmira.errors import ConfigError, DataError, MethodError
from fedmira.graphs.graph import group_graph
from fedmira.methods.base import Cohort
from fedmira.names import ClientNames
from fedmira.study.assemble import Intake, prepare, take_in
from fedmira.study.notes import lonely_notes

ONE = {"partitioner": {"name": "iid", "num_partitions": 1}}
KINDS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study.save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """120 rows sorted by kind, each with a prompt of its own."""
    made = [
        {
            "prompt": f"w{index % 20 + 2} w{index // 20 + 2}",
            "completion": "w9",
            "kind": KINDS[index // 40],
            "place": index,
        }
        for index in range(120)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def take(base: Path, rows: Path, /, **data: Any) -> Intake:
    options: dict[str, Any] = {"split": {"validation": 0, "test": 0}, "clients": {"by": "kind"}, **data}
    raw = small_study.settings(base, rows, rows.parent / "study")
    raw["data"] = {"path": str(rows), "max_length": 12, **options}
    return take_in(check_config(raw), silent)[1]


def sizes(intake: Intake) -> list[int]:
    return [len(client.train) for client in intake.clients]


@pytest.mark.parametrize(
    ("partitioner", "clients"),
    [
        ({"name": "iid", "num_partitions": 7}, 7),
        ({"name": "IidPartitioner", "num_partitions": 7, "shuffle": False}, 7),
        ({"name": "size", "partition_sizes": [20, 60, 40]}, 3),
        ({"name": "linear", "num_partitions": 5}, 5),
        ({"name": "square", "num_partitions": 4}, 4),
        ({"name": "exponential", "num_partitions": 3}, 3),
        ({"name": "dirichlet", "num_partitions": 6, "partition_by": "kind", "alpha": 0.5, "min_partition_size": 2}, 6),
        ({"name": "Pathological", "num_partitions": 6, "partition_by": "kind", "num_classes_per_partition": 2}, 6),
        ({"name": "shard", "num_partitions": 6, "partition_by": "kind", "num_shards_per_partition": 2}, 6),
        ({"name": "natural_id", "partition_by": "kind"}, 3),
    ],
)
def test_every_partitioner_gives_every_example_to_exactly_one_client(
    partitioner: Mapping[str, Any], clients: int, base: Path, rows: Path
) -> None:
    intake = take(base, rows, clients={"partitioner": partitioner})
    assert len(intake.clients) == clients
    assert sum(sizes(intake)) == 120
    assert intake.left_out == 0
    prompts = sorted(example.ids for client in intake.clients for example in client.train)
    everything = take(base, rows, clients={"by": "kind"})
    assert prompts == sorted(example.ids for client in everything.clients for example in client.train)


def test_iid_clients_of_a_sorted_file_are_alike_unless_told_otherwise(base: Path, rows: Path) -> None:
    def kinds(shuffle: bool) -> list[int]:
        made = take(base, rows, clients={"partitioner": {"name": "iid", "num_partitions": 3, "shuffle": shuffle}})
        third = [example.ids[1] for client in made.clients for example in client.train]
        return [len(set(third[start : start + 40])) for start in (0, 40, 80)]

    assert kinds(False) == [2, 2, 2]
    assert min(kinds(True)) > 2


def test_a_partitioner_follows_its_own_seed_or_that_of_the_data(base: Path, rows: Path) -> None:
    def deal(seed: int | None, own: int | None = None) -> list[tuple[int, ...]]:
        chosen = {"name": "iid", "num_partitions": 4, "seed": own}
        made = take(base, rows, clients={"partitioner": chosen}, seed=seed or 0)
        return [example.ids for example in made.clients[0].train]

    assert deal(1) == deal(1) == deal(7, own=1)
    assert deal(1) != deal(2)


def test_what_a_partitioner_leaves_out_is_counted(base: Path, rows: Path) -> None:
    intake = take(base, rows, clients={"partitioner": {"name": "size", "partition_sizes": [10, 20]}})
    assert (sizes(intake), intake.left_out, intake.examples) == ([10, 20], 90, 120)


def test_clients_of_a_partitioner_have_a_group_only_where_a_column_names_it(base: Path, rows: Path) -> None:
    chosen = {"name": "size", "partition_sizes": [40, 40, 40], "shuffle": False}
    assert {client.group for client in take(base, rows, clients={"partitioner": chosen}).clients} == {None}
    grouped = take(base, rows, clients={"partitioner": chosen, "groups": "kind"})
    assert [(client.id, client.group) for client in grouped.clients] == [
        ("client-0", "red"),
        ("client-1", "green"),
        ("client-2", "blue"),
    ]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({"partitioner": {"name": "dirichlet", "num_partitions": 2, "partition_by": "knid", "alpha": 1}}, "'knid'"),
        ({"partitioner": {"name": "size", "partition_sizes": [121]}}, "121"),
        ({"partitioner": {"name": "iid", "num_partitions": 121}}, "121"),
        ({"by": "knid"}, r"no column 'knid' \(did you mean 'kind'\?\).*partitioner: \{name: iid"),
    ],
)
def test_clients_that_cannot_be_formed_are_refused_with_what_to_do(
    clients: Mapping[str, Any], message: str, base: Path, rows: Path
) -> None:
    with pytest.raises(DataError, match=message):
        take(base, rows, clients=clients)


def test_plain_text_takes_no_template_and_no_written_answers(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w3 w4 w5", "kind": "a"}\n' * 3)
    raw = small_study.settings(base, path, tmp_path / "study", evaluation={"metrics": ["loss", "rouge_l"]})
    raw["data"] = {"path": str(path), "max_length": 12, "template": "alpaca", "clients": {"by": "kind"}}
    with pytest.raises(ConfigError) as caught:
        take_in(check_config(raw), silent)
    assert "data.template: found 'alpaca'" in str(caught.value)
    assert "evaluation.metrics: found rouge_l" in str(caught.value)
    raw["data"]["template"], raw["evaluation"]["metrics"] = "auto", ["loss"]
    _, intake = take_in(check_config(raw), silent)
    [client] = intake.clients
    assert client.train[0].prompt_length == 1  # there is one token to predict from
    assert client.train[0].labels == 4  # three words and the end


def test_a_template_of_ones_own_reaches_the_examples(base: Path, rows: Path) -> None:
    own = rows.parent / "own.jinja"
    own.write_text("w7 {{ instruction }} w8")
    plain, framed = take(base, rows).clients[0].train[0], take(base, rows, template=str(own)).clients[0].train[0]
    assert framed.ids[1:-3] == plain.ids[:-2]
    assert len(framed.ids) == len(plain.ids) + 2


def test_splits_that_the_data_names_are_kept_or_their_mixing_is_told(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": "w3", "completion": f"w{place}", "kind": "a", "split": split}) + "\n"
            for split, count in (("train", 6), ("test", 2))
            for place in range(3, 3 + count)
        )
    )
    mixed, kept = take(base, path), take(base, path, split_column="split")
    assert (mixed.pooled, kept.pooled) == (("split", ["test", "train"]), None)
    assert (len(mixed.clients[0].train), len(kept.clients[0].train), len(kept.clients[0].test)) == (8, 6, 2)


def test_prompts_that_run_into_their_answers_and_unknown_words_are_counted(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "glued.jsonl"
    rows = [("w3?", "w4", "a"), ("w3? ", "w4", "a"), ("w3", " w4", "a"), ("w3 :", "w4", "a"), ("zebra", " zebra", "b")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c, "kind": k}) + "\n" for p, c, k in rows))
    intake = take(base, path)
    assert intake.glued == 1
    assert intake.unknown["train"][1:] == (1, 5)
    assert take(base, path, template="alpaca").glued == 0


def test_unknown_words_are_counted_in_every_split_and_said_once(base: Path, tmp_path: Path) -> None:
    """Words of two prompts and of one answer of the tests are unknown, and of one answer of the validation."""
    path = tmp_path / "rows.csv"
    rows = ["w3, w4,train", "w4, w5,train", "zebra w2, w5,test", "zebra, zebra,test", "w5, w6 zebra,validation"]
    path.write_text("\n".join(["prompt,completion,split", *rows]))
    raw = small_study.settings(base, path, tmp_path / "study")
    raw["data"] = {"path": str(path), "max_length": 12, "split_column": "split", "clients": ONE}
    config = small_study.save_config(tmp_path / "config.yaml", raw)
    ended = small_study.command("run", config, "--show-example")
    assert ended.err.count("does not know") == 1
    assert (
        "does not know 25.0% of the validation, 42.9% of the test tokens; answers with such tokens: 1 of 1 in "
        "validation, 1 of 2 in test."
    ) in ended.err


def test_an_end_of_text_that_is_also_the_unknown_token_is_not_counted_as_unknown(base: Path, tmp_path: Path) -> None:
    """As GPT-2's: it ends each turn of the assistant, and none of these words is unknown."""
    both = tmp_path / "both"
    shutil.copytree(base, both)
    tokenizer = AutoTokenizer.from_pretrained(both)
    tokenizer.unk_token = tokenizer.eos_token
    tokenizer.save_pretrained(both)
    turns = [{"role": role, "content": "w3"} for role in ("user", "assistant") * 2]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turns, "kind": "a"}) + "\n" for _ in range(3)))
    assert take(both, path, template="zephyr", max_length=60).unknown == {}


@pytest.mark.parametrize(
    ("metrics", "most", "new", "expected"),
    [
        (["rouge_l", "exact_match"], None, 2, (8, [3] * 4, 4)),
        (["exact_match"], None, 3, (8, [], 0)),
        (["exact_match"], 1, 2, (1, [3], 0)),
        (["loss"], None, 1, (0, [], 0)),
    ],
)
def test_test_answers_that_no_method_can_match_are_counted(
    base: Path, tmp_path: Path, metrics: list[str], most: int | None, new: int, expected: tuple[int, list[int], int]
) -> None:
    """Here w9 and <unk> are words of the base; a longer answer is never written whole, 東京 has no word for rouge_l."""
    answers = ("w9 w8 w7", "\u6771\u4eac")
    rows = [
        {"prompt": "w2", "completion": answers[index % 2], "client": "a", "split": "test" if index < 8 else "train"}
        for index in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = small_study.settings(base, path, tmp_path / "study")
    raw["data"] = {"path": str(path), "max_length": 12, "split_column": "split", "clients": {"by": "client"}}
    raw["evaluation"] = {"metrics": metrics, "max_new_tokens": new, "max_examples": most}
    _, intake = take_in(check_config(raw), silent)
    assert (intake.asked, list(intake.too_long), intake.wordless) == expected


def test_a_method_may_be_given_by_its_name_alone() -> None:
    raw = small_study.settings(Path("b"), Path("d"), Path("s"), methods=["local", "mira"])
    assert [entry.folder for entry in check_config(raw).methods] == ["local", "mira"]


def test_a_fault_of_a_method_names_its_place(base: Path, rows: Path, tmp_path: Path) -> None:
    methods = [{"name": "local"}, {"name": "groupavg", "column": "nope"}]
    raw = small_study.settings(base, rows, tmp_path / "out", methods=methods, data={"clients": {"by": "kind"}})
    with pytest.raises(MethodError, match=r"methods\.1 \(groupavg\): groupavg: column 'nope'"):
        prepare(check_config(raw, "test"), silent)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("site", ["mira: the graph joins nobody", "groupavg: the graph joins nobody"]),
        ("ward", ["1 of 3 clients have no neighbour in the graph and learn alone: 'blue'"]),
        ("house", []),
    ],
)
def test_a_coupling_that_joins_nobody_or_leaves_some_alone_is_said(
    column: str, told: list[str], base: Path, rows: Path
) -> None:
    wards = {"red": "a", "green": "a", "blue": "b"}
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    named = [{**line, "site": line["kind"], "ward": wards[line["kind"]], "house": "one"} for line in lines]
    rows.write_text("".join(json.dumps(line) + "\n" for line in named))
    mira = {"name": "mira", "lambda": 0.1, "graph": {"kind": "groups", "column": column}}
    raw = small_study.settings(
        base, rows, rows.parent / "study", methods=[mira, {"name": "groupavg", "column": column}]
    )
    raw["data"] = {"path": str(rows), "max_length": 12, "clients": {"by": "kind"}}
    built = prepare(check_config(raw), silent).built
    notes = [note for one in built.values() for note in one.notes]
    assert len(notes) == (2 if told else 0)
    assert all(any(words in note for note in notes) for words in told)


def test_of_a_learned_graph_only_clients_that_took_part_are_looked_at() -> None:
    names = ClientNames({"a": "a", "b": "b", "c": "東京", "d": "d"})
    cohort = Cohort(("a", "b", "c", "d"), (1,) * 4, ({},) * 4, (), 0, names=names)
    graph = group_graph(["x", "x", "y", "z"])
    assert lonely_notes("mira", graph, cohort, of=[0, 1]) == []
    (note,) = lonely_notes("mira", graph, cohort, of=[0, 1, 2])
    assert note.endswith("have no neighbour in the graph and learn alone: '東京 (c)'")
    assert "joins nobody" in lonely_notes("mira", graph, cohort, of=[2, 3])[0]
    assert lonely_notes("local", None, cohort) == []


@pytest.mark.parametrize(
    ("participation", "mira", "said"),
    [
        (0.34, {"lambda": 0.1}, True),
        (0.34, {"lambda": 0.0}, True),
        (0.34, {"lambda": 0.1, "neighbours": "stored"}, False),
        (0.67, {"lambda": 0.1}, False),
        (1.0, {"lambda": 0.0}, False),
    ],
)
def test_rounds_in_which_no_two_joined_clients_meet_are_said(
    participation: float, mira: dict[str, Any], said: bool, base: Path, rows: Path
) -> None:
    entry = {"name": "mira", "graph": {"kind": "uniform"}, **mira}
    federation = {"rounds": 3, "participation": participation}
    raw = small_study.settings(base, rows, rows.parent / "study", methods=[entry], federation=federation)
    raw["data"] = {"path": str(rows), "max_length": 12, "clients": {"by": "kind"}}
    (built,) = prepare(check_config(raw), silent).built.values()
    expected = "mira: no round has two clients that the graph joins (1 of 3 clients in a round)"
    assert [note.startswith(expected) for note in built.notes] == [True] * said
