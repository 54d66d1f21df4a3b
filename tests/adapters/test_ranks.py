"""A rank for every client: what may be written, how types are drawn, and what a study makes of it on disk."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests import small_study, tiny
from tests.small_study import CLIENTS, command
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.adapters.ranks import SHARES, TYPES, by_ending, client_ranks, is_attention, is_mixed, shown
from fedmira.config.faults import check_config
from fedmira.config.lora import RANK_DRAWS, RANK_TYPES
from fedmira.data.partition import client_key
from fedmira.engine.events import silent
from fedmira.errors import ConfigError
from fedmira.study import dry_run as preview
from fedmira.study.assemble import prepare, take_in
from fedmira.study.face import Study

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def ranks_of(wanted: Any, ids: Sequence[str] = ("a", "b", "c"), /, **others: Any) -> torch.Tensor:
    options: dict[str, Any] = {"usual": 8, "columns": [{}] * len(ids), "seed": 0, "modules": lambda: LLAMA, **others}
    return client_ranks(wanted, ids=ids, keys=[client_key(name) for name in ids], **options)


def unasked() -> list[str]:
    raise AssertionError("the base is loaded to name its modules, and nobody is of type T3")


# ---------------------------------------------------------------- one for all, a list


def test_without_ranks_everyone_has_r() -> None:
    found = ranks_of(None, usual=5, modules=unasked)
    assert found.tolist() == [5, 5, 5]
    assert found.dtype == torch.int64
    assert not is_mixed(found)


def test_a_list_gives_ranks_in_the_clients_order() -> None:
    found = ranks_of([8, 200, 30], modules=unasked)
    assert found.tolist() == [8, 200, 30]
    assert is_mixed(found)
    assert (shown(found), shown(found[:1])) == ("8 to 200", "8")


def test_a_list_of_another_length_is_refused_with_the_clients_there_are() -> None:
    with pytest.raises(ConfigError, match=r"lora.ranks: found 2 ranks, and there are 3 clients.*\(a, b, c\)"):
        ranks_of([8, 30])


# ---------------------------------------------------------------- types


def test_the_types_are_those_of_the_paper() -> None:
    """T3 parts attention from feed-forward; the others are one rank for all modules, and need no base to be known."""
    assert ranks_of(["T1", "T2", "T4"], modules=unasked).tolist() == [8, 30, 200]
    found = ranks_of(["T3", "T1", 4])
    assert found.tolist() == [[30, 30, 200, 200] * 2, [8] * 8, [4] * 8]
    assert is_mixed(found)


def test_everyone_of_type_three_is_not_mixed() -> None:
    assert not is_mixed(ranks_of(["T3", "T3", "T3"]))


def test_type_three_on_attention_alone_is_one_rank() -> None:
    assert ranks_of(["T3", "T1", "T4"], modules=lambda: LLAMA[:2]).tolist() == [30, 8, 200]


@pytest.mark.parametrize(
    ("family", "feed_forward"),
    [
        ("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
        ("llama", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("gpt_neox", ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
        ("opt", ["fc1", "fc2", "project_in", "project_out"]),
        ("phi3", ["mlp.gate_up_proj", "mlp.down_proj"]),
        ("falcon", ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    ],
)
def test_attention_is_told_from_feed_forward_in_every_family(family: str, feed_forward: list[str]) -> None:
    names = [name for name, _, _ in tiny.base(family, targets="all-linear").shapes]
    for name in names:
        assert is_attention(name) != any(name.endswith(ending) for ending in feed_forward), name
    assert any(map(is_attention, names))


# ---------------------------------------------------------------- draws


def test_the_words_of_the_config_are_the_tables() -> None:
    assert tuple(TYPES) == RANK_TYPES
    assert tuple(SHARES) == RANK_DRAWS
    assert all(sum(shares) == pytest.approx(1) for shares in SHARES.values())


@pytest.mark.parametrize(
    ("draw", "percent"),
    [
        ("uniform", (25, 25, 25, 25)),
        ("heavy-tail-light", (80, 5, 5, 10)),
        ("heavy-tail-strong", (5, 5, 10, 80)),
        ("normal", (5.75, 44.25, 44.25, 5.75)),
    ],
)
def test_a_draw_has_the_shares_of_its_name(draw: str, percent: tuple[float, ...]) -> None:
    """Of 4000 clients; a standard deviation is at most 0.8 %."""
    ids = [f"client-{k}" for k in range(4000)]
    found = ranks_of(draw, ids, modules=lambda: ["attn", "mlp"])
    drawn = Counter(tuple(row) for row in found.tolist())
    for pair, share in zip(TYPES.values(), percent, strict=True):
        assert 100 * drawn[pair] / 4000 == pytest.approx(share, abs=3), pair


def test_a_clients_type_is_its_own_wherever_it_stands_and_whoever_is_there() -> None:
    ids = [f"c{k}" for k in range(40)]
    whole = dict(zip(ids, ranks_of("uniform", ids).tolist(), strict=True))
    some = ids[30:] + ids[:5] + ["another"]
    again = dict(zip(some, ranks_of("uniform", some).tolist(), strict=True))
    assert all(again[name] == whole[name] for name in some[:-1])
    other = ranks_of("uniform", ids, seed=1).tolist()
    assert sum(one != two for one, two in zip(whole.values(), other, strict=True)) > 10


# ---------------------------------------------------------------- a column


def test_a_column_holds_ranks_or_types() -> None:
    columns = [{"size": "8"}, {"size": " 200 "}, {"size": "T2"}]
    assert ranks_of({"column": "size"}, columns=columns).tolist() == [8, 200, 30]


def test_a_column_without_one_value_per_client_is_refused_with_those_that_have() -> None:
    columns = [{"size": "8", "group": "x"}, {"group": "x"}, {"group": "y"}]
    words = r"lora.ranks.column: found 'size', which has no single value for 2 clients such as 'b'; .*: group"
    with pytest.raises(ConfigError, match=words):
        ranks_of({"column": "size"}, columns=columns)


@pytest.mark.parametrize("value", ["0", "-8", "8.0", "T5", "eight", "65537", "9" * 5000, "²", "٣", ""])
def test_a_value_that_is_no_rank_is_refused_with_what_is_allowed(value: str) -> None:
    columns = [{"size": "8"}, {"size": value}, {"size": "x"}]
    with pytest.raises(ConfigError, match=r"of client 'b' \(and of 1 others\); .*1 to 65,536, and T1, T2") as caught:
        ranks_of({"column": "size"}, columns=columns)
    assert len(str(caught.value)) < 300


# ---------------------------------------------------------------- the config


def fault_of(**lora: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(small_study.settings(Path("b"), Path("d"), Path("s"), lora={"r": 8, **lora}))
    (fault,) = caught.value.faults
    return fault


@pytest.mark.parametrize("ranks", [[8, 30], ["T1", 4], {"column": "size"}, "uniform", "normal", None])
def test_ranks_may_be_a_list_a_column_or_a_draw(ranks: Any) -> None:
    raw = small_study.settings(Path("b"), Path("d"), Path("s"), lora={"r": 8, "ranks": ranks})
    assert check_config(raw).lora.ranks == ranks


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([8, 0], "lora.ranks: found 0 in the list of ranks; allowed are whole numbers from 1 to 65,536, and T1, T2"),
        ([8, "T5"], "found 'T5' in the list"),
        ([8, True], "found True in the list"),
        ([8, 3.0], "found 3.0 in the list"),
        ([], "should be a list with a rank per client"),
        (8, "lora.ranks: found 8: should be a list with a rank per client, {column: NAME}, or a draw: uniform, heavy"),
        ("unifrom", "(did you mean 'uniform'?)"),
        ("heavy_tail_light", "(did you mean 'heavy-tail-light'?)"),
        ({"colum": "size"}, "{column: NAME}"),
        ({"column": 3}, "{column: NAME}"),
        ({"column": "size", "first": 3}, "{column: NAME}"),
    ],
)
def test_anything_else_is_one_fault_that_says_what_may_be_written(ranks: Any, words: str) -> None:
    fault = fault_of(ranks=ranks)
    assert fault.startswith("lora.ranks: ")
    assert words in fault


def test_ranks_take_the_place_of_r() -> None:
    assert fault_of(r=4, ranks=[1, 2]) == "lora: ranks replaces r; remove 'r: 4', or ranks"


def test_modules_are_named_by_the_shortest_ending_that_says_enough() -> None:
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_attn", "h.1.attn.c_proj"]
    assert by_ending(names, [30, 30, 200, 30, 30]) == {"c_attn": 30, "attn.c_proj": 30, "mlp.c_proj": 200}
    found = by_ending(names, [30, 30, 200, 8, 30])
    assert found == {"0.attn.c_attn": 30, "1.attn.c_attn": 8, "attn.c_proj": 30, "mlp.c_proj": 200}


# ---------------------------------------------------------------- a study

METHODS: list[Mapping[str, Any]] = [{"name": "flexlora"}, {"name": "fedavg"}, {"name": "local"}]
GIVEN = [1, 3, 2, 3, 1, 2]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    small_study.save_base(folder / "base")
    small_study.save_data(folder / "data.jsonl")
    return folder


def run(here: Path, name: str, methods: Sequence[Mapping[str, Any]], /, **lora: Any) -> tuple[Study, str]:
    raw = small_study.settings(
        here / "base", here / "data.jsonl", here / name, methods=list(methods), lora={"r": 8, **lora}
    )
    ended = command("run", small_study.save_config(here / f"{name}.yaml", raw))
    assert ended.code == 0, ended.err
    return Study(here / name), ended.err


@pytest.fixture(scope="module")
def listed(here: Path) -> tuple[Study, str]:
    return run(here, "listed", METHODS, ranks=GIVEN)


@pytest.fixture(scope="module")
def typed(here: Path) -> Study:
    """One client of every type, T3 twice; attention and feed-forward are both adapted."""
    ranks = ["T3", "T1", "T4", "T2", "T3", 5]
    targets = ["q_proj", "v_proj", "down_proj"]
    return run(here, "typed", [{"name": "flexlora"}], ranks=ranks, target_modules=targets)[0]


@pytest.fixture(scope="module")
def typed_personal(here: Path) -> Study:
    targets = ["q_proj", "down_proj"]
    return run(here, "personal", [{"name": "local"}], ranks=["T3", "T1", 5, "T2", "T3", 5], target_modules=targets)[0]


def config_of(study: Study, label: str, client: str) -> dict[str, Any]:
    found = json.loads((study.path / label / "seed-3" / "adapters" / client / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found


def shapes_of(study: Study, label: str, client: str) -> dict[str, int]:
    """The rank of every exported module, by its last name."""
    path = study.path / label / "seed-3" / "adapters" / client / "adapter_model.safetensors"
    tensors = load_file(path)
    found = {}
    for name, value in tensors.items():
        module, factor = name.split(".")[-3], name.split(".")[-2]
        rank = value.shape[0 if factor == "lora_A" else 1]
        assert found.setdefault(module, rank) == rank, name
    return found


def peft_losses(study: Study, label: str) -> dict[str, float]:
    """What PEFT makes of each exported adapter on its client's own test examples, in nats per token."""
    _, intake = take_in(study.config, silent)
    losses = {}
    for client in intake.clients:
        base = AutoModelForCausalLM.from_pretrained(study.config.model.base_model, dtype=torch.float32)
        folder = study.path / label / "seed-3" / "adapters" / client.id
        made = PeftModel.from_pretrained(base, str(folder)).eval()
        with torch.no_grad():
            losses[client.id] = float(tiny.peft_loss(made, client.test))
    return losses


def scored(study: Study, label: str) -> dict[str, float]:
    """The last test losses of results.csv."""
    rows = study.results
    some = rows[(rows["method"] == label) & (rows["split"] == "test") & (rows["metric"] == "loss")]
    last = some[some["round"] == small_study.ROUNDS]
    return dict(zip(last["client"], last["value"], strict=True))


def test_clients_json_has_the_ranks_that_were_given(listed: tuple[Study, str]) -> None:
    study, _ = listed
    for label in ("flexlora", "fedavg", "local"):
        table = json.loads((study.path / label / "seed-3" / "clients.json").read_text())
        assert {name: table[name]["rank"] for name in CLIENTS} == dict(zip(CLIENTS, GIVEN, strict=True))
        assert not any("ranks" in row for row in table.values())


def test_every_client_of_flexlora_is_handed_an_adapter_of_its_own_rank(listed: tuple[Study, str]) -> None:
    for client, rank in zip(CLIENTS, GIVEN, strict=True):
        for label in ("flexlora", "local"):
            found = config_of(listed[0], label, client)
            assert (found["r"], found["lora_alpha"]) == (rank, 4)
            assert not found["rank_pattern"] | found["alpha_pattern"]
            assert shapes_of(listed[0], label, client) == {"q_proj": rank, "v_proj": rank}


@pytest.mark.parametrize(
    "label", ["flexlora", *(pytest.param(label, marks=pytest.mark.slow) for label in ("fedavg", "local"))]
)
def test_what_is_handed_over_is_what_was_scored(label: str, listed: tuple[Study, str]) -> None:
    wanted = scored(listed[0], label)
    assert peft_losses(listed[0], label) == pytest.approx(wanted, rel=1e-4)
    assert len(set(wanted.values())) == len(CLIENTS)


def test_methods_that_mix_factors_of_different_ranks_say_so(listed: tuple[Study, str]) -> None:
    (noted,) = (line for line in listed[1].splitlines() if "mixed as if padded" in line)
    assert noted.startswith("warning: fedavg: clients have ranks 1 to 3, ")
    kept = (listed[0].path / "fedavg" / "seed-3" / "log.txt").read_text(encoding="utf-8")
    assert "fedavg: clients have ranks 1 to 3, " in kept


@pytest.mark.slow
def test_a_study_of_one_rank_has_no_such_note(here: Path) -> None:
    _, told = run(here, "plain", METHODS[:2], ranks=[2] * 6)
    assert "padded" not in told


def test_a_list_that_does_not_fit_the_clients_stops_a_study_before_it_writes(here: Path, tmp_path: Path) -> None:
    raw = small_study.settings(here / "base", here / "data.jsonl", tmp_path / "study", lora={"r": 8, "ranks": [1, 2]})
    ended = command("run", small_study.save_config(tmp_path / "study.yaml", raw))
    assert (ended.code, ended.out) == (2, "")
    assert "lora.ranks: found 2 ranks, and there are 6 clients" in ended.err
    assert not small_study.has_traceback(ended.err)
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_column_of_the_data_gives_ranks(here: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (here / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row["size"] = 1 + CLIENTS.index(row["client"]) % 3
    (tmp_path / "sized.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = small_study.settings(
        here / "base",
        tmp_path / "sized.jsonl",
        tmp_path / "study",
        lora={"r": 8, "ranks": {"column": "size"}},
        methods=[{"name": "flexlora"}],
        federation={"rounds": 1},
    )
    ended = command("run", small_study.save_config(tmp_path / "study.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    table = json.loads((tmp_path / "study" / "flexlora" / "seed-3" / "clients.json").read_text())
    assert [table[name]["rank"] for name in CLIENTS] == [1, 2, 3, 1, 2, 3]


def test_the_types_of_a_study_are_drawn_from_its_datas_seed_whatever_the_runs_seed(here: Path) -> None:
    changes: dict[str, Any] = {"lora": {"r": 8, "ranks": "uniform"}, "data": {"seed": 5}}
    raw = small_study.settings(here / "base", here / "data.jsonl", here / "none", **changes)
    expected = ranks_of("uniform", CLIENTS, seed=5, modules=lambda: ["self_attn.q_proj"])
    assert expected.tolist() != ranks_of("uniform", CLIENTS, seed=3, modules=lambda: ["self_attn.q_proj"]).tolist()
    prepared = prepare(check_config(raw), silent)
    assert prepared.federation.ranks.tolist() == expected.tolist()
    known = prepared.cohorts[3]
    assert known.ranks is not None
    assert known.scale is not None
    assert (known.ranks.tolist(), (known.scale * known.ranks).tolist()) == (expected.tolist(), [4] * 6)


TYPED = {
    "ada": {"q_proj": 30, "v_proj": 30, "down_proj": 200},
    "bo": {"q_proj": 8, "v_proj": 8, "down_proj": 8},
    "cy": {"q_proj": 200, "v_proj": 200, "down_proj": 200},
    "007": {"q_proj": 30, "v_proj": 30, "down_proj": 30},
    "no": {"q_proj": 30, "v_proj": 30, "down_proj": 200},
    "eve": {"q_proj": 5, "v_proj": 5, "down_proj": 5},
}


@pytest.mark.parametrize("client", TYPED)
def test_a_client_of_type_three_is_handed_two_ranks_in_one_adapter(client: str, typed: Study) -> None:
    wanted = TYPED[client]
    found = config_of(typed, "flexlora", client)
    assert shapes_of(typed, "flexlora", client) == wanted
    assert (found["r"], found["lora_alpha"], found["alpha_pattern"]) == (wanted["down_proj"], 4, {})
    uneven = wanted["q_proj"] != wanted["down_proj"]
    assert found["rank_pattern"] == ({"q_proj": 30, "v_proj": 30} if uneven else {})
    row = json.loads((typed.path / "flexlora" / "seed-3" / "clients.json").read_text())[client]
    assert (row["rank"], row.get("ranks")) == (wanted["down_proj"], wanted if uneven else None)


def test_adapters_with_two_ranks_are_in_peft_what_was_scored(typed: Study) -> None:
    assert peft_losses(typed, "flexlora") == pytest.approx(scored(typed, "flexlora"), rel=1e-4)


@pytest.mark.slow
def test_clients_with_adapters_of_their_own_may_be_of_type_three(typed_personal: Study) -> None:
    assert peft_losses(typed_personal, "local") == pytest.approx(scored(typed_personal, "local"), rel=1e-4)
    assert shapes_of(typed_personal, "local", "ada") == {"q_proj": 30, "down_proj": 200}
    assert shapes_of(typed_personal, "local", "cy") == {"q_proj": 5, "down_proj": 5}


@pytest.mark.slow
def test_a_study_of_mixed_ranks_goes_on_to_more_rounds(here: Path, listed: tuple[Study, str]) -> None:
    raw = small_study.settings(
        here / "base",
        here / "data.jsonl",
        here / "short",
        methods=[{"name": "flexlora"}],
        lora={"r": 8, "ranks": GIVEN},
        federation={"rounds": small_study.ROUNDS - 1},
    )
    assert command("run", small_study.save_config(here / "short.yaml", raw), "-q").code == 0
    fedmira.resume(here / "short", [f"federation.rounds={small_study.ROUNDS}"])
    assert scored(Study(here / "short"), "flexlora") == scored(listed[0], "flexlora")


def test_bytes_are_counted_at_every_clients_own_rank(here: Path) -> None:
    raw = small_study.settings(
        here / "base",
        here / "data.jsonl",
        here / "own-bytes",
        methods=[{"name": "fedavg"}],
        lora={"r": 8, "ranks": GIVEN},
        federation={"rounds": 1, "participation": 1.0},
    )
    config = check_config(raw, "test")
    found = preview.plan_study(config).bytes_per_round["fedavg"]
    (record,) = fedmira.run(config).runs[0].rounds
    assert record["bytes_up"] + record["bytes_down"] == found
    whole = prepare(config, silent).federation.layout.size
    assert found < 2 * len(CLIENTS) * 4 * whole


def test_types_are_drawn_from_the_documented_stream() -> None:
    """The quarter in which default_rng([seed, STREAM, key]) falls; in attention types have ranks 8, 30, 30, 200."""
    ids = [f"c{k}" for k in range(12)]
    drawn = [np.random.default_rng([5, 0x52414E4B, client_key(name)]).random() for name in ids]
    found = ranks_of("uniform", ids, seed=5, modules=lambda: ["attn.q"])
    assert found.tolist() == [(8, 30, 30, 200)[int(4 * value)] for value in drawn]


@pytest.mark.parametrize("name", ["layers.0.SelfAttention.q", "h.0.Attn.c", "layers.0.attention.q", "attn"])
def test_attention_is_known_in_any_case(name: str) -> None:
    assert is_attention(name)
