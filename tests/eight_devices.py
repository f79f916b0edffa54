"""Loss, gradients and codes over a mesh; `tests/test_sharding.py` runs these on eight devices.

In float64, where only a fault shows; and in float32, where sums in another order move what lies
beside a rounding boundary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax import sharding
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.models import abstract_params
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.training import loop
from qvgen_jax.training.step import distillation_loss
from tests.training.test_run import CONFIG, SCHEDULER

WAN = WanConfig(
    num_attention_heads=4,
    attention_head_dim=12,
    in_channels=2,
    out_channels=2,
    text_dim=8,
    freq_dim=8,
    ffn_dim=64,
    num_layers=2,
)
COGVIDEOX = CogVideoXConfig(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=2,
    out_channels=2,
    text_embed_dim=8,
    time_embed_dim=16,
    num_layers=2,
    sample_height=4,
    sample_width=6,
    patch_size=(1, 2, 2),
    use_rotary_positional_embeddings=True,
)
FAMILIES = {
    "wan": (WAN, SCHEDULER),
    "cogvideox": (COGVIDEOX, CogVideoXDPMConfig(rescale_betas_zero_snr=True)),
}
ALONE = [{"data": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 4, "data": 2}]
# Four heads go over two of context, and not over eight; so both ways of attention are here.
PAIRS = [
    {first: 2 if second == "tensor" else 4, second: 4 if second == "tensor" else 2}
    for first, second in itertools.combinations(sharding.AXES, 2)
]
BATCH = 8


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Network:
    """One family at the smallest size: its loss as a function of arrays, and arrays for it."""

    def __init__(self, family: str, dtype: str):
        model, scheduler = FAMILIES[family]
        rng = np.random.default_rng(0)
        train = dict(CONFIG["train"])
        if family == "cogvideox":
            del train["shift"]
        product = "float64" if dtype == "float64" else "int8"
        quant = {**CONFIG["quant"], "product_dtype": product}
        config = {**CONFIG, "compute_dtype": dtype, "quant": quant, "train": train}

        def random(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        like = abstract_params(model)
        self.teacher = jax.tree.map(lambda leaf: 0.3 * random(*leaf.shape), like)
        self.recipe = loop.make_recipe(config, model, scheduler, branch=True)
        state = loop.initial_state(config, model, self.teacher)
        self.params = jax.tree.map(lambda leaf: leaf.astype(dtype), state["params"])
        self.levels = state["levels"]
        # Odd: 3 frames of 2 x 3 patches, 18 tokens, beside 5 of the prompt.
        self.inputs = {
            "latents": random(BATCH, 3, 4, 6, 2),
            "velocity": random(BATCH, 3, 4, 6, 2),
            "text_embeds": random(BATCH, 5, 8),
            "timesteps": jnp.linspace(100, 900, BATCH, dtype=dtype),
        }
        self.gate = jnp.asarray([1, 0.6], dtype)

    def loss(self, params, levels, teacher, inputs, gate):
        return distillation_loss(params, levels, teacher, inputs, gate, self.recipe)

    def arguments(self, mesh=None) -> tuple:
        trees = (self.params, self.levels, self.teacher)
        if mesh is None:
            return (*trees, self.inputs, self.gate)
        placed = [jax.device_put(tree, sharding.shard(tree, mesh)) for tree in trees]
        return (*placed, jax.device_put(self.inputs, sharding.samples(mesh)), self.gate)

    def run(self, mesh=None):
        """Loss and gradients, on one device or over the mesh; and the compiled program's text."""
        with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
            arguments = self.arguments(mesh)
            program = jax.jit(jax.value_and_grad(self.loss)).lower(*arguments).compile()
            return jax.device_get(program(*arguments)), program.as_text()


@pytest.fixture(scope="module")
def networks():
    kept = {}

    def network(family: str, dtype: str):
        if (family, dtype) not in kept:
            made = Network(family, dtype)
            kept[family, dtype] = made, made.run()[0]
        return kept[family, dtype]

    return network


def named(sizes: dict) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.parametrize("sizes", [*ALONE, *PAIRS], ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(networks, family, sizes):
    network, (loss, gradients) = networks(family, "float64")
    (found, others), text = network.run(sharding.make_mesh(sizes))
    assert found == pytest.approx(loss, rel=1e-9)

    def check(path, gradient, other):
        # A flipped code of a token or a weight would be seen at 1e-3.
        most = 1e-9 * np.abs(gradient).max() + 1e-15
        np.testing.assert_allclose(other, gradient, rtol=0, atol=most, err_msg=str(path))

    jax.tree.map_with_path(check, gradients, others)
    if sizes.get("fsdp", 1) > 1:
        # What travels of a quantized layer's kernel are codes.
        assert "s8[" in "".join(line for line in text.splitlines() if " all-gather(" in line)
