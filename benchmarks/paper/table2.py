"""Table II of MIRA from model configs alone: what a client sends in a round and what it holds, in bytes.

    python benchmarks/paper/table2.py [--page FILE]

prints docs/results/table2.md and writes it. No weights are loaded or made: bases are built from their configs on the
meta device of torch. Which layers carry adapters, how a row is laid out and what a message weighs is FedMira's own
code: find_targets, install, lora_layout, the layout of fedptuning, the messages of mira, fedit and fedptuning.

The paper prints neither dtype nor direction. Each of its figures is looked for in float32 and float16, one way and both
ways, with the adapters of the public configs and with others; all that match are listed.

Source: MIRA (arXiv:2410.15524), Table II and section IV: bytes U + D of a client and round, memory C_w + C_dW + C_O.
"""

import argparse
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from fedmira.adapters import Adapters, Layout, Stored, lora_layout, scales
from fedmira.adapters.optim import adamw
from fedmira.methods import build, load
from fedmira.methods.base import Clock, Cohort, Message, Method, Tools, all_columns
from fedmira.model.base.targets import find_targets
from fedmira.model.packed.lora import Stack, install

PAGE = Path(__file__).parents[2] / "docs" / "results" / "table2.md"
MIB, GIB, GB = 2**20, 2**30, 1e9
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
WAYS = {"one way": 1, "both ways": 2}
NEAR = 0.01  # MiB: a unit of the last digit that the paper prints
RANKS = (4, 8, 16)  # those that the paper tried
CLIENTS, ALPHA = 4, 16.0  # no byte depends on either

LLAMA, GPT2 = "Data-Juicer LLaMA-1.3B", "GPT2-large"
LORA, PROMPT = "MIRA, FedIT", "FedPTuning"
SENT_BY = {LORA: ("mira", "fedit"), PROMPT: ("fedptuning",)}  # the paper's columns -> FedMira's methods
Targets = tuple[str, ...]
TARGETS: dict[str, tuple[Targets, ...]] = {  # the first are those of the public configs
    LLAMA: (("q_proj",), ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")),
    GPT2: (("c_attn", "c_proj"), ("c_attn",)),
}
PUBLIC_RANK = {LLAMA: 16, GPT2: 8}


@dataclass(frozen=True)
class Printed:
    """What the paper prints of a base and a method: "MB" of communication, "GB" of memory."""

    base: str
    method: str
    mb: float
    gb: float


PAPER = (
    Printed(LLAMA, LORA, 12.0, 2.60),
    Printed(LLAMA, PROMPT, 2.22, 2.57),
    Printed(GPT2, LORA, 7.74, 1.51),
    Printed(GPT2, PROMPT, 0.71, 1.48),
)


def config(base: str) -> PretrainedConfig:
    """Return the shape of a base."""
    if base == LLAMA:
        sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
        return LlamaConfig(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, **sizes)
    return GPT2Config(vocab_size=50257, n_positions=1024, n_embd=1280, n_layer=36, n_head=20)


def empty(base: str) -> PreTrainedModel:
    """Build a base whose every tensor has a shape and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(base))


@functools.cache
def weights(base: str) -> int:
    """Count the parameters of a base, tied ones once."""
    return sum(one.numel() for one in empty(base).parameters())


# ---------------------------------------------------------------- adapters


@functools.cache
def adapted(base: str, targets: Targets) -> tuple[tuple[str, int, int], ...]:
    """Return the layers of a base that these names mean: (name, in, out)."""
    model = empty(base)
    names = find_targets(model, targets, head=model.get_output_embeddings())
    return tuple(install(model, names, Stack()))


@functools.cache
def make(name: str) -> Method:
    """Build a method at its defaults for a few clients."""
    ids = tuple(f"client-{k}" for k in range(CLIENTS))
    return build(name, {}, Cohort(ids, (1,) * CLIENTS, ({},) * CLIENTS, (np.arange(CLIENTS),), seed=0))


def encoder(base: str) -> Layout:
    """Lay out the prompt encoder of FedPTuning, by the method itself."""
    own = make("fedptuning").layout
    assert own is not None
    lora = lora_layout(adapted(base, TARGETS[base][0]), PUBLIC_RANK[base])
    return own(lora, empty(base).get_input_embeddings().weight.shape[1])


def public(base: str, method: str) -> tuple[str, Layout]:
    """Return the adapter of the public configs, in words and laid out."""
    if method == PROMPT:
        settings: Any = load("fedptuning").Config()
        return f"{settings.virtual_tokens} virtual tokens, MLP of width {settings.hidden}", encoder(base)
    targets, rank = TARGETS[base][0], PUBLIC_RANK[base]
    return f"{' + '.join(targets)}, r {rank}", lora_layout(adapted(base, targets), rank)


def tried(base: str, method: str) -> Iterator[tuple[str, Layout]]:
    """Yield every adapter in which a printed figure is looked for, that of the public configs first."""
    first = public(base, method)
    yield first
    if method == PROMPT:
        return
    for targets in TARGETS[base]:
        for rank in RANKS:
            words = f"{' + '.join(targets)}, r {rank}"
            if words != first[0]:
                yield words, lora_layout(adapted(base, targets), rank)


# ---------------------------------------------------------------- bytes


def size(layout: Layout, dtype: str, ways: str) -> float:
    """Return MiB of the parameters of one client, padding not counted."""
    return layout.parameters * DTYPES[dtype].itemsize * WAYS[ways] / MIB


def fits(layout: Layout, printed: float) -> list[tuple[str, str]]:
    """Return every (dtype, direction) in which an adapter weighs what is printed."""
    return [(d, w) for d in DTYPES for w in WAYS if abs(size(layout, d, w) - printed) <= NEAR]


def padding(layout: Layout) -> int:
    """Count the padding of a row, which ends on a cache line."""
    return layout.size - layout.parameters


def sent(name: str, layout: Layout) -> tuple[int, int]:
    """Return bytes down and up of a client in a round, of the messages that a method makes; padding is sent too."""
    method, ids = make(name), torch.arange(CLIENTS)
    clock = Clock(1)
    rows = torch.empty(method.count_rows(CLIENTS), layout.size, device="meta")
    held = hold(layout, rows)
    stored = Stored(layout, rows, held.ranks, held.scale)
    given = method.message(method.init(stored, Clock(0)), ids, clock)
    never: Any = no_training
    tools = Tools(clock, never, never, rng=never, curvature=never, loss=never, each=never)
    returned, _ = method.client.finish(hold(layout, given.rows), {}, given, tools)
    assert method.travels is method.trained is all_columns, "whole rows are counted"
    return payload(given), payload(returned)


def payload(message: Message) -> int:
    """Return bytes of a client's message: whole rows, and 8 for each scalar."""
    return (1 + len(message.more)) * message.rows[0].nbytes + 8 * len(message.scalars)


def hold(layout: Layout, rows: torch.Tensor) -> Adapters:
    ranks = torch.full((len(rows),), layout.parts[0].rank)
    return Adapters(layout, rows, ranks, scales(ranks, ALPHA))


def no_training(*_: object) -> NoReturn:
    raise AssertionError("only the size of a message is needed, but a method trained")


def trained(layout: Layout) -> int:
    """Return bytes of a client's row and of AdamW's memory of it, as the engine holds them in float32."""
    row = torch.empty(1, layout.size, device="meta")
    return row.nbytes + sum(one.nbytes for one in adamw().start(row).values())


# ---------------------------------------------------------------- the page


def traffic_row(printed: Printed) -> list[str]:
    """One line of the first table."""
    words, layout = public(printed.base, printed.method)
    found = fits(layout, printed.mb)
    ((down, up),) = {sent(name, layout) for name in SENT_BY[printed.method]}  # mira and fedit send alike
    return [
        printed.base,
        printed.method,
        words,
        f"{layout.parameters:,}",
        f"{padding(layout)}",
        f"{printed.mb:g} MB",
        f"{size(layout, *found[0]):.4f} MiB" if found else "not found",
        " or ".join(f"{dtype} {ways}" for dtype, ways in found),
        f"{down / MIB:.4f} + {up / MIB:.4f} = {(down + up) / MIB:.4f} MiB",
    ]


def other_rows(printed: Printed) -> Iterator[list[str]]:
    """Lines of the second table: adapters other than the public configs' that give the printed figure."""
    _, *others = tried(printed.base, printed.method)
    for words, layout in others:
        if found := fits(layout, printed.mb):
            how = " or ".join(f"{dtype} {ways}" for dtype, ways in found)
            yield [printed.base, f"{printed.mb:g} MB", words, f"{layout.parameters:,}", how]


def memory_row(printed: Printed) -> list[str]:
    """One line of the third table."""
    base = weights(printed.base) * DTYPES["fp16"].itemsize
    more = trained(public(printed.base, printed.method)[1])
    return [
        printed.base,
        printed.method,
        f"{weights(printed.base):,}",
        f"{base / GIB:.3f} GiB",
        f"{base / GB:.3f} GB",
        f"{more / MIB:.2f} MiB",
        f"{(base + more) / GIB:.3f} GiB",
        f"{(base + more) / GB:.3f} GB",
        f"{printed.gb:.2f} GB",
    ]


def conventions() -> str:
    """Say whether one dtype and direction gives every printed figure, with any adapter."""
    each = [
        {way for _, layout in tried(printed.base, printed.method) for way in fits(layout, printed.mb)}
        for printed in PAPER
    ]
    common = sorted(set.intersection(*each))
    if not common:
        return "No one dtype and direction gives all four figures, whichever of these adapters is taken"
    return f"All four figures are given by {' or '.join(f'{dtype} {ways}' for dtype, ways in common)}"


def rank_16() -> str:
    """Say for which base the rank that the paper calls its best gives the printed figure, with any modules."""
    found = {
        printed.base: any(
            fits(lora_layout(adapted(printed.base, targets), 16), printed.mb) for targets in TARGETS[printed.base]
        )
        for printed in PAPER
        if printed.method == LORA
    }
    words = [f"{'gives' if gives else 'does not give'} that of {base}" for base, gives in found.items()]
    return f"Rank 16, which the paper calls its best, {' and '.join(words)}"


def differences() -> str:
    """Say by how much the printed memory is above base, row and moments, least and most."""
    found = []
    for printed in PAPER:
        base = weights(printed.base) * DTYPES["fp16"].itemsize
        found.append(printed.gb - (base + trained(public(printed.base, printed.method)[1])) / GIB)
    return f"{min(found):.2f} to {max(found):.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """# Table II of MIRA, from configs alone

Made by `python benchmarks/paper/table2.py`. No weights are loaded or made: the bases are built from their configs
without memory, and FedMira's own code finds the layers, lays out the rows and makes the messages. The paper is
[arXiv:2410.15524](https://arxiv.org/abs/2410.15524); what it calls MB are MiB, 2^20 bytes.

## Communication of a client in a round

The paper says "U + D", upload and download, and prints no dtype. With the adapters of its public configs its figures
come out as the column "counted as" says:

{traffic}

- Padding: numbers that fill a row up to a multiple of 16. They are sent, and are not in the paper's count.
- FedMira sends float32 both ways, down + up; headers of a network are not counted. The reader who compares rows of the
  paper compares conventions: of LoRA it counts {llama} for one base and {gpt2} for the other.
- {conventions}.
- {rank_16}.

Other adapters give the same figures:

{others}

## Memory of a client

The paper's model is C_w + C_dW + C_O: base, what is trained, and the optimizer's state. Here: the base in two bytes a
number (fp16; FedMira's is bfloat16, of the same size), one row and AdamW's two moments in float32. Activations and
gradients are in neither.

{memory}

The paper's figures are not these: in GB they are below the base alone, in GiB they are {apart} above the sum. What else
they count the paper does not say. MIRA and FedIT hold the same.
"""


def page() -> str:
    """Return the text of docs/results/table2.md."""
    ways = {one.base: fits(public(one.base, LORA)[1], one.mb) for one in PAPER if one.method == LORA}
    in_words = {base: " or ".join(f"{dtype} {way}" for dtype, way in found) for base, found in ways.items()}
    adapter = ["model", "method", "adapter of the public configs", "parameters", "padding"]
    memory = ["model", "method", "parameters of the base", "base, fp16", "base in GB", "row and moments, fp32"]
    return TEXT.format(
        traffic=table([*adapter, "paper", "found", "counted as", "FedMira sends"], map(traffic_row, PAPER)),
        llama=in_words[LLAMA],
        gpt2=in_words[GPT2],
        conventions=conventions(),
        rank_16=rank_16(),
        others=table(
            ["model", "paper", "adapter", "parameters", "counted as"],
            (row for printed in PAPER for row in other_rows(printed)),
        ),
        memory=table([*memory, "sum", "sum in GB", "paper"], map(memory_row, PAPER)),
        apart=differences(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    text = page()
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
