"""The base model: loading, stacked LoRA, passes, generation."""

import os

# oneDNN sets a product of a new size up in about a millisecond and forgets those used longest ago. Real texts bring new
# sizes at every step, more than the 1,024 that it keeps by default; it reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
