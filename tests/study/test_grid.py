"""Cells, the configs they stand for, and what makes a record outdated."""

import subprocess
import sys

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.study import grid as study_grid
from qvgen_jax.study import record
from qvgen_jax.training.check import check_config
from tests.study.records import cells, grid, synthetic


@pytest.mark.parametrize("stage", ["screening", "finals", "smoke"])
def test_every_cell_of_the_grid_is_a_config_that_passes_its_checks(stage):
    asked = grid(stage)
    for cell in study_grid.read_cells(asked, list(asked["variants"])):
        check_config(cell.config)
        assert cell.config["quant"]["weight_bits"] == cell.bits[0]


def test_one_bit_width_comes_after_the_other_and_more_seeds_last():
    found = cells("screening", ("default", "plain_qat"))
    assert [cell.name for cell in found] == [
        "default-w4a4-0",
        "plain_qat-w4a4-0",
        "default-w3a3-0",
        "plain_qat-w3a3-0",
        "default-w4a4-1",
        "default-w3a3-1",
        "default-w4a4-2",
        "default-w3a3-2",
    ]


def test_a_cell_is_a_command_line_that_gives_its_config(tmp_path):
    """Values of every kind of variant, read back by the flags of main.py."""
    names = ("default", "no_refactor", "truth_blend_5", "hadamard", "unguided_last")
    for cell in cells("smoke", names, variants=grid("finals")["variants"]):
        arguments = cell.command(tmp_path)[1:]
        source = (
            "import sys\nfrom qvgen_jax.command_line import parse\n"
            "print(parse(['main.py', *sys.argv[1:]]).to_json())"
        )
        shown = subprocess.run(
            [sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=True
        )
        assert study_grid.relevant(cell.config) == study_grid.relevant(
            study_grid.json.loads(shown.stdout)
        )


def test_misspelt_keys_variants_and_values_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="no variant 'defualt'; did you mean 'default'"):
        cells("screening", ("defualt",))
    wrong = {"wrong": {"quant.ranc": 3}}
    with pytest.raises(UserError, match=r"variant 'wrong'.*did you mean 'quant.rank'"):
        cells("screening", ("wrong",), variants=wrong)
    with pytest.raises(UserError, match=r"quant.rank='many'"):
        cells("screening", ("wrong",), variants={"wrong": {"quant.rank": "many"}})
    with pytest.raises(UserError, match="does not exist; run from"):
        cells("screening", ("default",), base="configs/nope.py")


def test_a_record_is_outdated_by_its_own_keys_and_by_overridden_new_ones():
    cell = cells("screening", ("rank_8",))[0]
    recorded = study_grid.relevant(cell.config)
    assert study_grid.differences(recorded, cell) == []
    older = {**recorded, "quant.rank": 4}
    assert study_grid.differences(older, cell) == ["quant.rank: 4 there, 8 here"]
    del older["quant.rank"]  # The grid overrides it: the default of then is not what is asked.
    assert study_grid.differences(older, cell) == ["quant.rank: new, 8 here"]
    added_later = {key: value for key, value in recorded.items() if key != "train.ema_decay"}
    assert study_grid.differences(added_later, cell) == []
    assert study_grid.differences({**recorded, "quant.gone": 1}, cell)


@pytest.mark.parametrize("name", ["default", "efficient_dm"])  # Its rates have many digits.
def test_a_record_that_was_written_is_good(name, tmp_path):
    for cell in cells("finals", (name,)):
        assert record.outdated(tmp_path, cell) == "no result"
        content = synthetic(cell, loss=1 / 3)
        record.write(record.path_of(tmp_path, cell), content)
        assert record.outdated(tmp_path, cell) is None
    held = record.read_stage(tmp_path, "finals")[0]["held_out"]["per_clip"]
    assert all(float(f"{x:.5g}") == x for x in held)  # What was measured has few digits.


def test_where_things_lie_and_what_is_written_do_not_change_the_digest():
    cell = cells("screening", ("default",))[0]
    moved = {**cell.config, "data": {**cell.config["data"], "encoded": "elsewhere"}}
    assert study_grid.digest(moved) == study_grid.digest(cell.config)
    other = {**cell.config, "seed": 5}
    assert study_grid.digest(other) != study_grid.digest(cell.config)
