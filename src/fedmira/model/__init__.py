"""The base model: loading, stacked LoRA, passes, generation.

Words, each with one meaning in this room:

- A **pass** is one sequence of N tokens through the base for many clients (`packed.packing.Pass`, in code `plan`). Each
  client's tokens are contiguous.
- Clients of similar size form a **segment**, which a batched product views as [clients, tokens, width]. **Filler**
  tokens round a client up to the size of its segment, filler rows a lane; **padding** is what a gathered or padded
  array has beyond its tokens.
- Examples of a client that begin with the same **prefix** form a **group**: the prefix is laid out once, and the
  **suffixes** follow it.
- Attention on a CPU runs in **spans** (whole examples, read where they are) and **fans** (suffixes of similar size,
  gathered, with copies of the keys of their prefix); on CUDA in **buckets** (examples of similar size, gathered).
- **Labelled** tokens are those whose next token carries loss. After the last attention, in the **tail**, only they are
  computed.
- In generation a **lane** has prompts of one client and their common prefix; each answer is a **row** of its lane. Keys
  and values are in a **cache** made of **parts**.
- **Virtual tokens** have the ids -1 ... -n; a client's prompt encoder computes their embeddings.
- A **rule** says which positions the tokens of a layer may see: all before them, a window, a chunk.
- A **trial** is a measurement on random tokens, made when a base is loaded or first answers.

An **index** counts tokens along a pass; a **position** counts tokens from the start of an example, as the base does.
The rows of `Adapters` are the clients' parameters, [S, P].
"""

import os

# oneDNN sets a product of a new size up in about a millisecond and forgets those used longest ago. Real texts bring new
# sizes at every step, more than the 1,024 that it keeps by default; it reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
