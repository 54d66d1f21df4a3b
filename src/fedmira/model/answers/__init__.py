"""Greedy answers of many clients in one pass."""
