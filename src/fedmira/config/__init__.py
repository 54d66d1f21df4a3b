"""The one strict config: its keys, what they mean, and a check that reports all faults together."""
