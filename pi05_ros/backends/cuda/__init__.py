"""The CUDA backend: bfloat16, batch 1, every stage in CUDA graphs. Read `forward.py` first."""
