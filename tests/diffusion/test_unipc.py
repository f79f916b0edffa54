from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.diffusion.schedulers import sample
from qvgen_jax.diffusion.unipc import UniPCConfig, unipc_schedule
from qvgen_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "unipc.npz")
CASES = {  # as in tests/golden/make_unipc.py
    "wan_1": (1, UniPCConfig(flow_shift=3.0)),
    "wan_2": (2, UniPCConfig(flow_shift=3.0)),
    "wan_3": (3, UniPCConfig(flow_shift=3.0)),
    "wan_5": (5, UniPCConfig(flow_shift=5.0)),
    "wan_25": (25, UniPCConfig(flow_shift=3.0)),
    "wan_50": (50, UniPCConfig(flow_shift=1.0)),
    "order3_7": (7, UniPCConfig(flow_shift=2.0, solver_order=3)),
    "order1_4": (4, UniPCConfig(solver_order=1)),
    "partly_corrected_6": (6, UniPCConfig(flow_shift=3.0, disable_corrector=(0, 2))),
}
WAN_JSON = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_p": None,
}


def _velocity(x, timestep, step):
    return jnp.sin(2.0 * x) + x * (timestep / 1000.0) - 0.3


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_the_one_of_diffusers(name):
    steps, config = CASES[name]
    schedule = unipc_schedule(config, steps)
    ours = jax.jit(lambda noise: sample(_velocity, noise, schedule))(GOLDEN["noise"])
    expected = GOLDEN[f"{name}.sample"]

    np.testing.assert_array_equal(schedule.timesteps, GOLDEN[f"{name}.timesteps"])
    # Both are float32 sums of the same terms in another order: rounding only.
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-5


def test_a_model_that_knows_the_clean_latents_is_followed_to_them():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 5))
    schedule = unipc_schedule(UniPCConfig(flow_shift=3.0), 4)

    def velocity(x, timestep, step):
        sigma = jnp.interp(timestep, schedule.timesteps[::-1], schedule.sigmas[-2::-1])
        return (x - clean) / sigma

    np.testing.assert_allclose(sample(velocity, noise, schedule), clean, atol=1e-6)


def test_settings_are_read_from_the_published_json():
    config = UniPCConfig.from_json(WAN_JSON)
    assert config == UniPCConfig(flow_shift=3.0, solver_order=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("prediction_type", "epsilon"),
        ("use_flow_sigmas", False),
        ("use_karras_sigmas", True),
        ("final_sigmas_type", "sigma_min"),
        ("solver_order", 4),
        ("solver_type", "bh1"),
        ("lower_order_final", False),
        ("shift_terminal", 0.1),
    ],
)
def test_an_unsupported_option_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        UniPCConfig.from_json(WAN_JSON | {field: value})


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_a_step_count_that_is_no_count_is_refused(steps):
    with pytest.raises(UserError, match="steps is"):
        unipc_schedule(UniPCConfig(), steps)
