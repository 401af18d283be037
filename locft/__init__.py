"""LocFT core: edit one matrix of one layer of a causal language model, and measure what the edit did."""
