"""Durable files, rows of all clients, checkpoints, and the folders of studies and runs."""
