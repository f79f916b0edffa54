"""A scan's numbers against networks built for one question each; stopped, changed, read again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.drift import predictions
from qvgen_jax.mixed.candidates import parse_candidates
from qvgen_jax.mixed.figure import draw_heat_map
from qvgen_jax.mixed.probe import Probe, Samples
from qvgen_jax.mixed.scan import layer_targets, scan
from qvgen_jax.mixed.sensitivity import as_table, begun, read_sensitivity
from qvgen_jax.models import build_transformer, config_from_json, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.switched import switched_params
from qvgen_jax.training.student import student_definition
from qvgen_jax.training.teacher import teacher_definition
from qvgen_jax.transformer import Transformer
from tests.golden import tiny_models

MODEL = config_from_json({"_class_name": "WanTransformer3DModel", **tiny_models.WAN})
QUANT = QuantConfig(rank=2)
TIMESTEPS = (900, 300)
RNG = np.random.default_rng(0)
CLIPS = {
    "latents": RNG.normal(size=(3, 2, 4, 4, 2)).astype(np.float32),
    "text_embeds": RNG.normal(size=(3, 5, 6)).astype(np.float32),
}
SCHEDULER = UniPCConfig()
ASKED = {"timesteps": list(TIMESTEPS), "clips": 3}
DOWN = "blocks.ffn.down"


@pytest.fixture(scope="module")
def teacher():
    plain = build_transformer(MODEL, key=jax.random.key(0))
    return nnx.to_pure_dict(nnx.state(plain, nnx.Param))


@pytest.fixture(scope="module")
def probe():
    # Two calls of four: the last has two rows twice.
    return Probe(MODEL, QUANT, jnp.float32, Samples(CLIPS, TIMESTEPS, SCHEDULER, 1, 4))


def start(path, candidates, probe):
    layers = tuple(layer_targets(probe.names, MODEL.num_layers))
    return begun(path, ASKED, parse_candidates(candidates), layers)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory, teacher, probe):
    path = tmp_path_factory.mktemp("scan") / "sensitivity.json"
    found = start(path, "w3,w4a4", probe)
    return path, scan(found, path, probe, teacher, QUANT, MODEL.num_layers)


def direct(graphdef, states, teacher):
    """The damage at each timestep, by the predictions of two networks."""
    networks = (
        Transformer(MODEL, teacher_definition(MODEL, jnp.float32), (teacher,)),
        Transformer(MODEL, graphdef, states),
    )
    full, other = (predictions(x, CLIPS, SCHEDULER, 3, TIMESTEPS) for x in networks)
    squares = [np.square(x.astype(np.float64)).sum((2, 3, 4, 5)) for x in (other - full, full)]
    return (squares[0] / squares[1]).mean(1)


def test_weights_alone_are_the_plain_network_with_that_one_kernel_rounded(scanned, teacher):
    kernel = np.asarray(layer_at(teacher, DOWN)["kernel"])
    config = dataclasses.replace(QUANT, weight_bits=3)
    node = layer_at(switched_params(teacher, [DOWN], config)[0], DOWN)
    scale, zero = (np.asarray(node[x])[1] for x in ("scale", "zero_point"))
    rounded = kernel.copy()
    rounded[1] = scale * (np.clip(np.rint(kernel[1] / scale + zero), 0, 7) - zero)
    changed = with_layer(teacher, DOWN, {**layer_at(teacher, DOWN), "kernel": jnp.asarray(rounded)})
    expected = direct(teacher_definition(MODEL, jnp.float32), (changed,), teacher)
    found = scanned[1].damage["w3"]["blocks.1.ffn.down"]
    # Float32 predictions that differ by a hundredth; six digits are kept.
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_both_operands_are_the_student_with_that_one_layer_quantized(scanned, teacher):
    others = tuple(name for name in quantizable(MODEL) if name != "proj_out")
    quant = QuantConfig(4, 4, rank=0, full_precision=others)
    states = switched_params(teacher, quantizable(MODEL), quant)
    graphdef = student_definition(MODEL, quant, jnp.float32, branch=False)
    expected = direct(graphdef, states, teacher)
    np.testing.assert_allclose(scanned[1].damage["w4a4"]["proj_out"], expected, rtol=1e-3)


def test_with_every_switch_off_the_network_is_the_teacher(probe, teacher):
    states = switched_params(teacher, probe.names, QUANT)
    reference = np.concatenate(probe.reference(*states))[: len(TIMESTEPS) * 3]
    full = Transformer(MODEL, teacher_definition(MODEL, jnp.float32), (teacher,))
    expected = predictions(full, CLIPS, SCHEDULER, 3, TIMESTEPS).reshape(reference.shape)
    # Two float32 programs of one network, values about 1.
    np.testing.assert_allclose(reference, expected, rtol=0, atol=1e-5)


def test_a_scan_that_is_stopped_goes_on_and_ends_as_one_that_is_not(
    tmp_path, scanned, teacher, probe, monkeypatch
):
    path, calls = tmp_path / "sensitivity.json", []
    damage = Probe.damage

    def stops(self, *states):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return damage(self, *states)

    monkeypatch.setattr(Probe, "damage", stops)
    arguments = (path, probe, teacher, QUANT, MODEL.num_layers)
    with pytest.raises(KeyboardInterrupt):
        scan(start(path, "w3,w4a4", probe), *arguments)
    again = start(path, "w3,w4a4", probe)
    assert again.missing == 2 * len(again.layers) - 4
    assert scan(again, *arguments) == scanned[1]
    assert path.read_bytes() == scanned[0].read_bytes()


def test_a_damage_that_is_no_number_stops_the_scan_and_names_the_layer(
    tmp_path, teacher, probe, monkeypatch
):
    monkeypatch.setattr(Probe, "damage", lambda *_: np.array([0.1, np.nan]))
    path = tmp_path / "sensitivity.json"
    found = start(path, "w3", probe)
    with pytest.raises(UserError, match=rf"damage of {found.layers[0]} at w3 is \[0.1, nan\]"):
        scan(found, path, probe, teacher, QUANT, MODEL.num_layers)
    assert read_sensitivity(path).missing == len(found.layers)


def test_a_candidate_may_be_added_and_another_question_is_refused(scanned, probe):
    path, found = scanned
    more = start(path, "a8", probe)
    assert [each.name for each in more.candidates] == ["w3", "w4a4", "a8"]
    assert more.missing == len(found.layers)
    with pytest.raises(UserError, match=r"asked something else \(clips 3, now 4\); move it away"):
        begun(path, ASKED | {"clips": 4}, found.candidates, found.layers)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"damage": {"w3": 1}},
        {"layers": None},
        {"asked": None},
        {"asked": ASKED | {"clips": "3"}},
        {"asked": ASKED | {"timesteps": 900}},
        {"asked": ASKED | {"timesteps": [900, "300"]}},
        {"damage": {"w3": {DOWN: [0.1]}}},
        {"damage": {"w3": {DOWN: [0.1, float("nan")]}}},
        {"damage": {"w3": {DOWN: [-0.1, 0.1]}}},
        {"damage": {"w3": {DOWN: ["0.1", 0.1]}}},
        {"damage": {"w3": {DOWN: [10**400, 0.1]}}},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused(tmp_path, scanned, change):
    fields = json.loads(scanned[0].read_text()) | change
    (tmp_path / "sensitivity.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="is no complete scan of this program"):
        read_sensitivity(tmp_path / "sensitivity.json")


def test_the_table_and_the_heat_map_show_what_the_file_holds(tmp_path, scanned):
    path, found = scanned
    assert read_sensitivity(path) == found
    worst = max(found.layers, key=lambda name: np.mean(found.damage["w3"][name]))
    first = as_table(found).splitlines()[1].split()
    assert first[0] == worst
    expected = 100 * np.mean(found.damage["w3"][worst]) ** 0.5
    assert float(first[1]) == pytest.approx(expected, rel=5e-3)  # Three digits.
    draw_heat_map(tmp_path / "map.png", found)
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
