"""FedDPA by hand: one step of both parts, the gate, scores that it makes example by example, and what is exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests import small_study
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedmira.adapters import Adapters, lora_layout
from fedmira.adapters.parts import OWN, SHARED, own_and_shared, part_columns
from fedmira.cli.chat import open_chat
from fedmira.data.batches import asking
from fedmira.data.encode import encode_questions
from fedmira.data.formats import Record
from fedmira.disk.folders import GATE
from fedmira.engine.scoring import score_loss
from fedmira.evaluation.gated import at_mean, cosines, gated_answers, similarities
from fedmira.evaluation.measure import measure_answers, measure_loss
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, Tools
from fedmira.study.face import load_run, run
from fedmira.study.loading import check
from fedmira.study.run import Common

LAYOUT = own_and_shared(lora_layout([("m", 1, 1)], 1))
OWN_A, OWN_B, SHARED_A, SHARED_B = 0, 1, 16, 17


def feddpa(**settings: Any) -> Method:
    return build("feddpa", settings, Cohort(("a",), (1,), ({},), (), 0))


def one_row(**values: float) -> Adapters:
    rows = torch.zeros(1, LAYOUT.size, dtype=torch.float64)
    for place, name in ((OWN_A, "own_a"), (OWN_B, "own_b"), (SHARED_A, "shared_a"), (SHARED_B, "shared_b")):
        rows[0, place] = values[name]
    return Adapters(LAYOUT, rows, torch.ones(1, dtype=torch.int64), torch.ones(1))


def grad(adapters: Adapters) -> tuple[Tensor, Tensor]:
    """Loss 1/2 (p - 10)^2 of the sum p of both products."""
    rows = adapters.rows.clone().requires_grad_()
    whole = adapters.with_rows(rows)
    product = sum(whole.product("m", part)[:, 0, 0] for part in (OWN, SHARED))
    losses = (product - 10).square() / 2
    return losses.detach(), torch.autograd.grad(losses.sum(), rows)[0]


def never(*arguments: object) -> Any:
    raise AssertionError("this tool is not for this method")


def test_a_step_by_hand() -> None:
    """Rate 0.1, a = 1/2. Shared part alone: p = 3, slope -7: A 3 + 0.7 x 1 = 3.7, B 1 + 0.7 x 3 = 3.1.

    Own part beside half of the shared part as it was sent: p = 1/2 x 2 + 1/2 x 3 = 2.5, slope -7.5: A 1 + 0.75 x (1/2 x
    2) = 1.75, B 2 + 0.1 x 1/2 x 7.5 x 1 = 2.375. In the next step the shared part as it was sent is still A 3, B 1.
    """

    def update(adapters: Adapters, gradient: Tensor, *, of: str = "main") -> Adapters:
        columns = part_columns(LAYOUT, OWN if of == OWN else SHARED)
        assert not bool(gradient[:, ~columns].any()), "moments of one part see the other"
        return adapters.with_rows(adapters.rows - 0.1 * gradient)

    adapters = one_row(own_a=1, own_b=2, shared_a=3, shared_b=1)
    given = Message(adapters.rows.clone())
    tools = Tools(Clock(1, learning_rate=0.1), grad, update, lambda name: [], never, never, never)
    step = feddpa().client.step
    after, _ = step(adapters, {}, given, tools)
    found = after.rows[0, [OWN_A, OWN_B, SHARED_A, SHARED_B]]
    torch.testing.assert_close(found, torch.tensor([1.75, 2.375, 3.7, 3.1], dtype=torch.float64))
    again, _ = step(after, {}, given, tools)
    # own: p = 1/2 x 1.75 x 2.375 + 1.5 = 3.578125, slope -6.421875: B 2.375 + 0.1 x 1/2 x 6.421875 x 1.75
    assert float(again.rows[0, OWN_B]) == pytest.approx(2.375 + 0.05 * 6.421875 * 1.75, abs=1e-12)


def test_the_mix_by_hand() -> None:
    """w = 1/2: similarity 1/2 gives the own part 1/4, below 0 nothing, and what is read is the own part alone."""
    gate = feddpa().client.gate
    assert gate is not None
    assert gate.prompts == 5
    adapters = one_row(own_a=1, own_b=2, shared_a=3, shared_b=1).take(torch.tensor([0, 0]))
    mixed = gate.mix(adapters, torch.tensor([0.5, -0.5], dtype=torch.float64))
    assert mixed.product("m", OWN).flatten().tolist() == [0.25 * 2, 0]
    assert mixed.product("m", SHARED).flatten().tolist() == [0.75 * 3, 3]
    assert gate.look(adapters).product("m", SHARED).flatten().tolist() == [0, 0]
    assert gate.look(adapters).product("m", OWN).flatten().tolist() == [2, 2]


def test_a_mean_cosine_by_hand() -> None:
    """(3, 4) with (1, 0) and (0, 2): 3/5 and 4/5, mean 0.7."""
    found = cosines(torch.tensor([[3.0, 4.0]]).numpy(), torch.tensor([[1.0, 0.0], [0.0, 2.0]]).numpy())
    assert found.tolist() == pytest.approx([0.7])


# ---------------------------------------------------------------- on a real base


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feddpa")
    base, data = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")
    methods = [{"name": "local"}, {"name": "feddpa", "instances": 2, "max_weight": 0.9}]
    raw = small_study.settings(base, data, folder / "out", methods=methods, federation={"rounds": 2})
    return run(check(raw, "study.yaml")).path


def world(study: Path) -> tuple[Any, Method, Adapters]:
    """What the study worked with, its method, and adapters of two parts that are all but zero."""
    config = load_run(study / "feddpa" / "seed-3").config
    workplace = Common().prepare(config, lambda event: None).workplace
    method = feddpa(instances=2, max_weight=0.9)
    layout = own_and_shared(lora_layout(workplace.base.shapes, 2))
    rows = 0.3 * torch.randn(len(workplace.clients), layout.size, generator=torch.Generator().manual_seed(1))
    ranks = torch.full((len(rows),), 2)
    return workplace, method, Adapters(layout, rows, ranks, torch.full((len(rows),), 2.0))


def test_a_score_is_that_of_each_example_with_its_own_mix(study: Path) -> None:
    workplace, method, adapters = world(study)
    base, clients, gate = workplace.base, workplace.clients, method.client.gate
    assert gate is not None
    found = score_loss(workplace, adapters.take, [0, 3], gate, split="test")
    many: dict[str, Any] = {"split": "test", "cohort": 3, "metrics": ["exact_match", "rouge_l"], "max_new_tokens": 3}
    texts: dict[tuple[int, int], str] = {}
    gated_answers(
        gate, base, adapters.take, clients, [0, 3], written=lambda k, n, text: texts.update({(k, n): text}), **many
    )
    seen = set()
    for k, loss in zip((0, 3), found, strict=True):
        examples = clients[k].test
        (similar,) = similarities(base, gate, adapters.take(torch.tensor([k])), [clients[k]], [examples])
        nats = tokens = 0.0
        for place, example in enumerate(examples):
            row = gate.mix(adapters.take(torch.tensor([k])), similar[place : place + 1])
            alone = replace(clients[k], train=(), validation=(), test=(example,))
            (value,) = measure_loss(base, lambda asked, row=row: row.take(asked), [alone], [0], split="test", cohort=1)
            assert value is not None
            nats, tokens = nats + value * example.labels, tokens + example.labels
            measure_answers(
                base,
                lambda asked, row=row: row.take(asked),
                [alone],
                [0],
                written=lambda _, n, text, k=k, place=place: seen.add(text == texts[k, place]),
                **many,
            )
        assert loss == pytest.approx(nats / tokens, rel=1e-5)
    assert seen == {True}


def test_the_similarity_is_that_of_states_by_transformers_and_peft(study: Path) -> None:
    """The own part alone, as PEFT loads it from a folder: here an adapter of `local` is the own part."""
    workplace, method, adapters = world(study)
    gate, client = method.client.gate, workplace.clients[0]
    assert gate is not None
    folder = study / "local" / "seed-3" / "adapters" / client.id
    tensors = load_file(folder / "adapter_model.safetensors")
    row = adapters.take(torch.tensor([0]))
    for first, second in adapters.layout.part(OWN).pairs():
        for leaf, factor in ((first, "A"), (second, "B")):
            value = tensors[f"base_model.model.{leaf.module}.lora_{factor}.weight"]
            row.rows[0, leaf.start : leaf.stop] = value.flatten()
    (found,) = similarities(workplace.base, gate, row, [client], [client.test])
    config = load_run(study / "local" / "seed-3").config
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.base_model), folder)

    def state(question: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([question]), output_hidden_states=True).hidden_states[-1][0, -1]

    step = -(-len(client.train) // 2)
    near = [state(example.question) for example in client.train[::step]]
    for value, example in zip(found.tolist(), client.test, strict=True):
        cosine = [torch.cosine_similarity(state(example.question), one, dim=0) for one in near]
        assert value == pytest.approx(float(sum(cosine)) / len(cosine), abs=1e-4)


def test_a_folder_has_the_mean_mix_and_chat_the_mix_of_each_question(study: Path) -> None:
    path = study / "feddpa" / "seed-3"
    folder = path / "adapters" / "ada"
    assert (folder / GATE).is_file()
    assert "PEFT has no such gate" in (folder / "README.md").read_text(encoding="utf-8")
    workplace, method, _ = world(study)
    gate = method.client.gate
    assert gate is not None
    chat = open_chat(path, client="ada", max_new_tokens=3)
    assert chat.gated is not None
    parts, client = chat.gated.adapters, next(one for one in workplace.clients if one.id == "ada")
    mean = at_mean(workplace.base, gate, parts, [client])
    tensors = load_file(folder / "adapter_model.safetensors")
    for first, _ in parts.layout.part(OWN).pairs():
        name = f"base_model.model.{first.module}"
        found = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        expected = mean.product(first.module, OWN)[0] + mean.product(first.module, SHARED)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    (ids,) = encode_questions(
        [chat.template.render(Record("w3 w4 w5", "", ("-",), {}, "q"))], workplace.base.tokenizer, chat.template,
        max_question=None,
    )  # fmt: skip
    mixed = chat.gated.mixed(chat.base, ids)
    (similar,) = similarities(
        workplace.base,
        gate,
        parts,
        [client],
        [[asking(ids, 1)]],
    )
    torch.testing.assert_close(mixed.rows, gate.mix(parts, similar).rows, rtol=1e-4, atol=1e-6)
    assert set(chat.ask("w3 w4 w5")) == {"base", "ada"}
