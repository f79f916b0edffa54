"""Linear layers: full precision, and quantized in training, behind one calling convention."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.low_rank import LowRank, branch_in_weights, low_rank_matmul, rows_matmul
from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens
from kernels.reference import wide_type
from qvgen_jax.quant.codes_matmul import QuantizedWeight, codes_matmul
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.low_rank import merge_adapter
from qvgen_jax.quant.rotation import rotate
from qvgen_jax.quant.smoothing import smooth_tokens
from qvgen_jax.quant.steps import fake_quantize_with_step
from qvgen_jax.quant.tokens import (
    clip_multipliers,
    fake_quantize_tokens,
    initial_clips,
    of_bucket,
)
from qvgen_jax.quant.weights import fake_quantize_weight, quantize_weight
from qvgen_jax.sharding import cut, gathered


class QuantContext(NamedTuple):
    """What every quantizable linear needs to know about the step it runs in.

    Attributes:
        clip_index: int32 `[batch]`, each sample's learned clip pair; None for plain layers.
        gate: float32 `[rank]`, each component's weight in the low-rank branch; None without one.
        time_index: int32 `[batch]`, each sample's entry of a time table; None without one.
        tokens: int32 `[batch]`, how many of each sample's tokens are no padding; None where all of
            what a linear reads are tokens.
    """

    clip_index: jax.Array | None = None
    gate: jax.Array | None = None
    time_index: jax.Array | None = None
    tokens: jax.Array | None = None

    def padded(self, x: jax.Array, tokens: int) -> "QuantContext":
        """For linears of `x [batch, padded tokens, ...]`, of which so many are no padding."""
        if x.shape[1] == tokens:
            return self
        return self._replace(tokens=jnp.full(len(x), tokens, jnp.int32))

    def unpadded(self) -> "QuantContext":
        """For linears of something else."""
        return self._replace(tokens=None)


class Dense(nnx.Module):
    """`y = x @ kernel + bias` in full precision: `x [..., in]` to `[..., out]`.

    Over a run's mesh its kernel lies as `qvgen_jax.sharding` says of its name, if it is `cut`.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        use_bias: bool = True,
        cut: bool = True,
    ):
        bound = in_features**-0.5
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.name, self.dtype, self.cut = name, dtype, cut

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        path, kernel = f"{self.name}.kernel", self.kernel[...]
        if self.cut:
            kernel = gathered(cut(kernel, path).astype(self.dtype), path)
        kernel = kernel.astype(self.dtype)
        y = rows_matmul(x.astype(self.dtype), kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)


class Levels(nnx.Variable):
    """What of a layer is in the state but is not trained.

    2^bits - 1, an array so that stacked layers may differ in bits, and the factors of smoothing.
    """


def _levels(bits: int) -> Levels:
    return Levels(jnp.asarray(2**bits - 1, jnp.float32))


class TokenQuantizer(nnx.Module):
    """What the quantized layers share: clips or steps, levels, and how tokens become integers."""

    def __init__(self, config: QuantConfig, name: str, in_features: int, dtype: jnp.dtype):
        weight_bits, act_bits = config.bits_of(name)
        buckets = config.buckets_of(name)
        if config.learned_steps:
            self.act_scale = nnx.Param(jnp.ones((buckets,), jnp.float32))
        else:
            self.lower = nnx.Param(initial_clips(buckets, config.initial_clip))
            self.upper = nnx.Param(initial_clips(buckets, config.initial_clip))
        if config.act_range == "learned_zero":
            self.act_zero_point = nnx.Param(jnp.zeros((buckets,), jnp.float32))
        self.weight_levels, self.act_levels = _levels(weight_bits), _levels(act_bits)
        self.dtype = dtype
        self.product_dtype = config.product_dtype
        self.include_zero, self.clip_ratio = config.include_zero, config.clip_ratio
        self.range_dtype = config.range_dtype
        self.block = config.own_block_of(name, in_features)

    def prepare(self, x: jax.Array) -> jax.Array:
        """`x [..., in]` as it is quantized: smoothed, then rotated; the kernel undoes both."""
        if hasattr(self, "smooth"):
            x = smooth_tokens(x, self.smooth[...])
        return rotate(x, self.block)

    @property
    def has_step(self) -> bool:
        """Whether its tokens are quantized with a learned step."""
        return hasattr(self, "act_scale")

    def step_arguments(self, x: jax.Array, ctx: QuantContext) -> dict:
        """The arguments of `encode_with_step` for tokens `x`."""
        of_sample = partial(of_bucket, clip_index=ctx.clip_index, ndim=x.ndim)
        zero = getattr(self, "act_zero_point", None)
        zero = None if zero is None else of_sample(zero[...])
        return {
            "step": of_sample(self.act_scale[...]),
            "zero_point": zero,
            "levels": self.act_levels[...],
        }

    def clip_arguments(self, x: jax.Array, ctx: QuantContext) -> dict:
        """The arguments of `quantize_tokens` for tokens `x` that are ready."""
        return {
            "lower": clip_multipliers(self.lower[...], ctx.clip_index, x.ndim),
            "upper": clip_multipliers(self.upper[...], ctx.clip_index, x.ndim),
            "levels": self.act_levels[...],
            "include_zero": self.include_zero,
            "clip_ratio": self.clip_ratio,
            "range_dtype": x.dtype if self.range_dtype == "tensor" else wide_type(x.dtype),
        }


class QuantDense(TokenQuantizer):
    """A linear in training: quantized tokens times (quantized kernel + gated low-rank branch).

    `y = Xq @ (What + (L * gate) @ R)^T + bias`, the first product in integers, the branch in token
    space. With a merged adapter it is `y = Xq @ Q(W + (L @ R)^T) + bias`. `kernel` is the float
    master weight; `qvgen_jax.quant.initialize.quantize_params` gives scale, zero point, L and R
    their values, the ones here only have the right shapes.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        config: QuantConfig,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        use_bias: bool = True,
    ):
        super().__init__(config, name, in_features, dtype)
        self.name = name
        plain = Dense(name, in_features, out_features, key=key, dtype=dtype, use_bias=use_bias)
        self.kernel, self.bias = plain.kernel, plain.bias
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.zero_point = zero_points(config, out_features)
        self.branch_space = config.branch_space
        if config.rank:
            self.L = nnx.Param(jnp.zeros((out_features, config.rank), jnp.float32))
            self.R = nnx.Param(jnp.zeros((config.rank, in_features), jnp.float32))
        if config.smooths(name):
            self.smooth = Levels(jnp.ones((in_features,), jnp.float32))

    def __call__(
        self, x: jax.Array | QuantizedTokens, ctx: QuantContext = QuantContext()
    ) -> jax.Array:
        """`x [..., in]` to `[..., out]`.

        Tokens already quantized are smoothed and rotated already, and take no gradient.
        """
        if isinstance(x, QuantizedTokens):
            values, tokens = dequantize_tokens(x), x
        else:
            values, tokens = self._fake_quantize(self.prepare(x), ctx)
        values = values.astype(self.dtype)
        # Over a mesh each device quantizes its slice of the master, and codes are what travels.
        weight = (
            self._kernel(),
            self.scale[...],
            None if self.zero_point is None else self.zero_point[...],
            self.weight_levels[...],
        )
        integers = self._everywhere(quantize_weight(*weight), *jax.lax.stop_gradient(weight[1:]))
        y = codes_matmul(
            values, fake_quantize_weight(*weight), tokens, integers, self.product_dtype
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if ctx.gate is not None and hasattr(self, "L") and self.branch_space != "merged":
            applied = low_rank_matmul if self.branch_space == "tokens" else branch_in_weights
            left = gathered(cut(self.L[...], f"{self.name}.L"), f"{self.name}.L")
            right = gathered(cut(self.R[...], f"{self.name}.R"), f"{self.name}.R")
            branch = LowRank(left, right, ctx.gate)
            y = y + applied(values, branch).astype(y.dtype)
        return y.astype(self.dtype)

    def _fake_quantize(self, x: jax.Array, ctx: QuantContext) -> tuple[jax.Array, QuantizedTokens]:
        if self.has_step:
            return fake_quantize_with_step(x, **self.step_arguments(x, ctx))
        return fake_quantize_tokens(x, **self.clip_arguments(x, ctx))

    def _kernel(self) -> jax.Array:
        """What is quantized, `[in, out]`: the master weight, and a merged adapter in it."""
        path = f"{self.name}.kernel"
        kernel = cut(self.kernel[...], path)
        if self.branch_space != "merged" or not hasattr(self, "L"):
            return kernel
        left, right = (cut(getattr(self, leaf)[...], f"{self.name}.{leaf}") for leaf in "LR")
        return cut(merge_adapter(kernel, left, right), path)

    def _everywhere(
        self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, levels: jax.Array
    ) -> QuantizedWeight:
        """The integers as products need them.

        All of them, so that the backward pass finds nothing to cut again: it would gather what the
        codes stand for, twice the bytes.
        """
        scale = gathered(scale, f"{self.name}.scale")
        if zero_point is not None:
            zero_point = gathered(zero_point, f"{self.name}.zero_point")
        return QuantizedWeight(gathered(codes, f"{self.name}.kernel"), scale, zero_point, levels)


def zero_points(config: QuantConfig, out_features: int) -> nnx.Param | None:
    """Zeros `[out]`; None where weights are symmetric."""
    if config.symmetric_weights:
        return None
    return nnx.Param(jnp.zeros((out_features,), jnp.float32))
