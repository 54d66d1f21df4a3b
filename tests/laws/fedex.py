"""FedEx-LoRA as a file outside the tree, which a study names by its dotted path: the tree's own, nothing else."""

from fedmira.methods.fedex_lora import Config, build

__all__ = ["Config", "build"]
