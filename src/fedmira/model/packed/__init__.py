"""One pass through the base for many clients: packing, attention, stacked LoRA, loss."""
