"""How good each client's adapter is on that client's held-out examples: loss, and scores of generated answers."""
