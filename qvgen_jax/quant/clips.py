"""Which learned clip pair a timestep uses: in training, inference and both CFG branches alike."""

import jax
import jax.numpy as jnp
import numpy as np

CLIP_INDEX_MODES = ("bucket", "t_mod_50", "countdown", "last")


def clip_index(timesteps: jax.Array, mode: str = "bucket", buckets: int = 50) -> jax.Array:
    """One clip index per sample.

    `bucket` splits 0..1000 evenly. The other modes are the release's: `t_mod_50` is what it trains
    with, `countdown` and `last` what its inference scripts do.

    Args:
        timesteps: `[batch]`, 0 to 1000 inclusive.
        mode: one of `CLIP_INDEX_MODES`.
        buckets: how many clip pairs a layer has.

    Returns:
        int32 `[batch]`.

    Raises:
        ValueError: an unknown mode, or `countdown`, which depends on the call and not on t.
    """
    if mode == "bucket":
        # Comparisons with the edges: XLA may turn a division into a product that rounds elsewhere.
        edges = np.asarray([1000 * k / buckets for k in range(1, buckets)], np.float32)
        passed = timesteps.astype(jnp.float32)[:, None] >= edges
        return jnp.sum(passed, axis=-1, dtype=jnp.int32)
    if mode == "t_mod_50":
        return timesteps.astype(jnp.int32) % buckets
    if mode == "last":
        return jnp.full(timesteps.shape, buckets - 1, jnp.int32)
    if mode == "countdown":
        raise ValueError(
            "clip_index='countdown' counts the transformer's calls (49, 48, ... 0, 0) and cannot "
            "be computed from the timestep; pass clip_index=[batch] at every call, see countdown"
        )
    raise ValueError(f"clip_index={mode!r}; expected one of {', '.join(CLIP_INDEX_MODES)}")


def countdown(call: jax.Array | int, buckets: int = 50) -> jax.Array:
    """The clip index of `countdown`: the last at the transformer's first call, then one less each.

    The release's inference with `--fix`; Wan's guidance calls the transformer twice per step, the
    prompt first, CogVideoX's once.

    Args:
        call: int32, how many calls went before.
        buckets: how many clip pairs a layer has, 50 in the release.
    """
    return jnp.maximum(buckets - 1 - jnp.asarray(call, jnp.int32), 0)
