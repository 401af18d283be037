"""LocFT core: edit one matrix of one layer of a causal language model, and measure what the edit did."""

import os

# Threads that wait for each other yield their core. Otherwise they spin, and if another process wants the cores too,
# small products take 30 times as long. OpenMP reads this when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
