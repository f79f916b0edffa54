"""Quantization without training: a transformer block by block, in bounded memory."""
