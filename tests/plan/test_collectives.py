"""Collectives of compiled programs: lines as XLA writes them, and a program of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen_jax.plan.collectives import Collective, collectives

ROOT = Path(__file__).parents[2]
PROGRAM = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner (p: (s32[], s8[80,5120])) -> s8[5120,5120] {
  %gather = s8[5120,5120]{1,0:T(8,128)(4,1)} all-gather(%x), replica_groups=[1,64]<=[64]
}

%body (p: (s32[], s8[80,5120])) -> (s32[], s8[80,5120]) {
  %fusion.1 = s8[5120,5120]{1,0} fusion(%p), kind=kCustom, calls=%inner
}

%condition (p: (s32[], s8[80,5120])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%n, %constant.3), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%t), condition=%condition, body=%body, backend_config={TURNS}
  %while.2 = (s32[]) while(%t), condition=%condition, body=%body
LINE
}
""".replace("TURNS", '"known_trip_count":{"n":"40"}')


def found(line: str) -> Collective:
    return next(c for c in collectives(PROGRAM.replace("LINE", line)) if c.devices != 64)


def test_what_is_in_a_loop_counts_as_often_as_it_turns():
    (gather,) = collectives(PROGRAM.replace("LINE", ""))
    # Once 40 turns, as is written beside it, and once 7, which its condition compares with.
    arriving = 5120 * 5120 * 63 // 64
    assert gather == Collective("all-gather", "s8", 64, 47, 47 * arriving)


@pytest.mark.parametrize(
    "line",
    [
        "%r = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true",
        "%r = (f32[8]{0}, u32[], token[]) recv(%t), frontend_attributes={"
        '_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}',
    ],
)
def test_what_no_other_slice_sends_does_not_count(line):
    assert not [c for c in collectives(PROGRAM.replace("LINE", line)) if c.kind == "recv"]


def test_a_tpus_sum_and_slice_in_one_is_a_reduce_scatter():
    # As libtpu 0.0.48.1 writes a gradient over 64 of 256 devices.
    scatter = """
%all-reduce-scatter.clone.1 (input.2: f32[5120,5120]) -> f32[80,5120] {
  %ar = f32[5120,5120]{1,0:T(8,128)} all-reduce(%input.2), replica_groups=[4,64]<=[256]
  ROOT %slice = f32[80,5120]{1,0:T(8,128)S(1)} dynamic-slice(%ar, %multiply.30, %constant.655)
}

%inner """
    line = "%f = f32[80,5120]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1"
    text = PROGRAM.replace("\n%inner ", scatter).replace("LINE", line)
    expected = Collective("reduce-scatter", "f32", 64, 1, 4 * 5120 * 5120 * 63 // 64)
    assert expected in collectives(text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%ar = f32[16]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
            ("all-reduce", "f32", 4, 1, 2 * 64 * 3 // 4),
        ),
        (  # A result of 64 bytes, and from each of seven others as much.
            "%rs = f32[16]{0} reduce-scatter(%x), replica_groups=[2,8]<=[16], dimensions={0}",
            ("reduce-scatter", "f32", 8, 1, 7 * 64),
        ),
        (
            "ROOT %aa = bf16[4,8]{1,0} all-to-all(%x), "
            "replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b':(2)2,'c'}, dimensions={0}",
            ("all-to-all", "bf16", 4, 1, 64 * 3 // 4),
        ),
        (
            "%cp = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", "bf16", 2, 1, 64),
        ),
        (
            "%ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]",
            ("all-gather", "f32", 4, 1, 128 * 3 // 4),
        ),
        (  # Between slices, as libtpu 0.0.48.1 writes it: half of a gather is there already,
            "%recv = (f32[4,8]{1,0}, u32[]{:S(2)}, token[]) recv(%t), frontend_attributes={"
            "_xla_megascale_target={{100000,200000},{300000,400000}},"
            '_xla_megascale_transfer_type="ALL_GATHER"}',
            ("recv", "f32", 2, 1, 128 // 2),
        ),
        (  # and a sum over four slices goes round them twice.
            "%recv = (f32[4,8]{1,0}, u32[]{:S(2)}, token[]) recv(%t), frontend_attributes={"
            '_xla_megascale_target="{1,2,3,4}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}',
            ("recv", "f32", 4, 1, 2 * 128 * 3 // 4),
        ),
    ],
)
def test_bytes_are_those_that_arrive_from_others(line, expected):
    assert found(line) == Collective(*expected)


SCANNED = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from qvgen_jax.plan.collectives import collectives

mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))

def loss(layers, x):
    def body(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, layers)[0].sum()

shardings = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P("x"))
shapes = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), jax.ShapeDtypeStruct((16, 64), jnp.float32)
compiled = jax.jit(loss, in_shardings=shardings).lower(*shapes).compile()
print(json.dumps(collectives(compiled.as_text())))
"""


def test_a_scan_over_cut_layers_gathers_each_of_them_once():
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", SCANNED],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    gather, loss = json.loads(done.stdout.splitlines()[-1])
    assert gather == ["all-gather", "f32", 8, 5, 5 * 64 * 64 * 4 * 7 // 8]
    assert loss == ["all-reduce", "f32", 8, 1, 7]
