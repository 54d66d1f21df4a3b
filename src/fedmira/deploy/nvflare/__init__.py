"""The engine behind link.py: NVIDIA NVFlare 2.9. Nothing outside this folder knows it."""
