"""Losses from hidden states: what fits in a budget, the loop over chunks and tiles, and the products of each side."""
