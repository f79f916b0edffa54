"""The bits that a layer may get, by name: `w4a4`, or `w4` and `a4` for one of its operands."""

import re
from typing import NamedTuple

from qvgen_jax.errors import UserError


class Candidate(NamedTuple):
    """Bits of weights and activations; 0 leaves that operand as it is."""

    weights: int
    activations: int

    @property
    def name(self) -> str:
        """Such as `w4a4`."""
        parts = (("w", self.weights), ("a", self.activations))
        return "".join(f"{letter}{bits}" for letter, bits in parts if bits)

    @property
    def whole(self) -> bool:
        """Whether both operands are quantized: what a layer can really get."""
        return bool(self.weights and self.activations)


def parse_candidates(text: str) -> tuple[Candidate, ...]:
    """Candidates from `w3a3,w4a4,w8`.

    Raises:
        UserError: one is of another form, of other bits than 2 to 8, or there twice.
    """
    found = [_parse(word.strip().lower()) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise UserError(f"--candidates={text} names one twice; leave it out")
    return tuple(found)


def _parse(word: str) -> Candidate:
    match = re.fullmatch(r"(?:w(\d))?(?:a(\d))?", word)
    bits = [int(part or 0) for part in match.groups()] if match else []
    if not any(bits) or not all(width == 0 or 2 <= width <= 8 for width in bits):
        raise UserError(
            f"--candidates: {word!r} is none; expected w4a4, w4 (weights alone) or a4 (activations "
            "alone), 2 to 8 bits, with commas between them"
        )
    return Candidate(*bits)
