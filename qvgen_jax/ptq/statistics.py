"""What is known of the tokens of a stage's linears: maxima, some rows, and second moments."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels.reference import wide_type
from qvgen_jax import sharding
from qvgen_jax.models import TransformerConfig
from qvgen_jax.ptq.stages import Network, on_devices, plain_network, spread
from qvgen_jax.quant.calibration import MAXIMA, Measure, Probe, observing, without_padding
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.untrained import Seen


def _second_moments(rows: jax.Array, real: jax.Array | None) -> jax.Array:
    rows = without_padding(rows, real)
    return jnp.matmul(
        rows.T, rows, precision="highest", preferred_element_type=wide_type(rows.dtype)
    )


GRAM = Measure(lambda width: (width, width), _second_moments)


def some_rows(count: int, seed: int) -> Measure:
    """So many rows, one drawn from each of as many equal parts; all, some twice, if they are few.

    The positions are the same in every batch, whose samples are not.
    """
    drawn = (np.arange(count) + np.random.default_rng(seed).random(count)) / count

    def choose(rows: jax.Array, real: jax.Array | None) -> jax.Array:
        if real is None:
            return rows[np.asarray(drawn * len(rows), np.int32)]
        first = jnp.argsort(~real)  # Stable: those that are no padding, in their order.
        return rows[first[(drawn * jnp.sum(real)).astype(jnp.int32)]]

    return Measure(lambda width: (count, width), choose)


class Observer:
    """Measures the linears of one kind of stage, in full precision.

    Args:
        model: of the whole transformer.
        dtype: in which it computes.
        kind: of the stage.
        names: of its linears.
        rows: of tokens to keep of each batch.
        seed: of their choice.
        moments: whether to sum `x x^T` too.
    """

    def __init__(
        self,
        model: TransformerConfig,
        dtype: jnp.dtype,
        kind: str,
        names: Sequence[str],
        *,
        rows: int,
        seed: int,
        moments: bool,
    ):
        measures = {"maxima": MAXIMA, "rows": some_rows(rows, seed)}
        measures |= {"gram": GRAM} if moments else {}
        self._network = plain_network(model, dtype, observing(names, measures), Probe)
        self._kind, self._names = kind, tuple(names)

    def __call__(
        self, params: Mapping, batches: Sequence[tuple], mesh: Mesh | None
    ) -> dict[str, Seen]:
        """By the linears' names, of all batches together.

        Args:
            params: of the stage.
            batches: its arguments.
            mesh: whose devices share a batch.
        """
        params, total, found = on_devices(params, mesh), None, []
        with sharding.under(mesh):
            for args in batches:
                seen = _measure(self._network, self._kind, self._names, params, spread(args, mesh))
                found.append({name: each.rows for name, each in seen.items()})
                sums = {name: (each.maxima, each.gram) for name, each in seen.items()}
                del seen
                total = sums if total is None else _together(total, sums)
        rows = {name: jnp.concatenate([each[name] for each in found]) for name in self._names}
        return {name: Seen(maxima, rows[name], gram) for name, (maxima, gram) in total.items()}

    def lower(self, params: Mapping, args: tuple) -> jax.stages.Lowered:
        """The program of one batch, for who asks what it costs."""
        return _measure.lower(self._network, self._kind, self._names, params, args)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    network: Network, kind: str, names: tuple[str, ...], params: dict, args: tuple
) -> dict[str, Seen]:
    def total(probes: dict) -> jax.Array:
        y = network.run(kind, params, args, probes)
        floats = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in floats)

    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), network.rest[0])
    probes = jax.grad(total)(zeros)
    return {name: _seen(layer_at(probes, name)) for name in names}


def _seen(node: Mapping) -> Seen:
    """Of one linear; of a block's, without the axis of its one layer."""
    rank = {"maxima": 1, "rows": 2, "gram": 2}
    flat = {key: leaf.reshape(leaf.shape[leaf.ndim - rank[key] :]) for key, leaf in node.items()}
    return Seen(flat["maxima"].astype(jnp.float32), flat["rows"], flat.get("gram"))


@partial(jax.jit, donate_argnums=0)  # Sums of `x x^T` are what is large here.
def _together(total: dict, sums: dict) -> dict:
    """Maxima and sums of `x x^T`, or None, of two parts of the tokens."""

    def both(one: tuple, other: tuple) -> tuple:
        gram = None if one[1] is None else one[1] + other[1]
        return jnp.maximum(one[0], other[0]), gram

    return {name: both(each, sums[name]) for name, each in total.items()}
