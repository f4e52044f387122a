"""The least time of GPU programs: a hand-made schedule with known sums, and one of XLA's compiler for GPUs."""

import io

import pytest
from rich.console import Console

from virst_jax import cli
from virst_jax.profiling import prediction, roofline
from virst_jax.profiling.flops import PEAKS
from virst_jax.profiling.interconnect import SWITCHED, Fabric
from virst_jax.profiling.roofline import Roofline
from virst_jax.profiling.schedule import MOVES, PRODUCTS

H100 = PEAKS["h100"]
MIB = 2**20

PROGRAM = """HloModule jit_step, is_scheduled=true

%one_layer (w: bf16[4,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %w = bf16[4,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,1024,1024]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,1024,1024}
  ROOT %b = bf16[1024,1024]{1,0} bitcast(%s)
}

%small (a: f32[64,8192], b: f32[8192,64]) -> f32[64,64] {
  %a = f32[64,8192]{1,0} parameter(0)
  %b = f32[8192,64]{1,0} parameter(1)
  ROOT %d = f32[64,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], bf16[8192,1024], bf16[4,1024,1024])) -> (s32[], bf16[8192,1024], bf16[4,1024,1024]) {
  %t = (s32[], bf16[8192,1024], bf16[4,1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8192,1024]{1,0} get-tuple-element(%t), index=1
  %w = bf16[4,1024,1024]{2,1,0} get-tuple-element(%t), index=2
  %layer = bf16[1024,1024]{1,0} fusion(%w, %i), kind=kLoop, calls=%one_layer
  %y = (bf16[8192,1024]{1,0}, s8[33554432]{0}) custom-call(%x, %layer), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}
  %p = bf16[8192,1024]{1,0} get-tuple-element(%y), index=0
  ROOT %r = (s32[], bf16[8192,1024], bf16[4,1024,1024]) tuple(%i, %p, %w)
}

%condition (t: (s32[], bf16[8192,1024], bf16[4,1024,1024])) -> pred[] {
  %t = (s32[], bf16[8192,1024], bf16[4,1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%commands (v: f32[1048576]) -> f32[1048576] {
  %v = f32[1048576]{0} parameter(0)
  ROOT %c = f32[1048576]{0} copy(%v)
}

ENTRY %main (x: bf16[8192,1024], w: bf16[4,1024,1024], f: f32[64,8192], g: f32[8192,64], v: f32[1048576], m: bf16[8,256,256,64], k: bf16[64,3,3,64]) -> f32[64,64] {
  %x = bf16[8192,1024]{1,0} parameter(0)
  %w = bf16[4,1024,1024]{2,1,0} parameter(1)
  %f = f32[64,8192]{1,0} parameter(2)
  %g = f32[8192,64]{1,0} parameter(3)
  %v = f32[1048576]{0} parameter(4)
  %m = bf16[8,256,256,64]{3,2,1,0} parameter(5)
  %k = bf16[64,3,3,64]{3,2,1,0} parameter(6)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8192,1024], bf16[4,1024,1024]) tuple(%zero, %x, %w)
  %loop = (s32[], bf16[8192,1024], bf16[4,1024,1024]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %conv = (bf16[8,256,256,64]{3,2,1,0}, u8[0]{0}) custom-call(%m, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %called = f32[1048576]{0} call(%v), to_apply=%commands
  ROOT %sum = f32[64,64]{1,0} fusion(%f, %g), kind=kCustom, calls=%small
}
"""  # noqa: E501


def test_operations_take_what_products_or_bytes_take():
    spent = roofline.roofline(PROGRAM, "h100:1")
    turn = 2 * 8192 * 1024 * 1024 / H100.flops  # longer than its bytes, the library's room aside
    assert turn > (2 * 16 + 2) * MIB / H100.bandwidth
    convolution = max(2 * 8 * 256**2 * 64 * 9 * 64 / H100.flops, (2 * 64 * MIB + 9 * 64 * 64 * 2) / H100.bandwidth)
    fused = 2 * 64 * 64 * 8192 / (H100.flops / 2)  # float32 as TF32; its bytes take longer
    by_bytes = (2 * 2 * MIB + 64 * 64 * 4) / H100.bandwidth
    assert fused < by_bytes
    assert spent.category(PRODUCTS) == pytest.approx(4 * turn + convolution + by_bytes)
    # a layer of the stacked weights is read and written in each turn, not all of them
    assert spent.category(MOVES) == pytest.approx((4 * (2 * 2 * MIB + 4) + 2 * 4 * MIB) / H100.bandwidth)
    assert spent.seconds == pytest.approx(spent.category(PRODUCTS) + spent.category(MOVES))
    assert (spent.operations, spent.unread_loops) == (4 * 2 + 3, 0)


def test_full_precision_runs_without_matrix_units():
    text = PROGRAM.replace("f32[64,8192]", "f32[8192,8192]").replace("f32[64,64]", "f32[8192,64]")
    quick = Roofline(text, H100, Fabric.of("h100:1"))
    slow = Roofline(
        text.replace(
            "lhs_contracting_dims={1}, rhs", "operand_precision={highest,highest}, lhs_contracting_dims={1}, rhs"
        ),
        H100,
        Fabric.of("h100:1"),
    )
    flops = 2 * 8192 * 64 * 8192
    for schedule, rate in ((quick, H100.flops / 2), (slow, H100.vector)):
        product = schedule.module.instructions["main"]["sum"]
        assert schedule.product_seconds(product, "main") == pytest.approx(flops / rate)


@pytest.mark.parametrize(
    ("target", "arrays"),
    [
        ("__cudnn$convForward", ("m", "k", "y")),
        ("__cudnn$convBackwardInput", ("y", "k", "m")),
        ("__cudnn$convBackwardFilter", ("m", "y", "k")),
    ],
)
def test_passes_of_a_convolution_take_the_same(target, arrays):
    shapes = {"m": "bf16[2,64,64,16]", "k": "bf16[32,3,3,16]", "y": "bf16[2,32,32,32]"}
    first, second, result = arrays
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: {shapes[first]}, b: {shapes[second]}) -> {shapes[result]} {{
  %a = {shapes[first]}{{3,2,1,0}} parameter(0)
  %b = {shapes[second]}{{3,2,1,0}} parameter(1)
  ROOT %c = ({shapes[result]}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3 stride=2x2}}, dim_labels=b01f_o01i->b01f, custom_call_target="{target}"
}}
"""  # noqa: E501
    here = Roofline(text, H100, Fabric.of("h100:1")).module.instructions["main"]
    assert roofline.product_flops(here["c"], here) == 2 * 2 * 32 * 32 * 32 * 9 * 16


def test_a_step_of_training():
    """One column, and no promise that a step reaches it."""
    out = io.StringIO()
    step = prediction.at_least(PROGRAM, "h100:8", flops=1e11, chips=8)
    assert step.is_roofline
    assert step.seconds == roofline.roofline(PROGRAM, "h100:8").seconds
    prediction.print_prediction(step, 16, Console(file=out, width=160))
    printed = out.getvalue()
    for words in ("roofline of h100:8", "data sheet's rates, ms", "MFU, at most", "samples/s/chip, at most"):
        assert words in printed
    assert "compiler's estimate" not in printed
    line = prediction.StageCost.of(3600, [(1.0, 16, step)]).line()
    hours = step.seconds
    assert line.startswith(f"3600 steps on 8 chips: at least {hours:.1f} hours, {8 * hours:.0f} chip-hours; at most ")


def test_what_is_estimated():
    assert [
        name
        for name in ("h100:1", "a100:8", "l4:1", "h100:16", "v5e:1x1", "cpu:1", "h100:0", "h100")
        if roofline.estimated(name)
    ] == ["h100:1", "a100:8", "l4:1"]
    for kind in SWITCHED:
        assert PEAKS[kind].vector > 0


@pytest.mark.heavy
def test_command(capsys):
    pytest.importorskip("jax_plugins.xla_cuda12")
    arguments = ["--model", "virst_7b", "--topology", "l4:1", "--only", "second fusion"]
    assert cli.main(["compile", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "roofline, ms of a call: a lower bound, not measured" in printed
    row = next(line for line in printed.splitlines() if "second fusion" in line and line.count("│") == 6)
    assert 0.1 < float(row.split("│")[2]) < 10
