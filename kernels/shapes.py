"""The products of real models: benchmarks time them, compilers and interpreters are asked for them.

What else compilers are asked for, other bits and sizes that hurt, stands in their own tests.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """`[rows, inner] @ [inner, columns]`, of one linear for one video."""

    model: str
    layer: str
    rows: int
    inner: int
    columns: int

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.inner * self.columns


def _block(model: str, rows: int, dim: int, hidden: int) -> tuple[Shape, ...]:
    return (
        Shape(model, "attention", rows, dim, dim),
        Shape(model, "ffn up", rows, dim, hidden),
        Shape(model, "ffn down", rows, hidden, dim),
    )


SHAPES = (
    # 81 frames at 480 x 832: 21 x 30 x 52 tokens.
    *_block("Wan-1.3B 480p", 32760, 1536, 8960),
    *_block("Wan-14B 480p", 32760, 5120, 13824),
    Shape("Wan-14B 480p", "text key", 512, 5120, 5120),
    # 81 frames at 720 x 1280: 21 x 45 x 80.
    *_block("Wan-14B 720p", 75600, 5120, 13824),
    # 49 frames at 480 x 720: 13 x 30 x 45, and 226 of text.
    *_block("CogVideoX-2B", 17776, 1920, 7680),
    # 81 frames at 768 x 1360: 11 x 48 x 85, and 226 of text.
    *_block("CogVideoX1.5-5B", 45106, 3072, 12288),
)
"""Of four models; the 14B at both of its sizes. What takes the time: `kernels.bench` times them."""

SMALL_SHAPES = (
    Shape("Wan-1.3B 480p", "text embedder", 512, 4096, 1536),
    Shape("Wan-1.3B 480p", "text key", 512, 1536, 1536),
    Shape("Wan-1.3B 480p", "proj_out", 32760, 1536, 64),
    Shape("Wan-14B 480p", "text embedder", 512, 4096, 5120),
    Shape("Wan-14B 480p", "proj_out", 32760, 5120, 64),
    Shape("CogVideoX-2B", "proj_out", 17550, 1920, 64),
)
"""Of a few rows or columns: only compiled."""

INNERS = tuple(sorted({shape.inner for shape in SHAPES}))
"""The lengths of a token in the blocks of all models."""


def of_models(*models: str) -> tuple[Shape, ...]:
    """All shapes of the models that are named, the large ones first.

    Raises:
        ValueError: there is no such model.
    """
    if unknown := set(models) - {shape.model for shape in SHAPES}:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such model")
    return tuple(shape for shape in (*SHAPES, *SMALL_SHAPES) if shape.model in models)
