"""Quantizers, the gated low-rank branch, and the linear layers made of them."""
