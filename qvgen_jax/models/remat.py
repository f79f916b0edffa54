"""What of a block is kept for the backward pass, by name; the rest is computed again there."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from kernels.attention_call import KEPT
from kernels.attention_cudnn import is_kept
from qvgen_jax.errors import UserError

POLICIES = ("none", "blocks", "attention", "offload")
"""By what they keep, the most first, but for the last:

`none` recomputes nothing. `attention` keeps every block's input and the results of its
self-attention, the dearest to compute again. `blocks` keeps the inputs alone. `offload` keeps what
`attention` does in the host's memory (with cuDNN, whose results have no name, the inputs alone).
"""

_INPUT = "block input"


def recomputed(body: Callable, policy: str) -> Callable:
    """A scan's `body(x, block) -> (x, y)` whose backward pass keeps what the policy says.

    Raises:
        UserError: an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"remat is {policy!r}; expected one of {', '.join(POLICIES)}")
    if policy == "none":
        return body

    def named(x: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        return body(checkpoint_name(x, _INPUT), block)

    # Scan keeps the two passes apart: nothing needs the barriers against merging them.
    return jax.checkpoint(named, prevent_cse=False, policy=_KEEPING[policy])


def _attention(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    return is_kept(primitive, *operands) or _named(primitive, *operands, **params)


_named = jax.checkpoint_policies.save_only_these_names(KEPT)
_KEEPING = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "attention": _attention,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[KEPT, _INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
