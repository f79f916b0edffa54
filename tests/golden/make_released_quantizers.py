"""Golden vectors of QVGen's released quantizers, forward and gradients.

    python tests/golden/make_released_quantizers.py CHECKOUT

CHECKOUT is a clone of ModelTC/QVGen (commit 198e761). Needs torch 2.13, which differentiates the
clamp as 1 at its bounds; another version may not. Writes released_quantizers.npz beside this file.
"""

import importlib.util
import logging
import sys
import types
from pathlib import Path

import numpy as np
import torch

OUT, IN, RANK, PHASE = 6, 10, 4, 6
STEPS = (0, 3, 6, 8, 12, 15, 17, 18, 40)


def load_release(checkout: Path):
    """The module with the quantizers, without the rest of the training package."""
    if not torch.__version__.startswith("2.13"):
        sys.exit(f"torch {torch.__version__} found; the vectors are defined by torch 2.13")
    logger = logging.getLogger("release")
    accelerate, accelerate_logging = types.ModuleType("accelerate"), types.ModuleType("logging")
    accelerate_logging.get_logger = lambda name: logger
    loguru = types.ModuleType("loguru")
    loguru.logger = logger
    sys.modules |= {
        "accelerate": accelerate,
        "accelerate.logging": accelerate_logging,
        "loguru": loguru,
    }
    source = checkout / "training" / "quant" / "quant.py"
    spec = importlib.util.spec_from_file_location("released_quant", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer(release, bits: int, generator: torch.Generator):
    """One released linear, calibrated, built, and moved away from its start as training would."""
    linear = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(OUT, IN, generator=generator))
        linear.bias.copy_(torch.randn(OUT, generator=generator))
    weight = {
        "bit": bits,
        "granularity": "per_channel",
        "cali": "mse",
        "use_grad_scaling": True,
        "rank": RANK,
        "alpha_T": PHASE,
    }
    act = {"bit": bits, "granularity": "per_token", "cali": "minmax", "clip_ratio": 0.95}
    quant = release.QuantLinear(
        linear,
        {"w": "progressive_lora", "act": "learnable_clipped_dynamic"},
        {"w": weight, "act": act},
    )
    with torch.no_grad():
        quant.wquantizer(quant.w)
    quant.wquantizer.build()
    quant.aquantizer.build()
    quant.set_quant_state(True, True)
    return quant


def perturb(quant, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor, size in (
            (quant.wquantizer.scale, 0.02),
            (quant.wquantizer.zero_point, 0.3),
            (quant.wquantizer.L, 0.05),
            (quant.wquantizer.R, 0.05),
            (quant.aquantizer.lower, 1.0),
            (quant.aquantizer.upper, 1.0),
        ):
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def state(quant) -> dict[str, torch.Tensor]:
    w, a = quant.wquantizer, quant.aquantizer
    return {
        "w": quant.w,
        "b": quant.b,
        "scale": w.scale,
        "zero_point": w.zero_point,
        "L": w.L,
        "R": w.R,
        "lower": a.lower,
        "upper": a.upper,
    }


def forward_and_gradients(name: str, function, x: torch.Tensor, tensors: dict, cotangent) -> dict:
    """The output of `function(x)` and the gradient of everything it depends on."""
    x = x.clone().requires_grad_()
    y = function(x)
    wanted = {"x": x, **tensors}
    grads = torch.autograd.grad(y, list(wanted.values()), cotangent, allow_unused=True)
    out = {f"{name}/y": y}
    for key, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            out[f"{name}/grad_{key}"] = grad
    return out


def vectors(release, bits: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    quant = layer(release, bits, generator)
    out = {f"start/{key}": value.clone() for key, value in state(quant).items()}
    perturb(quant, generator)
    out |= {f"trained/{key}": value.clone() for key, value in state(quant).items()}

    x = torch.randn(2, 5, IN, generator=generator)
    x[0, 0] += 4.0  # A token far from zero: the release clips all of it.
    x[0, 1] = 1.5
    out["x"], timestep = x, torch.tensor([957, 12])
    quant.aquantizer.set_idx(timestep)
    out["timesteps"], out["clip_index"] = timestep, torch.tensor(quant.aquantizer.idx)
    act_cotangent = torch.randn(x.shape, generator=generator)
    y_cotangent = torch.randn(2, 5, OUT, generator=generator)
    w_cotangent = torch.randn(OUT, IN, generator=generator)
    out |= {"act/cotangent": act_cotangent, "weight/cotangent": w_cotangent}
    out["linear/cotangent"] = y_cotangent

    tensors = state(quant)
    out |= forward_and_gradients("act", quant.aquantizer, x, tensors, act_cotangent)
    quant.wquantizer.valid = True
    pure = {key: value for key, value in tensors.items() if key not in ("L", "R")}
    weight = forward_and_gradients(
        "weight", lambda _: quant.wquantizer(quant.w), x, pure, w_cotangent
    )
    out |= weight
    quant.wquantizer.valid = False
    quant.wquantizer.set_alpha_L_R(2)
    out |= forward_and_gradients("linear", quant, x, tensors, y_cotangent)

    # The gate over the phases, and L and R after the first refactoring.
    gates = []
    for step in range(max(STEPS) + 1):
        quant.wquantizer.set_alpha_L_R(step)
        w = quant.wquantizer
        if step == PHASE:
            out["refactored/L"], out["refactored/R"] = w.L.clone(), w.R.clone()
        if step in STEPS:
            gate = torch.tensor([w.alpha] * w.rank + [0] * (RANK - w.rank))
            if w.rank >= 2:
                gate[: w.rank // 2] = 1
            gates.append(gate)
    out["gates"], out["gate_steps"] = torch.stack(gates), torch.tensor(STEPS)
    return out


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    release = load_release(Path(sys.argv[1]))
    arrays = {
        f"w{bits}/{key}": value.detach().numpy()
        for bits in (4, 3)
        for key, value in vectors(release, bits).items()
    }
    np.savez_compressed(Path(__file__).with_name("released_quantizers.npz"), **arrays)


if __name__ == "__main__":
    main()
