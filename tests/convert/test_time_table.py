"""Timestep linears as a table: the same numbers, fewer bytes, and no timestep it does not hold."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.export import export_pipeline
from convert.load import read_transformer
from convert.packed import packed_definition
from convert.released_export import export_released
from convert.save import SCHEDULER, write_json
from convert.tensors import Tensors, read_json, write_tensors
from convert.time_table import fold_time, visited_timesteps
from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.schedulers import make_schedule, scheduler_from_json
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.models import (
    abstract_params,
    build_transformer,
    config_from_json,
    quantizable,
    time_only,
    time_outputs,
    time_values,
)
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.layers import timestep_embedding
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.code_planes import packed_bytes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, Levels, QuantContext
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.time_table import nearest_entry, stored_table
from qvgen_jax.transformer import Transformer
from tests.compiling import optimized
from tests.golden.tiny_models import WAN_ODD

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
WAN = WanConfig(**WAN_ODD)
COGVIDEOX = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=3,
    out_channels=3,
    text_embed_dim=10,
    time_embed_dim=8,
    num_layers=2,
)
DDIM = {
    "_class_name": "CogVideoXDDIMScheduler",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "beta_schedule": "scaled_linear",
}
FAMILIES = {
    "wan": (WAN, {**SCHEDULER, "flow_shift": 5.0}, "WanTransformer3DModel"),
    "cogvideox": (COGVIDEOX, DDIM, "CogVideoXTransformer3DModel"),
}
STEPS = 8
# float16 keeps 11 bits of a value.
ROUNDING = {"rtol": 2**-11, "atol": 2**-25}


def quant_for(model, **changes) -> QuantConfig:
    return QuantConfig(rank=0, time_table=True, full_precision=time_only(model), **changes)


def student(model, quant: QuantConfig) -> Transformer:
    """The training form around random parameters, the timestep's linears in float."""
    plain = nnx.eval_shape(lambda: build_transformer(model, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        nnx.to_pure_dict(nnx.state(plain, nnx.Param)),
    )
    params, levels = quantize_params(params, quantizable(model), quant)
    network = nnx.eval_shape(
        lambda: build_transformer(
            model,
            key=jax.random.key(0),
            dense=dense_factory(quant, "train"),
            clip_mode=quant.clip_index,
            buckets=quant.buckets,
        )
    )
    return Transformer(model, nnx.split(network, nnx.Param, Levels)[0], (params, levels))


def pipeline_folder(folder: Path, family: str) -> Path:
    """A source with what an export looks at."""
    model, scheduler, name = FAMILIES[family]
    fields = {"_class_name": name, **dataclasses.asdict(model)}
    if family == "cogvideox":
        fields["patch_size"] = model.patch_size[1]
    write_json(folder / "transformer" / "config.json", fields)
    write_json(folder / "model_index.json", {"_class_name": "of no import here"})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "generation_config.json", {"steps": STEPS})
    return folder


def embeddings(family: str, network: nnx.Module, timesteps: jax.Array) -> dict[str, jax.Array]:
    """What the time outputs say within the trained network, layer by layer."""
    ctx, prompt = QuantContext(jnp.zeros(len(timesteps), jnp.int32)), jnp.zeros((1, 1, 10))
    if family == "wan":
        prompt = jnp.broadcast_to(prompt, (len(timesteps), 1, 10))
        embedding, modulation, _ = network.condition_embedder(timesteps, prompt, ctx)
        modulation = modulation.reshape(len(timesteps), -1)
        return dict(zip(time_outputs(WAN), (embedding, modulation), strict=True))
    sinusoids = timestep_embedding(timesteps, COGVIDEOX.dim)
    condition = jax.nn.silu(network.time_embedding(sinusoids, ctx))
    graphdef, stacked = nnx.split(network.blocks)
    blocks = [
        nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(2)
    ]
    values = (
        jnp.stack([block.norm1.linear(condition, ctx) for block in blocks]),
        jnp.stack([block.norm2.linear(condition, ctx) for block in blocks]),
        network.norm_out.linear(condition, ctx),
    )
    return dict(zip(time_outputs(COGVIDEOX), values, strict=True))


@dataclasses.dataclass
class Exported:
    """A trained transformer and its export."""

    family: str
    model: WanConfig | CogVideoXConfig
    trained: Transformer
    folder: Path
    loaded: Transformer

    @property
    def scheduler(self):
        return scheduler_from_json(read_json(self.folder / "scheduler" / "scheduler_config.json"))

    def sample(self, transformer: Transformer, steps: int = STEPS) -> np.ndarray:
        keys = jax.random.split(jax.random.key(1), 3)
        noise = jax.random.normal(keys[0], (2, 3, 4, 6, self.model.in_channels))
        text, empty = (jax.random.normal(key, (2, 5, 10)) for key in keys[1:])
        schedule = make_schedule(self.scheduler, steps)
        run = optimized(lambda *x: transformer.sample(*x, 3.0, schedule))
        return np.asarray(run(noise, text, empty))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory) -> Exported:
    family, model = request.param, FAMILIES[request.param][0]
    root = tmp_path_factory.mktemp(family)
    # Many levels, so that rounding of the table is not drowned in codes that flip by one.
    quant = quant_for(model, weight_bits=8, act_bits=8, table_steps=(5,))
    trained = student(model, quant)
    source = pipeline_folder(root / "source", family)
    export_pipeline(source, root / "export", model, trained.states[0], quant)
    loaded = read_transformer(root / "export" / "transformer", jnp.float32)
    return Exported(family, model, trained, root / "export", loaded)


def _at(tree: dict, name: str) -> dict:
    for part in name.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_listed_linears_see_no_tokens(family):
    """What has a row per sample, and none per token, sees the timestep and nothing else."""
    model, found = FAMILIES[family][0], set()

    class Watched(Dense):
        def __init__(self, name: str, *features: int, **arguments):
            super().__init__(name, *features, **arguments)
            self.name = name

        def __call__(self, x, ctx=None):
            found.update([self.name] if x.ndim == 2 else [])
            return super().__call__(x)

    def run():
        network = build_transformer(model, key=jax.random.key(0), dense=Watched)
        latents, text = jnp.ones((2, 1, 4, 4, model.in_channels)), jnp.ones((2, 3, 10))
        return network(latents, jnp.ones(2), text)

    jax.eval_shape(run)
    assert found == set(time_only(model))


def test_the_table_is_what_the_layers_say_at_every_timestep(exported):
    timesteps = visited_timesteps(exported.scheduler, (STEPS, 5))
    assert set(timesteps) == {
        t for steps in (STEPS, 5) for t in make_schedule(exported.scheduler, steps).timesteps
    }
    network = nnx.merge(exported.trained.graphdef, *exported.trained.states)
    said = embeddings(exported.family, network, jnp.asarray(timesteps))
    params = exported.trained.states[0]
    exact, stored = fold_time(exported.model, params, timesteps), exported.loaded.states[0]
    np.testing.assert_array_equal(stored["timestep_table"], timesteps)
    for name in time_outputs(exported.model):
        # float32: only the order of the sums may differ.
        np.testing.assert_allclose(_at(exact, name)["table"], said[name], rtol=1e-6, atol=1e-6)
        assert _at(stored, name)["table"].dtype == np.float16
        np.testing.assert_allclose(
            np.float32(_at(stored, name)["table"]), _at(exact, name)["table"], **ROUNDING
        )


@pytest.mark.slow
def test_tables_of_blocks_that_differ_in_bits_are_cut_like_their_blocks(tmp_path):
    quant = quant_for(COGVIDEOX, bits={"blocks.1.ffn.up": (8, 8)})
    trained = student(COGVIDEOX, quant)
    source = pipeline_folder(tmp_path / "source", "cogvideox")
    export_pipeline(source, tmp_path / "export", COGVIDEOX, trained.states[0], quant)
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32)
    timesteps = loaded.states[0]["timestep_table"]
    said = fold_time(COGVIDEOX, trained.states[0], timesteps)["blocks"]["norm1"]["linear"]["table"]
    for block, part in enumerate(("from_0", "from_1")):
        found = loaded.states[0]["blocks"][part]["norm1"]["linear"]["table"]
        np.testing.assert_allclose(np.float32(found), said[block : block + 1], **ROUNDING)
    arguments = (jnp.ones((1, 3, 4, 6, COGVIDEOX.in_channels)), timesteps[:1], jnp.ones((1, 5, 10)))
    assert np.isfinite(loaded(*arguments)).all()


def test_the_export_holds_tables_and_none_of_the_linears(exported):
    tensors = Tensors(exported.folder / "transformer")
    config = read_json(exported.folder / "transformer" / "config.json")["quantization_config"]
    assert config["format_version"] == 3
    assert config["time_table"] == {"entries": len(tensors["timesteps"]), "steps": [5, STEPS]}
    tables = sorted(name for name in tensors if name.endswith(".table"))
    per_block = [f"transformer_blocks.{i}.norm{k}.linear.table" for i in (0, 1) for k in (1, 2)]
    assert (
        tables
        == {
            "wan": [
                "condition_embedder.time_embedder.linear_2.table",
                "condition_embedder.time_proj.table",
            ],
            "cogvideox": ["norm_out.linear.table", *per_block],
        }[exported.family]
    )
    stems = tuple(name.removesuffix("table") for name in tables)
    inner = ("condition_embedder.time_embedder.", "time_embedding.")
    left = [name for name in tensors if name.startswith((*stems, *inner)) and name not in tables]
    assert not left


@pytest.mark.slow
def test_the_export_samples_what_the_trained_student_samples(exported):
    """With a float32 table to rounding; with float16, as far as the codes that flip move it."""
    trained = exported.sample(exported.trained)
    timesteps = exported.loaded.states[0]["timestep_table"]
    exact = fold_time(exported.model, exported.trained.states[0], timesteps)
    params = jax.tree.map(lambda leaf: leaf, exported.loaded.states[0])
    for name in time_outputs(exported.model):
        _at(params, name)["table"] = _at(exact, name)["table"]
    float32 = dataclasses.replace(exported.loaded, states=(params, exported.loaded.states[1]))
    size = np.linalg.norm(trained)
    assert np.linalg.norm(exported.sample(float32) - trained) < 1e-5 * size
    moved = np.linalg.norm(exported.sample(exported.loaded) - trained)
    assert 0 < moved < 2e-2 * size


@pytest.mark.parametrize("steps", [3, 50])
def test_steps_that_the_table_does_not_hold_are_refused(exported, steps):
    message = rf"steps is {steps}: .* made for steps = 5, {STEPS} .*table_steps=\({steps},\)"
    with pytest.raises(UserError, match=message):
        exported.sample(exported.loaded, steps)
    exported.sample(exported.loaded, 5)


def test_part_of_the_table_is_enough(exported):
    """Half of 8 steps visit 4 of the 8 timesteps."""
    exported.loaded.check_schedule(make_schedule(exported.scheduler, 4))


def test_another_flow_shift_is_refused(exported):
    if exported.family == "wan":
        schedule = make_schedule(UniPCConfig(flow_shift=3.0), STEPS)
        with pytest.raises(UserError, match="leave flow_shift away"):
            exported.loaded.check_schedule(schedule)


def test_a_call_takes_the_nearest_entry(exported):
    model, timesteps = exported.model, exported.loaded.states[0]["timestep_table"]
    latents, text = jnp.ones((2, 1, 4, 4, model.in_channels)), jnp.ones((2, 3, 10))
    # Within one bucket of clips.
    at, near = (np.asarray([timesteps[-1], timesteps[2]]) + shift for shift in (0, 0.4))
    clip_index = jnp.zeros(2, jnp.int32)
    once = exported.loaded(latents, at, text, clip_index=clip_index)
    np.testing.assert_array_equal(exported.loaded(latents, near, text, clip_index=clip_index), once)
    table = jnp.asarray([0.0, 10.0, 20.0])
    asked = jnp.asarray([-3.0, 5.0, 5.1, 1000.0])
    assert nearest_entry(asked, table).tolist() == [0, 0, 1, 2]


def test_values_beyond_float16_are_stored_in_float32():
    values = np.asarray([[1.0, -65504.0], [1 / 3, 2**-20]], np.float32)
    assert stored_table(values).dtype == np.float16
    np.testing.assert_allclose(np.float32(stored_table(values)), values, **ROUNDING)
    values[0, 0] = 65520.0
    np.testing.assert_array_equal(stored_table(values), values)
    assert stored_table(values).dtype == np.float32


def test_a_block_with_large_values_keeps_them(tmp_path):
    quant = quant_for(COGVIDEOX)
    params = student(COGVIDEOX, quant).states[0]
    params["blocks"]["norm1"]["linear"]["bias"] = (
        params["blocks"]["norm1"]["linear"]["bias"].at[1, 0].set(1e5)
    )
    source = pipeline_folder(tmp_path / "source", "cogvideox")
    export_pipeline(source, tmp_path / "export", COGVIDEOX, params, quant)
    tensors = Tensors(tmp_path / "export" / "transformer")
    kinds = [tensors[f"transformer_blocks.{i}.norm1.linear.table"].dtype for i in range(2)]
    assert kinds == [np.float16, np.float32]
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32).states[0]
    table = loaded["blocks"]["norm1"]["linear"]["table"]
    said = time_values(COGVIDEOX, params, loaded["timestep_table"])["blocks.norm1.linear"]
    np.testing.assert_allclose(table[1], said[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scheduler", "parameters", "megabytes"),
    [
        ("Wan2.1-T2V-1.3B", UniPCConfig(flow_shift=5.0), 16.9, 1.1),
        ("CogVideoX-2B", CogVideoXDDIMConfig(), 357.8, 69.5),
    ],
)
def test_fifty_steps_take_less_than_four_bit_linears(name, scheduler, parameters, megabytes):
    """The figures of DSAQuant (arXiv 2609.04031), from the real shapes."""
    model = config_from_json(json.loads((CONFIGS / f"{name}.json").read_text()))
    plain, entries = abstract_params(model), len(visited_timesteps(scheduler, (50,)))
    layers = [_at(plain, layer) for layer in time_only(model)]
    assert round(sum(leaf.size for layer in layers for leaf in layer.values()) / 1e6, 1) == (
        parameters
    )
    quant = quant_for(model, time_entries=entries)
    shapes = packed_definition(model, quant, jnp.bfloat16).shapes
    tables = [_at(shapes, layer)["table"] for layer in time_outputs(model)]
    assert {table.dtype for table in tables} == {jnp.dtype(jnp.float16)}
    assert shapes["timestep_table"].shape == (entries,) == (50,)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    names = {".".join(part.key for part in path[:-1]) for path in paths}
    assert names & set(time_only(model)) == set(time_outputs(model))
    stored = sum(2 * table.size for table in tables)
    assert round(stored / 1e6, 1) == megabytes
    codes = sum(
        layer["kernel"].size
        // layer["kernel"].shape[-2]
        * packed_bytes(layer["kernel"].shape[-2], 4)
        for layer in layers
    )
    assert stored < 0.4 * codes


def test_a_table_of_another_size_is_refused(exported, tmp_path):
    tensors = dict(Tensors(exported.folder / "transformer"))
    name = next(name for name in tensors if name.endswith(".table"))
    stem = name.split(".")[0]
    changed = {
        key: array[:-1] if key.startswith(stem) and key.endswith(".table") else array
        for key, array in tensors.items()
    }
    config = read_json(exported.folder / "transformer" / "config.json")
    write_json(tmp_path / "config.json", config)
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", changed)
    with pytest.raises(UserError, match=r"table is .* expected .* by config.json"):
        read_transformer(tmp_path, jnp.float32)


def test_the_released_names_have_no_place_for_a_table(exported, tmp_path):
    with pytest.raises(UserError, match="timestep linears are a table"):
        export_released(exported.folder, tmp_path / "theirs", approximate=True)
    assert not (tmp_path / "theirs").exists()
