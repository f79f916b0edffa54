"""Makes unipc.npz: trajectories of diffusers' UniPC scheduler on a fixed velocity function.

Run: python tests/golden/make_unipc.py (needs torch and diffusers).
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

CASES = {  # name: (steps, scheduler options)
    "wan_1": (1, {"flow_shift": 3.0}),
    "wan_2": (2, {"flow_shift": 3.0}),
    "wan_3": (3, {"flow_shift": 3.0}),
    "wan_5": (5, {"flow_shift": 5.0}),
    "wan_25": (25, {"flow_shift": 3.0}),
    "wan_50": (50, {"flow_shift": 1.0}),
    "order3_7": (7, {"flow_shift": 2.0, "solver_order": 3}),
    "order1_4": (4, {"solver_order": 1}),
    "partly_corrected_6": (6, {"flow_shift": 3.0, "disable_corrector": [0, 2]}),
}
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Smooth, nonlinear and different at every timestep; tests repeat it in JAX."""
    return torch.sin(2.0 * x) + x * (timestep / 1000.0) - 0.3


def trajectory(noise: np.ndarray, steps: int, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """`(final sample, timesteps)` of diffusers' scheduler."""
    scheduler = UniPCMultistepScheduler(**WAN, **options)
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
    return sample.numpy(), scheduler.timesteps.numpy()


def main() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 3, 5)).astype(np.float32)
    arrays = {"noise": noise}
    for name, (steps, options) in CASES.items():
        arrays[f"{name}.sample"], arrays[f"{name}.timesteps"] = trajectory(noise, steps, options)
    np.savez(Path(__file__).with_name("unipc.npz"), **arrays)


if __name__ == "__main__":
    main()
