"""Our CogVideoX transformers against diffusers' on the same random weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.cogvideox_transformer import name_table
from convert.names import from_torch, to_torch
from qvgen_jax.models.cogvideox import CogVideoXTransformer
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.cogvideox_positions import rotations, sincos_table
from tests.golden.tiny_models import COGVIDEOX_VARIANTS
from tests.parity.table import hold

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = Path(__file__).parent.parent / "models/configs"
TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "text_embed_dim": 24,
    "time_embed_dim": 20,
    "num_layers": 3,
    "sample_height": 12,
    "sample_width": 18,
}
VARIANTS = {name: TINY | fields for name, fields in COGVIDEOX_VARIANTS.items()}
# diffusers cuts the rotations of 1.5 from a table of the sample size.
VARIANTS["1_5"] |= {"sample_height": 28, "sample_width": 24}


def torch_model(fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # The initial 0 and 1 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def rotary(model: torch.nn.Module, frames: int, height: int, width: int) -> tuple | None:
    """What diffusers' pipeline hands over for latents of this size."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * height, 8 * width, frames, torch.device("cpu"))


def random_inputs(shape: tuple[int, ...], text_tokens: int, text_dim: int) -> tuple:
    rng = np.random.default_rng(1)
    latents = rng.standard_normal(shape).astype(np.float32)
    text = rng.standard_normal((shape[0], text_tokens, text_dim)).astype(np.float32)
    return latents, np.linspace(999, 0, shape[0]).round().astype(np.float32), text


def run_torch(model: torch.nn.Module, latents, timesteps, text) -> np.ndarray:
    dtype = model.dtype
    with torch.no_grad():
        v = model(
            torch.from_numpy(latents.transpose(0, 1, 4, 2, 3)).to(dtype),
            torch.from_numpy(text).to(dtype),
            torch.from_numpy(timesteps),
            image_rotary_emb=rotary(model, *latents.shape[1:4]),
            return_dict=False,
        )[0]
    return v.float().numpy().transpose(0, 1, 3, 4, 2)


def run_ours(config: CogVideoXConfig, params: dict, inputs: tuple, dtype=jnp.float32):
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: CogVideoXTransformer(config, key=jax.random.key(0), dtype=dtype))
    )
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, *x: nnx.merge(graph, params)(*x))(params, *inputs)


def compare(fields: dict, shape: tuple[int, ...], text_tokens: int) -> float:
    # The 2B's table in diffusers has room for text of one length only.
    reference = torch_model(fields | {"max_text_seq_length": text_tokens})
    config = CogVideoXConfig.from_json(dict(reference.config))
    inputs = random_inputs(shape, text_tokens, config.text_embed_dim)
    expected = run_torch(reference, *inputs)
    params = from_torch(name_table(config), numpy_state(reference))
    del reference
    got = run_ours(config, params, inputs)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "text_tokens"),
    [
        ((1, 1, 2, 2, 16), 1),  # one frame (of patches), one patch, one word
        ((3, 3, 6, 10, 16), 7),  # wider than the 5B's base size
        ((2, 2, 14, 4, 16), 13),  # taller
    ],
)
def test_v_equals_diffusers(variant, shape, text_tokens):
    frames = shape[1] * VARIANTS[variant].get("patch_size_t", 1)
    error = compare(VARIANTS[variant], (shape[0], frames, *shape[2:]), text_tokens)
    hold("CogVideoX transformer", f"random {variant}, odd sizes", error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_heights_and_widths_equal_diffusers_where_the_patch_permits(variant):
    fields = VARIANTS[variant] | {"patch_size": 1, "in_channels": 5, "out_channels": 5}
    error = compare(fields, (2, 4, 5, 3, 5), 4)
    hold("CogVideoX transformer", f"random {variant}, odd sizes", error)


@pytest.mark.parametrize("model", ["CogVideoX-2B", "CogVideoX-5B", "CogVideoX1.5-5B"])
def test_one_layer_at_the_real_dimensions_equals_diffusers(model):
    fields = json.loads((CONFIGS / f"{model}.json").read_text()) | {"num_layers": 1}
    del fields["_class_name"]
    error = compare(fields, (1, 2, 6, 10, 16), 9)
    hold("CogVideoX transformer", f"{model}, one layer at its real dimensions", error)


@pytest.mark.parametrize("model", ["CogVideoX-5B", "CogVideoX1.5-5B"])
@pytest.mark.parametrize("size", [(14, 60, 90), (6, 96, 170), (2, 90, 60)])
def test_rotations_at_real_sizes_equal_diffusers(model, size):
    fields = json.loads((CONFIGS / f"{model}.json").read_text())
    config = CogVideoXConfig.from_json(fields)
    expected = rotary(SimpleNamespace(config=SimpleNamespace(**fields)), *size)
    grid = tuple(length // p for length, p in zip(size, config.patch_size, strict=True))
    base = None if config.unfolds_patches else (30, 45)
    cos, sin = (table[:, 0] for table in rotations(grid, 64, base, 0))
    sin[:, 0::2] *= -1
    # PyTorch's angles, up to 85 here, are float32.
    np.testing.assert_allclose(cos, expected[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(sin, expected[1].numpy(), atol=2e-5)


def test_sincos_positions_at_a_real_size_equal_diffusers():
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    expected = get_3d_sincos_pos_embed(1920, (45, 30), 13, 1.875, 1.0).flatten(0, 1).numpy()
    got = sincos_table((13, 30, 45), 1920, 1.875, 1.0)
    np.testing.assert_allclose(got, expected, atol=5e-6)  # positions are float32 in PyTorch


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_as_near_to_float32_as_pytorchs(variant, tmp_path):
    """Root mean square error against PyTorch in float32: ours is 0.8 of PyTorch's, at most 1."""
    fields = VARIANTS[variant] | {"num_layers": 6, "max_text_seq_length": 11}
    reference = torch_model(fields)
    config = CogVideoXConfig.from_json(dict(reference.config))
    inputs = random_inputs((3, 4, 8, 12, 16), 11, config.text_embed_dim)
    expected = run_torch(reference, *inputs)
    reference.save_pretrained(tmp_path)  # from_pretrained knows what PyTorch keeps in float32.
    half = type(reference).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf,
        from_torch(name_table(config), numpy_state(reference)),
    )

    def error(got) -> float:
        return float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))

    ours = error(run_ours(config, params, inputs, jnp.bfloat16))
    assert 0 < ours <= error(run_torch(half, *inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_converting_there_and_back_keeps_every_tensor(variant):
    state = numpy_state(torch_model(VARIANTS[variant]))
    table = name_table(CogVideoXConfig.from_json(VARIANTS[variant]))
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
