"""Compiling a training step for devices that are not here.

TPUs are described by libtpu (`pip install 'virst-jax[aot]'`), NVIDIA GPUs by the fields of XLA's target
configurations (xla/backends/gpu/target_config/specs; needs jax-cuda12-plugin, no driver), CPUs by virtual devices.
Nothing runs: arguments are shapes.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from virst_jax.errors import UserError
from virst_jax.profiling.collectives import Traffic, collective_traffic
from virst_jax.profiling.flops import PEAKS, Device
from virst_jax.profiling.prediction import Prediction, at_least, predict, predicted
from virst_jax.profiling.roofline import estimated, roofline
from virst_jax.profiling.schedule import Spent
from virst_jax.types import PyTree

GIB = 2**30
# Spellings that libtpu accepts; the shape behind the colon counts chips, such as 4x4 or 2x2x2.
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS: dict[str, dict[str, Any]] = {
    "a100": {"name": "NVIDIA A100-SXM4-80GB", "cores": 108, "major": 8, "memory": 85100068864, "shared": 166912},
    "h100": {"name": "NVIDIA H100 80GB HBM3", "cores": 132, "major": 9, "memory": 84942979072, "shared": 232448},
    "h200": {"name": "NVIDIA H200 141GB HBM3e", "cores": 132, "major": 9, "memory": 151397597184, "shared": 232448},
    "l4": {"name": "NVIDIA L4", "cores": 58, "major": 8, "minor": 9, "memory": 24152899584, "shared": 101376},
    "rtx4090": {
        "name": "NVIDIA GeForce RTX 4090",
        "cores": 128,
        "major": 8,
        "minor": 9,
        "memory": 25757220864,
        "shared": 101376,
    },
}
# Figures that go with a compute capability: CUDA's programming guide, technical specifications
CAPABILITIES = {
    (8, 0): {"shared": 167936, "threads": 2048, "lanes": 64, "cache": 41943040, "clock": 1.41},
    (8, 9): {"shared": 102400, "threads": 1536, "lanes": 128, "cache": 50331648, "clock": 2.04},
    (9, 0): {"shared": 233472, "threads": 2048, "lanes": 128, "cache": 52428800, "clock": 1.98},
}
REMEDY = "take more devices, a larger fsdp axis, remat 'full' or fewer frames"
EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8, cpu:8"


@dataclass(frozen=True)
class Report:
    """What a compiled step takes, per device."""

    topology: str
    num_devices: int
    mesh: str
    parts: dict[str, int]  # bytes of the arguments, by part
    temporary: int  # bytes
    peak: int  # bytes of all that lives at once: arguments, results, temporaries, less what is donated
    capacity: int  # bytes a program may use; 0: unknown
    flops: float  # by formula
    xla_flops: float  # by XLA's cost analysis, the bodies of loops counted once; 0: none
    traffic: dict[str, Traffic] = field(default_factory=dict)
    unread_loops: int = 0
    seconds: float = 0.0
    prediction: Prediction | None = None  # of a step's time

    @property
    def arguments(self) -> int:
        """bytes"""
        return sum(self.parts.values())


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a described topology, for sharding.make_mesh.

    Args:
      topology: KIND:SHAPE. A TPU and its slice (v5e:4x4), a GPU and how many (h100:8), or cpu:N, virtual devices.
      slices: how many such TPU slices, joined by the data-centre network.

    Raises:
      UserError: unknown, several slices of what has none, or what describes it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if slices < 1 or (slices > 1 and kind not in TPUS):
        raise UserError(f"{slices} slices of {topology}: give 1 or more, and more than 1 of TPUs only")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        if not _installed("libtpu"):
            raise UserError(f"topology {topology}: libtpu is missing; run pip install 'virst-jax[aot]'")
        _quiet_tpu()
        # a single chip is refused as a part of a host; here it is a host of its own
        options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= set("1x") else {}
        return _described("tpu", topology, **options, **({"num_slices": slices} if slices > 1 else {}))
    if kind in GPUS and shape.isdigit():
        if not _installed("jax_plugins.xla_cuda12"):
            raise UserError(f"topology {topology}: NVIDIA's compiler is missing; run pip install jax-cuda12-plugin")
        # kernels cannot be timed on a GPU that is not here, and Triton's untimed choice of tiles fails on some products
        _add_xla_flag("--xla_gpu_autotune_level=0")
        _add_xla_flag("--xla_gpu_enable_triton_gemm=false")
        nodes, each = max(1, int(shape) // 8), min(8, int(shape))
        target = gpu_target(kind)
        return _described("cuda", kind, target_config=target, topology=f"1x{nodes}x{each}")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return _virtual_cpus(int(shape))
    raise UserError(f"unknown topology {topology!r}: write one such as {EXAMPLES} (TPUs: {', '.join(TPUS)})")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _described(platform: str, name: str, **options: Any) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except Exception as error:  # what the plugins raise has no common type
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"topology {name}: cannot be described ({reason}); sizes that exist are such as {EXAMPLES}"
        ) from (error)


def _quiet_tpu() -> None:
    # libtpu would look for the machine's own TPUs, and wait for them
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)


def _add_xla_flag(flag: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _virtual_cpus(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # a backend is up: it has what it has
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"topology cpu:{count}: this process has {len(devices)} CPU devices; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def gpu_target(kind: str) -> str:
    """A GpuTargetConfigProto in text form; figures of openxla/xla's specs for the device."""
    gpu = GPUS[kind]
    major, minor = gpu["major"], gpu.get("minor", 0)
    capability = CAPABILITIES[major, minor]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {capability["shared"]}
  threads_per_core_limit: {capability["threads"]}
  core_count: {gpu["cores"]}
  fpus_per_core: {capability["lanes"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {PEAKS[kind].bandwidth:.0f}
  l2_cache_size: {capability["cache"]}
  clock_rate_ghz: {capability["clock"]}
  device_memory_size: {gpu["memory"]}
  shared_memory_per_block_optin: {gpu["shared"]}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  name: "{gpu["name"]}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu["name"]}"
"""


def capacity(topology: str) -> int:
    """Bytes of memory that a program may use on a device of the topology; 0: unknown."""
    device: Device | None = PEAKS.get(topology.partition(":")[0])
    return round(device.memory * 0.97) if device else 0  # the runtime keeps some


def compile_report(
    step: Callable[..., Any],
    state: PyTree,
    batch: PyTree,
    state_shardings: PyTree,
    batch_shardings: PyTree,
    topology: str,
    *,
    parts: Callable[[PyTree], dict[str, PyTree]] | None = None,
    flops: float = 0.0,
    quick: bool = True,
    options: Mapping[str, str | bool] | None = None,
    hlo_path: str | os.PathLike[str] | None = None,
) -> Report:
    """Compiles (state, batch) -> (state, metrics) for a topology and reads off what it takes.

    To be called within sharding.use_mesh of a mesh over `topology_devices(topology)`.

    Args:
      step: a pure function; it is jitted with the state donated.
      state, batch: trees of arrays or ShapeDtypeStructs.
      state_shardings, batch_shardings: trees of NamedShardings, or one for the whole tree.
      topology: for the report, for the limit of memory and for times; what follows a space is for the reader.
      parts: what the state consists of: a state -> {name of the part: tree}; None: one part "state".
      flops: of one step on all devices by formula; for the report.
      quick: less effort of the compiler: several times faster, temporaries within some 15 %. The step itself comes out
        several times slower than with full effort, so no time is predicted.
      options: flags of the compiler by name, without hyphens.
      hlo_path: where to write the compiled program's text.

    Raises:
      UserError: it does not fit (by how much), or it cannot be compiled.
    """
    state, batch = _with_shardings(state, state_shardings), _with_shardings(batch, batch_shardings)
    mesh = next(x.sharding.mesh for x in jax.tree.leaves(state))
    metrics = NamedSharding(mesh, jax.sharding.PartitionSpec())
    out_shardings = (jax.tree.map(lambda x: x.sharding, state), metrics)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    limit, slice_of = capacity(topology), topology.partition(" ")[0]
    start = time.perf_counter()
    with _effort(quick):
        try:
            compiled = jitted.lower(state, batch).compile(compiler_options=dict(options or {}))
        except jax.errors.JaxRuntimeError as error:
            raise _explain(str(error), topology, mesh) from error
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    named = {"state": state} if parts is None else parts(state)
    sizes = {name: device_bytes(tree) for name, tree in {**named, "batch": batch}.items()}
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = live + memory.temp_size_in_bytes
    text = compiled.as_text() or ""
    if hlo_path is not None:
        with open(hlo_path, "w") as file:
            file.write(text)
    traffic, unread = collective_traffic(text)
    cost = _cost(compiled)
    report = Report(
        topology=topology,
        num_devices=mesh.size,
        mesh=" x ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        parts=sizes,
        temporary=memory.temp_size_in_bytes,
        peak=peak,
        capacity=limit,
        flops=flops / mesh.size,
        xla_flops=cost,
        traffic=traffic,
        unread_loops=unread,
        seconds=seconds,
        prediction=None if quick else _timed(text, slice_of, flops / mesh.size, mesh.size),
    )
    if limit and peak > limit:
        raise UserError(f"{topology} with {report.mesh}: {_too_much(peak, limit)}; {REMEDY}")
    return report


def _timed(text: str, topology: str, flops: float, chips: int) -> Prediction | None:
    """How long a step takes; None: it is not known for this topology."""
    if predicted(topology):
        return predict(text, topology, flops, chips)
    return at_least(text, topology, flops, chips) if estimated(topology) else None


@dataclass(frozen=True)
class Compiled:
    """A function that was compiled for a topology, per device."""

    temporary: int  # bytes
    results: int  # bytes, without those that take the place of arguments
    prediction: Prediction | None  # None: compiled with little effort, or for what times are not predicted for
    seconds: float
    roofline: Spent | None = None  # of a GPU: the least that it can take


def compile_function(function: Callable[..., Any], arguments: Sequence[PyTree], topology: str, quick: bool) -> Compiled:
    """Compiles a function for a topology.

    Args:
      function: jitted as it is.
      arguments: ShapeDtypeStructs with shardings over `topology_devices(topology)`.
      quick: see compile_report.

    Raises:
      UserError: it does not fit (by how much), or it cannot be compiled.
    """
    mesh = next(x.sharding.mesh for x in jax.tree.leaves(tuple(arguments)))
    start = time.perf_counter()
    with _effort(quick):
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _explain(str(error), topology, mesh) from error
    memory: Any = compiled.memory_analysis()
    text = "" if quick else compiled.as_text() or ""
    prediction = predict(text, topology, chips=mesh.size) if text and predicted(topology) else None
    least = roofline(text, topology) if text and estimated(topology) else None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(memory.temp_size_in_bytes, results, prediction, time.perf_counter() - start, least)


def _with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: shape(x, shardings), tree)
    return jax.tree.map(shape, tree, shardings)


def device_bytes(tree: PyTree) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs or arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.ceil(math.prod(x.sharding.shard_shape(x.shape)) * width(x.dtype)) for x in leaves)


def width(dtype: Any) -> float:
    """Bytes of an element on a device, where two of int4 share one."""
    return 0.5 if dtype == jnp.int4 else np.dtype(dtype).itemsize


def _cost(compiled: jax.stages.Compiled) -> float:
    try:
        cost = compiled.cost_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # not every compiler has one
        return 0.0
    cost = cost[0] if isinstance(cost, Sequence) else cost
    return float((cost or {}).get("flops", 0.0))


@contextlib.contextmanager
def _effort(quick: bool) -> Iterator[None]:
    names = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    old = {name: getattr(jax.config, name) for name in names}
    try:
        for name in names:
            if quick:
                jax.config.update(name, -1.0)
        yield
    finally:
        for name, value in old.items():
            jax.config.update(name, value)


def _too_much(needed: float, there: float) -> str:
    """Both in bytes."""
    excess = (needed - there) / GIB
    return f"the step needs {needed / GIB:.2f} GiB a device and {there / GIB:.2f} GiB are there, {excess:.2f} too much"


def _explain(message: str, topology: str, mesh: Mesh) -> UserError:
    """One line for what the compiler says."""
    sizes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message:
        asked = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
        asked = asked or re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
        if asked:
            used, there = float(asked[1]), float(asked[2])
            reason = (
                f"the step needs {used:.2f} GiB a device and {there:.2f} GiB are there, {used - there:.2f} too much"
            )
        else:
            reason = message.strip().splitlines()[0][:300]
        return UserError(f"{topology} with {sizes}: {reason}; {REMEDY}")
    return UserError(f"{topology} with {sizes}: does not compile: {message.strip().splitlines()[0][:300]}")


def print_report(report: Report, console: Console | None = None) -> None:
    """The report as a table."""
    console = console or Console()
    table = Table(title=f"{report.topology}: {report.num_devices} devices as {report.mesh}", show_header=False)
    table.add_column("")
    table.add_column("a device", justify="right")
    for name, size in report.parts.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_row("temporary", f"{report.temporary / GIB:.2f} GiB")
    room = f" of {report.capacity / GIB:.1f}" if report.capacity else ""
    table.add_row("together", f"{report.peak / GIB:.2f}{room} GiB", end_section=True)
    if report.flops:
        table.add_row("FLOPs a step (formula)", f"{report.flops / 1e12:.2f} T")
    if report.xla_flops:
        table.add_row("FLOPs (XLA, loops once)", f"{report.xla_flops / 1e12:.2f} T", end_section=True)
    for kind, traffic in report.traffic.items():
        table.add_row(f"{kind} x {traffic.count}", f"{traffic.payload / GIB:.3f} GiB, sends {traffic.sent / GIB:.3f}")
    if report.unread_loops:
        table.add_row("loops of unknown length, counted once", str(report.unread_loops))
    table.add_row("compiled in", f"{report.seconds:.0f} s")
    console.print(table)
