"""What a method says of itself is true where privacy hangs on it: gradients of a step, and what clients send."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.house import SEED, house, run, with_client
from tests.laws.variants import FEW, Variant

from fedmira.engine.ledger import Ledger
from fedmira.engine.round import Sender
from fedmira.engine.simulated import Simulated
from fedmira.engine.trainees import make_clients
from fedmira.errors import MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Method, Tools
from fedmira.privacy.budget import Budget, Terms
from fedmira.privacy.uploads import Uploads

HOUSE = house(count=1)
START = HOUSE.start()
COLUMNS = [{"family": name} for name in ("x", "x", "y", "y")]
KINDS = [variant for variant in FEW if variant.graph not in ("file", "file, asymmetric")]
FIRST = {variant.name: variant for variant in reversed(KINDS)}
VARIANTS = [  # further settings of one method are slow
    pytest.param(one, id=str(one), marks=[pytest.mark.slow] * (one is not FIRST[one.name])) for one in KINDS
]


def watched(method: Method, most: Counter[str]) -> Method:
    """The method, whose steps write down how often each of them asks for what."""
    step = method.client.step

    def watching(adapters: Any, memory: Any, given: Any, tools: Tools) -> Any:
        asked: Counter[str] = Counter()

        def counted(name: str) -> Any:
            original = getattr(tools, name)

            def call(*arguments: Any, **options: Any) -> Any:
                asked[name] += 1
                return original(*arguments, **options)

            return call

        names = ("grad", "curvature", "loss", "each")
        found = step(adapters, memory, given, replace(tools, **{name: counted(name) for name in names}))
        for name, count in asked.items():
            most[name] = max(most[name], count)
        return found

    return with_client(method, step=watching)


def settings_of(variant: Variant) -> dict[str, Any]:
    settings = dict(variant.settings)
    if variant.graph is not None:
        settings["graph"] = {"kind": variant.graph, **({"column": "family"} if variant.graph == "groups" else {})}
    return settings


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_asks_for_as_many_gradients_as_its_regime_says(variant: Variant, tmp_path: Path) -> None:
    method = build(variant.name, settings_of(variant), HOUSE.cohort(columns=COLUMNS))
    most: Counter[str] = Counter()
    run(HOUSE, watched(method, most), tmp_path / "run", rounds=1, start=START)
    if method.regime.trainees == "nobody":
        assert not most
    elif method.regime.gradients is None:
        assert most["curvature"]
    else:
        assert most == {"grad": method.regime.gradients}


@pytest.mark.parametrize("variant", VARIANTS)
def test_clients_send_a_row_alone_where_a_method_says_so(variant: Variant, tmp_path: Path) -> None:
    """A row that began with the client is none that was sent: `absent` says whose."""
    method = build(variant.name, settings_of(variant), HOUSE.cohort(columns=COLUMNS))
    began: list[bool] = []
    step = method.client.step

    def watching(adapters: Any, memory: Any, given: Any, tools: Tools) -> Any:
        began.append("rows" in given.absent)
        return step(adapters, memory, given, tools)

    found = run(HOUSE, with_client(method, step=watching), tmp_path / "run", rounds=2, start=START)
    more = any(began) or any(phase.returned.scalars or phase.returned.more for phase in found.phases)
    assert more == (method.facts.uploads == "more")


def test_a_method_that_says_so_wrongly_is_found_out(tmp_path: Path) -> None:
    method = build("fedfomo", {}, HOUSE.cohort())
    lying = replace(method, facts=replace(method.facts, uploads="row"))
    account = Uploads(tmp_path, 1.0, 1e-5)
    clients = make_clients(HOUSE.workplace, HOUSE.federation, lying, HOUSE.training, uploads=account)
    state = HOUSE.federation.first_state(SEED, lying)
    ledger = Ledger(HOUSE.federation, state, torch.zeros(len(HOUSE), dtype=torch.float64))
    with pytest.raises(MethodError, match="send more than a row"):
        clients.train(torch.tensor([0, 1]), Sender(lying, ledger, Clock(1)))


def test_clients_with_a_budget_train_in_rounds_alone(tmp_path: Path) -> None:
    """Fine-tuning at the end and training of newcomers are phases that nobody has paid for."""
    method = build("local", {}, HOUSE.cohort())
    terms = Terms(epsilon=1.0, delta=1e-5, noise_multiplier=1.0, clip=1.0)
    account = Budget(tmp_path, terms, {}, [])
    clients = make_clients(HOUSE.workplace, HOUSE.federation, method, HOUSE.training, budget=account)
    assert isinstance(clients, Simulated)
    state = HOUSE.federation.first_state(SEED, method)
    ledger = Ledger(HOUSE.federation, state, torch.zeros(len(HOUSE), dtype=torch.float64))
    with pytest.raises(MethodError, match="clients train in rounds alone"):
        clients.alone(torch.tensor([0]), Sender(method, ledger, Clock(1)), steps=1)
    assert not (tmp_path / "privacy.jsonl").exists()


def test_a_pool_has_no_budget(tmp_path: Path) -> None:
    method = build("pooled", {}, HOUSE.cohort())
    account = Budget(tmp_path, Terms(1.0, 1e-5, 1.0, 1.0), {}, [])
    with pytest.raises(MethodError, match="trains on all data in one place"):
        make_clients(HOUSE.workplace, HOUSE.federation, method, HOUSE.training, budget=account)
