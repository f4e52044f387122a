"""How long segmentation takes, stage by stage, and how our tracker compares with SAM 2 in PyTorch.

    python -m benchmarks.segment [--config virst_7b] [--layers 2] [--parts stages,encoder,track,propagation,many]
                                 [--repeats 3] [--threads N] [--json FILE]

stages       every compiled step of inference, and the share of the device's peak in matrix products that it reaches
encoder      the image encoder beside transformers' Sam2VideoModel
track        memory attention, mask decoder, memory encoder and the whole step, on a frame with all memories in place
propagation  a whole video: its first frame is prompted with a point, the others are tracked
many         K expressions together against K runs of one, on a frame with all memories in place

Parameters and memories are random; everything is float32, but memories are kept in bfloat16 by both sides. The sides of
a comparison have the same weights, inputs and number of threads, take turns in one process, and must agree: the largest
difference of what they compute, over the largest value, stands beside the ratio. Times are medians of the repeats,
without compilation. transformers needs PyTorch: pip install -e '.[bench]'.
Exit status: 0; 1 if two sides do not agree; 2 with one line if an argument is wrong.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.random_network import (
    Past,
    random_features,
    random_params,
    random_past,
    random_video,
    remembering,
    small_config,
    track_inputs,
)
from benchmarks.segment_stages import measure_stages, take_turns
from virst_jax.config import VirstConfig, get_preset
from virst_jax.data.transforms import normalize
from virst_jax.errors import UserError
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.io import atomic
from virst_jax.models.sam2.sam2 import Features, Prediction, Sam2
from virst_jax.models.sam2.tracker import Tracked
from virst_jax.profiling.flops import device_peak

PARTS = ("stages", "encoder", "track", "propagation", "many")
WITH_PEER = {"encoder", "track", "propagation"}
TOLERANCE = 1e-3  # of the largest value
POINT = (0.45, 0.55)  # the prompt: x and y over the image's side
CHUNK = 4  # frames of a compiled call

Say = Callable[[str], None]
Row = dict[str, Any]


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Row:
    """Times of both, which have run before."""
    a, b = take_turns([ours, theirs], repeats)
    return {"stage": name, "ours": a, "theirs": b, "ratio": b / a}


# beside transformers


def compare_encoder(network: Network, peer: Any, repeats: int) -> list[Row]:
    import torch

    frames = random_video(network.cfg.sam2, 1)
    channels_first = torch.from_numpy(np.moveaxis(normalize(frames), -1, 1).copy())
    (ours,), theirs = network.encode_batch(frames, 1), peer.encode(channels_first)
    maps = zip((ours.high0, ours.high1, ours.top), theirs, strict=True)
    differ = max(difference(np.reshape(x, (-1, x.shape[-1])), y[:, 0]) for x, y in maps)
    run = compare(
        "image encoder", lambda: network.encode_batch(frames, 1), lambda: peer.encode(channels_first), repeats
    )
    return [run | {"difference": differ}]


def compare_track(network: Network, peer: Any, repeats: int) -> list[Row]:
    """The step and its three parts. Their decoder resizes three masks to the image's size; our memory encoder one."""
    cfg, tracker, params = network.cfg.sam2, network.steps.tracker, {"params": network.params["sam2"]}
    sam = tracker.sam
    frame, past = random_features(cfg), random_past(cfg)
    number = len(past.memory)
    known, bank, *_ = track_inputs(network.cfg, [past], frame)
    batch = ExpressionBatch(known, bank, 1)
    state = peer.open_with_past([frame.high0, frame.high1, frame.top], past)

    at = (known, known.valid, bank, frame, jnp.int32(number), jnp.int32(number + 1))
    condition = jax.jit(tracker.condition)

    @jax.jit
    def decode(params: Any, image: jax.Array, frame: Features) -> Prediction:
        sparse = sam.apply(params, 1, method=Sam2.no_prompt)
        prediction: Any = sam.apply(params, image, frame, sparse, mode=tracker.mode, method=Sam2.predict)
        return prediction

    @jax.jit
    def encode_memory(params: Any, frame: Features, prediction: Prediction) -> jax.Array:
        memory: Any = sam.apply(params, frame, prediction, method=Sam2.encode_memory)
        return memory

    def track() -> Tracked:
        batch.bank = bank  # the same frame each time
        return network.advance(batch, [frame], number, number + 1, 1)

    rows: list[Row] = []

    def add(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], *pairs: tuple[Any, Any]) -> None:
        rows.append(compare(name, ours, theirs, repeats) | {"difference": max(difference(*pair) for pair in pairs)})

    image, peer_image = condition(params["params"], *at), peer.condition(state, number)
    add(
        "memory attention",
        lambda: condition(params["params"], *at),
        lambda: peer.condition(state, number),
        (image[0], peer_image[0].permute(1, 2, 0)),
    )
    # both decode the same image and encode the mask they made of it
    peer_image = peer_image.new_tensor(np.moveaxis(np.asarray(image), -1, 1))
    made, peer_made = decode(params, image, frame), peer.decode(state, number, peer_image)
    add(
        "mask decoder",
        lambda: decode(params, image, frame),
        lambda: peer.decode(state, number, peer_image),
        (made.low_res[0], peer_made.pred_masks[0, 0]),
        (made.pointer[0], peer_made.object_pointer[0, 0]),
    )
    given = (state, number, peer_made.high_res_masks, peer_made.object_score_logits)
    memory = encode_memory(params, frame, made)
    add(
        "memory encoder",
        lambda: encode_memory(params, frame, made),
        lambda: peer.encode_memory(*given),
        (memory[0], peer.encode_memory_exactly(*given)),
    )
    tracked, peer_tracked = track().prediction, peer.track(state, number)
    add(
        "track step",
        track,
        lambda: peer.track(state, number),
        (tracked.low_res[0, 0], peer_tracked["pred_masks"][0, 0]),
        (tracked.pointer[0, 0], peer_tracked["object_pointer"][0, 0]),
    )
    return rows


def propagate(network: Network, frames: np.ndarray, prompts: jax.Array) -> np.ndarray:
    """Prompts frame 0 of frames uint8[T, R, R, 3] and tracks; mask logits float32[T, L, L]."""
    count = len(frames)

    def encode(frame: np.ndarray) -> Features:
        return network.encode_batch(frame[None], 1)[0]

    first = encode(frames[0])
    batch = network.start([first], [0], prompts, slots=1)
    masks = []
    for start in range(0, count, CHUNK):
        chunk = [encode(frame) if start + i else first for i, frame in enumerate(frames[start : start + CHUNK])]
        out = network.advance(batch, chunk, start, count, CHUNK)
        masks.append(np.asarray(out.prediction.low_res[: len(chunk), 0]))
    return np.concatenate(masks)


def compare_propagation(network: Network, peer: Any, count: int, repeats: int) -> list[Row]:
    import torch

    cfg, frames = network.cfg.sam2, random_video(network.cfg.sam2, count)
    x, y = (share * cfg.image_size for share in POINT)
    point, label = jnp.array([[[x, y]]]), jnp.ones((1, 1), int)
    params = {"params": network.params["sam2"]}
    tokens: Any = network.steps.tracker.sam.apply(params, point, label, method=Sam2.embed_points)
    prompts = tokens[:, None]
    channels_first = torch.from_numpy(np.moveaxis(normalize(frames), -1, 1).copy())
    propagate(network, frames[:1], prompts)  # compiles what longer videos need too
    kept: dict[str, np.ndarray] = {}

    def ours() -> None:
        kept["ours"] = propagate(network, frames, prompts)

    def theirs() -> None:
        kept["theirs"] = peer.propagate(channels_first, (x, y))

    row = compare(f"propagation, {count} frames", ours, theirs, repeats)
    masks = [kept[name] > 0 for name in ("ours", "theirs")]
    row["difference"] = difference(kept["ours"], kept["theirs"])
    row["mask_iou"] = float((masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum()))
    return [row]


# many expressions


def measure_many(network: Network, expressions: int, repeats: int, say: Say) -> Row:
    """A frame for several expressions, encoded and tracked once for all or once for each."""
    cfg = network.cfg.sam2
    pixels = random_video(cfg, 1)
    pasts = [random_past(cfg, seed) for seed in range(expressions)]
    number = len(pasts[0].memory)

    def run(objects: list[Past]) -> Callable[[], Any]:
        batch = remembering(network.cfg, objects)
        bank = batch.bank

        def frame() -> Any:
            batch.bank = bank  # the same frame each time
            out = network.advance(batch, network.encode_batch(pixels, 1), number, number + 1, 1)
            return jax.block_until_ready(out.prediction.low_res[0])

        return frame

    say("many: compiling")
    together, each = run(pasts), [run([past]) for past in pasts]
    a, b = together(), jnp.concatenate([one() for one in each])
    say("many: running")
    seconds = take_turns([together, lambda: [one() for one in each]], repeats)
    return {
        "expressions": expressions,
        "together": seconds[0],
        "separate": seconds[1],
        "ratio": seconds[1] / seconds[0],
        "difference": difference(a, b),
    }


# command line


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[int]:
    """Both libraries run on so many threads; XLA takes as many as there are processors it may use."""
    before = os.sched_getaffinity(0)
    count = len(before) if count is None else count
    if not 1 <= count <= len(before):
        raise UserError(f"--threads {count}: this process may use 1 to {len(before)} processors")
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield count
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def peer_of(network: Network, threads: int) -> Iterator[Any]:
    """transformers' model with the network's weights.

    Raises:
      UserError: PyTorch is missing, or transformers cannot express the network.
    """
    try:
        import torch
        from benchmarks.transformers_sam2 import Peer
    except ImportError as error:
        raise UserError(f"the comparison needs PyTorch ({error}): pip install -e '.[bench]'") from error
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield Peer(network.cfg.sam2, network.params["sam2"])
    finally:
        torch.set_num_threads(before)


def measure(result: dict[str, Any], options: argparse.Namespace, cfg: VirstConfig, threads: int, say: Say) -> None:
    """Puts all figures of the parts that are asked for into `result`, each as soon as it is there."""
    peak, origin = device_peak()
    packages = ["jax", "jaxlib"] + (["torch", "transformers"] if WITH_PEER & set(options.parts) else [])
    result |= {
        "config": cfg.name,
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "repeats": options.repeats,
        "peak": peak,
        "peak_origin": origin,
        "versions": {name: metadata.version(name) for name in packages},
        "stages": [],
        "compared": [],
        "many": None,
    }
    wanted = set(options.parts)
    network = Network(cfg, None)
    if wanted - {"stages"}:
        say("making parameters")
        network.params = random_params(cfg, "sam2")
    if wanted & WITH_PEER:
        with peer_of(network, threads) as peer:
            if "encoder" in wanted:
                say("image encoder, both sides")
                result["compared"] += compare_encoder(network, peer, options.repeats)
            if "track" in wanted:
                say("track step, both sides")
                result["compared"] += compare_track(network, peer, options.repeats)
            if "propagation" in wanted:
                say("propagation, both sides")
                result["compared"] += compare_propagation(network, peer, options.frames, options.repeats)
    if "many" in wanted:
        result["many"] = measure_many(network, options.expressions, options.repeats, say)
    if "stages" in wanted:
        network.params = None  # the stages make their own
        layers = options.layers or (2 if cfg.llm.hidden_size > 1024 else cfg.llm.num_layers)
        result["stages"] = measure_stages(
            cfg, layers=layers, expressions=options.expressions, repeats=options.repeats, say=say
        )


def show(result: dict[str, Any], console: Console) -> None:
    where = f"{result['config']}, {result['threads']} threads"
    if result["stages"]:
        table = Table(title=f"Stages of {where}; peak {result['peak'] / 1e9:.0f} GFLOP/s ({result['peak_origin']})")
        for column in ("stage", "of", "seconds", "a frame", "GFLOP", "GFLOP/s", "of peak", "compiling"):
            table.add_column(column, justify="left" if column in ("stage", "of") else "right")
        for row in result["stages"]:
            each = row["seconds_per_frame"]
            table.add_row(
                row["stage"],
                row["unit"],
                f"{row['seconds']:.4f}",
                "" if each is None else f"{each:.4f}",
                f"{row['flops'] / 1e9:.2f}",
                f"{row['flops'] / row['seconds'] / 1e9:.1f}",
                f"{100 * row['share_of_peak']:.0f} %",
                f"{row['compile_seconds']:.1f}",
            )
        console.print(table)
    if result["compared"]:
        table = Table(title=f"Tracker of {where}: seconds beside transformers' Sam2VideoModel")
        for column in ("stage", "ours", "theirs", "theirs / ours", "largest difference"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for row in result["compared"]:
            figures = [f"{row['ours']:.4f}", f"{row['theirs']:.4f}", f"{row['ratio']:.2f}", f"{row['difference']:.1e}"]
            table.add_row(row["stage"], *figures)
        console.print(table)
    if many := result["many"]:
        table = Table(title=f"Expressions of {where}: seconds a frame")
        for column in ("expressions", "together", "one by one", "ratio", "largest difference"):
            table.add_column(column, justify="right")
        figures = [f"{many['together']:.4f}", f"{many['separate']:.4f}", f"{many['ratio']:.2f}"]
        table.add_row(str(many["expressions"]), *figures, f"{many['difference']:.1e}")
        console.print(table)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, VirstConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="virst_7b", help="a preset")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: sizes for tests")
    parser.add_argument("--layers", type=int, help="of the language model, at full width; default 2, or all of a small")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts above, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=9, help="of the propagated video")
    parser.add_argument("--expressions", type=int, default=8)
    parser.add_argument("--threads", type=int, help="default: all processors")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    options.parts = tuple(options.parts.split(","))
    if unknown := sorted(set(options.parts) - set(PARTS)):
        raise UserError(f"--parts: there is no part {unknown[0]!r}; choose from {','.join(PARTS)}")
    for name in ("layers", "repeats", "frames", "expressions"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    return options, small_config() if options.size == "small" else get_preset(options.config)


def main(arguments: list[str] | None = None) -> int:
    console = Console(width=120)
    result: dict[str, Any] = {}
    try:
        options, cfg = parse(arguments)
        cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype="float32", param_dtype="float32"))
        with limited_threads(options.threads) as threads, console.status("starting") as status:
            say = status.update if console.is_terminal else lambda message: print(message, file=sys.stderr)
            measure(result, options, cfg, threads, say)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured until now:", file=sys.stderr)
        if "many" not in result:
            return 130
    show(result, console)
    if options.json:
        atomic.write_json(options.json, result)
    compared = [*result["compared"], *([result["many"]] if result["many"] else [])]
    apart = [row.get("stage", "many") for row in compared if not row["difference"] <= TOLERANCE]
    if apart:
        print(f"differ by more than {TOLERANCE:g} of the largest value: {', '.join(apart)}", file=sys.stderr)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
