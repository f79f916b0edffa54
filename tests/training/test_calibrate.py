"""The activations that smoothing measures, and a run that starts from them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.export import export_pipeline
from qvgen_jax.data.dataset import batches
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.models import build_transformer, quantizable
from qvgen_jax.quant.calibration import means
from qvgen_jax.quant.dense import Dense
from qvgen_jax.quant.smoothing import smooth_factors
from qvgen_jax.training import loop
from qvgen_jax.training.calibrate import BATCHES, activation_maxima, unmeasured
from qvgen_jax.training.step import noisy_inputs, sample_keys
from qvgen_jax.training.student import quant_config, student_definition
from qvgen_jax.transformer import Transformer
from tests.convert.test_export import pipeline_folder
from tests.training.resuming import assert_predicts_the_same, whole_and_resumed
from tests.training.test_run import CONFIG, MODEL, SCHEDULER, Clips, teacher  # noqa: F401

SMOOTHED = {
    **CONFIG,
    "quant": {**CONFIG["quant"], "bits": (), "smoothing": 0.5, "rotation": "hadamard"},
    "train": {**CONFIG["train"], "steps": 2, "weight_decay": 0.5},
}
SMOOTHED["quant"] |= {"rank": 0, "full_precision": ("proj_out",)}


def by_hand(params: dict) -> dict[str, np.ndarray]:
    """The maxima of a plain forward: every linear calls back with its tokens, block after block."""
    found: dict[str, list[np.ndarray]] = {}

    class Recorded(Dense):
        def __init__(self, name, *sizes, **options):
            super().__init__(name, *sizes, **options)
            self.name = name

        def __call__(self, x, *rest):
            def record(x):
                found.setdefault(self.name, []).append(np.abs(x).max(tuple(range(x.ndim - 1))))

            jax.debug.callback(record, x, ordered=True)
            return super().__call__(x, *rest)

    network = nnx.eval_shape(
        lambda: build_transformer(MODEL, key=jax.random.key(0), dense=Recorded, remat="none")
    )
    graphdef = nnx.split(network, nnx.Param)[0]
    data = batches(Clips(), seed=CONFIG["seed"], batch_size=CONFIG["train"]["batch_size"])
    noising = training_noise(SCHEDULER, CONFIG["train"])
    for step in range(BATCHES):
        batch = next(data)
        keys = sample_keys(CONFIG["seed"], jnp.int32(step), batch["sample_index"])
        seen = noisy_inputs(batch, keys, noising, CONFIG["train"]["caption_dropout"], empty())
        nnx.merge(graphdef, params)(seen["latents"], seen["timesteps"], seen["text_embeds"])
    jax.effects_barrier()
    maxima = {}
    for name, records in found.items():
        layers = MODEL.num_layers if name.startswith("blocks.") else 1
        each = np.stack(records).reshape(BATCHES, layers, -1).max(0)
        maxima[name] = each if name.startswith("blocks.") else each[0]
    return maxima


def empty() -> jax.Array:
    return jnp.asarray(Clips.empty_text_embeds)


@pytest.fixture(scope="module")
def activations(teacher) -> dict:  # noqa: F811
    return activation_maxima(SMOOTHED, MODEL, SCHEDULER, teacher, Clips())


def test_the_statistics_are_those_of_a_plain_forward(teacher, activations):  # noqa: F811
    expected = by_hand(teacher)
    assert set(activations) == set(quantizable(MODEL)) - {"proj_out"}
    for name, array in activations.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, err_msg=name)
    shapes = jax.tree.map(jnp.shape, unmeasured(MODEL, teacher))
    assert {name: shapes[name] for name in activations} == jax.tree.map(jnp.shape, activations)


def test_half_batches_have_the_same_statistics(teacher, activations):  # noqa: F811
    config = {**SMOOTHED, "train": {**SMOOTHED["train"], "accumulate": 2}}
    halves = activation_maxima(config, MODEL, SCHEDULER, teacher, Clips())
    for name, array in halves.items():
        np.testing.assert_allclose(array, activations[name], rtol=1e-5, err_msg=name)


def test_moments_of_bfloat16_tokens_are_those_of_their_values():
    """Far from 0: in bfloat16 a square of 100 has a last bit of 0.5, and the variance is 0.25."""
    drawn = np.random.default_rng(0).normal(10, 0.5, (4096, 32))
    rows = jnp.asarray(drawn, jnp.bfloat16)
    values = np.asarray(rows, np.float64)
    absolute, mean, square = means(rows)
    np.testing.assert_allclose(absolute, np.abs(values).mean(), rtol=1e-5)
    # Float32 leaves 1e-5 of a square of 100.
    np.testing.assert_allclose(square - mean**2, values.var(), rtol=0.01)


def test_a_run_without_smoothing_measures_nothing(teacher):  # noqa: F811
    assert activation_maxima(CONFIG, MODEL, SCHEDULER, teacher, Clips()) is None


@pytest.mark.slow
def test_a_smoothed_run_resumes_exactly_never_trains_its_factors_and_is_exported_as_trained(
    teacher,  # noqa: F811
    activations,
    tmp_path,
    monkeypatch,
):
    first = loop.initial_state(SMOOTHED, MODEL, teacher, activations)
    layer, kernel = (s["blocks"]["ffn"]["down"] for s in (first["levels"], teacher))
    expected = smooth_factors(activations["blocks.ffn.down"], kernel["kernel"], 0.5)
    np.testing.assert_array_equal(layer["smooth"], expected)
    assert "smooth" not in first["levels"]["blocks"]["attn1"]["to_out"]  # Folded into to_v.
    moments = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(first["opt"])]
    assert moments
    assert not [path for path in moments if "smooth" in path]

    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return activations

    monkeypatch.setattr(loop, "activation_maxima", measure)
    whole, resumed = whole_and_resumed(SMOOTHED, teacher, tmp_path, monkeypatch, at=1, branch=False)
    # Weight decay of a half would have shown.
    jax.tree.map(np.testing.assert_array_equal, whole["levels"], first["levels"])
    before, after = (s["params"]["blocks"]["ffn"]["down"]["kernel"] for s in (first, whole))
    assert not np.array_equal(before, after)

    assert len(measured) == 2  # The checkpoint has what came of it.
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    exported_as_trained(whole, tmp_path)


def exported_as_trained(state: dict, tmp_path: Path) -> None:
    quant = quant_config(SMOOTHED["quant"], MODEL)
    definition = student_definition(MODEL, quant, jnp.float32, branch=False)
    params = state["params"]
    # Stored as bfloat16, since it is not quantized.
    params["proj_out"]["kernel"] = params["proj_out"]["kernel"].astype(jnp.bfloat16)
    trained = Transformer(MODEL, definition, (params, state["levels"]))
    source = pipeline_folder(tmp_path / "source", MODEL)
    levels = state["levels"]
    export_pipeline(source, tmp_path / "export", MODEL, params, quant, levels=levels)
    assert_predicts_the_same(tmp_path / "export", trained)
