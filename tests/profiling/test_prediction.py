"""Times that are read from compiled programs: a hand-made schedule with known sums, and one of libtpu."""

import dataclasses
import gzip
import io

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from helpers.places import DATA, ROOT
from virst_jax import cli
from virst_jax.errors import UserError
from virst_jax.parallel import sharding
from virst_jax.profiling import aot, picture, prediction
from virst_jax.profiling.flops import PEAKS
from virst_jax.profiling.hlo import Module
from virst_jax.profiling.interconnect import HOP, Fabric
from virst_jax.profiling.prediction import (
    AGAIN,
    BACKWARD,
    FORWARD,
    REST,
    StageCost,
    dearest,
    predict,
    weak_scaling,
)
from virst_jax.profiling.schedule import (
    HOST,
    ICI,
    KERNEL_SHARE,
    KERNELS,
    MEMORY,
    MOVES,
    NETWORK,
    PRODUCTS,
    Schedule,
    Spent,
)

CLOCK = 1.5e9  # of v5e
MIB = 2**20

# 2 MiB a gather, of 4 chips on one axis: 3/4 of it over one link of 50 GB/s, and 3 hops
GATHER = 0.75 * 2 * MIB / 50e9 + 3 * HOP

PROGRAM = """HloModule jit_step, is_scheduled=true

%product (a: bf16[1024,1024], b: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%begins (p: bf16[256,1024]) -> bf16[1024,1024] {
  %p = bf16[256,1024]{1,0} parameter(0)
  %g = bf16[1024,1024]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
  ROOT %s = bf16[1024,1024]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[256,1024], q: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[256,1024]{1,0} parameter(0)
  %q = bf16[1024,1024]{1,0} parameter(1)
  %g = bf16[1024,1024]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
  ROOT %c = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%q, %q), dim_labels=bf_io->bf
}

%ends (p: bf16[256,1024]) -> bf16[1024,1024] {
  %p = bf16[256,1024]{1,0} parameter(0)
  %g = bf16[1024,1024]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
  ROOT %s = bf16[1024,1024]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

%body (t: (u32[], bf16[1024,1024])) -> (u32[], bf16[1024,1024]) {
  %t = (u32[], bf16[1024,1024]) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%t), index=1
  %two = u32[] constant(2)
  %f = bf16[1024,1024]{1,0} fusion(%x, %x), kind=kOutput, calls=%goes_on, metadata={op_name="jit(step)/jvp(Net)/llm/layers/while/body/mlp/dot_general"}, backend_config={"estimated_cycles":"3000"}
  %next = u32[] add(%i, %two)
  ROOT %r = (u32[], bf16[1024,1024]) tuple(%next, %f)
}

%condition (t: (u32[], bf16[1024,1024])) -> pred[] {
  %t = (u32[], bf16[1024,1024]) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %n = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[256,1024], x: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[256,1024]{1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %early = bf16[1024,1024]{1,0} fusion(%w), kind=kCustom, calls=%begins, metadata={op_name="jit(step)/jvp(Net)/llm/all_gather"}
  %t = (u32[], bf16[1024,1024]) tuple(%zero, %x)
  %loop = (u32[], bf16[1024,1024]) while(%t), condition=%condition, body=%body
  %y = bf16[1024,1024]{1,0} get-tuple-element(%loop), index=1
  %gathered = bf16[1024,1024]{1,0} fusion(%w), kind=kCustom, calls=%ends
  %z = bf16[1024,1024]{1,0} fusion(%y, %gathered), kind=kOutput, calls=%product, metadata={op_name="jit(step)/transpose(jvp(Net))/llm/layers/while/body/checkpoint/rematted_computation/mlp/dot_general"}, backend_config={"estimated_cycles":"15000"}
  %moved = bf16[1024,1024]{0,1} copy(%z), metadata={op_name="jit(step)/transpose(jvp(Net))/sam2/layers3/transpose"}, backend_config={"estimated_cycles":"150000"}
  %fetch = (bf16[1024,1024]{0,1:S(1)}, bf16[1024,1024]{0,1}, u32[]) copy-start(%moved)
  %here = bf16[1024,1024]{0,1:S(1)} copy-done(%fetch)
  %attended = bf16[8,4096,128]{2,1,0} custom-call(%mask, %mask, %q, %k, %v), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, s8[1,8,8]{2,1,0}, bf16[8,4096,128]{2,1,0}, bf16[8,4096,128]{2,1,0}, bf16[8,4096,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/jvp(Net)/sam2/splash_mha_fwd/pallas_call"}
  %told = f32[512,512]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[512,512]{1,0}, f32[512,512]{1,0}}, metadata={op_name="jit(step)/jvp(Net)/own/pallas_call"}, backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"197000000","transcendentals":"0","bytes_accessed":"819000000","remote_bytes_transferred":"0"}}}
  %silent = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8]{0}}, metadata={op_name="jit(step)/other/pallas_call"}
  %sent = (f32[781250]{0}, u32[], token[]) send(%z, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %over = token[] send-done(%sent), channel_id=2, is_host_transfer=true
  ROOT %sum = bf16[1024,1024]{1,0} all-reduce(%z), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%product
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def schedule():
    return Schedule(PROGRAM, PEAKS["v5e"], Fabric.of("v5e:4x1"))


def test_a_schedule_is_played_through(schedule):
    spent = schedule.estimated()
    # four turns, since the loop counts by two up to eight; one product is slower by its cycles, none by its bytes
    loop = 4 * 3000 / CLOCK
    product = 15000 / CLOCK
    assert spent.category(PRODUCTS) == pytest.approx(loop + product)
    assert spent.category(MOVES) == pytest.approx(150000 / CLOCK)
    assert spent.category(MEMORY) == pytest.approx(2 * MIB / 819e9)
    attention = 2 * 2 * 8 * 4096 * 4096 * 128 / (KERNEL_SHARE * 197e12)
    assert spent.category(KERNELS) == pytest.approx(attention + 1e-3)  # its cost estimate is bound by bytes: 1 ms
    assert spent.category(NETWORK) == pytest.approx(4 * 781250 / 3.125e9)
    assert list(spent.without_estimate) == ["jit(step)/other/pallas_call"]
    # the gather runs beside the loop, and is waited for where its last piece stands
    reduced = 2 * GATHER
    assert spent.category(ICI) == pytest.approx(GATHER - loop + reduced)
    assert spent.hidden[ICI] == pytest.approx(loop)
    assert (spent.started_early, spent.at_once, spent.unread_loops) == (2, 1, 0)
    assert spent.seconds == pytest.approx(sum(spent.by.values()))


def test_slices_that_wait_in_the_memory_of_the_host():
    """Both directions at once: 4 MiB there and as many back, beside an operation of 0.1 ms."""
    text = """HloModule step

ENTRY %main (x: f32[1,1024,1024], stack: f32[28,1024,1024], i: s32[]) -> f32[1,1024,1024] {
  %x = f32[1,1024,1024]{2,1,0} parameter(0)
  %stack = f32[28,1024,1024]{2,1,0:S(5)} parameter(1)
  %i = s32[] parameter(2)
  %put = ((f32[28,1024,1024]{2,1,0:S(5)}, f32[1,1024,1024]{2,1,0}, s32[]), f32[28,1024,1024]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%stack, %x, %i), metadata={op_name="jit(step)/layers/put"}
  %get = ((f32[28,1024,1024]{2,1,0:S(5)}, s32[]), f32[1,1024,1024]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%stack, %i), metadata={op_name="jit(step)/layers/get"}
  %beside = f32[1,1024,1024]{2,1,0} copy(%x), backend_config={"estimated_cycles":"150000"}
  %there = f32[28,1024,1024]{2,1,0:S(5)} dynamic-update-slice-done(%put)
  ROOT %here = f32[1,1024,1024]{2,1,0} dynamic-slice-done(%get)
}
"""  # noqa: E501
    spent = Schedule(text, PEAKS["v5e"], Fabric.of("v5e:4x1")).estimated()
    link, beside = 4 * MIB / 16e9, 150000 / CLOCK
    assert link > beside
    assert spent.category(HOST) == pytest.approx(link - beside)
    assert spent.hidden[HOST] == pytest.approx(2 * beside + link - beside)
    assert spent.category(MOVES) == pytest.approx(beside)
    assert spent.category(MEMORY) == 0


def test_an_array_of_one_axis_goes_to_the_host():
    text = """HloModule step

ENTRY %main (x: f32[1048576]) -> f32[1048576] {
  %x = f32[1048576]{0} parameter(0)
  %put = (f32[1048576]{0:S(5)}, f32[1048576]{0}, u32[]{:S(2)}) copy-start(%x)
  ROOT %there = f32[1048576]{0:S(5)} copy-done(%put)
}
"""
    assert Schedule(text, PEAKS["v5e"], Fabric.of("v5e:4x1")).estimated().category(HOST) == pytest.approx(
        4 * MIB / 16e9
    )


def test_moves_may_be_as_fast_as_memory(schedule):
    fast = schedule.at_bandwidth()
    assert fast.category(MOVES) == pytest.approx(2 * 2 * MIB / 819e9)  # read and written
    assert fast.category(PRODUCTS) == schedule.estimated().category(PRODUCTS)


def test_bytes_bound_what_the_compiler_takes_for_faster():
    text = PROGRAM.replace('"estimated_cycles":"15000"', '"estimated_cycles":"1"')
    products = Schedule(text, PEAKS["v5e"], Fabric.of("v5e:4x1")).estimated().category(PRODUCTS)
    assert products == pytest.approx(4 * 3000 / CLOCK + 3 * 2 * MIB / 819e9)


def test_an_operation_that_the_compiler_has_no_estimate_for():
    text = PROGRAM.replace('"estimated_cycles":"15000"', f'"estimated_cycles":"{2**63 - 1}"')
    spent = Schedule(text, PEAKS["v5e"], Fabric.of("v5e:4x1")).estimated()
    assert spent.category(PRODUCTS) == pytest.approx(4 * 3000 / CLOCK + 3 * 2 * MIB / 819e9)
    assert len(spent.without_estimate) == 2  # and the kernel


def test_loops_that_count_by_more_than_one():
    module = Module.parse(PROGRAM)
    assert list(module.trip_counts.values()) == [4]
    assert list(Module.parse(PROGRAM.replace("constant(2)", "constant(1)")).trip_counts.values()) == [8]
    assert list(Module.parse(PROGRAM.replace("constant(2)", "constant(3)")).trip_counts.values()) == [3]
    unread = Schedule(PROGRAM.replace("direction=LT", "direction=NE"), PEAKS["v5e"], Fabric.of("v5e:4x1")).estimated()
    assert unread.unread_loops == 1


def test_collectives_on_lines_and_rings():
    line, ring = Fabric.of("v5e:4x4"), Fabric.of("v5e:16x16")
    payload = 100 * MIB
    # both axes of 4 are lines with one link, 3 + 3 hops; of 16 they are rings with two, 8 + 8 hops
    assert line.seconds("all-gather", payload, 16) == pytest.approx(15 / 16 * payload / 100e9 + 6 * HOP)
    assert ring.seconds("all-gather", payload, 256) == pytest.approx(255 / 256 * payload / 200e9 + 16 * HOP)
    assert line.seconds("all-gather", payload, 4) == pytest.approx(3 / 4 * payload / 50e9 + 3 * HOP)
    assert line.seconds("all-gather", payload, 0) == line.seconds("all-gather", payload, 16)
    assert line.seconds("all-reduce", payload, 16) == 2 * line.seconds("reduce-scatter", payload, 16)
    assert line.seconds("collective-permute", payload, 2) == pytest.approx(payload / 50e9 + HOP)
    assert line.seconds("all-to-all", payload, 16) < line.seconds("all-gather", payload, 16)
    with pytest.raises(UserError, match="cpu:8: no times are known of it, but of v5e, v5p, v6e, a100"):
        Fabric.of("cpu:8")


def test_a_program_of_libtpu():
    """Three layers of two products over weights that four chips share, and their gradients.

    A chip multiplies 2048 x 1024 x 4096 twice a layer forward, once or twice again, and four times backward.
    """
    text = gzip.decompress((DATA / "hlo" / "fsdp_v5e_2x2.txt.gz").read_bytes()).decode()
    product = 2 * 2048 * 1024 * 4096
    step = predict(text, "v5e:2x2", flops=3 * 6 * product, chips=4)
    least = 3 * 7 * product / 197e12
    assert least < step.slow.category(PRODUCTS) < 1.35 * least
    assert step.fast.seconds < step.slow.seconds
    assert step.mfu(step.seconds) == pytest.approx(3 * 6 * product / 197e12 / step.seconds)
    # weights are gathered by permutes that begin before the products that need them, and mostly run beside others
    assert step.slow.started_early == 60
    assert step.slow.at_once == 1  # the loss
    assert step.slow.hidden[ICI] > 10 * step.slow.category(ICI)
    assert (step.slow.unread_loops, dict(step.slow.without_estimate)) == (0, {})


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/jvp(vmap(Net))/llm/while/body/closed_call/layers/mlp/up/dot_general", ("llm/layers/mlp", FORWARD)),
        (
            "jit(step)/transpose(jvp(vmap(Net)))/llm/while/body/checkpoint/rematted_computation/layers/attn/mul",
            ("llm/layers/attn", AGAIN),
        ),
        (
            "jit(step)/transpose(jvp(vmap()))/sam2/trunk/blocks17/bgsk,bgke->bgse/dot_general",
            ("sam2/trunk/blocks", BACKWARD),
        ),
        ("jit(step)/adam/mul", ("adam", REST)),
        ("reshape.12", ("(no module)", REST)),
    ],
)
def test_parts_of_the_network(op_name, expected):
    assert prediction.part(op_name) == expected


def spent(**seconds):
    made = Spent()
    for category, value in seconds.items():
        made.add(("jit(step)/jvp(Net)/llm/mul", {"ici": ICI, "products": PRODUCTS}[category]), value)
    return made


def test_cost_of_a_stage():
    one, two = (
        prediction.Prediction("v5e:4x4", 16, spent(products=s), spent(products=s / 2), 1e12) for s in (1.0, 4.0)
    )
    cost = StageCost.of(3600, [(3.0, 16, one), (1.0, 32, two)])
    assert (cost.slow, cost.fast, cost.samples) == (1.75, 0.875, 20)
    assert cost.line() == (
        "3600 steps on 16 chips: 0.9 to 1.8 hours, 14 to 28 chip-hours; 0.714 to 1.429 samples/s/chip"
    )


def test_weak_scaling_by_formula():
    step = prediction.Prediction("v5e:4x4", 16, spent(products=0.5, ici=0.1), spent(products=0.5), 1e12)
    traffic, gradients = {"all-gather": 10**10, "between slices": 10**12}, 32e9
    scaled = weak_scaling(step, traffic, 16, gradients)
    assert list(scaled) == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert scaled[16].seconds == pytest.approx(0.6)  # what was compiled
    assert (scaled[64].mesh, scaled[4096].mesh) == ("data=2 x fsdp=32", "data=8 x fsdp=32, dcn_data=16")
    lines, rings = Fabric.of("v5e:4x4"), Fabric.of("v5e:16x16")
    links = 0.1 * rings.seconds("all-gather", 10**10, 32) / lines.seconds("all-gather", 10**10, 16)
    within = 0.5 + links + rings.seconds("all-reduce", 10**9, 8)
    assert scaled[256].seconds == pytest.approx(within)
    # every chip sends its 256th of the gradients to one other slice, or nearly twice to sixteen
    assert scaled[512].seconds == pytest.approx(within + 32e9 / 256 / 3.125e9)
    assert scaled[4096].seconds == pytest.approx(within + 2 * 15 / 16 * 32e9 / 256 / 3.125e9)
    slower = {n: dataclasses.replace(one, seconds=3 * one.seconds) for n, one in scaled.items()}
    mean = prediction.mean_scaling([(1.0, scaled), (1.0, slower)])
    assert mean[512].seconds == pytest.approx(2 * scaled[512].seconds)


def test_tables(schedule):
    out = io.StringIO()
    console = Console(file=out, width=160)
    step = predict(PROGRAM, "v5e:2x2", flops=1e9, chips=4)
    prediction.print_prediction(step, 16, console)
    prediction.print_scaling(weak_scaling(step, {"all-gather": 10**9}, 4, 1e9, most=512), 1, console)
    printed = out.getvalue()
    for words in ("waiting for ICI", "MFU", "samples/s/chip", "llm/layers/mlp", "ICI behind operations", "2 x 16x16"):
        assert words in printed
    assert "1 runs of operations without an estimate" in printed
    assert "most of the time goes to the attention kernels" in printed


@pytest.mark.parametrize(("kernel", "width"), [("fwd_segmented", 256 + 64), ("dkv_segmented", 3 * 256 + 2 * 64)])
def test_kernels_of_a_batch_are_counted(kernel, width):
    """One axis more before the heads. Forward: scores and values; gradient: scores, theirs, queries, keys, values."""
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[3,1,4096,256], k: bf16[3,1,8320,256], v: bf16[3,1,8320,64]) -> bf16[3,1,4096,64] {
  %q = bf16[3,1,4096,256]{3,2,1,0} parameter(0)
  %k = bf16[3,1,8320,256]{3,2,1,0} parameter(1)
  %v = bf16[3,1,8320,64]{3,2,1,0} parameter(2)
  ROOT %o = bf16[3,1,4096,64]{3,2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,13]{2,1,0}, bf16[3,1,4096,256]{3,2,1,0}, bf16[3,1,8320,256]{3,2,1,0}, bf16[3,1,8320,64]{3,2,1,0}, s32[3,8,8320]{2,1,0}}, metadata={op_name="jit(step)/splash_mha_KERNEL/pallas_call"}
}
"""  # noqa: E501
    spent = predict(text.replace("KERNEL", kernel), "v5e:1x1").slow
    assert not spent.without_estimate
    flops = 2 * 3 * 4096 * 8320 * width
    assert spent.category(KERNELS) == pytest.approx(flops / (KERNEL_SHARE * 197e12))


def test_times_need_a_tpu_or_a_gpu(capsys):
    config = f"--config={ROOT}/tests/helpers/train_cases.py:image_text"
    assert cli.main(["train", config, "--compile-only", "--effort=full", "--topology=cpu:1"]) == 2
    said = capsys.readouterr().err
    assert "times are predicted for TPUs (v5e, v5p, v6e) and for up to 8 GPUs of one machine (a100" in said
    assert "not for cpu:1" in said


@pytest.mark.heavy
def test_a_step_is_compiled_and_predicted():
    """With libtpu, where it is installed: one large product takes 97 % of what a chip can do."""
    pytest.importorskip("libtpu")
    size = 4096
    mesh = sharding.make_mesh(1, -1, devices=aot.topology_devices("v5e:2x2"))

    def step(state, batch):
        return state, {"x": batch @ state}

    with sharding.use_mesh(mesh):
        report = aot.compile_report(
            step,
            jax.ShapeDtypeStruct((size, size), jnp.bfloat16),
            jax.ShapeDtypeStruct((4 * size, size), jnp.bfloat16),
            sharding.replicated(mesh),
            NamedSharding(mesh, P("fsdp")),
            "v5e:2x2",
            flops=4 * 2 * size**3,
            quick=False,
        )
    assert report.prediction is not None
    assert 0.9 < 2 * size**3 / 197e12 / report.prediction.slow.category(PRODUCTS) < 1


STACKED = """HloModule m, is_scheduled=true

%slices (w: bf16[28,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %w = bf16[28,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,1024,1024]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,1024,1024}
  ROOT %b = bf16[1024,1024]{1,0} bitcast(%s)
}

%product (x: bf16[1024,1024], v: bf16[28,1024,1024], j: s32[]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:S(1)} parameter(0)
  %v = bf16[28,1024,1024]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %same = bf16[28,1024,1024]{2,1,0} bitcast(%v)
  %one = bf16[1024,1024]{1,0} fusion(%same, %j), kind=kLoop, calls=%slices
  ROOT %c = bf16[1024,1024]{1,0:S(1)} convolution(%x, %one), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[1024,1024], v: bf16[28,1024,1024], j: s32[]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:S(1)} parameter(0)
  %v = bf16[28,1024,1024]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = bf16[1024,1024]{1,0:S(1)} fusion(%x, %v, %j), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"9"}
}
"""  # noqa: E501


# integers are first read in other tiles, in their place
RETILED = STACKED.replace(
    "bitcast(%v)",
    "fusion(%v), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled",
)


@pytest.mark.parametrize("text", [STACKED, RETILED], ids=["bitcast", "in other tiles"])
def test_a_product_reads_one_layer_of_stacked_weights(text):
    schedule = Schedule(text, PEAKS["v5e"], Fabric.of("v5e:1x1"))
    product = schedule.module.instructions["main"]["f"]
    hbm, fast = schedule.moved(product, "main")
    assert hbm == pytest.approx(2 * MIB + 4)  # the slice, and its number
    assert fast == 2 * 2 * MIB  # read from and written to fast memory


KEPT = """HloModule m, is_scheduled=true

%product (k: bf16[28,1024,1024], x: bf16[1024,1024], w: bf16[1024,1024], i: s32[]) -> (bf16[28,1024,1024], bf16[1024,1024]) {
  %k = bf16[28,1024,1024]{2,1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %w = bf16[1024,1024]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %z = s32[] constant(0)
  %c = bf16[1024,1024]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %b = bf16[1,1024,1024]{2,1,0} bitcast(%c)
  %u = bf16[28,1024,1024]{2,1,0} dynamic-update-slice(%k, %b, %i, %z, %z)
  ROOT %t = (bf16[28,1024,1024]{2,1,0}, bf16[1024,1024]{1,0}) tuple(%u, %c)
}

ENTRY %main (k: bf16[28,1024,1024], x: bf16[1024,1024], w: bf16[1024,1024], i: s32[]) -> bf16[28,1024,1024] {
  %k = bf16[28,1024,1024]{2,1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %w = bf16[1024,1024]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %f = (bf16[28,1024,1024]{2,1,0}, bf16[1024,1024]{1,0}) fusion(%k, %x, %w, %i), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"9"}
  ROOT %g = bf16[28,1024,1024]{2,1,0} get-tuple-element(%f), index=0
}
"""  # noqa: E501


def test_a_product_that_is_kept_with_those_of_other_layers():
    """It is written once for what comes next, and once into the stack, of which the rest stays."""
    schedule = Schedule(KEPT, PEAKS["v5e"], Fabric.of("v5e:1x1"))
    hbm, _ = schedule.moved(schedule.module.instructions["main"]["f"], "main")
    assert hbm == pytest.approx(4 * 2 * MIB + 4)


def test_the_dearest_operations(schedule):
    spent = schedule.estimated()
    rows = dearest(spent, 3)
    assert len(rows) == 3
    assert [seconds for *_, seconds in rows] == sorted((seconds for *_, seconds in rows), reverse=True)
    everything = dearest(spent, 10**6)
    assert sum(seconds for *_, seconds in everything) == pytest.approx(spent.seconds)
    assert any(name.startswith("llm/layers/mlp") and category == PRODUCTS for name, category, _ in everything)


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_of_steps(schedule, kind, start):
    steps = {"encode": (schedule.estimated(), schedule.at_bandwidth()), "track": (schedule.estimated(),) * 2}
    drawn = picture.draw(steps, "virst_7b on v5e:4x1", kind)
    assert drawn.startswith(start)
    if kind == "svg":
        assert all(f"<!-- {name} -->".encode() in drawn for name in ("encode", "track", PRODUCTS, KERNELS))
