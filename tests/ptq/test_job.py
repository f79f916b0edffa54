"""The job on a real pipeline of the smallest size: its export, its record, its refusals."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import qvgen_jax
from configs.tiny_w4a4 import get_config
from convert.export import check_export, export_layers
from convert.packed import packed_definition
from convert.tensors import Tensors
from qvgen_jax import command_line
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import write_json
from qvgen_jax.ptq import job
from qvgen_jax.ptq.engine import Done, _Packed, names_in, quantize_stages
from qvgen_jax.ptq.files import RECORD, Unfinished, is_done
from qvgen_jax.ptq.job import Exporting, run_quantize
from qvgen_jax.ptq.methods import METHODS
from qvgen_jax.ptq.stages import Stage, part_of
from qvgen_jax.ptq.trajectory import Inputs
from qvgen_jax.quant.packed import leaves_of
from tests.evaluation.small_pipelines import write_full
from tests.ptq.models import MODELS, inputs
from tests.ptq.test_engine import plan_of

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
        ({"prompts": "nowhere.txt"}, "rtn", "^calibration.prompts='nowhere.txt' is no file"),
        ({"prompts": "held_out"}, "rtn", "one prompt per line, not those that are judged"),
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


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("include_zero", "no", "tokens keep their whole range, which contains 0"),
        ("branch_space", "merged", "--method chooses it"),
    ],
)
def test_what_the_method_does_not_read_is_refused(full, tmp_path, key, value, why):
    config = settings(full)
    config["quant"][key] = value
    with pytest.raises(UserError, match=f"quant.{key}={value} is for training; .* {why}"):
        run_quantize(config, tmp_path, "rtn", EXPORTING)


@pytest.mark.parametrize("damage", ["cut", "renamed", "record", "inputs"])
def test_damaged_files_of_a_stage_are_told(tmp_path, damage):
    plan = plan_of(MODELS["wan"], "svdquant")
    kept, stage = Unfinished(tmp_path, {}), Stage("head")
    names = names_in(plan, stage)
    tensors = {n: {x: np.ones(2, np.float32) for x in leaves_of(plan.quant, n)} for n in names}
    kept.keep_stage(Done(stage, tensors, {}, {}))
    kept.keep_inputs(Inputs(*np.ones((3, 2), np.float32)))
    assert kept.stage(stage, plan)[0].keys() == tensors.keys()
    assert len(kept.inputs()) == 3
    file = kept.folder / "head-0000.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "renamed":
        save_file({"proj_out.other": np.ones(2, np.float32)}, file)
    elif damage == "record":
        file.with_suffix(".json").write_text('{"errors": {}}')
    else:
        save_file({"latents": np.ones(2, np.float32)}, kept.folder / "inputs.safetensors")
    with pytest.raises(UserError, match="delete its folder"):
        kept.inputs() if damage == "inputs" else kept.stage(stage, plan)


def test_a_finished_quantization_is_neither_replaced_nor_done_again(tmp_path):
    task = {"method": "rtn", "choices": {"sides": (1, 2)}}
    assert not is_done(tmp_path, task)
    write_json(tmp_path / RECORD, {"task": task})
    assert not is_done(tmp_path, task)  # Its export was taken away.
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model_index.json").write_text("{}")
    assert is_done(tmp_path, task)
    with pytest.raises(
        UserError, match="method='rtn', this one has 'gptq'; give another --workdir"
    ):
        is_done(tmp_path, task | {"method": "gptq"})


def test_another_scheduler_or_guidance_is_another_task(monkeypatch):
    monkeypatch.setattr(job, "fingerprint", lambda *networks: "")  # Their weights are the same.
    networks = dict.fromkeys(("transformer", "text_encoder", "vae"))

    def task(shift, guidance):
        scheduler, defaults = UniPCConfig(flow_shift=shift), {"guidance_scale": guidance}
        pipe = SimpleNamespace(scheduler=scheduler, defaults=defaults, **networks)
        return job._task(settings("x"), "rtn", plan_of(MODELS["wan"], "rtn"), ["a star"], pipe)

    assert task(3.0, 5.0) == task(3.0, 5.0)
    assert task(7.0, 5.0) != task(3.0, 5.0) != task(3.0, 1.0)


@pytest.mark.slow
def test_a_block_of_other_bits_with_a_branch_says_from_its_export_what_was_calibrated(
    full, tmp_path, monkeypatch
):
    config, seen = settings(full), {}
    config["quant"]["bits"] = (("blocks.1.ffn.up", 8, 8),)

    def remembered(plan, params, *rest):
        seen.update(plan=plan, params=params, done=[])
        for done in quantize_stages(plan, params, *rest):
            seen["done"].append(done)
            yield done

    monkeypatch.setattr(job, "quantize_stages", remembered)
    export = run_quantize(config, tmp_path, "svdquant", EXPORTING)
    plan, packed = seen["plan"], _Packed(seen["plan"])
    args = inputs(plan.model)
    batches = [args]
    for each in seen["done"]:
        part = part_of(seen["params"], each.stage)
        batches = packed.run(each.stage, part, each.tensors, batches)
    found = qvgen_jax.load(export).transformer(*args)
    # One network's blocks lie in two stacks, the other's blocks run one by one: float32 sums.
    scale = np.abs(batches[0][0]).max()
    np.testing.assert_allclose(found, batches[0][0], atol=1e-4 * scale)
    monkeypatch.setattr(job, "sampled_inputs", None)
    assert run_quantize(config, tmp_path, "svdquant", EXPORTING) == export  # It is there.
    with pytest.raises(UserError, match="'rtn'; give another --workdir"):
        run_quantize(config, tmp_path, "rtn", EXPORTING)


def test_a_training_run_keeps_its_workdir(full, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a training run"):
        run_quantize(settings(full), tmp_path, "rtn", EXPORTING)


def test_the_command_line_knows_the_methods():
    assert set(command_line.flags.FLAGS["method"].parser.enum_values) == set(METHODS)
