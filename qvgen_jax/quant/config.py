"""What is quantized and how: one frozen object shared by training, packing and inference."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

from qvgen_jax.errors import UserError
from qvgen_jax.quant.blocks import in_block, split_block
from qvgen_jax.quant.clips import CLIP_INDEX_MODES
from qvgen_jax.quant.rotation import block_size

PRODUCT_DTYPES = ("int8", "bfloat16", "float32", "float64")
BRANCH_SPACES = ("tokens", "weights", "merged")
ACT_RANGES = ("token", "learned", "learned_zero")
SEARCHED = "searched"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """The quantization of one transformer. Layers have the names that `quantizable` lists.

    Attributes:
        weight_bits: 2 to 8, for every layer not in `bits`.
        act_bits: the same for activations.
        bits: layer name to (weight bits, activation bits), where a layer differs; of all blocks
            (`blocks.ffn.up`) or of one (`blocks.7.ffn.up`), which goes before.
        rank: of the low-rank branch at step 0; 0 for none.
        buckets: learned clip pairs per layer.
        clip_index: how a timestep chooses its pair, see `qvgen_jax.quant.clips`.
        single_clip: layers with one clip pair. Those that see only text belong here, so that they
            can be computed once per prompt; the release keeps `buckets` for them too.
        full_precision: layers that stay as they are.
        include_zero: widen each token's range to contain 0; the release does not.
        initial_clip: the sigmoid of every clip at step 0.
        clip_twice: apply `initial_clip` as a constant on top of the learned clips, as the release.
        range_dtype: what a token's range is computed in: `float32`, or `tensor` for its own dtype.
        product_dtype: what the codes are multiplied in: int8, bfloat16, float32 (or float64).
        branch_space: where the low-rank branch is applied in training: to the `tokens`, or, as the
            release does, to the `weights`: the same numbers to rounding. Or `merged`: an adapter
            inside the weights' quantizer (EfficientDM, arXiv 2310.03270, eq. 6), which an export
            has in its codes.
        act_range: what activations are quantized with: `token`, every token's own range and learned
            clips; `learned`, a learned step per bucket, symmetric (LSQ, arXiv 1902.08153);
            `learned_zero`, a learned zero point beside it (LSQ+, arXiv 2004.09576).
        symmetric_weights: the zero point of every kernel stays in the middle of its codes
            (QuaRot, arXiv 2404.00456, and DSAQuant, arXiv 2609.04031); LSQ+ learns it.
        rotation: `hadamard` before activations are quantized (QuaRot), or `none`.
        folded: layers whose tokens another linear makes ready, in its own columns: name to (that
            linear, width of a head). Attention mixes tokens, not channels: what `to_out` needs,
            `to_v` can do.
        smoothing: exponent of the channel balance between activations and weights at step 0
            (SmoothQuant, arXiv 2211.10438, SVDQuant, arXiv 2411.05007); 0 for none; `searched`
            where each layer has its own (`qvgen_jax.quant.smoothing_search`).
        branch_input: what the low-rank branch of an export reads: the tokens' `codes`, as QVGen's
            Phi, or the `tokens` themselves before they are quantized (SVDQuant).
        time_table: the linears that see only the timestep stay in full precision and are exported
            as a table of what they say at the sampler's timesteps (DSAQuant).
        table_steps: numbers of steps that the table serves, beside the pipeline's own; all of them
            in what an export says of itself.
        time_entries: of an exported table; None before there is one.
    """

    weight_bits: int = 4
    act_bits: int = 4
    bits: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    rank: int = 32
    buckets: int = 50
    clip_index: str = "bucket"
    single_clip: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()
    include_zero: bool = True
    initial_clip: float = 0.95
    clip_twice: bool = False
    range_dtype: str = "float32"
    product_dtype: str = "int8"
    branch_space: str = "tokens"
    act_range: str = "token"
    symmetric_weights: bool = False
    rotation: str = "none"
    folded: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    smoothing: float | str = 0.0
    branch_input: str = "codes"
    time_table: bool = False
    table_steps: tuple[int, ...] = ()
    time_entries: int | None = None

    def __post_init__(self):
        pairs = {"the default": (self.weight_bits, self.act_bits), **self.bits}
        for name, pair in pairs.items():
            if len(pair) != 2 or not all(isinstance(b, int) and 2 <= b <= 8 for b in pair):
                raise UserError(
                    f"bits={pair!r} of {name}; expected (weight bits, activation bits), 2 to 8 each"
                )
        for field, value, known in (
            ("clip_index", self.clip_index, CLIP_INDEX_MODES),
            ("range_dtype", self.range_dtype, ("float32", "tensor")),
            ("product_dtype", self.product_dtype, PRODUCT_DTYPES),
            ("branch_space", self.branch_space, BRANCH_SPACES),
            ("act_range", self.act_range, ACT_RANGES),
            ("rotation", self.rotation, ("none", "hadamard")),
            ("branch_input", self.branch_input, ("codes", "tokens")),
        ):
            if value not in known:
                raise UserError(f"{field}={value!r}; expected one of {', '.join(known)}")
        if self.rank < 0 or self.buckets < 1 or not 0 < self.initial_clip < 1:
            raise UserError(
                f"rank={self.rank}, buckets={self.buckets}, initial_clip={self.initial_clip}; "
                "expected rank >= 0, buckets >= 1 and a clip between 0 and 1"
            )
        if self.smoothing != SEARCHED and not 0 <= self.smoothing < 1:
            raise UserError(
                f"smoothing={self.smoothing}; expected 0 (off) to below 1, or {SEARCHED!r}"
            )
        if self.learned_steps and (self.smoothing or self.rotation != "none"):
            raise UserError(
                f"act_range={self.act_range!r} with smoothing={self.smoothing}, rotation="
                f"{self.rotation!r}; a learned step starts from tokens as the teacher has them: "
                "leave smoothing and rotation away, or take act_range='token'"
            )
        if self.learned_steps and self.branch_input == "tokens":
            raise UserError(
                f"act_range={self.act_range!r} with branch_input='tokens'; a branch that reads "
                "tokens is svdquant's, whose tokens have their own ranges: take act_range='token'"
            )

    @classmethod
    def released(cls, **changes) -> "QuantConfig":
        """The behaviour of QVGen's released code, changed where `changes` say so."""
        behaviour = {
            "clip_index": "t_mod_50",
            "include_zero": False,
            "clip_twice": True,
            "range_dtype": "tensor",
        }
        return cls(**{**behaviour, **changes})

    @property
    def clip_ratio(self) -> float:
        """The constant on top of the learned clips."""
        return self.initial_clip if self.clip_twice else 1.0

    def bits_of(self, name: str, block: int | None = None) -> tuple[int, int]:
        """(weight bits, activation bits) of a layer; of all blocks' if `block` is None."""
        everywhere = self.bits.get(name, (self.weight_bits, self.act_bits))
        return tuple(self.bits.get(in_block(name, block), everywhere))

    def blocks_by_bits(self, name: str, blocks: int | None) -> dict[tuple[int, int], list[int]]:
        """Bits to the numbers of the blocks that have them, 0 for a layer outside the blocks."""
        found: dict[tuple[int, int], list[int]] = {}
        for block in [None] if blocks is None else range(blocks):
            found.setdefault(self.bits_of(name, block), []).append(block or 0)
        return found

    @property
    def by_block(self) -> bool:
        """Whether blocks may differ in bits."""
        return any(split_block(name)[0] is not None for name in self.bits)

    def with_widest(self, names: Iterable[str], blocks: Iterable[int]) -> "QuantConfig":
        """The config of some blocks alone, counted from 0; of all of them, a layer's widest bits.

        Args:
            names: the layers that every block has.
            blocks: numbers of neighbours.
        """
        bits = {name: pair for name, pair in self.bits.items() if split_block(name)[0] is None}
        blocks = tuple(blocks)
        for name in names:
            pairs = [self.bits_of(name, block) for block in blocks]
            bits[name] = tuple(max(column) for column in zip(*pairs, strict=True))
            if len(set(pairs)) > 1:
                bits |= {in_block(name, place): pair for place, pair in enumerate(pairs)}
        return dataclasses.replace(self, bits=bits)

    def token_bits(self, name: str) -> tuple[int, ...]:
        """A layer's activation bits: of one block after the other where these differ."""
        numbers = [block for block, kind in map(split_block, self.bits) if kind == name]
        last = max((block for block in numbers if block is not None), default=None)
        blocks = (None,) if last is None else range(last + 1)
        found = tuple(self.bits_of(name, block)[1] for block in blocks)
        everywhere = self.bits_of(name)[1]
        return (everywhere,) if set(found) == {everywhere} else found

    @property
    def learned_steps(self) -> bool:
        """Whether activations have learned steps in place of ranges of their own."""
        return self.act_range != "token"

    @property
    def merged(self) -> bool:
        """Whether there is an adapter inside the weights' quantizer."""
        return self.branch_space == "merged" and self.rank > 0

    @property
    def token_rank(self) -> int:
        """Of the branch that every token passes; a merged one costs a product of weights a step."""
        return 0 if self.merged else self.rank

    def buckets_of(self, name: str) -> int:
        """How many clip pairs a layer has."""
        return 1 if name in self.single_clip else self.buckets

    def block_of(self, name: str, width: int) -> int:
        """How many channels the rotation of a layer's tokens `[..., width]` mixes; 1 is none."""
        if self.rotation == "none":
            return 1
        return block_size(self.folded[name][1] if name in self.folded else width)

    def own_block_of(self, name: str, width: int) -> int:
        """The same of what a layer does itself: `block_of`, unless that is folded."""
        return 1 if name in self.folded else self.block_of(name, width)

    def smooths(self, name: str) -> bool:
        """Whether a layer divides its tokens itself: `smoothing`, unless that is folded."""
        return self.smoothing != 0 and name not in self.folded

    def quantized(self, names: Iterable[str]) -> tuple[str, ...]:
        """The layers of a model that this config quantizes, in the model's order.

        Raises:
            UserError: the config names a layer that the model does not have.
        """
        names = tuple(names)
        folded = (*self.folded, *(source for source, _ in self.folded.values()))
        stacked = [split_block(name)[1] for name in self.bits]
        for name in (*stacked, *self.single_clip, *self.full_precision, *folded):
            if name in self.full_precision and split_block(name)[0] is not None:
                raise UserError(
                    f"full_precision names {name!r}, of one block: a layer stays in full precision "
                    "in all blocks or in none; give that block 8 bits instead, "
                    f"bits=(({name!r}, 8, 8),)"
                )
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                raise UserError(
                    f"the quantization config names {name!r}, which is no quantizable layer of "
                    f"this model; the nearest is {near[0] if near else None!r}"
                )
        return tuple(name for name in names if name not in self.full_precision)

    def check_blocks(self, blocks: int) -> None:
        """Refuse bits of a block that a model of so many blocks does not have.

        Raises:
            UserError: it names the layer.
        """
        for name in self.bits:
            if (split_block(name)[0] or 0) >= blocks:
                raise UserError(
                    f"the quantization config gives bits to {name!r}, and the model has {blocks} "
                    f"blocks, 0 to {blocks - 1}; the bits are of another model, or the number is "
                    "wrong"
                )
