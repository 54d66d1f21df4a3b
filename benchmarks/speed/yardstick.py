"""The yardstick: the plain loop that everybody writes with PEFT. One resident model, one client after another.

Each client's adapter is swapped in, batches are padded to their longest example, torch's AdamW steps; with `autocast`
the passes run in bfloat16 as under torch.autocast.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedmira.data.batches import ClientData, collate

RANK, ALPHA, LEARNING_RATE, CLIP = 8, 16, 3e-4, 1.0


class PeftLoop:
    """A PEFT model and its starting adapter."""

    def __init__(
        self,
        base: Path,
        targets: Sequence[str],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = RANK,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
        conv = type(model).__name__.startswith("GPT2")
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=conv, task_type="CAUSAL_LM"
        )
        torch.manual_seed(0)
        self.model: PeftModel = get_peft_model(model, config)
        self.device = device
        self.start = {name: value.clone() for name, value in get_peft_model_state_dict(self.model).items()}

    def train(self, client: ClientData, *, steps: int, batch_size: int, autocast: bool = False) -> tuple[float, float]:
        """Train one client from the common start; return seconds and the last loss."""
        began = time.perf_counter()
        set_peft_model_state_dict(self.model, self.start)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        loss = torch.zeros(())
        for step in range(steps):
            batch = collate([client.train[step * batch_size : (step + 1) * batch_size]], pad_id=0)
            lengths = batch.lengths[0]
            mask = (torch.arange(batch.ids.shape[-1])[None, :] < lengths[:, None]).long()
            context = torch.autocast(self.device, dtype=torch.bfloat16) if autocast else nullcontext()
            with context:
                loss = self.model(
                    input_ids=batch.ids[0].to(self.device),
                    attention_mask=mask.to(self.device),
                    labels=batch.labels[0].to(self.device),
                ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = float(loss.detach())
        return time.perf_counter() - began, last
