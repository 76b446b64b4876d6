import functools
import math

import jax
import jax.numpy as jnp
import pytest

from tinymim_jax.runtime import hlo_stats

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[10])) -> (s32[], bf16[10]) {
  %p = (s32[]{:T(128)}, bf16[10]{0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %g = bf16[10]{0} get-tuple-element(%p), index=1
  %all-reduce.1 = bf16[10]{0} all-reduce(%g), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %t = (s32[], /*index=1*/bf16[10]{0}) tuple(%i, %all-reduce.1)
}

%condition (p.1: (s32[], bf16[10])) -> pred[] {
  %n = s32[]{:T(128)} constant(4)
  %p.1 = (s32[], bf16[10]{0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

%start (a: u8[3]) -> u8[6] {
  %a = u8[3]{0} parameter(0)
  ROOT %ag.1 = u8[6]{0} all-gather(%a), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
}

%go_on (b: u8[3]) -> u8[6] {
  %b = u8[3]{0} parameter(0)
  ROOT %ag.2 = u8[6]{0} all-gather(%b), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
}

%all-reduce-scatter.clone (c: f32[8,2]) -> f32[2,2] {
  %c = f32[8,2]{1,0:T(8,128)} parameter(0)
  %ar = f32[8,2]{1,0} all-reduce(%c), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = f32[2,2]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={2,2}
}

ENTRY %main (k: u8[3], m: f32[8,2], l: (s32[], bf16[10])) -> f32[] {
  %k = u8[3]{0} parameter(0)
  %m = f32[8,2]{1,0} parameter(1)
  %l = (s32[], bf16[10]{0}) parameter(2)
  %f.1 = u8[6]{0} fusion(%k), kind=kCustom, calls=%start
  %f.2 = u8[6]{0} fusion(%k), kind=kCustom, calls=%go_on
  %f.3 = f32[2,2]{1,0} fusion(%m), kind=kCustom, calls=%all-reduce-scatter.clone
  %ps = (u8[3]{0}, u8[3]{0}, u32[], u32[]) collective-permute-start(%k), channel_id=2, source_target_pairs={{0,1}}
  %pd = u8[3]{0} collective-permute-done(%ps)
  %w = (s32[], bf16[10]{0}) while(%l), condition=%condition, body=%body
  ROOT %one = f32[] constant(1)
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert hlo_stats.collectives(PROGRAM) == {
        "all-reduce": {"count": 4, "bytes": 80, "sent_bytes": pytest.approx(2 * 80 * 7 / 8)},
        "all-gather": {"count": 1, "bytes": 6, "sent_bytes": 3},  # in two fusions
        "reduce-scatter": {"count": 1, "bytes": 64, "sent_bytes": 48},
        "collective-permute": {"count": 1, "bytes": 3, "sent_bytes": 3},
    }
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo_stats.collectives(known)["all-reduce"]["count"] == 5
    unknown = PROGRAM.replace("s32[]{:T(128)} constant(4)", "s32[] parameter(1)")
    assert hlo_stats.collectives(unknown)["all-reduce"]["count"] == 1


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{}", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=8] {'axis_0'}", 8),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}", 4),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", 2),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", 4),
    ],
)
def test_groups(groups, n):
    text = PROGRAM.replace("replica_groups={}", f"replica_groups={groups}")
    assert hlo_stats.collectives(text)["all-reduce"]["sent_bytes"] == pytest.approx(2 * 80 * (n - 1) / n)


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_matmuls_in_a_loop_in_a_loop():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, w):
        return jax.lax.scan(inner, x @ w[0], w)[0], None

    program = compiled(lambda x, w: jax.lax.scan(outer, x, w)[0], (7, 32), (3, 5, 32, 32))
    one = 2 * 7 * 32 * 32
    assert hlo_stats.matmul_flops(program.as_text()) == (3 * (5 + 1) * one, 2 * one)
    assert 2 * one <= program.cost_analysis()["flops"] < 3 * one  # if not, XLA has learnt to count loops


def test_batched_matmuls():
    program = compiled(lambda q, k: jnp.einsum("bnhe,bmhe->bhnm", q, k), (2, 50, 3, 16), (2, 60, 3, 16))
    assert hlo_stats.matmul_flops(program.as_text())[0] == 2 * math.prod((2, 50, 60, 3, 16))


@pytest.mark.parametrize(
    "how",
    [
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (2, 3), "padding": "SAME"},
        {"window_strides": (1, 2), "padding": [(2, 0), (1, 5)], "rhs_dilation": (3, 1)},
        {"window_strides": (5, 5), "padding": [(0, 0), (0, 0)], "lhs_dilation": (6, 6)},
        {"window_strides": (1, 1), "padding": [(-1, 2), (0, -2)], "feature_group_count": 2},
    ],
)
def test_convolutions_are_counted_as_xla_counts_them(how):
    groups = how.get("feature_group_count", 1)
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)
    program = jax.jit(convolve).lower(jnp.zeros((4, 12, 13, 6)), jnp.zeros((3, 4, 6 // groups, 8))).compile()
    assert hlo_stats.matmul_flops(program.as_text())[0] == program.cost_analysis()["flops"] > 0


def test_a_librarys_matmul():
    text = """HloModule jit_f

ENTRY %main (a: bf16[2,64,32], b: bf16[2,32,16]) -> bf16[2,64,16] {
  %a = bf16[2,64,32]{2,1,0} parameter(0)
  %b = bf16[2,32,16]{2,1,0} parameter(1)
  %gemm = (bf16[2,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %get-tuple-element = bf16[2,64,16]{2,1,0} get-tuple-element(%gemm), index=0
}
"""
    assert hlo_stats.matmul_flops(text)[0] == 2 * 2 * 64 * 32 * 16


@pytest.mark.parametrize(("name", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
def test_attention_by_a_library(name, products):
    text = f"""HloModule jit_step, num_partitions=1

ENTRY %main (q: bf16[2,50,3,64]) -> bf16[2,3,50,64] {{
  %q = bf16[2,50,3,64]{{3,2,1,0}} parameter(0)
  %attn = (bf16[2,3,50,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="__cudnn${name}", \
backend_config={{"cudnn_fmha_backend_config":{{"bmm1_dot_dimension_numbers":{{"lhs_contracting_dimensions":["3"],\
"rhs_contracting_dimensions":["3"],"lhs_batch_dimensions":["0","2"],"rhs_batch_dimensions":["0","2"]}}}}}}
  ROOT %get-tuple-element = bf16[2,3,50,64]{{3,1,2,0}} get-tuple-element(%attn), index=0
}}
"""
    assert hlo_stats.matmul_flops(text)[0] == products * 2 * 2 * 3 * 50 * 50 * 64
