"""QVGen in JAX: quantization-aware training of low-bit video diffusion transformers."""

from typing import Any


def load(path: Any, dtype: Any = None, mesh: Any = None, **options: Any) -> Any:
    """Loads a pipeline: see `qvgen_jax.pipeline.load`."""
    from qvgen_jax.pipeline import load as load_pipeline  # Importing jax takes a second.

    return load_pipeline(path, dtype, mesh, **options)
