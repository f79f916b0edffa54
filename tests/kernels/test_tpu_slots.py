"""Slots are counted in a schedule, and the command refuses what it cannot count."""

import importlib.util

import pytest

from kernels import tpu_slots
from kernels.tpu_slots import count

SCHEDULE = """
     0   :  { %v1 = vld [vmem:[%s0]] }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 /* iteration index, stage = 1 */ }
   0x2   : > { %5 = dma.hbm_to_vmem [thread:$0] /* 
iteration_bounds: (32, 5)
strides: (8, 40, 4) */ }
   0x3 LB: >> { %v2 = vadd.s32 %v1, %v1  ;;  %p1 = scmp.ge.s32.totalorder %s3, 16 /* loop exit test */ }
   0x4 LB: >> { %v3 = vmatmul.mubr.s4.gmra.mxu0 %v2  ;;  %v4 = vmatmul.mubr.s4.gmra.mxu1 %v2 }
   0x5   : >> { %p2 = scmp.ge.s32.totalorder %s4, 2 /* loop exit test */ }
   0x6   :  {}
   0x7   : > { %v5 = vmatprep.mubr.s4.mxu0 %v2 }
   0x8 PF: > { %p3 = scmp.ge.s32.totalorder %s1, 162 /* loop exit test */ }
   0x9   :  { %v6 = vmatmul.s8.gmra.mxu0 %v2 }
"""  # noqa: E501


def test_slots_are_counted_times_the_trips_of_all_loops_around_them():
    slots = count(SCHEDULE)
    assert slots.opcodes == {"s8": 1, "s4": 2 * 2 * 160}
    assert slots.cycles == 2 + 4 * 160 + 3 * 2 * 160
    assert slots.prologue == 16


def test_a_loop_without_a_known_end_is_not_counted():
    with pytest.raises(ValueError, match="a loop of 160 steps ends at 7"):
        count(SCHEDULE.replace("162 /*", "7 /*"))


def test_a_shape_that_is_in_no_name_is_one_message_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(tpu_slots, "table", lambda *_: "an empty table")
    assert tpu_slots.main(["--shape", "1.3B", "nope"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: --shape nope: in no name of Wan-1.3B 480p, attention; ")
    assert not found.out


def test_without_libtpu_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tpu_slots.main(["--shape", "1.3B"]) == 2
    assert "libtpu is not installed: pip install 'jax[tpu]'" in capsys.readouterr().err


def test_parts_of_names_choose_shapes(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(tpu_slots, "table", lambda chips, shapes: f"{chips} {shapes}")
    assert tpu_slots.main(["--chip", "v5e", "--shape", "1.3B 480p, ffn", "X-2B, att"]) == 0
    out = capsys.readouterr().out
    assert "['v5e']" in out
    assert [out.count(word) for word in ("Shape(", "'ffn up'", "CogVideoX", "14B")] == [3, 1, 1, 0]
