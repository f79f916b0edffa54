"""Video diffusion transformers."""
