"""Prompt encoders of tiny bases as random rows, as PEFT builds them, and as folders."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tests import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmira.adapters import Adapters, prompt_layout
from fedmira.data.batches import Encoded, collate
from fedmira.export.card import Card
from fedmira.export.peft_folder import depth_of, export_adapter
from fedmira.model.base.load import Base
from fedmira.model.packed.virtual import prepend_virtual
from fedmira.model.passes import plan_pass, running


def encoders(base: Base, clients: int, *, tokens: int = 3, hidden: int = 8, seed: int = 0) -> Adapters:
    """Draw an encoder for each client, large enough that its virtual tokens matter."""
    layout = prompt_layout(base.width, tokens, hidden)
    rows = 0.5 * torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(seed))
    return Adapters(layout, rows, torch.zeros(clients, dtype=torch.int64), torch.ones(clients))


def export_one(folder: Path, base: Base, own: Adapters, *, base_model: str = "tiny", card: Card | None = None) -> Path:
    """Write one client's prompt [1, P] as a run does."""
    export_adapter(
        folder,
        own,
        base_model=base_model,
        target_modules=[],
        fan_in_fan_out=base.transposed,
        depth=depth_of(base.model.config),
        card={"client": folder.name} if card is None else card,
    )
    return folder


def peft_encoder(plain: Any, own: Adapters) -> Any:
    """PEFT's own model for training, with the weights of one client's encoder [1, P], MLP and all."""
    leaves = own.layout.part("prompt").leaves
    tokens, width = leaves[0].shape
    wanted = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, token_dim=width, encoder_hidden_size=leaves[1].shape[0]
    )
    made = peft.get_peft_model(copy.deepcopy(plain), wanted).eval()
    weights = {f"{leaf.module}.{leaf.factor}": own.leaf(leaf)[0] for leaf in leaves}
    made.prompt_encoder["default"].load_state_dict(weights, strict=True)
    return made


def our_logits(base: Base, stack: Adapters, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [T - 1, V] after every token of a client's text but the last, by the pass that trains and scores."""
    batch = collate([[Encoded(tuple(ids), 1, ("",))] for ids in texts], pad_id=base.pad_id)
    plan = plan_pass(base, prepend_virtual(batch, stack.layout.virtual_tokens))
    with running(base, plan, stack) as states:
        logits = base.head.logits(states)
    return [logits[plan.owner == k] for k in range(len(texts))]


@torch.no_grad()
def peft_logits(made: Any, ids: Sequence[int]) -> Tensor:
    """The same by PEFT, whose model gives those after the virtual tokens too."""
    logits: Tensor = made(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits[-len(ids) : -1]


@torch.no_grad()
def peft_answer(made: Any, ids: Sequence[int], *, new: int) -> str:
    """What a PEFT model, or a plain one, writes greedily after a prompt: a whole pass for every token.

    With a cache PEFT 0.21.2 under transformers 5.24 writes something else after virtual tokens.
    """
    given = torch.tensor([list(ids)])
    out = made.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        use_cache=False,
    )
    return str(tiny.tokenizer().decode(out[0, given.shape[1] :], skip_special_tokens=True)).strip()


def folder_answer(base: Path, adapter: Path | None, question: str, *, new: int) -> str:
    """What transformers and PEFT answer with the base in one folder and the adapter in another; None: the base."""
    made = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, str(adapter)).eval()
    return peft_answer(made, AutoTokenizer.from_pretrained(base)(question)["input_ids"], new=new)
