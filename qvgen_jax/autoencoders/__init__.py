"""Causal 3-D video autoencoders."""
