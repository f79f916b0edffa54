"""The decay of the low-rank branch as pure functions of the step (QVGen, section 4)."""

import dataclasses

import jax
import jax.numpy as jnp

from qvgen_jax.errors import UserError

DECAY_SHAPES = ("cosine", "linear", "abrupt")
DECAY_ORDERS = ("smallest", "largest")


@dataclasses.dataclass(frozen=True)
class RankDecay:
    """When and how the branch shrinks.

    Attributes:
        phase_steps: T, the steps between two halvings.
        rank: at step 0; 0 trains without the branch.
        shrink: what the rank is divided by at each boundary (lambda = 1 / shrink).
        shape: `cosine` or `linear`, the way from 1 to 0 within a phase; `abrupt` is a control: one
            phase at full weight, then nothing.
        order: the singular values that leave first, `smallest` or, as a control, `largest`.
        refactor: whether the living components become an SVD again at every boundary.
    """

    phase_steps: int
    rank: int = 32
    shrink: int = 2
    shape: str = "cosine"
    order: str = "smallest"
    refactor: bool = True

    def __post_init__(self):
        if self.phase_steps < 1 or self.rank < 0 or self.shrink < 2:
            raise UserError(
                f"rank decay needs phase_steps >= 1, rank >= 0 and shrink >= 2, got {self}"
            )
        if self.shape not in DECAY_SHAPES or self.order not in DECAY_ORDERS:
            raise UserError(
                f"rank decay shape={self.shape!r}, order={self.order!r}; expected one of "
                f"{', '.join(DECAY_SHAPES)} and one of {', '.join(DECAY_ORDERS)}"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every phase, ending with 0."""
        ranks = [self.rank]
        while ranks[-1]:
            ranks.append(0 if self.shape == "abrupt" else ranks[-1] // self.shrink)
        return tuple(ranks)

    @property
    def end(self) -> int:
        """The first step without the branch."""
        return self.phase_steps * (len(self.ranks) - 1)


def phase_rank(step: int, decay: RankDecay) -> int:
    """`rank_at` of a Python int, without touching a device."""
    return decay.ranks[min(step // decay.phase_steps, len(decay.ranks) - 1)]


def rank_at(step: jax.Array | int, decay: RankDecay) -> jax.Array:
    """The rank at a step: int32 `[]`; 0 from `decay.end` on."""
    phase = jnp.minimum(jnp.asarray(step, jnp.int32) // decay.phase_steps, len(decay.ranks) - 1)
    return jnp.asarray(decay.ranks, jnp.int32)[phase]


def fade_at(step: jax.Array | int, decay: RankDecay) -> jax.Array:
    """u, the weight of the components that leave at the end of this phase: float32 `[]`."""
    progress = (jnp.asarray(step, jnp.int32) % decay.phase_steps).astype(jnp.float32)
    progress = progress / decay.phase_steps
    if decay.shape == "abrupt":
        return jnp.ones((), jnp.float32)
    if decay.shape == "linear":
        return 1 - progress
    return (1 + jnp.cos(jnp.pi * progress)) / 2


def gate_at(step: jax.Array | int, decay: RankDecay) -> jax.Array:
    """gamma, the weight of every component: float32 `[decay.rank]`, 1 kept, u leaving, 0 gone."""
    rank = rank_at(step, decay)
    component = jnp.arange(decay.rank, dtype=jnp.int32)
    leaving = jnp.where(component < rank, fade_at(step, decay), 0)
    return jnp.where(component < rank // decay.shrink, 1, leaving).astype(jnp.float32)


def is_boundary(step: int, decay: RankDecay) -> bool:
    """Whether the rank drops on entering this step: refactor, or drop the branch at `decay.end`."""
    return 0 < step <= decay.end and step % decay.phase_steps == 0


def boundaries(decay: RankDecay, steps: int) -> tuple[int, ...]:
    """The steps up to `steps` on entering which the rank drops."""
    return tuple(step for step in range(1, min(decay.end, steps) + 1) if is_boundary(step, decay))


def phase_steps_for(
    total_steps: int, decay_fraction: float, rank: int, shrink: int = 2, shape: str = "cosine"
) -> int:
    """T such that the branch is gone after `decay_fraction` of training.

    Raises:
        UserError: the fraction is not in (0, 1], or there are fewer steps than phases.
    """
    if not 0 < decay_fraction <= 1:
        raise UserError(f"decay_fraction={decay_fraction}; expected a number in (0, 1]")
    phases = len(RankDecay(1, rank, shrink, shape).ranks) - 1
    steps = int(total_steps * decay_fraction) // max(phases, 1)
    if steps < 1:
        raise UserError(
            f"{total_steps} steps with decay_fraction={decay_fraction} leave less than one step "
            f"for each of the {phases} phases of rank {rank}; train longer or start at a lower rank"
        )
    return steps
