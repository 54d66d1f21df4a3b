"""Evaluation speed: greedy answers and losses of 8 clients against PEFT client by client, interleaved in one process.

    python benchmarks/speed/generation.py [--pairs 5] [--new 32] [--json FILE]

Unit (c): 8 tasks of Natural Instructions, 20 prompts each, every client with a separate adapter (random, strong
enough to change answers). The yardstick is a resident PeftModel: per client its adapter is set, then `generate` answers
4 prompts at a time, padded on the left; once with float32 weights, once with bfloat16 weights. FedMira answers the same
prompts by `answers`, as evaluation does. Counted are the tokens of every answer up to and with its end of text, over
the whole time, prompts included. 32 new tokens: the longest right answer of these tasks is about as long.

Losses: mean cross-entropy of the same clients' examples, 4 at a time with PEFT, by `measure_loss` here; in tokens of
the examples per second.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from units import BATCH, Unit, real_tokens, units
from yardstick import ALPHA, RANK, PeftLoop

from fedmira.adapters import Adapters, lora_layout, start_adapters
from fedmira.data.batches import collate
from fedmira.evaluation.measure import measure_loss
from fedmira.model.answers.generate import answers
from fedmira.model.base.load import load_base

STRENGTH = 0.1  # standard deviation of B


class Plain:
    """The yardstick: one PEFT model, one client after another."""

    def __init__(self, unit: Unit, adapters: Adapters, dtype: torch.dtype) -> None:
        loop = PeftLoop(unit.base, unit.targets, dtype=dtype)
        self.model, self.unit = loop.model.eval(), unit
        self.states = [self.state(adapters, k) for k in range(len(adapters))]
        assert set(self.states[0]) == set(loop.start)
        end = self.model.generation_config.eos_token_id
        self.end = self.pad = int(end[0] if isinstance(end, list) else end)

    def go_on(self) -> None:
        """Let no token end an answer from now on."""
        self.model.generation_config.eos_token_id = None
        self.end = -1

    @staticmethod
    def state(adapters: Adapters, k: int) -> dict[str, torch.Tensor]:
        """Client k's factors under PEFT's names."""
        found = {}
        for first, second in adapters.layout.part("lora").pairs():
            found[f"base_model.model.{first.module}.lora_A.weight"] = adapters.leaf(first)[k].clone()
            found[f"base_model.model.{second.module}.lora_B.weight"] = adapters.leaf(second)[k].clone()
        return found

    def answer(self, new: int) -> list[list[list[int]]]:
        """The tokens of every client's answers, the end of text among them."""
        found: list[list[list[int]]] = []
        for client, state in zip(self.unit.clients, self.states, strict=True):
            set_peft_model_state_dict(self.model, state)
            own: list[list[int]] = []
            for start in range(0, len(client.train), BATCH):
                questions = [example.question for example in client.train[start : start + BATCH]]
                longest = max(map(len, questions))
                ids = torch.tensor([[self.pad] * (longest - len(ids)) + list(ids) for ids in questions])
                mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in questions])
                with torch.no_grad():
                    out = self.model.generate(
                        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=self.pad
                    )
                for row in out[:, longest:].tolist():
                    own.append(row[: row.index(self.end) + 1] if self.end in row else row)
            found.append(own)
        return found

    def loss(self) -> list[float]:
        """Each client's mean nats per labelled token."""
        found = []
        for client, state in zip(self.unit.clients, self.states, strict=True):
            set_peft_model_state_dict(self.model, state)
            nats = labels = 0.0
            for start in range(0, len(client.train), BATCH):
                some = client.train[start : start + BATCH]
                batch = collate([some], pad_id=self.pad)
                mask = (torch.arange(batch.ids.shape[-1])[None, :] < batch.lengths[0][:, None]).long()
                with torch.no_grad():
                    out = self.model(input_ids=batch.ids[0], attention_mask=mask, labels=batch.labels[0])
                count = sum(one.labels for one in some)
                nats, labels = nats + float(out.loss) * count, labels + count
            found.append(nats / labels)
        return found


class Ours:
    """FedMira on the same unit."""

    def __init__(self, unit: Unit, adapters: Adapters, dtype: str) -> None:
        self.base = load_base(str(unit.base), dtype=dtype, device="cpu", targets=list(unit.targets))
        self.unit, self.adapters = unit, adapters
        self.tokens = 0
        decode = self.base.tokenizer.batch_decode

        def count(ids: Sequence[Sequence[int]], **others: Any) -> list[str]:
            self.tokens += sum(map(len, ids))
            return list(decode(ids, **others))

        self.base.tokenizer.batch_decode = count

    def go_on(self) -> None:
        """Let no token end an answer from now on."""
        assert self.base.model.generation_config is not None
        self.base.model.generation_config.eos_token_id = []

    def answer(self, new: int, adapters: Adapters | None = None) -> list[list[str]]:
        prompts = [[one.question for one in client.train] for client in self.unit.clients]
        self.tokens = 0
        return answers(self.base, adapters or self.adapters, prompts, max_new_tokens=new)

    def loss(self) -> list[float]:
        count = len(self.unit.clients)
        found = measure_loss(
            self.base, self.adapters.take, self.unit.clients, range(count), split="train", cohort=count
        )
        return [float(value or 0.0) for value in found]


def draw_adapters(unit: Unit) -> Adapters:
    """A as training starts with, B random: adapters that change most answers."""
    base = load_base(str(unit.base), dtype="float32", device="cpu", targets=list(unit.targets))
    stream = torch.Generator().manual_seed(0)
    made = start_adapters(lora_layout(base.shapes, RANK), torch.full((len(unit.clients),), RANK), ALPHA, stream)
    for _, second in made.layout.part("lora").pairs():
        leaf = made.leaf(second)
        leaf.copy_(torch.randn(leaf.shape, generator=stream) * STRENGTH)
    return made


def share(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> float:
    """Share of answers that are the same."""
    same = [a == b for own, others in zip(one, other, strict=True) for a, b in zip(own, others, strict=True)]
    return sum(same) / len(same)


def measure(unit: Unit, pairs: int, new: int) -> dict[str, Any]:
    """Interleave the yardstick in float32, FedMira in bfloat16, the yardstick in bfloat16, FedMira in float32."""
    adapters = draw_adapters(unit)
    plain = {"plain fp32": Plain(unit, adapters, torch.float32), "plain bf16": Plain(unit, adapters, torch.bfloat16)}
    ours = {"fedmira bf16": Ours(unit, adapters, "bfloat16"), "fedmira fp32": Ours(unit, adapters, "float32")}
    tokenizer = ours["fedmira fp32"].base.tokenizer
    decode = type(tokenizer).batch_decode
    order = ["plain fp32", "fedmira bf16", "plain bf16", "fedmira fp32"]
    written: dict[str, list[float]] = {name: [] for name in order}
    scored: dict[str, list[float]] = {name: [] for name in order}
    texts: dict[str, list[list[str]]] = {}
    losses: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    tokens = real_tokens(unit.clients)
    for number in range(-1, pairs):
        for name in order:
            began = time.perf_counter()
            if name in plain:
                ids = plain[name].answer(new)
                seconds = time.perf_counter() - began
                texts[name] = [decode(tokenizer, own, skip_special_tokens=True) for own in ids]
                counts[name] = sum(len(one) for own in ids for one in own)
            else:
                texts[name] = ours[name].answer(new)
                seconds = time.perf_counter() - began
                counts[name] = ours[name].tokens
            began = time.perf_counter()
            losses[name] = (plain.get(name) or ours[name]).loss()
            if number >= 0:  # the first round is a warm-up
                written[name].append(counts[name] / seconds)
                scored[name].append(tokens / (time.perf_counter() - began))
    untouched = ours["fedmira fp32"].answer(new, adapters.with_rows(torch.zeros_like(adapters.rows)))
    exact, close = losses["plain fp32"], losses["fedmira fp32"]
    long: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        (plain.get(name) or ours[name]).go_on()
    for number in range(-1, pairs):
        for name in order:
            began = time.perf_counter()
            (plain.get(name) or ours[name]).answer(new)
            if number >= 0:
                long[name].append(
                    new * sum(len(client.train) for client in unit.clients) / (time.perf_counter() - began)
                )
    return {
        "name": "generation",
        "title": unit.title,
        "prompts": sum(len(client.train) for client in unit.clients),
        "prompt_tokens": sum(len(one.question) for client in unit.clients for one in client.train),
        "max_new_tokens": new,
        "answer_tokens": counts,
        "answers": _rows(written),
        "long": _rows(long),
        "same_text_fp32": share(texts["plain fp32"], texts["fedmira fp32"]),
        "same_text_bf16": share(texts["plain fp32"], texts["fedmira bf16"]),
        "same_text_plain_bf16": share(texts["plain fp32"], texts["plain bf16"]),
        "changed_by_adapters": 1 - share(texts["fedmira fp32"], untouched),
        "losses": _rows(scored),
        "loss_error_fp32": max(abs(a - b) / a for a, b in zip(exact, close, strict=True)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _rows(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spreads, and FedMira's ratios to the yardstick of the same pair."""
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "spread": {name: [min(values), max(values)] for name, values in speeds.items()},
        "ratio": {
            f"{name} to {other}": [a / b for a, b in zip(speeds[name], speeds[other], strict=True)]
            for name in ("fedmira bf16", "fedmira fp32")
            for other in ("plain fp32", "plain bf16")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    row = measure(units("c")[0], options.pairs, options.new)
    for kind in ("answers", "long", "losses"):
        found = row[kind]
        speeds = ", ".join(f"{name} {value:,.0f}" for name, value in found["tokens_per_second"].items())
        ratios = "; ".join(
            f"{name} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for name, values in found["ratio"].items()
        )
        print(f"{kind}: tokens/s: {speeds}; ratio: {ratios}", flush=True)
    print(
        f"{row['prompts']} prompts of {row['prompt_tokens']:,} tokens; same text as the yardstick: float32 "
        f"{row['same_text_fp32']:.1%}, bfloat16 {row['same_text_bf16']:.1%} (the yardstick's own bfloat16 "
        f"{row['same_text_plain_bf16']:.1%}); adapters change {row['changed_by_adapters']:.0%} of the answers; "
        f"loss off by {row['loss_error_fp32']:.1e} in float32; peak RSS {row['peak_rss_mb']:.0f} MB",
        flush=True,
    )
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
