"""Makes samplers.npz: trajectories of diffusers' schedulers on a fixed model function.

Those with guidance are CogVideoXPipeline's own loop. UniPC has its own, unipc.npz.
Run: python tests/golden/make_samplers.py (needs torch and diffusers).
"""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_dpm_cogvideox

# tests/diffusion/test_samplers.py repeats them.
COGVIDEOX = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
CASES = {  # name: (scheduler, its options, steps)
    "euler_1": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    "euler_7": ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}, 7),
    "euler_50": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 50),
    "ddim_1": ("CogVideoXDDIMScheduler", COGVIDEOX, 1),
    "ddim_2": ("CogVideoXDDIMScheduler", COGVIDEOX, 2),
    "ddim_7": ("CogVideoXDDIMScheduler", COGVIDEOX | {"snr_shift_scale": 1.0}, 7),
    "ddim_50": ("CogVideoXDDIMScheduler", COGVIDEOX, 50),
    "dpm_1": ("CogVideoXDPMScheduler", COGVIDEOX, 1),
    "dpm_2": ("CogVideoXDPMScheduler", COGVIDEOX, 2),
    "dpm_7": ("CogVideoXDPMScheduler", COGVIDEOX, 7),
    "dpm_50": ("CogVideoXDPMScheduler", COGVIDEOX | {"snr_shift_scale": 1.0}, 50),
}
GUIDED = {  # name: (scheduler, steps, guidance scale, dynamic)
    "guided_ddim_5": ("CogVideoXDDIMScheduler", 5, 6.0, False),
    "guided_dpm_50": ("CogVideoXDPMScheduler", 50, 6.0, True),
}
TIMESTEPS = [0, 17, 999]


def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Smooth, nonlinear and different at every timestep; tests repeat it in JAX."""
    return torch.sin(2.0 * x) + x * (timestep / 1000.0) - 0.3


@contextlib.contextmanager
def given_noise(noises: np.ndarray, scheduler):
    """The stochastic scheduler draws once or twice a step; each draw is its step's noise."""
    steps = iter(range(len(noises)))
    current, step = [0], type(scheduler).step

    def counted(self, *args, **kwargs):
        current[0] = next(steps)
        return step(self, *args, **kwargs)

    def draw(*_, **__):
        return torch.from_numpy(noises[current[0]])

    with (
        mock.patch.object(type(scheduler), "step", counted),
        mock.patch.object(scheduling_dpm_cogvideox, "randn_tensor", draw),
    ):
        yield


def trajectory(scheduler, noise: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """`(final sample, timesteps)` of a scheduler, called as the pipelines do."""
    scheduler.set_timesteps(steps)
    x, clean, last = torch.from_numpy(noise), None, None
    for timestep in scheduler.timesteps:
        v = velocity(x, timestep)
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            x, clean = scheduler.step(v, clean, timestep, last, x, return_dict=False)
            last = timestep
        else:
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x.numpy(), scheduler.timesteps.numpy()


class TextModel(torch.nn.Module):
    """In the transformer's place: the velocity above of latents moved by the mean of the text."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(
        in_channels=2, patch_size_t=None, use_rotary_positional_embeddings=False
    )

    def cache_context(self, _):
        return contextlib.nullcontext()

    def forward(self, hidden_states, encoder_hidden_states, timestep, **_):
        text = encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        return (velocity(hidden_states + text, timestep[0]),)


def guided_trajectory(
    scheduler, noise, texts, steps: int, scale: float, dynamic: bool
) -> np.ndarray:
    """Final latents of CogVideoXPipeline around `TextModel`; noise `[batch, f, h, w, c]`."""
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=TextModel(), scheduler=scheduler
    )
    pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = 8, 4
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = noise.shape[1:4]
    latents = pipe(
        prompt_embeds=torch.from_numpy(texts[0]),
        negative_prompt_embeds=torch.from_numpy(texts[1]),
        height=8 * height,
        width=8 * width,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        guidance_scale=scale,
        use_dynamic_cfg=dynamic,
        latents=torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 1, 4, 2, 3))),
        output_type="latent",
    ).frames
    return latents.numpy().transpose(0, 1, 3, 4, 2)


def main() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 1, 3, 1, 2)).astype(np.float32)
    noises = rng.standard_normal((50, *noise.shape)).astype(np.float32)
    texts = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    arrays = {"noise": noise, "noises": noises, "texts": texts}
    for name, (kind, options, steps) in CASES.items():
        scheduler = getattr(diffusers, kind)(**options)
        with given_noise(noises, scheduler):
            sample, timesteps = trajectory(scheduler, noise, steps)
        arrays[f"{name}.sample"], arrays[f"{name}.timesteps"] = sample, timesteps
    for name, (kind, steps, scale, dynamic) in GUIDED.items():
        scheduler = getattr(diffusers, kind)(**COGVIDEOX)
        moved = np.ascontiguousarray(noises.transpose(0, 1, 2, 5, 3, 4))  # channels before pixels
        with given_noise(moved, scheduler):
            arrays[name] = guided_trajectory(scheduler, noise, texts, steps, scale, dynamic)
    scheduler = diffusers.CogVideoXDDIMScheduler(**COGVIDEOX)
    timesteps, latents = torch.tensor(TIMESTEPS), torch.from_numpy(noises[0, :1].repeat(3, 0))
    pair = latents, torch.from_numpy(noises[1, :1].repeat(3, 0)), timesteps
    arrays["alphas"] = scheduler.alphas_cumprod.numpy()[::37]
    arrays["noisy"] = scheduler.add_noise(*pair).numpy()
    arrays["target"] = scheduler.get_velocity(*pair).numpy()
    np.savez_compressed(Path(__file__).with_name("samplers.npz"), **arrays)


if __name__ == "__main__":
    main()
