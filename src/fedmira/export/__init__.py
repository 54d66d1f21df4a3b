"""Clients' adapters as PEFT folders, merged models and commands that serve them."""
