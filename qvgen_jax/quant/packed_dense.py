"""Linear layers at inference: codes in memory, and any backend's product of them."""

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.chips import Chip
from kernels.choose import choose, say_once
from kernels.layouts import container, laid_out_shape
from kernels.low_rank import LowRank, low_rank_matmul
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from kernels.quantized_matmul import quantize_and_matmul, quantized_matmul
from kernels.reference import wide_type
from kernels.xla import wide_dtype
from qvgen_jax.quant.codes_matmul import signed_zero_point
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import QuantContext, TokenQuantizer, zero_points
from qvgen_jax.quant.steps import encode_with_step
from qvgen_jax.sharding import gathered


class PackedDense(TokenQuantizer):
    """A linear at inference: integers in memory, the same arithmetic as `QuantDense`.

    Params: `codes`, in the layout of the backend that multiplies them (`kernels.layouts`), `scale`,
    `zero_point` (unless weights are symmetric), `code_sum` (the codes summed over the input axis)
    and `bias` `[out]`; `lower` and `upper`, or `act_scale` and `act_zero_point`, `[buckets]`; where
    the config has a rank, `L`, `R` and the `gate [rank]` they were saved with; `smooth [in]` where
    it divides its tokens. A branch that reads the tokens instead of their codes is bfloat16 and has
    no gate. The values come from `qvgen_jax.quant.packed`.
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
        backend: str = "auto",
        chip: Chip | None = None,
    ):
        del key  # Nothing is drawn: the values are loaded.
        super().__init__(config, name, in_features, dtype)
        self.name = name
        self.bits, self.in_features = config.bits_of(name), in_features
        self.token_bits = config.token_bits(name)
        product = Product(None, in_features, out_features, *self.bits, jnp.dtype(dtype))
        self.backend, reason, self.layout = choose(product, chip, backend)
        if backend not in ("auto", self.backend):
            say_once(f"kernels={backend!r}: {name} goes to {reason}")
        shape = laid_out_shape(in_features, out_features, self.layout)
        self.codes = nnx.Param(jnp.zeros(shape, container(self.bits[0], self.layout)))
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.zero_point = zero_points(config, out_features)
        self.code_sum = nnx.Param(jnp.zeros((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.reads_tokens = bool(config.rank) and config.branch_input == "tokens"
        if config.rank:
            kept = jnp.bfloat16 if self.reads_tokens else jnp.float32
            self.L = nnx.Param(jnp.zeros((out_features, config.rank), kept))
            self.R = nnx.Param(jnp.zeros((config.rank, in_features), kept))
            if not self.reads_tokens:
                self.gate = nnx.Param(jnp.zeros((config.rank,), jnp.float32))
        if config.smooths(name):
            self.smooth = nnx.Param(jnp.ones((in_features,), jnp.float32))

    def __call__(
        self, x: jax.Array | QuantizedTokens, ctx: QuantContext = QuantContext()
    ) -> jax.Array:
        """`x [..., in]`, or tokens ready and quantized, to `[..., out]`.

        Raises:
            ValueError: quantized tokens for a branch that reads them before.
        """
        how = {
            "backend": self.backend,
            "layout": self.layout,
            "bits": self.bits,
            "product_dtype": self.product_dtype,
            "out_dtype": self.dtype,
        }
        ready = isinstance(x, QuantizedTokens)
        if ready and self.reads_tokens:
            raise ValueError(f"the branch of {self.name} reads tokens, and these are codes already")
        x = x if ready else self.prepare(x)
        if self.reads_tokens:
            return self._beside_branch(x, ctx, how)
        if self.has_step and not ready:  # The kernels that quantize know tokens' own ranges alone.
            x, ready = encode_with_step(x, **self.step_arguments(x, ctx)), True
        if hasattr(self, "L"):
            tokens = x if ready else quantize_tokens(x, **self.clip_arguments(x, ctx))
            branch = LowRank(self.L[...], self.R[...], self.gate[...])
            return quantized_matmul(tokens, self._weight(), branch, **how)
        if ready:
            return quantized_matmul(x, self._weight(), **how)
        return quantize_and_matmul(x, **self.clip_arguments(x, ctx), weight=self._weight(), **how)

    def _beside_branch(self, x: jax.Array, ctx: QuantContext, how: dict) -> jax.Array:
        """The product of codes of `x`, prepared, plus its product with the branch (SVDQuant)."""
        wide = wide_type(self.dtype)
        how = {**self.clip_arguments(x, ctx), **how, "out_dtype": wide}
        y = quantize_and_matmul(x, weight=self._weight(), **how)
        rank = self.R[...].shape[0]
        branch = LowRank(self.L[...], self.R[...], jnp.ones((rank,), jnp.float32))
        return (y + low_rank_matmul(x.astype(self.dtype), branch).astype(wide)).astype(self.dtype)

    @property
    def token_form(self) -> tuple:
        """What its tokens go through: equal for layers that can read the same ones together."""
        ranges = (self.include_zero, self.clip_ratio, self.range_dtype)
        return (self.backend, self.token_bits, self.block, hasattr(self, "smooth"), *ranges)

    def _weight(self) -> Weight:
        given = None if self.zero_point is None else self.zero_point[...]
        wide = wide_dtype(self.product_dtype)
        zero_point = signed_zero_point(given, self.weight_levels[...], wide)
        bias = None if self.bias is None else self.bias[...]
        codes = gathered(self.codes[...], f"{self.name}.codes")
        return Weight(codes, self.scale[...], zero_point, self.code_sum[...], bias)
