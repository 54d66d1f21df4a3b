"""Clients' adapters as PEFT folders, merged models and the lines that serve them."""
