"""What the page refuses before anything is computed."""

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.generation_config import WAN_DEFAULTS
from qvgen_jax.serve.limits import BOTH, FULL, LOW, Asked, check, limits_of

LIMITS = limits_of(WAN_DEFAULTS, temporal=4)
ASKED = Asked("a red star", "", 7, 81, 480, 832, 50, 5.0, BOTH)


def checked(student: bool = True, **changes) -> Asked:
    return check(ASKED._replace(**changes), LIMITS, WAN_DEFAULTS, student)


def test_the_models_own_settings_pass_and_stand_for_what_is_left_empty():
    empty = dict.fromkeys(("num_frames", "height", "width", "steps", "guidance_scale"))
    assert checked(**empty) == checked() == ASKED


def test_720p_passes_where_480p_is_usual():
    checked(height=720, width=1280)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "x" * 2001}, "the prompt has 2001 characters, expected at most 2000"),
        ({"negative_prompt": "x" * 2001}, "the negative prompt has 2001"),
        ({"prompt": None}, "the prompt is None"),
        ({"steps": 201}, "steps is 201, expected a whole number from 1 to 200"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"num_frames": 81000}, "81000 x 480 x 832 .* ask for fewer frames"),
        # Of fewer pixels than the model's own video.
        ({"num_frames": 1, "height": 4800, "width": 6480}, "31104000 latent frames x height x"),
        ({"height": 10**30}, "height is 1000"),
        ({"width": -16}, "width is -16"),
        ({"guidance_scale": float("nan")}, "guidance is nan"),
        ({"guidance_scale": 31.0}, "expected 0 to 30"),
        ({"guidance_scale": "5"}, "guidance is '5'"),
        ({"sides": "everything"}, "expected both, full precision or low-bit"),
        ({"sides": None}, "the choice is None"),
    ],
)
def test_what_a_page_would_not_send_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        checked(**changes)


@pytest.mark.parametrize("sides", [BOTH, LOW])
def test_a_low_bit_video_needs_an_export(sides):
    with pytest.raises(UserError, match="no low-bit model"):
        checked(student=False, sides=sides)
    assert checked(student=False, sides=FULL).sides == FULL
