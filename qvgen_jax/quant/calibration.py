"""What the tokens of every linear are like, stacked layers included: the channels' maxima, or more.

Each observed linear has a probe for each measure that its output does not depend on. The backward
pass returns what was measured as the probe's gradient, so `jax.grad` with respect to the probes
gives that of all layers at once, out of the scan over blocks too. Nothing else of the backward pass
is needed, and XLA leaves it away.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.reference import at_least_float32
from qvgen_jax.quant.dense import Dense, QuantContext


class Probe(nnx.Variable):
    """What a measure of one linear comes out at: float32 zeros in its shape."""


class Measure(NamedTuple):
    """Something to be known of a linear's tokens.

    Attributes:
        shape: of a number of channels.
        of: of tokens `[rows, in]`, to an array of that shape; and of which of them are no padding,
            bool `[rows]`, or None where all are.
    """

    shape: Callable[[int], tuple[int, ...]]
    of: Callable[[jax.Array, jax.Array | None], jax.Array]


def without_padding(rows: jax.Array, real: jax.Array | None) -> jax.Array:
    """`rows [rows, in]`, zero where they are padding."""
    return rows if real is None else jnp.where(real[:, None], rows, 0)


def channel_maxima(rows: jax.Array, real: jax.Array | None = None) -> jax.Array:
    """`max |x|` of every channel of `rows [rows, in]`."""
    return jnp.max(jnp.abs(without_padding(rows, real)), axis=0)


def means(rows: jax.Array, real: jax.Array | None = None) -> jax.Array:
    """The means of |x|, x and x^2 over `rows [rows, in]`: `[3]`, float32 or wider."""
    # In bfloat16 the squares would lose what little a variance is of them.
    rows = at_least_float32(without_padding(rows, real))
    found = jnp.stack([jnp.mean(jnp.abs(rows)), jnp.mean(rows), jnp.mean(jnp.square(rows))])
    return found if real is None else found / jnp.mean(real, dtype=rows.dtype)


MAXIMA = Measure(lambda width: (width,), channel_maxima)
MEANS = Measure(lambda width: (3,), means)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def observe(
    x: jax.Array, probe: jax.Array, tokens: jax.Array | None = None, measure: Measure = MAXIMA
) -> jax.Array:
    """`x [..., in]`; the gradient of `probe` is the measure of its tokens, whatever follows.

    Of a linear that runs several times the gradients would add up.

    Args:
        x: the tokens; `[batch, padded tokens, in]` where there is padding.
        probe: zeros in the measure's shape.
        tokens: int32 `[batch]`, how many of each sample's are no padding; None where all are.
        measure: what is to be known.
    """
    del probe, tokens, measure
    return x


def _forward(x, probe, tokens, measure):
    real = None
    if tokens is not None:
        real = (jnp.arange(x.shape[1]) < tokens[:, None]).reshape(-1)
    return x, measure.of(x.reshape(-1, x.shape[-1]), real).astype(probe.dtype)


def _backward(measure, found, cotangent):
    del measure
    return cotangent, found, None


observe.defvjp(_forward, _backward)


class ObservedDense(Dense):
    """A `Dense` whose tokens are observed: a probe for each measure, under the measure's name."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        measures: Mapping[str, Measure],
        **options,
    ):
        super().__init__(name, in_features, out_features, **options)
        self.measures = tuple(measures.items())
        for key, measure in self.measures:
            setattr(self, key, Probe(jnp.zeros(measure.shape(in_features), jnp.float32)))

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        for key, measure in self.measures:
            x = observe(x, getattr(self, key)[...], ctx.tokens, measure)
        return super().__call__(x, ctx)


def observing(
    names: Iterable[str], measures: Mapping[str, Measure] | None = None
) -> Callable[..., nnx.Module]:
    """A dense factory for `Dense`'s parameters that observes the layers of these names.

    Args:
        names: of the layers.
        measures: by the probes' names; the channels' maxima, as `probe`, if None.
    """
    observed, measures = frozenset(names), {"probe": MAXIMA} if measures is None else measures

    def dense(name: str, in_features: int, out_features: int, **options) -> nnx.Module:
        if name not in observed:
            return Dense(name, in_features, out_features, **options)
        return ObservedDense(name, in_features, out_features, measures=measures, **options)

    return dense
