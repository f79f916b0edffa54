"""Low-bit kernels. Knows jax only; kept light because other packages probe for this name."""
