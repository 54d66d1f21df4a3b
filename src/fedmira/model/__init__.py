"""The frozen base model and the stacked adapters that many clients train through it at once."""
