"""The parts of benchmarks.accelerator: functions that give rows of its table."""

import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.long_video import write_clip
from benchmarks.random_network import device_normal, device_params, parameter_shapes, random_params, small_config
from conversion.parity import run_case
from virst_jax.api import Model
from virst_jax.config import VirstConfig, get_preset
from virst_jax.data.batches import BatchConfig
from virst_jax.data.prompts import load_tokenizer
from virst_jax.errors import UserError
from virst_jax.inference import abstract
from virst_jax.inference.abstract import StepCall
from virst_jax.inference.steps import Network
from virst_jax.io.json_files import read_json
from virst_jax.io.video import open_video
from virst_jax.models.sam2.hiera import block_specs
from virst_jax.ops.attention import IMPLEMENTATIONS, attention
from virst_jax.profiling.flops import device_name, device_peak, utilisation
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state, make_train_step
from virst_jax.training.tasks import get_task, visual_tokens
from virst_jax.types import PyTree

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "data" / "parity"
TOKENIZER = ROOT / "virst_jax" / "assets" / "tiny" / "tokenizer"
PREDICTED = Path(__file__).with_name("predicted_steps.json")
# cases that compute on the device, the telling ones first
FIRST = ("e2e_video", "qwen2", "umt", "hiera", "memory", "mask_decoder", "st_fusion", "sam2_image_tiny")
MORE = ("token_merge", "losses", "sam2_blocks", "sam2_video_tiny", "chat_video", "e2e_many_anchors", "train_loss")
STAGES = (
    "image encoder",
    "video encoder",
    "LLM reads the video",
    "LLM reads the sentences",
    "second fusion",
    "anchors",
    "track 4 frames",
    "mask tile",
    "embed a conversation",
    "answer in 64 tokens",
)
GROUPS = ((r"llm/layers/.*/lora_[ab]", 1.0), (r"(projector|second_fusion)/.*", 1.0), (".*", 0.0))
MEASURED = 0.05  # seconds that a measurement takes at least
SIZE = (480, 854)  # of videos

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # that it is expected to take at most, its compilation included
    run: Callable[[], list[Row]]


class Bench:
    """What parts share.

    Args:
      size: "full": virst_7b in bfloat16; "small": a small network in float32.
      repeats: of a measurement.
    """

    def __init__(self, size: str, repeats: int):
        self.full, self.repeats = size == "full", repeats
        cfg = get_preset("virst_7b") if self.full else small_config()
        self.dtype = "bfloat16" if self.full else "float32"
        compute = dataclasses.replace(cfg.compute, dtype=self.dtype, param_dtype=self.dtype)
        # [SEG] of the small model's tokenizer, which is here
        self.cfg = dataclasses.replace(cfg, compute=compute, seg_token_id=get_preset("tiny").seg_token_id)
        self.frames = 64 if self.full else 5
        self.params: PyTree = None

    def network(self) -> PyTree:
        """Random parameters on the device, made when they are first asked for."""
        if self.params is None:
            self.params = device_params(self.cfg, self.dtype)
        return self.params

    @functools.cached_property
    def calls(self) -> dict[str, StepCall]:
        """The steps of a video with one sentence, and of chat."""
        params = abstract.parameters(parameter_shapes(self.cfg)[0], self.dtype)
        return {call.name: call for call in abstract.step_calls(self.cfg, params, self.frames, 1)}

    def time(self, function: Callable[[], Any]) -> float:
        """Median seconds of a call; short ones are started several at a time."""
        jax.block_until_ready(function())  # compiles
        start = time.perf_counter()
        jax.block_until_ready(function())
        count = max(1, math.ceil((MEASURED if self.full else 0.0) / max(1e-6, time.perf_counter() - start)))
        found = []
        for _ in range(self.repeats):
            start, last = time.perf_counter(), None
            for _ in range(count):
                last = function()
            jax.block_until_ready(last)
            found.append((time.perf_counter() - start) / count)
        return statistics.median(found)


def list_parts(bench: Bench) -> list[Part]:
    """All parts, in the order in which they are run."""
    here = bench.full
    parity = lambda name, dtype: functools.partial(parity_rows, name, dtype)  # noqa: E731
    parts = [
        Part(f"parity/{name}/{dtype}", 20 if here else 10, parity(name, dtype))
        for dtype, name in itertools.product(("float32", "bfloat16"), FIRST if here else ("st_fusion",))
    ]
    parts += [Part(f"stage/{name}", 45, functools.partial(stage_rows, bench, name)) for name in STAGES]
    for source, count in (("memory", 1), ("memory", 8), ("file", 1)):
        run = functools.partial(video_rows, bench, source, count if here else min(count, 2))
        parts.append(Part(f"video/{source}/{count}", 60, run))
    parts += [
        Part(f"attention/{name}", 30, functools.partial(attention_rows, bench, name)) for name in shapes(bench.cfg)
    ]
    parts.append(Part("training", 90, functools.partial(training_rows, bench)))
    parts.append(Part("peer", 90, functools.partial(peer_rows, bench)))
    if here:
        more = itertools.product(MORE, ("float32",))
        parts += [Part(f"parity/{name}/{dtype}", 30, parity(name, dtype)) for name, dtype in more]
    return parts


# parity


def parity_rows(name: str, dtype: str) -> list[Row]:
    """The worst output of a case. Recorded numbers are float32: only float32 must agree."""
    checks, _ = run_case(CASES, name, dtype=dtype, tokenizer=CASES.parent / "tokenizer")
    errors = [check.relative for check in checks if check.relative is not None]
    overlaps = [check.iou for check in checks if check.iou is not None]
    failed = [f"{check.output} {check.note}".strip() for check in checks if not check.passed]
    wrong = bool(failed) and dtype == "float32"
    note = f"{len(checks)} outputs" + (f", masks' IoU from {min(overlaps):.4f} on" if overlaps else "")
    if wrong or (failed and not errors):
        note += f"; beyond the bound: {', '.join(failed)[:200]}"
    value = max(errors) if errors else None
    return [{"what": "largest relative error", "value": value, "unit": "", "note": note, "wrong": wrong}]


# steps


def fill(tree: PyTree) -> PyTree:
    """Arrays on the device for shapes: normal numbers, zeros for integers, pixels and flags that are set."""
    count = itertools.count(1)

    def made(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return device_normal(next(count), x.shape, str(x.dtype))
        return (jnp.ones if x.dtype == bool else jnp.zeros)(x.shape, x.dtype)

    return jax.tree.map(made, tree)


def tracking(arguments: Any) -> Any:
    """What tracking takes, with all memories in place, on frames that are no anchors."""
    filled: Any = fill(arguments)
    anchors, bank, features, frames, valid, _ = filled
    first, rings = 1000, {}
    for name in ("memory_frames", "pointer_frames"):
        size = len(getattr(bank, name))
        before = np.arange(first - size, first, dtype=np.int32)
        rings[name] = jnp.asarray(before[np.argsort(before % size)])  # frame t lies in slot t modulo the size
    number = jnp.arange(len(frames), dtype=jnp.int32) + first
    return anchors, bank.replace(**rings), features, number, valid, jnp.int32(2 * first)


def predictions(name: str) -> str:
    """What was predicted for a step on a device of this kind, in words; empty: nothing."""
    device = device_name(jax.devices()[0].device_kind)
    stored = read_json(PREDICTED).value if PREDICTED.is_file() else {}
    for topology in (f"{device}:1", f"{device}:1x1", f"{device}:1x1x1"):
        found = stored.get("virst_7b", {}).get(topology, {}).get("1", {}).get(name)
        if found and "roofline" in found:
            return f"roofline {found['roofline']:.4g} ms"
        if found:
            return f"predicted {found['slow']:.4g} to {found['fast']:.4g} ms"
    return ""


def stage_rows(bench: Bench, name: str) -> list[Row]:
    call = bench.calls[name]
    params: Any = None if call.part is None else bench.network()
    if call.part:
        params = params[call.part]
    arguments = (tracking if name.startswith("track") else fill)(call.arguments)
    step = jax.jit(functools.partial(call.function, **call.static))
    start = time.perf_counter()
    run = step.lower(params, *arguments).compile()
    compiling = time.perf_counter() - start
    seconds = bench.time(lambda: run(params, *arguments))
    notes = [f"{call.calls} calls a video" if call.calls else "chat", predictions(name) if bench.full else ""]
    notes.append(f"compiled in {compiling:.0f} s")
    note = ", ".join(filter(None, notes))
    return [{"what": "a call", "value": 1e3 * seconds, "unit": "ms", "note": note, "calls": call.calls}]


# whole videos


def video_rows(bench: Bench, source: str, count: int) -> list[Row]:
    tokenizer = load_tokenizer(TOKENIZER, bench.cfg.seg_token_id)
    model = Model(bench.cfg, bench.network(), tokenizer, dtype=bench.dtype)
    texts = [f"the red circle {number}" for number in range(count)]
    height, width = SIZE if bench.full else (90, 120)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, bench.frames, height, width)
        video: Any = str(clip)
        if source == "memory":
            video = np.stack(list(open_video(str(clip))))
        last: Any = None
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            with model.segment_stream(video, texts) as stream:
                for _ in stream:
                    pass
                last = time.perf_counter() - start, dict(stream.timings)
    seconds, timings = last
    note = ", ".join(f"{name} {value:.2f} s" for name, value in timings.items() if value)
    what = f"{bench.frames} frames of {height} x {width}, {count} sentence{'s' * (count > 1)}"
    return [{"what": what, "value": bench.frames / seconds, "unit": "frames/s", "note": note}]


# attention


@dataclass(frozen=True)
class Shape:
    """Of one attention: batch, queries, keys, heads, key heads, widths of keys and values."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    width: int
    values: int
    causal: bool = False
    masked: bool = False


def shapes(cfg: VirstConfig) -> dict[str, Shape]:
    """The network's attentions."""
    llm, vision, sam = cfg.llm, cfg.vision, cfg.sam2
    prefix = cfg.max_video_frames * vision.tokens_per_frame + abstract.PREFIX_TEXT
    heads = (llm.num_heads, llm.num_kv_heads, llm.head_dim, llm.head_dim)
    clip, narrow = vision.clip_frames * vision.grid**2, vision.hidden_size // vision.num_heads
    found = {
        "LLM, video": Shape(1, prefix, prefix, *heads, causal=True),
        "LLM, text": Shape(1, abstract.TEXT, prefix + abstract.TEXT, *heads, masked=True),
        "UMT": Shape(1, clip, clip, vision.num_heads, vision.num_heads, narrow, narrow),
    }
    side = sam.image_size // 4
    for spec in block_specs(sam.hiera):
        window = spec.window or side
        batch, keys, width = math.ceil(side / window) ** 2, window**2, spec.dim_out // spec.num_heads
        queries = keys // 4 if spec.pool else keys
        shape = Shape(batch, queries, keys, spec.num_heads, spec.num_heads, width, width)
        found[f"Hiera, {batch} x {queries} x {keys}, {spec.num_heads} heads"] = shape
        side = side // 2 if spec.pool else side
    size, anchors = sam.feature_size**2, cfg.max_anchors
    attended = anchors if sam.max_anchors_attended == -1 else min(anchors, sam.max_anchors_attended)
    wide, memories = (1, 1, sam.hidden_size), (attended + sam.num_maskmem - 1) * size
    inner = sam.hidden_size // 2 // sam.decoder_heads
    decoder = (sam.decoder_heads, sam.decoder_heads, inner, inner)
    tokens = 3 + sam.num_multimask + cfg.num_seg_tokens
    return found | {
        "memory, itself": Shape(1, size, size, *wide, sam.hidden_size),
        "memory, one frame": Shape(1, size, size, *wide, sam.memory_dim, masked=True),
        "memory, all frames": Shape(1, size, memories, *wide, sam.memory_dim, masked=True),
        "decoder, tokens": Shape(1, tokens, size, *decoder),
        "decoder, image": Shape(1, size, tokens, *decoder),
    }


def attention_rows(bench: Bench, name: str) -> list[Row]:
    """Errors are relative to the plain one in float32 at full precision."""
    x = shapes(bench.cfg)[name]
    wide = [
        device_normal(seed, shape, "float32")
        for seed, shape in enumerate(
            [
                (x.batch, x.queries, x.heads, x.width),
                (x.batch, x.keys, x.groups, x.width),
                (x.batch, x.keys, x.groups, x.values),
            ]
        )
    ]
    mask = jnp.broadcast_to(jnp.arange(x.keys) % 8 != 0, (x.batch, x.keys)) if x.masked else None
    rows: list[Row] = []
    for dtype in ("bfloat16", "float32"):
        arrays = [array.astype(dtype) for array in wide]
        precision = "highest" if dtype == "float32" else None

        def run(impl: str, arrays: list[jax.Array] = arrays, precision: str | None = precision) -> Callable[[], Any]:
            with jax.default_matmul_precision(precision):
                function = jax.jit(lambda q, k, v: attention(q, k, v, key_mask=mask, causal=x.causal, impl=impl))
                compiled = function.lower(*arrays).compile()
            return lambda: compiled(*arrays)

        def plain(arrays: list[jax.Array] = arrays) -> np.ndarray:
            with jax.default_matmul_precision("highest"):
                given = [array.astype(jnp.float32) for array in arrays]
                out = jax.jit(lambda q, k, v: attention(q, k, v, key_mask=mask, causal=x.causal, impl="plain"))(*given)
            return np.asarray(out, np.float64)

        truth = plain()
        for impl in IMPLEMENTATIONS:
            if impl == "splash" and jax.default_backend() != "tpu":
                continue  # it would be interpreted
            row: Row = {"what": f"{impl}, {dtype}", "value": None, "unit": "ms"}
            try:
                call = run(impl)
                error = np.linalg.norm(np.asarray(call(), np.float64) - truth) / np.linalg.norm(truth)
                row |= {"value": 1e3 * bench.time(call), "note": f"relative error {error:.1e}", "error": float(error)}
                # float32 sums in another order; bfloat16 rounds weights and results to 2^-8 of themselves
                row["wrong"] = bool(not error <= (1e-5 if dtype == "float32" else 2e-2))
            except UserError as refused:
                row["note"] = f"refused: {str(refused).split(';')[0][:120]}"
            except Exception as failure:  # of whatever kind: the other implementations are wanted all the same
                row["note"] = f"failed: {(str(failure).strip().splitlines() or [''])[0][:160]}"
            rows.append(row)
    return rows


# training


def training_rows(bench: Bench) -> list[Row]:
    """Adapters, projector and second fusion learn; the rest is frozen."""
    bench.params = None  # there is no room for both
    llm = bench.cfg.llm
    lora = dataclasses.replace(llm.lora, rank=llm.lora.rank or 4)
    llm = dataclasses.replace(llm, num_layers=2, lora=lora)
    compute = dataclasses.replace(bench.cfg.compute, remat="full", param_dtype="float32")
    cfg = dataclasses.replace(bench.cfg, llm=llm, compute=compute)
    videos, frames = (2, 8) if bench.full else (1, 4)
    batch = BatchConfig(
        kind="video",
        batch_size=videos,
        conversations=3 if bench.full else 1,
        vlm_frames=frames,
        seg_frames=2,
        anchors=1,
    )
    task = get_task(batch.kind)
    prefix = visual_tokens(cfg, batch) + 16
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in task.shapes(cfg, batch, prefix).items()
    }
    given = task.batch(fill(arrays), prefix)
    optim = OptimConfig()
    params = device_params(cfg, bench.dtype)
    state = jax.jit(functools.partial(init_state, cfg, optim, GROUPS), donate_argnums=0)(params)
    step = jax.jit(make_train_step(cfg, optim, GROUPS, task.loss), donate_argnums=0)
    run = step.lower(state, given).compile()
    times = []
    for _ in range(bench.repeats + 1):
        start = time.perf_counter()
        state, metrics = run(state, given)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    paths = ["/".join(str(part.key) for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    operations = task.count_flops(cfg, given, paths).model
    peak, origin = device_peak()
    what = f"a step, {videos} videos, {llm.num_layers} layers of the language model"
    note = f"{operations / 1e12:.3g} TFLOP; peak {peak / 1e12:.4g} TFLOP/s ({origin})"
    return [
        {"what": what, "value": 1e3 * seconds, "unit": "ms", "note": note},
        {"what": "MFU", "value": 100 * utilisation(operations, seconds, 1, peak), "unit": "%", "note": ""},
    ]


# beside PyTorch


def peer_rows(bench: Bench) -> list[Row]:
    """The image encoder of one frame; both sides in the same dtype, with the same weights."""
    absent = {"what": "transformers' Sam2Video", "value": None, "unit": "ms"}
    try:
        import torch
        from benchmarks.transformers_sam2 import Peer
    except ImportError as error:
        return [absent | {"note": f"absent: {error}"}]
    platform = jax.default_backend()
    if platform == "tpu" or (platform == "gpu" and not torch.cuda.is_available()):
        return [absent | {"note": f"absent: PyTorch {torch.__version__} does not see this device"}]
    where = "cuda" if platform == "gpu" else "cpu"
    bench.params = None
    cfg, dtype = bench.cfg, getattr(torch, bench.dtype)
    params = random_params(cfg, "sam2")
    low = jax.tree.map(lambda x: x.astype(bench.dtype), params)
    network = Network(cfg, low)
    side = cfg.sam2.image_size
    pixels = np.zeros((1, side, side, 3), np.uint8)
    rows: list[Row] = []
    seconds = bench.time(lambda: network.encode_batch(pixels, 1))
    rows.append({"what": "image encoder, ours", "value": 1e3 * seconds, "unit": "ms", "note": bench.dtype})
    with torch.inference_mode():
        model = Peer(cfg.sam2, params["sam2"]).model.to(where, dtype)
        given = torch.zeros(1, 3, side, side, dtype=dtype, device=where)

        def finished(function: Callable[[Any], Any]) -> Callable[[], None]:
            def call() -> None:
                function(given)
                if where == "cuda":
                    torch.cuda.synchronize()

            return call

        encode = lambda x: model.get_image_features(x, return_dict=True)  # noqa: E731
        kinds: list[tuple[str, Callable[[Any], Any]]] = [("PyTorch", encode)]
        if bench.full:
            kinds.append(("torch.compile", torch.compile(encode)))
        for name, function in kinds:
            row: Row = {"what": f"image encoder, {name}", "value": None, "unit": "ms"}
            try:
                theirs = bench.time(finished(function))
                row |= {"value": 1e3 * theirs, "note": f"{theirs / seconds:.2f} times ours; torch {torch.__version__}"}
            except Exception as failure:  # PyTorch's compiler needs a C compiler, among others
                row["note"] = f"failed: {(str(failure).strip().splitlines() or [''])[0][:160]}"
            rows.append(row)
    return rows
