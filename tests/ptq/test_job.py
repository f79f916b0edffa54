"""The job on a real pipeline of the smallest size: its export, its record, its refusals."""

import json

import jax
import numpy as np
import pytest

import qvgen_jax
from configs.tiny_w4a4 import get_config
from convert.export import check_export, export_layers
from convert.packed import packed_definition
from convert.tensors import Tensors
from main import flags as main_flags
from qvgen_jax.errors import UserError
from qvgen_jax.ptq import job
from qvgen_jax.ptq.job import Exporting, run_quantize
from qvgen_jax.ptq.methods import METHODS
from tests.evaluation.small_pipelines import write_full

EXPORTING = Exporting(packed_definition, check_export, export_layers)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_full(tmp_path_factory.mktemp("models") / "full")


def settings(model, **calibration) -> dict:
    config = get_config()
    config.model = str(model)
    config.quant.act_bits = 6
    config.data.update({"num_frames": 5, "height": 32, "width": 32})
    few = {"count": 1, "steps": 2, "every": 1, "batch_size": 2, "rows": 16}
    config.calibration.update(few | {"rank": 2, "smoothing_points": 2} | calibration)
    return config.to_dict()


def tensors_of(export) -> dict:
    tensors = Tensors(export / "transformer")
    return {name: np.asarray(tensors[name]) for name in tensors}


@pytest.mark.slow
def test_an_interrupted_quantization_goes_on_to_the_same_export_which_generates(
    full, tmp_path, monkeypatch
):
    config = settings(full, rounding="gptq")
    config["quant"]["time_table"] = True
    export = run_quantize(config, tmp_path / "whole", "svdquant", EXPORTING)
    told = job.Told.__call__

    def interrupted(self, done, was_there):
        told(self, done, was_there)
        if done.stage.kind == "block":
            raise KeyboardInterrupt

    monkeypatch.setattr(job.Told, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_quantize(config, tmp_path / "parts", "svdquant", EXPORTING)
    with pytest.raises(UserError, match="method='svdquant', this one has 'gptq'"):
        run_quantize(config, tmp_path / "parts", "gptq", EXPORTING)
    monkeypatch.setattr(job.Told, "__call__", told)
    monkeypatch.setattr(job, "sampled_inputs", None)  # They are there.
    again = run_quantize(config, tmp_path / "parts", "svdquant", EXPORTING)
    expected, found = tensors_of(export), tensors_of(again)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert not (tmp_path / "parts" / "quantize.partial").exists()
    _check_record(json.loads((tmp_path / "parts" / "quantize.json").read_text()), found)
    pipe = qvgen_jax.load(again)
    assert np.isfinite(pipe.sample_latents("a red circle moving right")).all()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.transformer.states))
    assert pipe.transformer.table_steps == (2,)
    branch = sum(array.nbytes for name, array in found.items() if name[-2:] in (".L", ".R"))
    codes = sum(array.nbytes for name, array in found.items() if name.endswith(".codes"))
    assert held > branch + codes  # What an evaluation's table counts.


def _check_record(record: dict, tensors: dict) -> None:
    assert record["bits"] == [4, 6]
    assert len(record["layers"]) == 2 * 10 + 3  # All but the timestep's own.
    assert all(0 < each["output"] < 1 for each in record["layers"].values())
    for kind, ends in {"codes": ["codes"], "branch": ["L", "R"], "smoothing": ["smooth"]}.items():
        held = [a.nbytes for name, a in tensors.items() if name.rpartition(".")[2] in ends]
        assert record["linears_bytes"][kind] == sum(held) > 0


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({}, "", "--method=; expected one of rtn, rtn_search"),
        ({"prompts": "nowhere.txt"}, "rtn", "'nowhere.txt' is no file"),
        ({"count": 17}, "rtn", "has 16 prompts; ask for fewer"),
        ({"damping": 0.0}, "gptq", "calibration.damping=0.0; expected a number above 0"),
        ({"rounding": "up"}, "gptq", "calibration.rounding=up; expected one of , nearest, gptq"),
        ({"exponent": 1.0}, "smoothquant", "exponent=1.0; expected a number from 0 to below 1"),
        ({"rank": 17}, "svdquant", "rank=17 is more than .* choose at most 16, or name it"),
        ({"batch_size": 0}, "rtn", "calibration.batch_size=0; expected a whole number from 1"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_computed(
    full, tmp_path, monkeypatch, change, method, message
):
    monkeypatch.setattr(job, "sampled_inputs", None)
    with pytest.raises(UserError, match=message):
        run_quantize(settings(full, **change), tmp_path / "new", method, EXPORTING)
    assert not (tmp_path / "new" / "quantize.partial").exists()


def test_a_training_run_keeps_its_workdir(full, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a training run"):
        run_quantize(settings(full), tmp_path, "rtn", EXPORTING)


def test_the_command_line_knows_the_methods():
    assert set(main_flags.FLAGS["method"].parser.enum_values) == set(METHODS)
