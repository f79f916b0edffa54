"""QVGen in JAX: quantization-aware training of low-bit video diffusion transformers."""
