"""The round loop, the local phase of a cohort, and the gate in front of every merge."""
