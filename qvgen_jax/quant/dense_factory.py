"""Which linear a network is built with: by its form, and by what stays in full precision."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, QuantDense
from qvgen_jax.quant.packed_dense import PackedDense


def dense_factory(config: QuantConfig, form: str, **packed: Any) -> Callable[..., nnx.Module]:
    """A function with `Dense`'s signature that builds each layer as the config wants it.

    Args:
        config: names the layers that stay in full precision.
        form: `train` for `QuantDense`, `packed` for `PackedDense`, `plain` for `Dense` everywhere.
        packed: `backend` and `chip` of packed layers.

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
        return layer(name, in_features, out_features, config=config, **arguments, **packed)

    return dense
