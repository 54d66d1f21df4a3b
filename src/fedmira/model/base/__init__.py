"""Load a base model, and try out on random tokens which ways of computing it give its own results."""
