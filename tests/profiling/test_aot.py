"""Ahead-of-time compilation, with virtual CPU devices, and the traffic that is read from compiled programs."""

import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from helpers.places import PROGRAMS, ROOT
from virst_jax.errors import UserError
from virst_jax.parallel import sharding
from virst_jax.profiling import aot
from virst_jax.profiling.collectives import Traffic, collective_traffic

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[4,4]<=[16], dimensions={0}
}

%body (t: (s32[], bf16[8,128])) -> (s32[], /*index=1*/bf16[8,128]) {
  %t = (s32[], bf16[8,128]) parameter(0)
  %g = bf16[32,128]{1,0} fusion(%x), kind=kCustom, calls=%fused
  %k = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %kernel = f32[2]{0} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"a":
"b"
}}, metadata={op_name="x"}
  %kd = f32[64]{0} collective-permute-done(%k)
  ROOT %r = (s32[], bf16[8,128]) tuple(%i, %x)
}

%cond (t: (s32[], bf16[8,128])) -> pred[] {
  %t.1 = (s32[], bf16[8,128]) parameter(0)
  %n = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (w: bf16[8,128]) -> f32[] {
  %loop = (s32[], bf16[8,128]) while(%init), condition=%cond, body=%body
  %s = f32[16]{0} reduce-scatter(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %both = (f32[10]{0}, f32[6]{0}) all-reduce(%u, %v), replica_groups=mesh['x'=2,'y'=8] {'y'}, to_apply=%add
  ROOT %x = f32[] add(%c, %d)
}
"""


def test_traffic_of_a_program():
    traffic, unread = collective_traffic(HLO)
    assert unread == 0
    assert traffic == {
        "all-gather": Traffic(28, 28 * 32 * 128 * 2, 28 * 32 * 128 * 2 * 3 // 4),
        "all-reduce": Traffic(1, 64, 2 * 64 * 7 // 8),
        "reduce-scatter": Traffic(1, 4 * 64, 4 * 64 * 3 // 4),
        "collective-permute": Traffic(28, 28 * 256, 28 * 256),
    }


def test_traffic_of_asynchronous_collectives_counts_no_operand():
    """As compiled for GPUs: operands, then results, in groups if there are several."""
    lines = """
  %p = (f32[8,64]{1,0}, f32[8,64]{1,0}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %s = ((f32[64,64]{1,0}, f32[8,4]{1,0}), (f32[8,64]{1,0}, f32[1,4]{1,0})) reduce-scatter-start(%b, %a), GROUPS
  %g = (f32[8,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%a), GROUPS
  %t = ((f32[8,64]{1,0}), f32[8,64]{1,0}) all-to-all-start(f32[8,64]{1,0} %a), GROUPS
  %r = f32[8,64]{1,0} all-reduce-start(%a), GROUPS
""".replace("GROUPS", "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}")
    traffic, _ = collective_traffic(f"ENTRY %main (w: f32[8,64]) -> f32[] {{{lines}}}")
    whole, part = 4 * 64 * 64, 4 * 8 * 64
    assert {kind: of.payload for kind, of in traffic.items()} == {
        "all-gather": whole,
        "all-reduce": part,
        "reduce-scatter": whole + 4 * 8 * 4,
        "all-to-all": part,
        "collective-permute": part,
    }
    assert traffic["reduce-scatter"].sent == traffic["reduce-scatter"].payload * 7 // 8


PIECES = """HloModule jit_step, is_scheduled=true

%first (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  %all-gather.1 = bf16[4,128]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%second (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,128]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%other (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[4,128]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
}

%body (w: (s32[], bf16[1,128])) -> (s32[], bf16[1,128]) {
  %w = (s32[], bf16[1,128]) parameter(0)
  %a = bf16[4,128]{1,0} fusion(%w), kind=kOutput, calls=%first
  %b = bf16[4,128]{1,0} fusion(%w), kind=kOutput, calls=%second
  %c = bf16[4,128]{1,0} fusion(%w), kind=kOutput, calls=%other
  ROOT %t = (s32[], bf16[1,128]) tuple(%w, %w)
}

%condition (w: (s32[], bf16[1,128])) -> pred[] {
  %w = (s32[], bf16[1,128]) parameter(0)
  ROOT %less = pred[] compare(%w, %w), direction=LT
}

ENTRY %main (x: bf16[1,128]) -> bf16[1,128] {
  %x = bf16[1,128]{1,0} parameter(0)
  %d = bf16[4,128]{1,0} fusion(%x), kind=kOutput, calls=%second
  %loop = (s32[], bf16[1,128]) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %token = token[] after-all()
  %send = (f32[64,8,128]{2,1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %y = bf16[1,128]{1,0} copy(%x)
}
"""  # noqa: E501


def test_pieces_of_a_collective_count_once_and_slices_apart():
    traffic, unread = collective_traffic(PIECES)
    assert unread == 0
    size = 64 * 8 * 128 * 4
    # two chains in each of the loop's five runs; the piece before it goes on with a chain that begins elsewhere
    assert traffic == {
        "all-gather": Traffic(10, 10 * 4 * 128 * 2, 10 * 3 * 128 * 2),
        "between slices": Traffic(1, size, size),
    }


def test_loops_of_unknown_length_are_counted():
    traffic, unread = collective_traffic(HLO.replace("direction=LT", "direction=NE"))
    assert unread == 1
    assert traffic["all-gather"].count == 1
    traffic, unread = collective_traffic(
        HLO.replace("direction=LT", "direction=NE").replace(
            "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
        )
    )
    assert (traffic["all-gather"].count, unread) == (5, 0)
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        collective_traffic("nothing")


def test_report_of_eight_virtual_devices(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, str(PROGRAMS / "aot_report.py"), str(tmp_path / "step.txt")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts, devices, flops, xla_flops, temporary, peak, gathers, payload = json.loads(done.stdout.splitlines()[-1])
    assert parts == {"parameters": 5 * 64 * 64 * 4 // 4, "optimizer": 400, "batch": 16 * 64 * 4 // 8}
    assert (devices, flops) == (8, 1e6)
    assert xla_flops > 0
    assert peak >= temporary + sum(parts.values())
    # each of the five weights is gathered at least once whole: the loop's trip count is read
    assert gathers >= 5
    assert payload >= 5 * 64 * 64 * 4
    assert "ENTRY" in (tmp_path / "step.txt").read_text()


def small_step(state, batch):
    return state + (batch @ state).sum(), {}


def report_here(**options) -> aot.Report:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    whole = sharding.replicated(mesh)
    with sharding.use_mesh(mesh):
        return aot.compile_report(small_step, shape, shape, whole, whole, "cpu:1", **options)


def test_report_as_a_table():
    out = io.StringIO()
    aot.print_report(report_here(flops=2e12), Console(file=out, width=100))
    assert "FLOPs a step (formula)" in out.getvalue()
    assert "2.00 T" in out.getvalue()
    assert "cpu:1: 1 devices as data=1" in out.getvalue()


def test_too_large_is_one_line(monkeypatch):
    monkeypatch.setattr(aot, "capacity", lambda topology: 2**18)
    with pytest.raises(UserError, match=r"cpu:1 .* needs 0.00 GiB a device .* too much; take more devices") as error:
        report_here()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (37.53G) "
            "exceeds available HBM (15.75G).",
            "needs 37.53 GiB a device and 15.75 GiB are there, 21.78 too much",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:",
            "needs 20.50 GiB a device and 15.75 GiB are there, 4.75 too much",
        ),
        ("INTERNAL: the compiler is confused\nat line 7", "does not compile: INTERNAL: the compiler is confused"),
    ],
)
def test_what_the_compiler_says_becomes_one_line(monkeypatch, message, words):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError) as error:
        report_here()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:4", "h100", "h100:2x2", "cpu:0", "", "cpu:many"])
def test_unknown_topologies(topology):
    with pytest.raises(UserError, match="unknown topology"):
        aot.topology_devices(topology)


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [("v5e:4x4", r"pip install 'virst-jax\[aot\]'"), ("h100:8", "pip install jax-cuda12-plugin")],
)
def test_missing_compilers(monkeypatch, topology, remedy):
    monkeypatch.setattr(aot, "_installed", lambda module: False)
    with pytest.raises(UserError, match=remedy):
        aot.topology_devices(topology)


def test_more_virtual_devices_than_there_are():
    count = len(jax.devices("cpu"))
    with pytest.raises(UserError, match="xla_force_host_platform_device_count"):
        aot.topology_devices(f"cpu:{count + 1000}")
    assert aot.topology_devices("cpu:1") == jax.devices("cpu")[:1]


@pytest.mark.parametrize("kind", aot.GPUS)
def test_targets_of_gpus(kind):
    text = aot.gpu_target(kind)
    assert text.count("{") == text.count("}")
    assert f"device_memory_size: {round(aot.PEAKS[kind].memory)}\n" in text


def test_topology_of_a_tpu():
    pytest.importorskip("libtpu")
    assert len(aot.topology_devices("v5e:2x2")) == 4
    with pytest.raises(UserError, match="cannot be described"):
        aot.topology_devices("v5e:3x7")
