"""Bytes on each device, by what they are for: arguments counted, temporaries estimated.

What the step is given (weights, moments, teacher, batch) is known to the byte. What it makes on its
way is estimated from a few sizes, with two factors that were fitted to compiled programs.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from qvgen_jax.models.wan import WanConfig
from qvgen_jax.plan.shapes import Run, abstract_mesh, arguments
from qvgen_jax.sharding import TOKEN_BLOCK
from qvgen_jax.training.optimizer import split_frozen


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
        master: float32 weights, the quantizers' and the branch's parameters among them.
        moments: Adam's two, and the rest of the optimizer's state.
        average: of the weights, where the run keeps one.
        teacher: its weights, as `train.teacher_weights` has them; with `train.target=truth` no step
            reads them, but they are there.
        batch: latents and prompts.
        gradients: float32, of all that trains at once: their norm is needed before any is applied.
            Twice where they accumulate, the sum and a part's.
        activations: kept from forward to backward pass, see `qvgen_jax.models.remat`.
        temporaries: of the block that is being computed, and its weights, gathered.
        host: of the activations what waits in the host's memory instead.
    """

    master: int
    moments: int
    average: int
    teacher: int
    batch: int
    gradients: int
    activations: int
    temporaries: int
    host: int = 0

    @property
    def arguments(self) -> int:
        """What the step is given."""
        return self.master + self.moments + self.average + self.teacher + self.batch

    @property
    def made(self) -> int:
        """What the step makes on its way."""
        return self.gradients + self.activations + self.temporaries

    @property
    def peak(self) -> int:
        """All of it: the new state takes the old one's place."""
        return self.arguments + self.made


def estimate(run: Run, sizes: Mapping[str, int], platform: str) -> Memory:
    """Of one device of a mesh with these sizes.

    Args:
        run: what is trained.
        sizes: of the mesh's axes.
        platform: of the devices; "tpu" pads arrays to its tiles.

    Raises:
        UserError: a parameter does not divide over the mesh.
    """
    mesh = abstract_mesh(sizes)
    state, batch, teacher, empty_text, _ = arguments(run, mesh)
    kept, host = _kept(run, sizes)
    elements = in_tiles if platform == "tpu" else math.prod

    def stored(tree: Any) -> int:
        """Bytes of the shards on one device."""
        leaves = jax.tree.leaves(tree)
        return sum(elements(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    train = run.config["train"]
    trained, _ = split_frozen(state["params"], train["freeze_weights"])
    return Memory(
        master=stored(state["params"]),
        moments=stored(state["opt"]) + stored(state["levels"]),
        average=stored(state.get("ema", {})),
        teacher=stored(teacher),
        batch=stored(batch) + stored(empty_text),
        gradients=stored(trained) * (1 if train["accumulate"] == 1 else 2),
        activations=kept,
        temporaries=_working(run, sizes),
        host=host,
    )


def in_tiles(shape: tuple[int, ...]) -> int:
    """Elements that an array takes on a TPU.

    Two of its dimensions lie in tiles of 8 x 128, or of 4, 2 or 1 x 128 where the first is shorter;
    the compiler takes those two that waste least. A vector lies packed.
    """
    if len(shape) < 2:
        return math.prod(shape)

    def tiled(rows: int, columns: int) -> int:
        tall = _up(rows, 8) if rows >= 8 else 1 << (rows - 1).bit_length()
        return tall * _up(columns, 128)

    whole = math.prod(shape)
    return min(whole // (a * b) * tiled(a, b) for a, b in itertools.permutations(shape, 2))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rows(run: Run, sizes: Mapping[str, int]) -> float:
    """Tokens that a device holds of its samples at once."""
    train, context = run.config["train"], sizes["context"]
    samples = train["batch_size"] // train["accumulate"] / (sizes["data"] * sizes["fsdp"])
    tokens = run.block_tokens
    return samples * (_up(tokens, context * TOKEN_BLOCK) if context > 1 else tokens) / context


def _kept(run: Run, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of activations on the device, and on the host."""
    model, policy = run.model, run.config["train"]["remat"]
    width = 2 if run.config["compute_dtype"] == "bfloat16" else 4
    rows, layers = _rows(run, sizes), model.num_layers
    inputs = layers * rows * model.dim * width
    # The result, and in float32 the logarithm of each head's sum.
    attended = layers * rows * (model.dim * width + 4 * model.num_attention_heads)
    if policy == "none":
        return int(layers * rows * sum(_everything(run, width))), 0
    if policy == "offload":
        return 0, int(inputs + attended)
    return int(inputs + (attended if policy == "attention" else 0)), 0


def _everything(run: Run, width: int) -> Iterator[float]:
    """Bytes a token of what a block's backward pass reads where nothing is computed again."""
    dim, hidden = run.model.dim, _hidden(run)
    crossed = isinstance(run.model, WanConfig)
    # Of each linear its input in floats and in codes; norms keep theirs in float32.
    inputs = dim * (4 + 2 * crossed) + hidden
    yield inputs * (width + 1)
    yield 4 * dim * (2 + crossed)
    # What attention keeps, GELU's input, and the residual stream.
    yield width * (4 * dim * (1 + crossed) + hidden + 2 * dim)


def _hidden(run: Run) -> int:
    model = run.model
    return model.ffn_dim if isinstance(model, WanConfig) else 4 * model.dim


# Fitted to what libtpu 0.0.48 needs for the steps of Wan-14B on v6e:16x16 and Wan-1.3B on v5e:4x4:
# arrays in the compute type, as wide as a block and its feed-forward, that the block at work holds
# of its tokens; and bytes that it holds of each of its weights, gathered, in all their types and
# with their gradients. And how many arrays more where each linear smooths and rotates its tokens,
# which adds 0.60 GB to the former.
_ARRAYS = 10.1
_PREPARED = 3.1
_BYTES_A_WEIGHT = 13.5


def _working(run: Run, sizes: Mapping[str, int]) -> int:
    """Bytes of the block at work."""
    width = 2 if run.config["compute_dtype"] == "bfloat16" else 4
    dim, hidden = run.model.dim, _hidden(run)
    crossed = isinstance(run.model, WanConfig)
    quant = run.config["quant"]
    prepared = quant["smoothing"] or quant["rotation"] != "none"
    arrays = _ARRAYS + (_PREPARED if prepared else 0)
    tokens = arrays * _rows(run, sizes) * (dim + hidden) * width
    weights = _BYTES_A_WEIGHT * dim * ((4 + 4 * crossed) * dim + 2 * hidden)
    return int((tokens + (weights if _cut(sizes) else 0)) / sizes["tensor"])


def _cut(sizes: Mapping[str, int]) -> bool:
    """Whether weights are gathered at all."""
    return sizes["fsdp"] > 1
