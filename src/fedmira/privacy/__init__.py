"""Differential privacy of a client's training examples: private gradients, their noise, and what they have cost.

Needs the extra `dp` for the accountant; docs/privacy.md says what is promised, and what is not.
"""
