"""A tiny model on disk."""

from pathlib import Path

import pytest
import torch
from tests import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A Llama with its tokenizer, in a folder that a test may change."""
    folder = tmp_path / "tiny"
    tiny.model("llama", dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
