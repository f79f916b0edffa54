"""Golden files of whole transformers with QVGen's released quantizers: checkpoint and outputs.

    python tests/golden/make_released_models.py CHECKOUT [wan] [cogvideox]

CHECKOUT is a clone of ModelTC/QVGen (commit 198e761). Every linear of a tiny diffusers model is
replaced by their quantized linear, as `training/trainer.py` and `inference/*.py` do it. Needs torch
2.13 and diffusers. Writes released_FAMILY.safetensors and released_FAMILY.npz beside this file.

Four bits make a network discontinuous: where a value lies at a rounding boundary, the last bit of a
sum decides. Inputs are drawn until none lies within MARGIN of a step from one, so that a float32
network with another order of sums must find the same codes.
"""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from make_released_quantizers import load_release, perturb
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from convert.released import import_released  # noqa: E402
from convert.released_export import export_released  # noqa: E402

RANK, PHASE, STEPS = 4, 6, (2, 6, 8, 17)
ADAPTER_RANK, ADAPTER_ALPHA = 3, 2.0
CALLS = (0, 1, 49, 60)
MARGIN = 1e-4
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one family, and how it is called.

    Attributes:
        full_precision: a linear that training left alone.
        shape: of latents `[frames, height, width, channels]`.
        text: of text embeddings `[tokens, dim]`.
        axes: from our order of the latents' axes to theirs.
    """

    name: str
    model: Any
    fields: dict
    full_precision: str
    shape: tuple[int, ...]
    text: tuple[int, int]
    axes: tuple[int, ...]

    def base(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = self.model(**self.fields).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:  # The initial 0 and 1 hide mistakes.
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def run(self, model, latents, timesteps, text) -> np.ndarray:
        inputs = {
            "hidden_states": torch.from_numpy(latents).permute(self.axes),
            "timestep": torch.from_numpy(timesteps),
            "encoder_hidden_states": torch.from_numpy(text),
        }
        with torch.no_grad():
            out = model(**inputs).sample
        return out.numpy().transpose(np.argsort(self.axes))


WAN = Family(
    "wan",
    WanTransformer3DModel,
    tiny_models.WAN_ODD,
    "condition_embedder.time_proj",
    (2, 4, 6, 3),
    (5, 10),
    (0, 4, 1, 2, 3),
)
COGVIDEOX = Family(
    "cogvideox",
    CogVideoXTransformer3DModel,
    tiny_models.COGVIDEOX | {"max_text_seq_length": 5},
    "norm_out.linear",
    (2, 2, 6, 2),
    (5, 6),
    (0, 1, 4, 2, 3),
)
FAMILIES = {family.name: family for family in (WAN, COGVIDEOX)}


def quantized(
    release, model, weight: str, skipped: list[int], *, cali: str, adapters: bool = False
):
    """The model with their linears, initialised but not loaded."""
    weights = {"bit": 4, "granularity": "per_channel", "cali": cali, "use_grad_scaling": True}
    decay = {"rank": RANK, "alpha_T": PHASE}
    acts = {"bit": 4, "granularity": "per_token", "cali": "minmax", "clip_ratio": 0.95}
    release.replace_linear(
        model,
        {"w": weight, "act": "learnable_clipped_dynamic"},
        {"w": weights | decay, "act": acts},
        {"rank": ADAPTER_RANK, "alpha": ADAPTER_ALPHA, "dropout": 0.0},
        use_lora=adapters,
        random_list=skipped,
    )
    for layer in linears(release, model):
        with torch.no_grad():
            layer.wquantizer(layer.w.detach())
        layer.wquantizer.build()
        layer.aquantizer.build()
        layer.set_quant_state(True, True)
    return model


def linears(release, model) -> list:
    kinds = (release.QuantLinear, release.QuantLoRALinear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def skipped_linears(model, keep: Callable[[str], bool]) -> list[int]:
    """Places of the linears to leave alone, counted as their inference counts them."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return [i for i, name in enumerate(names) if keep(name)]


def in_training(release, family: Family, weight: str, **options):
    model = family.base()
    skipped = skipped_linears(model, lambda name: name == family.full_precision)
    return quantized(release, model, weight, skipped, **options)


def trained(release, family: Family) -> dict[str, torch.Tensor]:
    """A checkpoint in the middle of training: every tensor moved away from its start."""
    model = in_training(release, family, "progressive_lora", cali="mse")
    generator = torch.Generator().manual_seed(1)
    for layer in linears(release, model):
        perturb(layer, generator)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def inference(release, model, checkpoint: dict):
    """The steps of `inference/*.py` around a checkpoint, adapters merged as there."""
    checkpoint = dict(checkpoint)
    for name in [name for name in checkpoint if name.endswith("loraA.weight")]:
        stem = name.removesuffix(".loraA.weight")
        down, up = checkpoint.pop(name), checkpoint.pop(f"{stem}.loraB.weight")
        checkpoint[f"{stem}.w"] = up @ down + checkpoint[f"{stem}.w"]
    skipped = skipped_linears(model, lambda name: f"{name}.wquantizer.scale" not in checkpoint)
    quantized(release, model, "lsq+", skipped, cali="minmax")
    unknown = model.load_state_dict(checkpoint, strict=False)
    assert not unknown.missing_keys
    assert all(name[-2:] in (".L", ".R") for name in unknown.unexpected_keys)
    return model


def at_step(release, family: Family, checkpoint: dict, step: int):
    """The steps by which `training/trainer.py` resumes a run of `step` steps, up to its forward."""
    model = in_training(release, family, "progressive_lora", cali="mse")
    halvings = (step - 1) // PHASE
    for layer in linears(release, model):
        layer.wquantizer.set_alpha_L_R(0)
        if halvings:
            layer.wquantizer.rank = RANK // 2**halvings * 2
            layer.wquantizer.set_alpha_L_R(halvings * PHASE)
    model.load_state_dict(checkpoint)
    for layer in linears(release, model):
        layer.wquantizer.set_alpha_L_R(step)
    return model


@contextmanager
def distances(release) -> Iterator[list[float]]:
    """Collects how near the rounded numbers of every activation came to a boundary."""
    kind, found = release.LearnableClippedDynamicQuantizer, []
    quant, qparams = kind.quant, kind.get_qparams

    def note(ratio: torch.Tensor) -> None:
        found.append(float((ratio - ratio.floor() - 0.5).abs().min()))

    def noting_quant(self, x, scale, zero_point):
        note(x / scale)
        return quant(self, x, scale, zero_point)

    def noting_qparams(self, low, high):
        scale, zero_point = qparams(self, low, high)
        note(low / scale)
        return scale, zero_point

    kind.quant, kind.get_qparams = noting_quant, noting_qparams
    try:
        yield found
    finally:
        kind.quant, kind.get_qparams = quant, qparams


def case(release, family: Family, forward: Callable[..., dict], timesteps=(640.0,)) -> dict:
    """Inputs that come near no boundary, and what `forward` makes of them."""
    times = np.array(timesteps, np.float32)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        latents = rng.standard_normal((len(times), *family.shape)).astype(np.float32)
        text = rng.standard_normal((len(times), *family.text)).astype(np.float32)
        with distances(release) as found:
            outputs = forward(latents, times, text)
        if min(found) > MARGIN:
            return {"latents": latents, "timesteps": times, "text": text, **outputs}
    raise RuntimeError("no input stays clear of every boundary; take a smaller MARGIN")


def countdown(release, family: Family, model) -> dict[str, np.ndarray]:
    """Outputs of the calls in CALLS, the indices moving as with `--fix`."""

    def at_calls(*inputs):
        for index in sorted({max(49 - call, 0) for call in CALLS}):
            for layer in linears(release, model):
                layer.aquantizer.set_idx(index)
            family.run(model, *inputs)
        return {}

    inputs = case(release, family, at_calls)
    for layer in linears(release, model):
        layer.aquantizer.set_auto(True)
    outputs = [family.run(model, *inputs.values()) for _ in range(max(CALLS) + 1)]
    return inputs | {f"call_{i}": outputs[i] for i in CALLS}


def random_adapters(checkpoint: dict) -> dict[str, torch.Tensor]:
    generator, adapters = torch.Generator().manual_seed(2), {}
    for name in [name for name in checkpoint if name.endswith(".w")]:
        fan_out, fan_in = checkpoint[name].shape
        down = torch.randn(ADAPTER_RANK, fan_in, generator=generator) * 0.02
        up = torch.randn(fan_out, ADAPTER_RANK, generator=generator)
        adapters |= {f"{name[:-1]}loraA.weight": down, f"{name[:-1]}loraB.weight": up}
    return adapters


def codes_in_bfloat16(release, family: Family, checkpoint: dict) -> np.ndarray:
    """Every weight's code when a bfloat16 pipeline loads a bfloat16 checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        family.base().save_pretrained(folder)
        model = family.model.from_pretrained(folder, torch_dtype=torch.bfloat16)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.items()}
    model = inference(release, model, half)
    codes = []
    for _, layer in sorted((n, m) for n, m in model.named_modules() if hasattr(m, "wquantizer")):
        quantizer = layer.wquantizer
        factor = 1.0 / math.sqrt(layer.w.shape[1] * quantizer.P)
        scale = quantizer.grad_scale(quantizer.scale, factor)
        zero_point = quantizer.grad_scale(quantizer.zero_point, factor)
        codes.append(quantizer.quant(layer.w, scale, zero_point).detach().flatten())
    return torch.cat([part.float() for part in codes]).to(torch.uint8).numpy()


def there_and_back(family: Family, checkpoint: dict) -> dict[str, torch.Tensor]:
    """The checkpoint after our import and our export."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "checkpoint").mkdir()
        (root / "base" / "transformer").mkdir(parents=True)
        save_file(checkpoint, root / "checkpoint" / WEIGHTS)
        fields = dict(family.model(**family.fields).config)
        (root / "base/transformer/config.json").write_text(
            json.dumps({"_class_name": family.model.__name__, **fields})
        )
        import_released(root / "checkpoint", root / "base", root / "ours", clip_index="last")
        export_released(root / "ours", root / "theirs", dtype="float32")
        return load_file(root / "theirs" / WEIGHTS)


def write(release, family: Family) -> None:
    checkpoint = trained(release, family)
    save_file(checkpoint, HERE / f"released_{family.name}.safetensors", metadata={"format": "pt"})

    def velocity(model) -> Callable[..., dict]:
        return lambda *inputs: {"velocity": family.run(model, *inputs)}

    model = inference(release, family.base(), checkpoint)
    cases = {"last": case(release, family, velocity(model))}

    def as_trained(latents, timesteps, text):
        for layer in linears(release, model):
            layer.aquantizer.set_idx(torch.from_numpy(timesteps))
        return {"velocity": family.run(model, latents, timesteps, text)}

    cases["t_mod_50"] = case(release, family, as_trained, (957.0, 407.0))
    cases["countdown"] = countdown(release, family, model)
    for step in STEPS:
        resumed = at_step(release, family, checkpoint, step)
        cases[f"step_{step}"] = case(release, family, velocity(resumed))

    last = {name: t for name, t in checkpoint.items() if name[-2:] not in (".L", ".R")}
    adapters = random_adapters(last)
    merged = inference(release, family.base(), last | adapters)
    cases["adapter"] = case(release, family, velocity(merged))
    unmerged = in_training(release, family, "lsq+", cali="minmax", adapters=True)
    unmerged.load_state_dict(last | adapters)
    cases["adapter_alpha"] = case(release, family, velocity(unmerged))
    returned = inference(release, family.base(), there_and_back(family, checkpoint))
    cases["exported"] = case(release, family, velocity(returned))

    arrays = {f"{name}/{key}": value for name, case in cases.items() for key, value in case.items()}
    arrays |= {f"adapters/{name}": tensor.numpy() for name, tensor in adapters.items()}
    arrays["bfloat16_codes"] = codes_in_bfloat16(release, family, checkpoint)
    np.savez_compressed(HERE / f"released_{family.name}.npz", **arrays)


def main() -> None:
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(FAMILIES):
        sys.exit(__doc__)
    release = load_release(Path(sys.argv[1]))
    for name in sys.argv[2:] or FAMILIES:
        write(release, FAMILIES[name])


if __name__ == "__main__":
    main()
