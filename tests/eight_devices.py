"""Loss, gradients and codes over a mesh; `tests/test_sharding.py` runs these on eight devices.

In float64, where only a fault shows; and in float32, where sums in another order move what lies
beside a rounding boundary.
"""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qvgen_jax
from convert.export import export_pipeline
from kernels.quantize_tokens import quantize_tokens
from qvgen_jax import sharding
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES, make_mesh, mesh_of_config
from qvgen_jax.models import abstract_params, quantizable, stack
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant import dense
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params, round_to_nearest
from qvgen_jax.quant.named import layer_at
from qvgen_jax.training import loop
from qvgen_jax.training.calibrate import activation_maxima, activation_moments, unmeasured
from qvgen_jax.training.step import distillation_loss
from qvgen_jax.training.student import quant_config
from qvgen_jax.training.teacher import as_held, byte_linears, teacher_definition
from tests.ptq.models import inputs, random_params
from tests.training.float64_run import Clips64, train64
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
    for first, second in itertools.combinations(AXES, 2)
]
# The smallest models' rotations are of 16 channels.
ROTATED = {**CONFIG["quant"], "rotation": "hadamard", "smoothing": 0.5}
BATCH = 8
TINY = Path(__file__).parents[1] / "assets" / "tiny_wan"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def config_of(family: str, dtype: str, quant: dict, **train) -> dict:
    """The smallest config for a family, with changes to its training."""
    train = CONFIG["train"] | train
    if family == "cogvideox":
        del train["shift"]
    return {**CONFIG, "compute_dtype": dtype, "quant": quant, "train": train}


class Network:
    """One family at the smallest size: its loss as a function of arrays, and arrays for it."""

    def __init__(self, family: str, dtype: str):
        model, scheduler = FAMILIES[family]
        rng = np.random.default_rng(0)
        product = "float64" if dtype == "float64" else "int8"
        quant = {**ROTATED, "product_dtype": product}
        config = config_of(family, dtype, quant)

        def random(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        like = abstract_params(model)
        self.teacher = jax.tree.map(lambda leaf: 0.3 * random(*leaf.shape), like)
        self.recipe = loop.make_recipe(config, model, scheduler, branch=True)
        loud = unmeasured(model, self.teacher)
        loud = {name: 1 + jnp.abs(random(*ones.shape)) for name, ones in loud.items()}
        state = loop.initial_state(config, model, self.teacher, loud)
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
        return distillation_loss(params, levels, teacher, inputs, gate, self.recipe)[0]

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
    return f"{'alone' if sizes in ALONE else 'pair'}-" + "-".join(
        f"{axis}{size}" for axis, size in sizes.items()
    )


@pytest.mark.parametrize("sizes", [*ALONE, *PAIRS], ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(networks, family, sizes):
    network, (loss, gradients) = networks(family, "float64")
    (found, others), text = network.run(make_mesh(sizes))
    assert found == pytest.approx(loss, rel=1e-9)

    def check(path, gradient, other):
        # A flipped code of a token or a weight would be seen at 1e-3.
        most = 1e-9 * np.abs(gradient).max() + 1e-15
        np.testing.assert_allclose(other, gradient, rtol=0, atol=most, err_msg=str(path))

    jax.tree.map_with_path(check, gradients, others)
    if sizes.get("fsdp", 1) > 1:
        # What travels of a quantized layer's kernel are codes.
        assert "s8[" in "".join(line for line in text.splitlines() if " all-gather(" in line)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_differ_in_float32_only_beside_a_rounding_boundary(family, monkeypatch):
    """Of the teacher's activations: there a code that differs moves nothing behind it."""
    network = Network(family, "float32")
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    here, there = (codes_seen(network, each, monkeypatch) for each in (None, mesh))
    assert set(here) == set(there)
    assert len(here) == {"wan": 27, "cogvideox": 22}[family]
    for name, (ratios, codes) in here.items():
        differ = codes != there[name][1][:, : codes.shape[1]]  # Behind are padded tokens.
        beside = np.abs(np.abs(ratios - np.floor(ratios)) - 0.5)
        assert (beside[differ] < 1e-4).all(), name
        assert differ.mean() < 1e-2


def codes_seen(network: Network, mesh, monkeypatch) -> dict:
    """What every linear of the teacher would make of its tokens: `x / scale`, and 4-bit codes."""
    plain = dense.Dense.__call__

    def one_by_one(body, x, layers):
        for layer in range(len(jax.tree.leaves(layers)[0])):
            x, _ = body(x, jax.tree.map(lambda leaf, n=layer: leaf[n], layers))
        return x, None

    def predict(params, *arguments):
        seen = {}

        def spied(layer, x, ctx=dense.QuantContext()):
            tokens = quantize_tokens(x, jnp.float32(0.95), jnp.float32(0.95), jnp.float32(15))
            name = f"{layer.name} {sum(key.startswith(f'{layer.name} ') for key in seen)}"
            seen[name] = x / tokens.scale, tokens.codes
            return plain(layer, x, ctx)

        with monkeypatch.context() as patched:
            patched.setattr(dense.Dense, "__call__", spied)
            patched.setattr(stack, "layer_scan", one_by_one)
            nnx.merge(network.recipe.teacher, params)(*arguments)
        return seen

    with sharding.under(mesh):
        _, _, teacher, inputs, _ = network.arguments(mesh)
        arguments = (inputs["latents"], inputs["timesteps"], inputs["text_embeds"])
        return jax.device_get(jax.jit(predict)(teacher, *arguments))


def test_a_teacher_of_bytes_lies_as_the_table_says_and_says_the_same():
    params, dtype = random_params(WAN), jnp.dtype("float32")
    in_bytes = byte_linears({"teacher_weights": "int8"}, WAN)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    alone = as_held(jax.tree.map(jnp.asarray, params), dtype, in_bytes)
    spread = as_held(sharding.place(jax.tree.map(jnp.asarray, params), mesh), dtype, in_bytes)
    jax.tree.map(np.testing.assert_array_equal, spread, alone)
    codes, scale = (spread["blocks"]["ffn"]["up"][leaf] for leaf in ("codes", "scale"))
    assert codes.sharding.shard_shape(codes.shape) == (2, 48 // 4, 64 // 2)
    assert scale.sharding.shard_shape(scale.shape) == (2, 64 // 2)

    def answer(params: dict) -> jax.Array:
        return nnx.merge(teacher_definition(WAN, dtype, in_bytes), params)(*inputs(WAN))

    expected = jax.jit(answer)(alone)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(answer)(spread), expected, rtol=0, atol=1e-5)


def test_rotated_kernels_lie_as_the_table_says_and_are_the_same():
    """Blocks of 16 channels, of which a device holds 12."""
    params, quant = random_params(WAN), quant_config(ROTATED, WAN)
    rng = np.random.default_rng(1)
    loud = {
        name: jnp.asarray(1 + rng.random(ones.shape), jnp.float32)
        for name, ones in unmeasured(WAN, params).items()
    }
    alone, _ = quantize_params(params, quantizable(WAN), quant, loud)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        spread, _ = quantize_params(sharding.place(params, mesh), quantizable(WAN), quant, loud)
    for name in quant.quantized(quantizable(WAN)):
        kernel, expected = (layer_at(each, name)["kernel"] for each in (spread, alone))
        lies = sharding.parameter_sharding(f"{name}.kernel", kernel.shape, mesh)
        assert kernel.sharding.is_equivalent_to(lies, kernel.ndim), name
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_over_a_mesh_is_the_run_of_one_device(tmp_path):
    """The branch shrinks and goes on the way; in float64, so to 1e-9."""
    config = {
        **CONFIG,
        "quant": ROTATED,
        "train": {**CONFIG["train"], "batch_size": 8, "accumulate": 2},
        "mesh": {"data": 1, "fsdp": 2, "context": 0, "tensor": 1, "across_slices": {}},
    }
    train64(config, WAN, tmp_path / "alone", None)
    mesh = mesh_of_config(config)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
    spread = train64(config, WAN, tmp_path / "spread", mesh)
    kernel = spread["params"]["blocks"]["ffn"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24, 64)
    assert spread["opt"][1].mu["blocks"]["ffn"]["up"]["kernel"].sharding == kernel.sharding
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("alone", "spread")]
    np.testing.assert_allclose(*losses, rtol=1e-9)
    # Where it stands, another mesh reads it.
    again = train64(config, WAN, tmp_path / "spread", make_mesh({"data": 2, "fsdp": 4}))
    assert int(again["step"]) == config["train"]["steps"]
    jax.tree.map(np.testing.assert_array_equal, again["params"], spread["params"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("measured", "quant"),
    [
        (activation_maxima, ROTATED),
        (activation_moments, {**CONFIG["quant"], "act_range": "learned"}),
    ],
    ids=["maxima", "moments"],
)
def test_what_a_run_measures_of_its_teacher_does_not_depend_on_the_mesh(family, measured, quant):
    """Of every linear, behind padded tokens and beside them; probes are float32."""
    model, scheduler = FAMILIES[family]
    config = config_of(family, "float64", quant, batch_size=8)
    rng = np.random.default_rng(0)
    like = abstract_params(model)
    teacher = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape)), like)
    alone = measured(config, model, scheduler, teacher, Clips64())
    mesh = make_mesh({"fsdp": 2, "context": 4})
    placed = sharding.place(teacher, mesh)
    with jax.set_mesh(mesh):
        spread = measured(config, model, scheduler, placed, Clips64(), mesh)
    assert set(alone) == set(quantizable(model))
    for name, expected in alone.items():
        np.testing.assert_allclose(spread[name], expected, rtol=1e-6, err_msg=name)


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def sizes(batch: int = 8, accumulate: int = 1, **mesh) -> dict:
    mesh = {"data": 1, "fsdp": -1, "context": 0, "tensor": 1, "across_slices": {}} | mesh
    train = {"batch_size": batch, "accumulate": accumulate}
    return dict(mesh_of_config({"mesh": mesh, "train": train}).shape)


def test_the_default_mesh_gives_every_sample_as_few_devices_as_it_can():
    assert sizes() == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert sizes(12) == {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}
    assert sizes(8, 8) == {"data": 1, "fsdp": 1, "context": 8, "tensor": 1}
    assert sizes(8, tensor=2) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert sizes(8, data=2) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert sizes(8, fsdp=2, context=4) == {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            {"context": 1, "batch": 4},
            "4 samples at once, .* = 8 groups .* mesh.context",
        ),
        ({"fsdp": 3, "context": 1}, "3 devices, and there are 8"),
        ({"fsdp": -1, "context": -1}, "at most one -1"),
        ({"across_slices": {"context": 2}}, "only data and fsdp may go over the network"),
        ({"across_slices": {"rows": 2}}, "has the axis 'rows'; expected data, fsdp, context"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(mesh, message):
    with pytest.raises(UserError, match=message):
        sizes(**mesh)


def test_parameters_that_do_not_divide_or_have_no_rule_are_told():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(UserError, match=r"proj_out.kernel \[60, 4\] .* has 8 devices; .*=6 or an"):
        sharding.parameter_sharding("proj_out.kernel", (60, 4), mesh)
    with pytest.raises(UserError, match=r"no rule .* blocks.attn3.kernel .* qvgen_jax/sharding.py"):
        sharding.parameter_sharding("blocks.attn3.kernel", (2, 8, 8), mesh)


@pytest.mark.parametrize(
    ("batch", "layout"),
    [
        (4, (("data", "fsdp"), ("context",))),
        (2, (("data",), ("fsdp", "context"))),
        (3, ((), ("data", "fsdp", "context"))),
    ],
)
def test_axes_that_samples_leave_are_for_tokens(batch, layout):
    assert sharding.layout(batch, {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}) == layout


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """The tiny pipeline, and an export of it at 8 bits."""
    export = tmp_path_factory.mktemp("folders") / "export"
    pipe, quant = qvgen_jax.load(TINY), QuantConfig(8, 8, rank=0)
    model = pipe.transformer.config
    params, _ = round_to_nearest(pipe.transformer.states[0], quantizable(model), quant)
    export_pipeline(TINY, export, model, params, quant)
    return {"full": TINY, "export": export}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("full", {"data": 2, "fsdp": 4}),
        ("full", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("export", {"data": 2, "fsdp": 2, "context": 2}),
    ],
)
def test_one_video_is_computed_by_all_devices_together(folders, kind, sizes):
    with jax.enable_x64(False):
        request = {"prompts": "a red star moving up slowly", "steps": 2, "seeds": 5}
        alone = qvgen_jax.load(folders[kind])
        latents = alone.sample_latents(**request)
        pipe = qvgen_jax.load(folders[kind], mesh=make_mesh(sizes))
        leaf = pipe.transformer.states[0]["blocks"]["ffn"]["up"]
        leaf = leaf["codes" if kind == "export" else "kernel"]
        assert leaf.addressable_shards[0].data.size < leaf.size
        found = pipe.sample_latents(**request)
        # Sums in another order. In a packed transformer they round single activations to the next
        # code, and it ends where noise that differs by 1e-7 ends too, see `four_devices`.
        most = 1e-5 if kind == "full" else 0.1
        assert np.linalg.norm(found - latents) < most * np.linalg.norm(latents)
        frames = pipe.to_frames(latents).astype(int)
        assert np.abs(frames - alone.to_frames(latents)).max() <= 1
