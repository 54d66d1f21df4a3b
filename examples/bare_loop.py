"""MIRA on one page: plain PyTorch, transformers and PEFT, one client after another, none of FedMira's abstractions.

    python examples/bare_loop.py MODEL TASKS.jsonl

TASKS.jsonl has rows {"client", "family", "split", "prompt", "completion"}. Every round each client trains its own LoRA
adapter from where the server left it; then the server pulls the adapters of one family together:

    w_k <- w_k - c * sum_l a_kl (w_k - w_l),   a = 1 / (family size - 1) within a family (row-normalised)

`fedmira run` does the same, all clients in one pass; a test holds the two to 1e-5.
"""

import hashlib
import json
import math
import sys

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED, ROUNDS, STEPS, BATCH, RANK, ALPHA, LR, COUPLING = 0, 3, 4, 8, 8, 16, 3e-3, 0.25
EPS = 1e-4  # at Adam's 1e-8 a gradient that is mere rounding becomes a full step, and no two orders of a sum agree


def mira(model_path: str, tasks_path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return each client's adapter after ROUNDS rounds: parameter name -> tensor."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()  # eval: a base's own dropouts stay off; gradients flow all the same
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    clients: dict[str, list[tuple[list[int], int]]] = {}
    family: dict[str, str] = {}
    with open(tasks_path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        family[row["client"]] = row["family"]
        if row["split"] == "train":
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            clients.setdefault(row["client"], []).append((prompt + answer, len(prompt)))

    # The common start: every client begins from the same A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0.
    stream, start = torch.Generator().manual_seed(SEED), {}
    for name in names:
        shape = model.get_parameter(name).shape
        drawn = (2 * torch.rand(shape, generator=stream) - 1) / math.sqrt(shape[1]) if "lora_A" in name else None
        start[name] = torch.zeros(shape) if drawn is None else drawn
    adapters = {client: {name: value.clone() for name, value in start.items()} for client in clients}

    for number in range(1, ROUNDS + 1):
        uploads = {}
        for client, examples in clients.items():  # everyone takes part; FedMira samples a fraction of them
            for name in names:
                model.get_parameter(name).data.copy_(adapters[client][name])  # each restarts from its own adapter
            mine = [model.get_parameter(name) for name in names]
            optimizer = torch.optim.AdamW(mine, lr=LR, eps=EPS, weight_decay=0.0)
            key = int.from_bytes(hashlib.sha256(client.encode()).digest()[:8], "big")
            order: list[int] = []
            for epoch in range(math.ceil(STEPS * BATCH / len(examples))):
                order += np.random.default_rng([SEED, number, key, epoch]).permutation(len(examples)).tolist()
            for step in range(STEPS):
                batch = [examples[i] for i in order[step * BATCH : (step + 1) * BATCH]]
                longest = max(len(ids) for ids, _ in batch)
                ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
                labels = torch.full_like(ids, -100)  # loss on the answer only
                for row, (own, prompt) in enumerate(batch):
                    labels[row, prompt : len(own)] = torch.tensor(own[prompt:])
                optimizer.zero_grad()
                model(input_ids=ids, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(mine, 1.0)
                optimizer.step()
            uploads[client] = {name: model.get_parameter(name).detach().clone() for name in names}
        for client in clients:  # the server: all differences are taken between uploads, never between moved rows
            near = [other for other in clients if other != client and family[other] == family[client]]
            for name in names:
                pull = sum(uploads[client][name] - uploads[other][name] for other in near) / len(near)
                adapters[client][name] = uploads[client][name] - COUPLING * pull
        print(f"round {number} done", file=sys.stderr)
    return adapters


if __name__ == "__main__":
    for client, adapter in mira(sys.argv[1], sys.argv[2]).items():
        print(client, f"|w| = {math.sqrt(sum(float(value.square().sum()) for value in adapter.values())):.4f}")
