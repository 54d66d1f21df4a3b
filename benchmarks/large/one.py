"""One measurement in a process of its own: a base is loaded, and local steps of some clients are timed.

    python benchmarks/large/one.py --base 0.5B --side fedmira --clients 8 [--tokens 256] [--nf4] [--recompute]

Prints one line of JSON: seconds of a step of every client (the first pass is left out), MiB of the weights, held when
they are loaded (loading), kept by a pass for its backward pass (kept), the most that training holds above the loaded
base (above), the same of blocks in use alone (used), the most of all (peak), and the last loss. `--side peft` is
the loop that everybody writes: one resident model, one client after another, `gradient_checkpointing_enable()` with
--recompute; of more clients than one only the first two are trained, for the third takes as long as the second.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from memory import held, now, saved_for_backward, watched
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from shapes import SHAPES, make_base, make_clients
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedmira.adapters import lora_layout, start_adapters
from fedmira.adapters.optim import adamw
from fedmira.data.batches import ClientData, collate
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.model.base.load import Base, choose_dtype, load_base
from fedmira.model.quantised import Quantisation

RANK, LEARNING_RATE, CLIP = 16, 3e-4, 1.0
Work = Callable[[], float]  # a step of every client -> the mean loss


def load_ours(folder: Path, options: argparse.Namespace) -> Base:
    """Load the base as a study does, with all its trials."""
    kind = str(options.dtype).removeprefix("torch.")
    quantisation = Quantisation(4) if options.nf4 else None
    return load_base(str(folder), dtype=kind, device=options.device, targets="all-linear", quantisation=quantisation)


def ours(base: Base, clients: Sequence[ClientData], options: argparse.Namespace) -> Work:
    """Return a step of all clients in one pass."""
    layout, count = lora_layout(base.shapes, RANK), len(clients)
    start = start_adapters(layout, torch.full((count,), RANK), 2.0 * RANK, torch.Generator().manual_seed(0))
    ids = tuple(client.id for client in clients)
    method = build("local", {}, Cohort(ids, (1,) * count, ({},) * count, (), 0))
    training = Training(adamw(), LEARNING_RATE, 1, 1, None, CLIP, False, 0.0, seed=0, recompute=options.recompute)

    def step() -> float:
        done = local_phase(
            base, method, clients, start, Message(start.rows), {}, training=training, clock=Clock(1), cohort=count
        )
        return float(done.losses.mean())

    return step


def load_theirs(folder: Path, options: argparse.Namespace) -> Any:
    """Load the base as PEFT's users do."""
    how: dict[str, Any] = {}
    if options.nf4:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options.dtype
        )
        how = {"quantization_config": settings, "device_map": {"": options.device}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype, **how)
    return model if how else model.to(options.device)


def loop(model: Any, clients: Sequence[ClientData], options: argparse.Namespace) -> Work:
    """Return a step of one client after another."""
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft = get_peft_model(model, config)
    start = {name: value.clone() for name, value in get_peft_model_state_dict(peft).items()}
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]

    def step() -> float:
        losses = []
        for client in clients:
            set_peft_model_state_dict(peft, start)
            peft.train()
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
            batch = collate([client.train], pad_id=0)
            ids, labels = batch.ids[0].to(options.device), batch.labels[0].to(options.device)
            loss = peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return statistics.mean(losses)

    return step


def bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of a model's numbers, those that several layers share once."""
    seen = {one.untyped_storage().data_ptr(): one.numel() * one.element_size() for one in model.parameters()}
    seen |= {one.untyped_storage().data_ptr(): one.numel() * one.element_size() for one in model.buffers()}
    return sum(seen.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, train, and return what was found."""
    folder = make_base(options.base, options.folder)
    clients = make_clients(SHAPES[options.base].vocabulary, count=options.clients, length=options.tokens)
    few = clients if options.side == "fedmira" else clients[:2]
    with watched("cpu") as loading:
        base = load_ours(folder, options) if options.side == "fedmira" else load_theirs(folder, options)
    weights, files = bytes_of(base.model if isinstance(base, Base) else base) / 2**20, held("RssFile")
    step = ours(base, few, options) if isinstance(base, Base) else loop(base, few, options)
    step_seconds = []
    loaded = now(options.device)
    with watched(options.device, counted=True) as first, saved_for_backward(options.device) as saved:
        loss = step()
    with watched(options.device) as passes:
        for _ in range(options.repeats):
            began = time.perf_counter()
            loss = step()
            step_seconds.append((time.perf_counter() - began) * len(clients) / len(few))
    most = max(first.most, passes.most)
    return {
        "seconds": step_seconds,
        "weights": weights,
        "loading": loading.above,
        "files": files,
        "kept": max(saved),
        "above": most - loaded,
        "used": first.used,
        "peak": most,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(SHAPES), default="0.5B")
    parser.add_argument("--side", choices=("fedmira", "peft"), default="fedmira")
    parser.add_argument("--clients", type=int, default=1, help="that train together, or one after another")
    parser.add_argument("--tokens", type=int, default=256, help="of the text of each")
    parser.add_argument("--nf4", action="store_true", help="weights in 4 bits")
    parser.add_argument("--recompute", action="store_true", help="activations again in backward")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where products in it are fast")
    parser.add_argument("--folder", type=Path, default=Path("runs/large"), help="of the bases")
    options = parser.parse_args()
    options.dtype = choose_dtype(options.dtype, torch.device(options.device))
    torch.set_num_threads(options.threads)
    print(json.dumps({"dtype": str(options.dtype).removeprefix("torch."), **measure(options)}))


if __name__ == "__main__":
    main()
