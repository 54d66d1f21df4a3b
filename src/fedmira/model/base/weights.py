"""Do the tensors in a base's files and its config.json fit each other? transformers only warns where they do not.

Tensors that are missing or have another shape would be random numbers. Tensors that no layer takes, such as the biases
of `q_proj` where the config says that there are none, were part of what the base computed when it was trained. Two
different tensors where the config has one for both would be loaded here as two, and by other programs as one.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from fedmira.model.base.source import join_some, refuse

# Constants that old releases of transformers saved with the weights and newer ones compute: masks and tables of angles.
# transformers itself leaves out those that a model's class lists as such (`_keys_to_ignore_on_load_unexpected`).
_CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn)\.masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$"
)
_WHOLE = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"})


def check_numbers(folder: Path, *, name: str) -> None:
    """Raise ModelError if a file has weights that are whole numbers: they would be loaded as floats without a scale.

    A file that cannot be read is left to who loads it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        except Exception:  # any fault of the file
            continue
        whole = sorted(key for key, kind in kinds.items() if key.endswith(".weight") and kind in _WHOLE)
        if whole:
            raise refuse(
                name,
                f"{file.name} has whole numbers ({kinds[whole[0]]}) as weights: {join_some(whole)}; FedMira trains on "
                "plain float weights, so use the model that this one was quantised from",
            )


def check_fit(
    model: transformers.PreTrainedModel,
    report: Mapping[str, Iterable[Any]],
    *,
    name: str,
    ignored: re.Pattern[str] | None = None,
) -> None:
    """Raise ModelError unless every tensor of a loaded base has one place, and every place a tensor.

    report: what transformers returns with `output_loading_info`; ignored: names of tensors that need no place. Towers
    and heads beside a text model (vision, tokens predicted ahead) are refused too, unless the model's class lists them:
    their names do not show that the text model computes the same without them.
    """
    unfit = sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]])
    if unfit:
        raise refuse(name, f"weights do not fit its config.json: {len(unfit)} such as {unfit[0]}")
    free = [pattern for pattern in (_CONSTANTS, ignored) if pattern is not None]
    extra = sorted(str(key) for key in report["unexpected_keys"] if not any(one.search(str(key)) for one in free))
    if extra:
        raise refuse(
            name,
            f"weights do not fit its config.json: {type(model).__name__} has no place for {len(extra)} of the tensors, "
            f"{join_some(extra)}, and would compute something else without them. Set the config's key that adds them "
            "(such as attention_bias), or, if they are not needed, write the model anew without them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    apart = [
        f"{target} and {source}"
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source)
    ]
    if apart:
        raise refuse(
            name,
            f"weights do not fit its config.json: {join_some(apart)} are different tensors, and the config has one for "
            'both; set "tie_word_embeddings": false there',
        )
