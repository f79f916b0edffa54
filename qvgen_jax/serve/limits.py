"""What the page may be asked for: less than `generate` takes, because anybody may ask a server."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qvgen_jax.errors import UserError
from qvgen_jax.request import whole_number

BOTH, FULL, LOW = "both", "full precision", "low-bit"


class Limits(NamedTuple):
    """The most that one video may have.

    Attributes:
        characters: of a prompt; text encoders read 512 tokens at most.
        steps: calls of the transformer.
        positions: latent frames x height x width, the last two in pixels.
        temporal: frames to a latent frame, after the first, which is one of its own.
        guidance: the scale.
    """

    characters: int
    steps: int
    positions: int
    temporal: int
    guidance: float = 30.0


class Asked(NamedTuple):
    """What a user typed; numbers may be None for the model's own.

    Attributes:
        prompt, negative_prompt: texts.
        seed: of the noise, the same for both sides.
        num_frames, height, width, steps: whole numbers.
        guidance_scale: 1 for none.
        sides: `BOTH`, `FULL` or `LOW`.
    """

    prompt: str
    negative_prompt: str
    seed: Any
    num_frames: Any
    height: Any
    width: Any
    steps: Any
    guidance_scale: Any
    sides: str = FULL

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `Pipeline.latent_steps`, but for the texts."""
        names = ("num_frames", "height", "width", "steps", "guidance_scale")
        return {"seeds": self.seed} | {name: getattr(self, name) for name in names}


def limits_of(defaults: Mapping[str, Any], temporal: int) -> Limits:
    """The limits for a model, from its own settings and the VAE's frames to a latent frame.

    Three times the positions of its own video hold 720p where 480p is usual; four times the steps
    are more than any sampler here gains from. Pixels are no measure: one frame with the pixels of a
    long video has nearly `temporal` times its tokens.
    """
    own = _positions(*(defaults[name] for name in ("num_frames", "height", "width")), temporal)
    return Limits(2000, max(4 * defaults["steps"], 100), 3 * own, temporal)


def _positions(num_frames: int, height: int, width: int, temporal: int) -> int:
    return ((num_frames - 1) // temporal + 1) * height * width


def check(asked: Asked, limits: Limits, defaults: Mapping[str, Any], student: bool) -> Asked:
    """The request with the model's own settings filled in; `generate`'s own checks come after.

    Args:
        asked: as it came, of any types.
        limits: of `limits_of`.
        defaults: of the pipeline.
        student: whether there is a low-bit side.

    Raises:
        UserError: it names the value, what was expected and what to do.
    """
    own = {name: defaults[name] for name in asked.settings() if name in defaults}
    asked = asked._replace(**{k: v for k, v in own.items() if getattr(asked, k) is None})
    for name in ("prompt", "negative_prompt"):
        text = getattr(asked, name)
        if not isinstance(text, str) or len(text) > limits.characters:
            size = f"has {len(text)} characters" if isinstance(text, str) else f"is {text!r}"
            raise UserError(
                f"the {name.replace('_', ' ')} {size}, expected at most {limits.characters}; "
                "shorten it"
            )
    if not asked.prompt.strip():
        raise UserError("the prompt is empty; say what the video should show")
    if asked.sides not in (BOTH, FULL, LOW):
        raise UserError(f"the choice is {asked.sides!r}, expected {BOTH}, {FULL} or {LOW}")
    if asked.sides != FULL and not student:
        raise UserError("there is no low-bit model here yet; choose full precision")
    whole_number(asked.steps, "steps", high=limits.steps)
    sizes = [whole_number(getattr(asked, n), n) for n in ("num_frames", "height", "width")]
    if (positions := _positions(*sizes, limits.temporal)) > limits.positions:
        raise UserError(
            f"{' x '.join(map(str, sizes))} (frames x height x width) are {positions} latent "
            f"frames x height x width, expected at most {limits.positions}; ask for fewer frames "
            "or a smaller size"
        )
    scale = asked.guidance_scale
    # "Not at most", because it may be NaN.
    if not isinstance(scale, int | float) or not 0 <= scale <= limits.guidance:
        raise UserError(
            f"guidance is {scale!r}, expected 0 to {limits.guidance:g}; 1 means no guidance"
        )
    return asked
