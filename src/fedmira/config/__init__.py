"""The one strict config: what may be written, what it means, every fault at once."""
