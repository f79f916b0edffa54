"""What an import of QVGen's release was asked for: checked, put on record, and read again."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from convert.released_names import ReleasedPlan
from qvgen_jax.errors import UserError
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.schedule import RankDecay

RECORD = "released"
_OF_RECORD = {"released_step": int, "phase_steps": int, "lora_alpha": float}


@dataclasses.dataclass(frozen=True)
class ReleasedOptions:
    """What neither the checkpoint nor its base says; the fields are `import_released`'s.

    Raises:
        UserError: a number is out of its range.
    """

    clip_index: str = "countdown"
    bits: tuple[int, int] = (4, 4)
    released_step: int | None = None
    phase_steps: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self):
        # None, where verify was not given it, is what the import recorded.
        if self.bits is not None and not all(2 <= bits <= 8 for bits in self.bits):
            raise _refusal(
                "bits",
                ",".join(map(str, self.bits)),
                "weights,activations of 2 to 8 each; give those it was trained with, such as 4,4",
            )
        if self.released_step is not None and self.released_step < 0:
            raise _refusal(
                "released_step",
                self.released_step,
                "the number of steps trained, from 0; leave it out to go without the branch",
            )
        if self.phase_steps is not None and self.phase_steps < 1:
            raise _refusal(
                "phase_steps",
                self.phase_steps,
                "the steps of a phase, from 1; leave it out for the published recipe's",
            )
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise _refusal(
                "lora_alpha",
                self.lora_alpha,
                "a finite number above 0; leave it out to merge with 1, as their inference",
            )

    def decay(self, plan: ReleasedPlan, published: int) -> RankDecay | None:
        """The schedule that rebuilds the branch; None where it is left away.

        Args:
            plan: of the checkpoint.
            published: T of this family's published recipe.

        Raises:
            UserError: the step does not fit the checkpoint, or is not given but a phase is.
        """
        step = self.released_step
        if step is None and self.phase_steps is not None:
            raise UserError(
                f"--phase-steps is {self.phase_steps}, but only --released-step rebuilds the "
                "branch: give that too, or leave both out"
            )
        if step is None:
            return None
        if not plan.rank:
            raise UserError(
                f"--released-step is {step}, but the checkpoint has no L and R: it was saved after "
                "the last phase; leave it out"
            )
        return RankDecay(published if self.phase_steps is None else self.phase_steps, plan.rank)

    def adapter_scale(self, plan: ReleasedPlan) -> float:
        """What adapters are multiplied by: `lora_alpha / r`, 1 where it is not given.

        Raises:
            UserError: it is given, and the checkpoint has no adapters.
        """
        if self.lora_alpha is None:
            return 1.0
        if not plan.adapter_rank:
            raise UserError(
                f"--lora-alpha is {self.lora_alpha}, but the checkpoint holds no adapters "
                "(X.loraA.weight); leave it out"
            )
        return self.lora_alpha / plan.adapter_rank

    def quant(self, plan: ReleasedPlan, rank: int) -> QuantConfig:
        """The quantization of the packed transformer, its branch of this rank."""
        return QuantConfig.released(
            weight_bits=self.bits[0],
            act_bits=self.bits[1],
            rank=rank,
            buckets=plan.buckets,
            clip_index=self.clip_index,
            full_precision=plan.full_precision,
        )

    def record(self, decay: RankDecay | None) -> dict[str, dict]:
        """What goes into `quantization_config` beside the quantization, which says the rest."""
        phase_steps = None if decay is None else decay.phase_steps
        values = dataclasses.asdict(self) | {"phase_steps": phase_steps}
        return {RECORD: {name: values[name] for name in _OF_RECORD}}


def _refusal(field: str, value: object, expected: str) -> UserError:
    return UserError(f"--{field.replace('_', '-')} is {value}, expected {expected}")


def recorded(fields: Mapping[str, Any], quant: QuantConfig) -> ReleasedOptions:
    """The options that a packed folder was imported with.

    Args:
        fields: its `quantization_config`. One that an earlier version wrote has no record: its
            import is taken to have had none of the options that stand there.
        quant: as read from them.

    Raises:
        UserError: the record is damaged.
    """
    record = fields.get(RECORD, {})
    if not isinstance(record, dict) or not all(
        record.get(name) is None or type(record[name]) in (int, kind)
        for name, kind in _OF_RECORD.items()
    ):
        raise UserError(
            f"quantization_config has {RECORD}={record!r}, expected an object with the numbers "
            f"{', '.join(_OF_RECORD)}; import the checkpoint again"
        )
    bits = quant.weight_bits, quant.act_bits
    return ReleasedOptions(quant.clip_index, bits, *(record.get(name) for name in _OF_RECORD))
