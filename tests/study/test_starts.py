"""`lora.start`: clients begin where someone stopped, exactly; whoever has nothing there begins as a newcomer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.cli.method_facts import build_default, method_facts
from fedmira.engine.federation import Federation, Given
from fedmira.errors import ConfigError, FedMiraError, MethodError, StoreError
from fedmira.methods import build, load, names
from fedmira.methods.base import Clock, Cohort
from fedmira.study.face import resume, run
from fedmira.study.loading import check
from fedmira.study.run import Common

GROUPS = {"name": "mira", "lambda": 0.5, "graph": {"kind": "groups", "column": "group"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("starts")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture(scope="module")
def first(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which every client has trained."""
    raw = small_study.settings(
        *made,
        tmp_path_factory.mktemp("first") / "out",
        methods=[{"name": "local"}, {"name": "fedavg"}],
        federation={"rounds": 2, "participation": 1.0},
    )
    return run(check(raw, "study.yaml")).path


def settings(made: tuple[Path, Path], output: Path, start: Any, **changes: Any) -> dict[str, Any]:
    lora = changes.pop("lora", {})
    changes.setdefault("methods", [{"name": "local"}])
    raw = small_study.settings(*made, output, **{"federation": {"rounds": 1, "participation": 1.0}, **changes})
    raw["lora"] = {**raw["lora"], "start": start, **lora}
    return raw


def product_of(folder: Path, module: str) -> Tensor:
    """s B A of a PEFT folder, by hand."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def begun(config: Any, label: str, seed: int = 3) -> tuple[Any, Adapters]:
    """What a method's server has before round 1, as every client would use it."""
    prepared = Common().prepare(config, lambda event: None)
    method = prepared.built[label].methods[seed]
    federation = prepared.under(method)
    state = federation.first_state(seed, method)
    ids = torch.arange(len(federation))
    return prepared, federation.adapters(ids, state.adapters.rows[method.row_of(ids)]).mask_()


@pytest.mark.parametrize(
    "lora",
    [{}, {"r": 5, "lora_alpha": 7}, {"use_rslora": True, "r": 4}, {"init_lora_weights": "orthogonal", "r": 4}],
    ids=str,
)
def test_each_client_begins_with_its_own_exactly_at_any_larger_rank_and_other_scale(
    made: tuple[Path, Path], first: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    config = check(settings(made, tmp_path / "x", {"study": str(first), "method": "local"}, lora=lora), "study.yaml")
    prepared, adapters = begun(config, "local")
    seen = []
    for k, client in enumerate(prepared.workplace.clients):
        for module, _, _ in prepared.workplace.base.shapes:
            expected = product_of(first / "local" / "seed-3" / "adapters" / client.id, module)
            torch.testing.assert_close(adapters.product(module)[k], expected, rtol=1e-5, atol=1e-7)
            seen.append(float(expected.abs().sum()))
    assert len(set(seen)) == len(seen)
    if lora:  # what is beyond the given rank is drawn: A is there to train, and B is 0
        (pair, *_) = list(adapters.layout.parts[0].pairs())
        assert bool(adapters.leaf(pair[0])[:, 2:].any(dim=2).all())
        assert not bool(adapters.leaf(pair[1])[:, :, 2:].any())


def test_a_study_that_learns_nothing_scores_as_the_one_before(
    made: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    still = {"training": {"learning_rate": 1e-12, "local_steps": 1, "optimizer": "sgd"}}
    start = {"study": str(first), "method": "local", "seed": 3}
    shared = ("fedavg", "pooled", "untouched")
    methods = [{"name": "local"}, {"name": "pftt"}, {"name": "feddpa", "max_weight": 0.0}]
    methods += [{"name": name} for name in shared]
    study = run(check(settings(made, tmp_path / "out", start, methods=methods, **still), "study.yaml"))
    table = {}
    for path, label in ((first, "local"), *((study.path, label) for label in ("local", "pftt", *shared))):
        rows = [line.split(",") for line in (path / label / "seed-3" / "results.csv").read_text().splitlines()[1:]]
        table[path, label] = {row[0]: float(row[7]) for row in rows if row[5:7] == ["test", "loss"] and int(row[3]) > 0}
    before = table[first, "local"]
    assert table[study.path, "local"] == pytest.approx(before, rel=1e-5)
    assert table[study.path, "pftt"] == pytest.approx(before, rel=1e-5), "in the own part, beside a shared part of 0"
    assert table[study.path, "pooled"] == pytest.approx(table[study.path, "fedavg"], rel=1e-5), "the mean of all"
    assert table[study.path, "pooled"] != pytest.approx(table[study.path, "untouched"], rel=1e-3)


def test_one_folder_is_everybodys_and_a_shared_row_is_the_mean_of_what_there_is(
    made: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    folder = first / "local" / "seed-3" / "adapters" / "bo"
    _, adapters = begun(check(settings(made, tmp_path / "x", str(folder)), "study.yaml"), "local")
    assert torch.equal(adapters.rows, adapters.rows[:1].expand_as(adapters.rows))
    start = {"study": str(first), "method": "local"}
    methods = [{"name": "local"}, {"name": "fedavg"}, {"name": "groupavg", "column": "group"}]
    config = check(settings(made, tmp_path / "x", start, methods=methods), "study.yaml")
    prepared, own = begun(config, "local")
    _, shared = begun(config, "fedavg")
    torch.testing.assert_close(shared.rows[0], own.rows.mean(dim=0))
    _, grouped = begun(config, "groupavg")
    even = torch.tensor([client.group == "even" for client in prepared.workplace.clients])
    torch.testing.assert_close(grouped.rows[even][0], own.rows[even].mean(dim=0))
    torch.testing.assert_close(grouped.rows[~even][0], own.rows[~even].mean(dim=0))


def test_a_newcomer_begins_as_the_method_lets_one(made: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    """`ada` has no adapter: B = 0 under local, the mean of its group's two others under MIRA."""
    shutil.copytree(first, tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "local" / "seed-3" / "adapters" / "ada")
    start = {"study": str(tmp_path / "less"), "method": "local"}
    config = check(settings(made, tmp_path / "x", start, methods=[{"name": "local"}, GROUPS]), "study.yaml")
    prepared, local = begun(config, "local")
    ids = [client.id for client in prepared.workplace.clients]
    place = ids.index("ada")
    (pair, *_) = list(local.layout.parts[0].pairs())
    assert not bool(local.leaf(pair[1])[place].any())
    assert bool(local.leaf(pair[1])[ids.index("bo")].any())
    _, mira = begun(config, "mira")
    others = [k for k, client in enumerate(prepared.workplace.clients) if client.group == "even" and k != place]
    torch.testing.assert_close(mira.rows[place], local.rows[others].mean(dim=0))
    shown = run(config)
    assert shown.runs[0].facts.start_sha256


def test_a_column_names_each_clients_folder(made: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in made[1].read_text(encoding="utf-8").splitlines()]
    for line in lines:
        folder = first / "local" / "seed-3" / "adapters" / line["client"]
        line["adapter"] = "" if line["client"] == "eve" else str(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = check(settings((made[0], data), tmp_path / "x", {"column": "adapter"}), "study.yaml")
    prepared, adapters = begun(config, "local")
    module = prepared.workplace.base.shapes[0][0]
    for k, client in enumerate(prepared.workplace.clients):
        if client.id == "eve":
            assert not bool(adapters.product(module)[k].any())
            continue
        expected = product_of(first / "local" / "seed-3" / "adapters" / client.id, module)
        torch.testing.assert_close(adapters.product(module)[k], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("start", "lora", "words"),
    [
        ("FOLDER", {"r": 1}, "has rank 2 on model.layers.0.self_attn.q_proj, and client"),
        ("FOLDER", {"target_modules": ["q_proj"]}, "unexpected tensor"),
        ("FOLDER", {"target_modules": ["q_proj", "v_proj", "k_proj"]}, "no tensor"),
        ({"study": "STUDY", "method": "mira"}, {}, "has no run of 'mira' with seed 0; there are: local (seed 3)"),
        ({"study": "STUDY", "method": "local", "seed": 4}, {}, "has no run of 'local' with seed 4"),
        ({"study": "nowhere", "method": "local"}, {}, "is not a FedMira study"),
        ("nowhere", {}, "is not an adapter"),
        ({"column": "group"}, {}, "'even' is not an adapter"),
        ({"column": "other"}, {}, "'other' has no client's"),
        ({"column": "completion"}, {}, "no client's"),
        ({"study": "STUDY"}, {}, "should be the folder of an adapter"),
        (3, {}, "should be the folder of an adapter"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_pass(
    made: tuple[Path, Path], first: Path, tmp_path: Path, start: Any, lora: dict[str, Any], words: str
) -> None:
    named = {"FOLDER": str(first / "local" / "seed-3" / "adapters" / "bo"), "STUDY": str(first)}
    if isinstance(start, str):
        start = named.get(start, start)
    if isinstance(start, dict):
        start = {key: named.get(value, value) for key, value in start.items()}
    with pytest.raises(FedMiraError) as caught:
        Common().prepare(check(settings(made, tmp_path / "x", start, lora=lora), "study.yaml"), lambda event: None)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError | StoreError)


def test_another_base_and_a_prompt_method_are_refused(made: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    other = small_study.save_base(tmp_path / "other", seed=1)
    start = {"study": str(first), "method": "local"}
    with pytest.raises(StoreError, match="and this base is sha256"):
        Common().prepare(check(settings((other, made[1]), tmp_path / "x", start), "study.yaml"), lambda event: None)
    for named in (tmp_path / "other", tmp_path / "elsewhere" / "base"):  # of another name, of the same
        if named != other:
            shutil.copytree(other, named)
        folder = str(next(first.glob("local/seed-3/adapters/*")))
        with pytest.raises(StoreError, match=r"the card of '.*' names another base, sha256 [0-9a-f]{64}, and this"):
            Common().prepare(
                check(settings((named, made[1]), tmp_path / "x", folder), "study.yaml"), lambda event: None
            )
    methods = [{"name": "local"}, {"name": "fedptuning", "virtual_tokens": 1, "hidden": 2}]
    with pytest.raises(MethodError, match=r"has no LoRA, and lora\.start is an adapter of LoRA"):
        Common().prepare(
            check(settings(made, tmp_path / "x", start, methods=methods), "study.yaml"), lambda event: None
        )


def test_a_resumed_run_wants_the_adapters_that_it_began_with(
    made: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "copy")
    start = {"study": str(tmp_path / "copy"), "method": "local"}
    study = run(check(settings(made, tmp_path / "out", start), "study.yaml"))
    resume(study.path, ["federation.rounds=2"])
    adapters = tmp_path / "copy" / "local" / "seed-3" / "adapters"
    shutil.rmtree(adapters / "ada")
    shutil.copytree(adapters / "bo", adapters / "ada")
    with pytest.raises(StoreError, match="have changed since this study began"):
        resume(study.path, ["federation.rounds=3"])


def test_shared_rows_by_hand() -> None:
    """Three clients of ranks 1, 2, 2; two begin with A = (1, 1) and (3, 3; 5, 5): the mean is (2, 2; 2.5, 2.5)."""
    layout = lora_layout([("m", 2, 1)], 2)  # A 2 x 2, B 1 x 2
    rows = torch.zeros(2, layout.size)
    rows[0, :2], rows[1, :4] = 1.0, torch.tensor([3.0, 3.0, 5.0, 5.0])
    columns = layout.rank_mask(torch.tensor([1, 2]))
    given = Given(rows, columns, torch.tensor([0, 1, -1]))
    federation = Federation(("a", "b", "c"), layout, torch.tensor([1, 2, 2]), 2.0, given=given)
    cohort = Cohort(("a", "b", "c"), (1, 1, 1), ({}, {}, {}), (), 0)
    state = federation.first_state(0, build("fedavg", {}, cohort))
    assert state.adapters.rows[torch.tensor([0])][0, :4].tolist() == [2, 2, 2.5, 2.5]
    local = federation.first_state(0, build("local", {}, cohort)).adapters.rows[torch.tensor([0, 1, 2])]
    assert local[0, :4].tolist() == [1, 1, 0, 0]
    assert local[1, :4].tolist() == [3, 3, 5, 5]
    drawn = Federation(("a", "b", "c"), layout, torch.tensor([1, 2, 2]), 2.0).start_rows(0)[0][-1]
    assert torch.equal(local[2], drawn)


@pytest.mark.parametrize("name", names())
def test_every_method_begins_as_its_page_says(name: str) -> None:
    """Four clients with an adapter each: what the server has, and the columns that stay with a client."""
    method, said = build_default(load(name)), method_facts(load(name)).starts
    layout, everyone = lora_layout([("m", 6, 4)], 2), torch.arange(4)
    mask = layout.rank_mask(torch.tensor([2]))[0]
    rows = torch.randn(4, layout.size, generator=torch.Generator().manual_seed(1)) * mask
    ids = tuple("abcd")

    def with_starts(of: Tensor) -> Federation:
        given = Given(rows, mask.expand(4, -1), of)
        return Federation(ids, layout, torch.full((4,), 2), 2.0, given=given).under(method, 6)

    if "refused" in said:
        with pytest.raises(MethodError, match=r"lora\.start"):
            with_starts(everyone)
        if "one adapter for all is taken" not in said:
            return
        federation, own = with_starts(torch.zeros(4, dtype=torch.int64)), rows[:1].expand(4, -1)
    else:
        federation, own = with_starts(everyone), rows
    if method.regime.trainees == "nobody":  # what it uses is no adapter
        assert said.startswith("nothing")
        return
    if method.regime.trainees == "pool":
        federation = federation.together("pool", 0)
        drawn, kinds = federation.start_rows(0)
        torch.testing.assert_close(drawn[kinds][:, mask], own[:, mask].mean(dim=0, keepdim=True))
        assert said == "the mean of all clients'"
        return
    server = federation.first_state(0, method).adapters.rows[method.row_of(everyone)][:, : layout.size]
    drawn, kinds = federation.start_rows(0)
    client = drawn[kinds][:, : layout.size]
    travels = (method.travels(federation.layout, Clock(1)) | method.travels(federation.layout, Clock(2)))[: layout.size]
    begun = torch.where(travels, server, client)[:, mask]
    if said.startswith("its own"):
        torch.testing.assert_close(begun, own[:, mask])
    elif not said.startswith("the mean of its group's"):  # there are no groups here
        stay = ~travels[mask]
        assert ("its own in the rest" in said) == bool(stay.any()) or "one adapter" in said
        expected = torch.where(stay, own[:, mask], own[:, mask].mean(dim=0))
        torch.testing.assert_close(begun, expected)
