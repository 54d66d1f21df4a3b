"""Passes of a study's clients in Ray's actors, on one machine or many (extra `ray`); docs/scale.md.

Ray is imported when it is needed, and in cluster.py and crew.py alone.
"""
