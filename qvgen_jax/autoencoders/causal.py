"""What the causal video VAEs share: convolutions that remember the frames before a chunk.

One code path serves whole clips and chunks. Every temporal layer asks a `Past` for the frames that
precede its input: nothing at the start of a clip, else what the previous chunk left. A clip run
whole is a first chunk that happens to be long, so the two forms are equal by construction.

Frames are `[batch, frames, height, width, channels]`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Past:
    """Hands each temporal layer, in calling order, the frames kept from the previous chunk.

    Lives for one call of the encoder or decoder; only the plain tuple `kept` leaves it.
    """

    def __init__(self, frames: tuple[jax.Array, ...] | None = None):
        self._frames = None if frames is None else iter(frames)
        self._kept: list[jax.Array] = []

    def take(self) -> jax.Array | None:
        """Frames before the current input; None at the start of the clip."""
        return None if self._frames is None else next(self._frames)

    def keep(self, frames: jax.Array) -> None:
        """What the same layer will be handed in the next chunk."""
        self._kept.append(frames)

    @property
    def kept(self) -> tuple[jax.Array, ...]:
        return tuple(self._kept)


def conv_kernel(key: jax.Array, shape: tuple[int, ...]) -> nnx.Param:
    """PyTorch's default range, `U(-1/sqrt(fan_in), 1/sqrt(fan_in))`, float32 `[..., in, out]`."""
    fan_in = 1
    for n in shape[:-1]:
        fan_in *= n
    bound = fan_in**-0.5
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


def conv2d_frames(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: tuple[int, int] | None = None
) -> jax.Array:
    """A 2-D convolution `[h, w, in, out]` on every frame of `[b, t, H, W, in]`."""
    b, t, height, width, channels = x.shape
    if padding is None:
        padding = (kernel.shape[0] // 2, kernel.shape[0] // 2)
    # No preferred_element_type: its gradient rule wants one dtype; backends accumulate in float32.
    y = jax.lax.conv_general_dilated(
        x.reshape(b * t, height, width, channels),
        kernel,
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, t, *y.shape[1:])


def causal_conv(x: jax.Array, kernel: jax.Array, past: jax.Array | None) -> jax.Array:
    """Convolves over time and space; frame `i` sees frames `i - taps + 1 .. i`.

    A sum over the taps of 2-D convolutions: XLA's 3-D convolution is several times slower on CPU.

    Args:
        x: `[b, t, h, w, in]`.
        kernel: `[taps, h, w, in, out]`.
        past: the `taps - 1` frames before `x`, or None for zeros (whose products are then skipped).

    Returns:
        `[b, t, h, w, out]`.
    """
    taps, frames = kernel.shape[0], x.shape[1]
    if past is not None:
        x = jnp.concatenate([past, x], axis=1)
        parts = [conv2d_frames(x[:, i : i + frames], kernel[i]) for i in range(taps)]
        return sum(parts[1:], parts[0])
    y = conv2d_frames(x, kernel[-1])
    for delay in range(1, min(taps, frames)):
        part = conv2d_frames(x[:, : frames - delay], kernel[-1 - delay])
        y = y + jnp.pad(part, ((0, 0), (delay, 0), (0, 0), (0, 0), (0, 0)))
    return y


class CausalConv(nnx.Module):
    """A causal convolution of stride 1: `kernel [taps, size, size, in, out]`, `bias [out]`.

    A clip is preceded by zeros (Wan) or, with `repeat_first`, by its first frame (CogVideoX).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: tuple[int, int, int],
        *,
        key: jax.Array,
        dtype: jnp.dtype,
        repeat_first: bool = False,
    ):
        self.kernel = conv_kernel(key, (*window, in_channels, out_channels))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.dtype, self.repeat_first = dtype, repeat_first

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        x = x.astype(self.dtype)
        remembered = kernel.shape[0] - 1
        if remembered == 0:
            return causal_conv(x, kernel, None) + bias
        before = past.take()
        if before is None and self.repeat_first:
            before = jnp.repeat(x[:, :1], remembered, axis=1)
        y = causal_conv(x, kernel, before) + bias
        if before is None:
            before = jnp.zeros_like(x[:, :1], shape=(x.shape[0], remembered, *x.shape[2:]))
        past.keep(jnp.concatenate([before, x], axis=1)[:, -remembered:])
        return y


class Conv2d(nnx.Module):
    """A 2-D convolution on every frame: `kernel [size, size, in, out]`, `bias [out]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
    ):
        self.kernel = conv_kernel(key, (size, size, in_channels, out_channels))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.dtype, self.stride, self.padding = dtype, stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = conv2d_frames(x.astype(self.dtype), kernel, self.stride, self.padding)
        return y + self.bias[...].astype(self.dtype)


def run_chunks(
    net: Callable[[jax.Array, Past], jax.Array], x: jax.Array, first: int, chunk: int
) -> jax.Array:
    """Runs `net` on the first frames of `x`, then on equal chunks in a scan.

    Memory, and the size of the compiled program, do not grow with the clip.

    Args:
        net: `[b, frames, ...]` and what came before it, to frames.
        x: `[b, first + n * chunk, ...]`.
        first: frames of the first chunk.
        chunk: frames of every later one.
    """
    past = Past()
    start = net(x[:, :first], past)
    chunks = (x.shape[1] - first) // chunk
    if chunks == 0:
        return start
    later = x[:, first:].reshape(x.shape[0], chunks, chunk, *x.shape[2:])

    def step(frames: tuple[jax.Array, ...], x: jax.Array) -> tuple[tuple, jax.Array]:
        past = Past(frames)
        y = net(x, past)
        return past.kept, y

    _, outputs = jax.lax.scan(step, past.kept, jnp.moveaxis(later, 1, 0))
    outputs = jnp.moveaxis(outputs, 0, 1)
    outputs = outputs.reshape(x.shape[0], -1, *outputs.shape[3:])
    return jnp.concatenate([start, outputs], axis=1)
