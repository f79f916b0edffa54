"""The products of real models: what benchmarks time and compilers are asked for."""

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
"""Of four models; the 14B at both of its sizes."""
