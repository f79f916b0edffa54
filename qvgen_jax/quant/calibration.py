"""Statistics of what every linear reads, stacked layers included.

Each observed linear has probes that its output does not depend on. The backward pass returns the
statistics as the probes' gradients, so `jax.grad` with respect to the probes gives those of all
layers at once, out of the scan over blocks too.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.quant.dense import Dense, QuantContext


class Probe(nnx.Variable):
    """What one statistic of one linear comes out at: zeros in its shape, float32."""


@jax.custom_vjp
def observe(x: jax.Array, probe: jax.Array) -> jax.Array:
    """`x [..., in]`; the gradient of `probe [in]` is `max |x|` over all tokens, whatever follows.

    Of a linear that runs several times the gradients, and so the maxima, would add up.
    """
    del probe
    return x


def _forward(x, probe):
    maxima = jnp.max(jnp.abs(x.astype(probe.dtype)), axis=tuple(range(x.ndim - 1)))
    return x, maxima


def _backward(statistic, cotangent):
    return cotangent, statistic


observe.defvjp(_forward, _backward)


@jax.custom_vjp
def observe_moments(x: jax.Array, probe: jax.Array) -> jax.Array:
    """`x [..., in]`; the gradient of `probe [3]` is the mean of |x|, of x and of x^2."""
    del probe
    return x


def _moments_forward(x, probe):
    wide = x.astype(probe.dtype)
    return x, jnp.stack([jnp.mean(jnp.abs(wide)), jnp.mean(wide), jnp.mean(jnp.square(wide))])


observe_moments.defvjp(_moments_forward, _backward)


class ObservedDense(Dense):
    """A `Dense` whose tokens are observed."""

    def __init__(self, name: str, in_features: int, out_features: int, **options):
        super().__init__(name, in_features, out_features, **options)
        self.probe = Probe(jnp.zeros((in_features,), jnp.float32))
        self.moments = Probe(jnp.zeros((3,), jnp.float32))

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        x = observe_moments(observe(x, self.probe[...]), self.moments[...])
        return super().__call__(x, ctx)


def observing(names: Iterable[str]) -> Callable[..., nnx.Module]:
    """A dense factory for `Dense`'s parameters that observes the layers of these names."""
    observed = frozenset(names)

    def dense(name: str, in_features: int, out_features: int, **options) -> nnx.Module:
        layer = ObservedDense if name in observed else Dense
        return layer(name, in_features, out_features, **options)

    return dense
