"""Multiply-adds against a count by hand."""

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.models import quantizable
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.study.operations import (
    equal_steps,
    forward_operations,
    run_operations,
    step_operations,
)
from tests.study.records import cells

MODEL = WanConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=1,
    attention_head_dim=10,
    in_channels=2,
    out_channels=2,
    text_dim=3,
    freq_dim=4,
    ffn_dim=20,
    num_layers=2,
)
TOKENS, TEXT = 7, 5
# By hand: rows x in x out.
TIME = 1 * (4 * 10 + 10 * 10 + 10 * 60)
TEXT_EMBEDDER = TEXT * (3 * 10 + 10 * 10)
SELF = 4 * TOKENS * 10 * 10 + 2 * TOKENS * TOKENS * 10
CROSS = 2 * TOKENS * 10 * 10 + 2 * TEXT * 10 * 10 + 2 * TOKENS * TEXT * 10
FFN = TOKENS * (10 * 20 + 20 * 10)
BLOCKS = 2 * (SELF + CROSS + FFN)
ENDS = TOKENS * (2 * 10 + 10 * 2)
NAMES = quantizable(MODEL)
OUTSIDE = TIME + TEXT_EMBEDDER + ENDS


def test_a_forward_counts_every_matrix_once_per_row():
    assert forward_operations(MODEL, TOKENS, TEXT) == OUTSIDE + BLOCKS


def test_a_step_is_the_teachers_forward_and_the_students_forward_and_backward():
    plain = step_operations(
        MODEL, TOKENS, TEXT, rank=0, batch_size=3, remat="none", quantized=NAMES
    )
    assert plain == 3 * 4 * (OUTSIDE + BLOCKS)
    remat = step_operations(
        MODEL, TOKENS, TEXT, rank=0, batch_size=3, remat="blocks", quantized=NAMES
    )
    assert remat - plain == 3 * BLOCKS


def test_the_branch_costs_rank_times_both_sides_of_every_quantized_linear():
    def step(rank: int) -> int:
        return step_operations(
            MODEL, TOKENS, TEXT, rank=rank, batch_size=1, remat="none", quantized=NAMES
        )

    time = (4 + 10) + (10 + 10) + (10 + 60)
    text = TEXT * ((3 + 10) + (10 + 10))
    layer = 4 * TOKENS * 20 + 2 * TOKENS * 20 + 2 * TEXT * 20 + TOKENS * 60
    proj_out = TOKENS * (10 + 2)
    assert step(2) - step(0) == 3 * 2 * (time + text + 2 * layer + proj_out)


def test_the_branch_is_counted_for_as_long_as_it_lives_and_where_it_is():
    names = ("default", "abrupt_end", "time_table", "rank_16")
    found = {cell.variant: cell.config for cell in cells("screening", names)[:4]}
    totals = {name: run_operations(config) for name, config in found.items()}
    step = totals["default"][1]
    assert {each[1] for each in totals.values()} == {step}  # Without a branch all cost the same.
    extra = {name: total - 300 * step for name, (total, _) in totals.items()}
    # 0.9 of 300 steps in one phase, to 6 phases of 25 steps; rank 16 has 5 phases of 30, half the
    # columns.
    assert extra["abrupt_end"] * 150 == extra["default"] * 270
    assert extra["rank_16"] * 2 == extra["default"]
    # The timestep's linears have one row each: a branch less, by hand.
    dim, frequencies = 128, 256
    time = (frequencies + dim) + (dim + dim) + (dim + 6 * dim)
    assert extra["default"] - extra["time_table"] == 150 * 8 * 3 * 32 * time


def test_plain_training_gets_the_steps_that_cost_what_the_default_costs():
    plain, like = cells("screening", ("plain_qat_equal_ops", "default"))[:2]
    steps = plain.config["train"]["steps"]
    assert steps > like.config["train"]["steps"]
    total, step = run_operations(plain.config)
    assert abs(total - run_operations(like.config)[0]) <= step
    warmup = plain.config["train"]["warmup_steps"] / steps
    assert warmup == pytest.approx(like.config["train"]["warmup_steps"] / 300, abs=0.01)
    with pytest.raises(UserError, match=r"set it to 0"):
        equal_steps(like.config, like.config)
