"""Which token ids a base can read, and the refusal of texts, tokenizers and configs that go beyond them.

A tokenizer may know more tokens than its base has embeddings for: somebody added some and left the weights as they
were. An id beyond them is an IndexError in the middle of a pass, so all ids are compared before the first one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import transformers
from torch import Tensor, nn

from fedmira.model.base.source import first_line, refuse

SHOWN = 3  # unknown tokens in a message


def count_known_ids(model: transformers.PreTrainedModel, *, name: str) -> int:
    """Return n: the base can read the ids 0 to n - 1, and give a loss for them.

    n is the number of rows of its smallest table of embeddings, or of its output head if that has fewer. A pass of
    three tokens shows which tables those are: Gemma 3n looks ids up in a second one.
    Raises ModelError if that pass fails.
    """
    ids = torch.tensor([[1, 0, 1]], device=model.device)
    rows = [len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight)]

    def note(table: nn.Module, inputs: tuple[object, ...]) -> None:
        looked_up = inputs[0] if inputs else None
        assert isinstance(table, nn.Embedding)
        if isinstance(looked_up, Tensor) and looked_up.numel() == ids.numel() and bool((looked_up == ids).all()):
            rows.append(table.num_embeddings)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # any architecture's own code
        why = f"{type(error).__name__}: {first_line(error)}"
        raise refuse(name, f"a first pass of {type(model).__name__} failed: {why}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return min(rows)


def check_ids(
    texts: Iterable[Sequence[int]],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    name: str,
    where: str,
) -> None:
    """Raise ModelError if a text has an id from `vocabulary` on; where: what the texts are, such as "examples"."""
    unknown: Counter[int] = Counter()
    count = 0
    for ids in texts:
        count += 1
        if max(ids, default=0) >= vocabulary:
            unknown.update({index for index in ids if index >= vocabulary})
    if not unknown:
        return
    found = [f"{describe_token(index, tokenizer)} in {times}" for index, times in unknown.most_common(SHOWN)]
    more = f" and {len(unknown) - SHOWN} more tokens" if len(unknown) > SHOWN else ""
    raise refuse(
        name,
        f"its embeddings have ids 0 to {vocabulary - 1}, and of {count} {where} its tokenizer writes "
        f"{', '.join(found)}{more}. {remedy(tokenizer)}",
    )


def check_end(tokenizer: transformers.PreTrainedTokenizerBase, *, vocabulary: int, name: str) -> None:
    """Raise ModelError if the base does not know the id that its tokenizer ends texts with."""
    if tokenizer.eos_token_id >= vocabulary:
        raise refuse(
            name,
            f"its tokenizer ends texts with {describe_token(tokenizer.eos_token_id, tokenizer)}, and its embeddings "
            f"have ids 0 to {vocabulary - 1}. {remedy(tokenizer)}",
        )


def describe_token(index: int, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Return a token's text and id: `'<|im_start|>' (id 512)`."""
    return f"{str(tokenizer.convert_ids_to_tokens(index))!r} (id {index})"


def remedy(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Say what to do about a tokenizer with more tokens than its base has embeddings."""
    return (
        "Use the tokenizer files that were made for these weights, a data.template and data without such tokens, or "
        f"weights that have them: model.resize_token_embeddings({len(tokenizer)}), train the new rows, save_pretrained"
    )
