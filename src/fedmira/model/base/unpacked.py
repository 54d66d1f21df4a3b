"""Folders whose weights another program has rounded and packed, read as float weights where transformers makes them.

    fp8                 8-bit floats, one scale for each block of a matrix
    mxfp4               4-bit floats, one power of two for each 32
    compressed-tensors  whole numbers or floats of 3 to 8 bits with scales (extra `quant`)

What is trained and scored is the dense weight that the codes stand for. Such a file may also tell how a layer's inputs
are rounded where it is served; that depends on what else is in a pass, and is left out here.
Methods whose weights transformers computes with only in their packed form are not in METHODS.
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from fedmira.errors import ModelError

METHODS: Mapping[str, str | None] = {"fp8": None, "mxfp4": None, "compressed-tensors": "compressed_tensors"}
HINT = "weights in compressed-tensors need that library: pip install 'fedmira[quant]'"
INPUT_SCALES = re.compile(r"\.((input|output|[qkv])_(scale|zero_point|global_scale)|activation_scale)$")


def packed_by(settings: object) -> str | None:
    """Return the method, of METHODS, of a quantization_config in a base's config.json; None: it has none of them."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return method if isinstance(method, str) and method in METHODS else None


def unpacked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a quantization_config with which transformers makes float weights as it loads them.

    Raises ModelError where a library is missing.
    """
    needed = METHODS[settings["quant_method"]]
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise ModelError(HINT)
    others = {key: value for key, value in settings.items() if key not in {"run_compressed", "use_optimized_inference"}}
    return {**others, "dequantize": True}
