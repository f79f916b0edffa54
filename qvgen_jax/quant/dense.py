"""Linear layers: full precision here, quantized beside it, behind one calling convention."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens, quantize_tokens
from kernels.quantized_matmul import quantized_matmul
from qvgen_jax.quant.codes_matmul import QuantizedWeight, codes_matmul
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.rotation import rotate
from qvgen_jax.quant.smoothing import smooth_tokens
from qvgen_jax.quant.tokens import clip_multipliers, fake_quantize_tokens, initial_clips
from qvgen_jax.quant.weights import fake_quantize_weight, quantize_weight


class QuantContext(NamedTuple):
    """What every quantizable linear needs to know about the step it runs in.

    Attributes:
        clip_index: int32 `[batch]`, each sample's learned clip pair; None for plain layers.
        gate: float32 `[rank]`, each component's weight in the low-rank branch; None without one.
        time_index: int32 `[batch]`, each sample's entry of a time table; None without one.
    """

    clip_index: jax.Array | None = None
    gate: jax.Array | None = None
    time_index: jax.Array | None = None


def rows_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., in] @ kernel [in, out]`, accumulated in float32 at least.

    The leading axes are one axis inside: XLA's CPU backend contracts two axes at once, as the
    gradient of the kernel would, 2.4 times slower.
    """
    y = jnp.matmul(
        x.reshape(-1, x.shape[-1]),
        kernel,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nnx.Module):
    """`y = x @ kernel + bias` in full precision: `x [..., in]` to `[..., out]`."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        use_bias: bool = True,
    ):
        del name  # A dense factory chooses by name; the plain layer has no choice to make.
        bound = in_features**-0.5
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        y = rows_matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)


class Levels(nnx.Variable):
    """What of a layer is in the state but is not trained.

    2^bits - 1, an array so that stacked layers may differ in bits, and the factors of smoothing.
    """


def _levels(bits: int) -> Levels:
    return Levels(jnp.asarray(2**bits - 1, jnp.float32))


class _TokenQuantizer(nnx.Module):
    """What the quantized layers share: clips, levels and how tokens become integers."""

    def __init__(self, config: QuantConfig, name: str, in_features: int, dtype: jnp.dtype):
        weight_bits, act_bits = config.bits_of(name)
        buckets = config.buckets_of(name)
        self.lower = nnx.Param(initial_clips(buckets, config.initial_clip))
        self.upper = nnx.Param(initial_clips(buckets, config.initial_clip))
        self.weight_levels, self.act_levels = _levels(weight_bits), _levels(act_bits)
        self.dtype = dtype
        self.product_dtype = config.product_dtype
        self.include_zero, self.clip_ratio = config.include_zero, config.clip_ratio
        self.range_dtype = config.range_dtype
        self.block = 1 if name in config.folded else config.block_of(name, in_features)

    def _prepare(self, x: jax.Array) -> jax.Array:
        """`x [..., in]` as it is quantized: smoothed, then rotated; the kernel undoes both."""
        if hasattr(self, "smooth"):
            x = smooth_tokens(x, self.smooth[...])
        return rotate(x, self.block)

    def _clip_arguments(self, x: jax.Array, ctx: QuantContext) -> dict:
        return {
            "lower": clip_multipliers(self.lower[...], ctx.clip_index, x.ndim),
            "upper": clip_multipliers(self.upper[...], ctx.clip_index, x.ndim),
            "levels": self.act_levels[...],
            "include_zero": self.include_zero,
            "clip_ratio": self.clip_ratio,
            "range_dtype": x.dtype if self.range_dtype == "tensor" else _at_least_float32(x.dtype),
        }


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


class QuantDense(_TokenQuantizer):
    """A linear in training: quantized tokens times (quantized kernel + gated low-rank branch).

    `y = Xq @ (What + (L * gate) @ R)^T + bias`, the first product in integers, the branch in token
    space. `kernel` is the float master weight; `qvgen_jax.quant.initialize.quantize_params` gives
    scale, zero point, L and R their values, the ones here only have the right shapes.
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
        plain = Dense(name, in_features, out_features, key=key, dtype=dtype, use_bias=use_bias)
        self.kernel, self.bias = plain.kernel, plain.bias
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.zero_point = _zero_points(config, out_features)
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
            x = self._prepare(x)
            values, tokens = fake_quantize_tokens(x, **self._clip_arguments(x, ctx))
        values = values.astype(self.dtype)
        weight = (
            self.kernel[...],
            self.scale[...],
            None if self.zero_point is None else self.zero_point[...],
            self.weight_levels[...],
        )
        integers = QuantizedWeight(quantize_weight(*weight), *jax.lax.stop_gradient(weight[1:]))
        y = codes_matmul(
            values, fake_quantize_weight(*weight), tokens, integers, self.product_dtype
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if ctx.gate is not None and hasattr(self, "L"):
            applied = branch if self.branch_space == "tokens" else branch_in_weights
            y = y + applied(values, self.L[...], self.R[...], ctx.gate).astype(y.dtype)
        return y.astype(self.dtype)


def _zero_points(config: QuantConfig, out_features: int) -> nnx.Param | None:
    if config.symmetric_weights:
        return None
    return nnx.Param(jnp.zeros((out_features,), jnp.float32))


def branch(values: jax.Array, left: jax.Array, right: jax.Array, gate: jax.Array) -> jax.Array:
    """`((values @ R^T) * gate) @ L^T`: `[..., in]` to `[..., out]`, in the values' dtype.

    A closed gate costs a product but changes nothing, so that one compilation serves all phases.
    The gate is a schedule, not a parameter: it carries no gradient.
    """
    dtype = values.dtype
    hidden = rows_matmul(values, right.T.astype(dtype)) * jax.lax.stop_gradient(gate)
    return rows_matmul(hidden.astype(dtype), left.T.astype(dtype))


def branch_in_weights(
    values: jax.Array, left: jax.Array, right: jax.Array, gate: jax.Array
) -> jax.Array:
    """`values @ ((L * gate) @ R)^T`, as the release computes it: a product of full size.

    `branch` to rounding, in its shapes and dtypes.
    """
    gated = left * jax.lax.stop_gradient(gate)
    return rows_matmul(values, jnp.matmul(gated, right).T.astype(values.dtype))


class PackedDense(_TokenQuantizer):
    """A linear at inference: integers in memory, the same arithmetic as `QuantDense`.

    Params: `codes` int4 (up to 4 bits) or int8 `[in, out]`, `scale`, `zero_point` (unless weights
    are symmetric), `code_sum` (the codes summed over the input axis) and `bias` `[out]`, `lower`
    and `upper` `[buckets]`; where the config has a rank, `L`, `R` and the `gate [rank]` they were
    saved with; `smooth [in]` where it divides its tokens. The values come from
    `qvgen_jax.quant.packed`.
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
        del key  # Nothing is drawn: the values are loaded.
        super().__init__(config, name, in_features, dtype)
        container = code_container(config.bits_of(name)[0])
        self.codes = nnx.Param(jnp.zeros((in_features, out_features), container))
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.zero_point = _zero_points(config, out_features)
        self.code_sum = nnx.Param(jnp.zeros((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        if config.rank:
            self.L = nnx.Param(jnp.zeros((out_features, config.rank), jnp.float32))
            self.R = nnx.Param(jnp.zeros((config.rank, in_features), jnp.float32))
            self.gate = nnx.Param(jnp.zeros((config.rank,), jnp.float32))
        if config.smooths(name):
            self.smooth = nnx.Param(jnp.ones((in_features,), jnp.float32))

    def __call__(
        self, x: jax.Array | QuantizedTokens, ctx: QuantContext = QuantContext()
    ) -> jax.Array:
        """`x [..., in]`, or tokens ready and quantized, to `[..., out]`."""
        tokens = x
        if not isinstance(x, QuantizedTokens):
            x = self._prepare(x)
            tokens = quantize_tokens(x, **self._clip_arguments(x, ctx))
        low_rank = hasattr(self, "L")
        y = quantized_matmul(
            tokens,
            self.codes[...],
            self.scale[...],
            None if self.zero_point is None else self.zero_point[...],
            self.weight_levels[...],
            None if self.bias is None else self.bias[...],
            code_sum=self.code_sum[...],
            product_dtype=self.product_dtype,
            out_dtype=jnp.float32 if low_rank else self.dtype,
        )
        if low_rank:
            values = dequantize_tokens(tokens).astype(self.dtype)
            y = y + branch(values, self.L[...], self.R[...], self.gate[...]).astype(y.dtype)
        return y.astype(self.dtype)


def code_container(bits: int) -> jnp.dtype:
    """What codes of this many bits live in, in memory."""
    return jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)


def dense_factory(config: QuantConfig, form: str) -> Callable[..., nnx.Module]:
    """A function with `Dense`'s signature that builds each layer as the config wants it.

    Args:
        config: names the layers that stay in full precision.
        form: `train` for `QuantDense`, `packed` for `PackedDense`, `plain` for `Dense` everywhere.

    Raises:
        ValueError: an unknown form.
    """
    forms = {"train": QuantDense, "packed": PackedDense, "plain": None}
    if form not in forms:
        raise ValueError(f"form={form!r}; expected one of {', '.join(forms)}")
    layer = forms[form]

    def dense(name: str, in_features: int, out_features: int, **arguments) -> nnx.Module:
        if layer is None or name in config.full_precision:
            return Dense(name, in_features, out_features, **arguments)
        return layer(name, in_features, out_features, config=config, **arguments)

    return dense
