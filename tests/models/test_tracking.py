"""Invariants of the tracker, on a small network with random weights."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.extend.core import jaxprs_in_params

from helpers.compiling import SAME_BITS
from helpers.kernels import equations, kernels
from virst_jax.config import Compute, HieraConfig, Sam2Config, VirstConfig, virst_7b
from virst_jax.inference.steps import Network
from virst_jax.inference.stream import propagate
from virst_jax.models.sam2 import memory
from virst_jax.models.sam2 import tracker as tracker_module
from virst_jax.models.sam2.anchors import select_anchors
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Anchors, MemoryBank, Tracked, Tracker
from virst_jax.ops import splash

CFG = Sam2Config(
    hiera=HieraConfig(embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_att_blocks=(2,), window_spec=(4, 4, 4, 4)),
    image_size=128,
    hidden_size=32,
    memory_dim=16,
    memory_layers=1,
    memory_mlp_dim=32,
    decoder_layers=1,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_head_dim=16,
    memory_fuser_layers=1,
    max_pointers=8,  # fewer than the frames: both ring buffers go round
    num_maskmem=4,
    max_anchors_attended=2,
)
OBJECTS, FRAMES = 3, 12
ANCHORS = np.array([2, 5, 9], np.int32)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def abstract_parameters(sam: Sam2) -> Any:
    side = sam.cfg.image_size
    return meta.unbox(jax.eval_shape(lambda: sam.init(jax.random.key(0), jnp.zeros((side, side, 3)))["params"]))


@functools.cache
def parameters() -> Any:
    """Random weights, large enough for every frame's outcome to differ."""
    rng = np.random.RandomState(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            fan_in = leaf.shape[0] if leaf.ndim == 4 and leaf.shape[1:3] == (2, 2) else leaf.shape[-2]
            return 1.4 * x / np.float32(np.sqrt(fan_in))
        if jax.tree_util.keystr(path) == "['mask_decoder']['object_head']['layer2']['bias']":
            return x - 2.3  # so that objects come and go
        return 1 + 0.2 * x if name in ("scale", "gamma") else 0.5 * x

    return jax.tree_util.tree_map_with_path(draw, abstract_parameters(Sam2(CFG, Compute())))


@functools.cache
def tracker() -> tuple[Tracker, Any, Any]:
    made = Tracker(Sam2(CFG, Compute()))
    made.memory_dtype = jnp.dtype(jnp.float32)  # rounding differences must not grow to one of bfloat16's steps
    track = functools.partial(made.track, keep_memory=True)
    return made, jax.jit(made.prompt_anchors, compiler_options=SAME_BITS), jax.jit(track, compiler_options=SAME_BITS)


def features(count: int) -> Features:
    """Of a video: random, with something that lasts."""
    rng = np.random.RandomState(1)
    size, width = CFG.feature_size, CFG.hidden_size
    shapes = (4 * size, 4 * size, width // 8), (2 * size, 2 * size, width // 4), (size, size, width)
    return Features(
        *(
            jnp.asarray(rng.standard_normal(shape) + 0.7 * rng.standard_normal((count, *shape)), jnp.float32)
            for shape in shapes
        )
    )


def at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def prompts() -> np.ndarray:
    return np.random.RandomState(2).standard_normal((OBJECTS, len(ANCHORS), 4, CFG.hidden_size)).astype(np.float32)


def prompt(tokens: np.ndarray) -> Anchors:
    images = at(features(FRAMES), ANCHORS)
    return tracker()[1](parameters(), images, ANCHORS, np.ones(len(ANCHORS), bool), tokens)


def track(anchors: Anchors, chunk: int, count: int = FRAMES) -> tuple[MemoryBank, Tracked]:
    """Frames 0..count-1 in chunks; those that fill up the last chunk hold NaN."""
    made, _, step = tracker()
    bank, results = made.start(anchors.memory.shape[1]), []
    for start in range(0, count, chunk):
        numbers = np.arange(start, start + chunk, dtype=np.int32)
        valid = numbers < count
        images = at(features(FRAMES), np.minimum(numbers, FRAMES - 1))
        images = jax.tree.map(
            lambda x, valid=valid: np.where(valid.reshape(-1, 1, 1, 1), x, np.nan).astype(np.float32), images
        )
        bank, out = step(parameters(), anchors, bank, images, numbers, valid, np.int32(count))
        results.append(jax.tree.map(np.asarray, out))
    return bank, jax.tree.map(lambda *x: np.concatenate(x), *results)


@functools.cache
def in_one_piece() -> tuple[Anchors, MemoryBank, Tracked]:
    anchors = prompt(prompts())
    return anchors, *track(anchors, FRAMES)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_video_is_worth_tracking() -> None:
    """Objects come and go, and no frame is like another."""
    anchors, _, out = in_one_piece()
    present = out.prediction.object_score > 0
    assert present.any(0).all()
    assert not present.all(0).any()
    assert np.abs(out.prediction.object_score).min() > 1e-3  # rounding decides none
    assert len(np.unique(out.prediction.pointer.reshape(-1, CFG.hidden_size)[present.ravel()], axis=0)) == present.sum()
    for slot, frame in enumerate(ANCHORS):
        assert_equal(at(out, frame), Tracked(at(anchors.prediction, slot), anchors.memory[slot]))


def test_memories_of_anchors_that_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on TPUs; the last slot is empty."""
    valid = np.array([True, True, False])
    images = at(features(FRAMES), ANCHORS)
    apart = tracker()[1](parameters(), images, ANCHORS, valid, prompts())
    monkeypatch.setattr(tracker_module, "target_platform", lambda: "tpu")
    together = jax.jit(lambda *x: tracker()[0].prompt_anchors(*x), compiler_options=SAME_BITS)(
        parameters(), images, ANCHORS, valid, prompts()
    )
    assert_equal((together.valid, together.prediction), (apart.valid, apart.prediction))
    assert np.abs(apart.memory[:2]).min() > 0
    np.testing.assert_allclose(together.memory[:2], apart.memory[:2], atol=1e-5 * float(np.abs(apart.memory).max()))


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_give_what_one_piece_gives(chunk: int) -> None:
    anchors, bank, out = in_one_piece()
    assert_equal(track(anchors, chunk), (bank, out))


def test_frames_that_are_not_there_change_nothing() -> None:
    """Ten frames in three chunks of four."""
    anchors, _, _ = in_one_piece()
    bank, out = track(anchors, 4, count=10)
    expected = track(anchors, 1, count=10)
    assert_equal((bank, at(out, slice(10))), expected)
    assert_equal(at(out, slice(10, None)), jax.tree.map(lambda x: np.zeros_like(x[10:]), out))


def test_objects_do_not_see_each_other() -> None:
    _, _, together = in_one_piece()
    for index in range(OBJECTS):
        _, alone = track(prompt(prompts()[index : index + 1]), 4)
        for name in ("low_res", "pointer", "object_score", "iou"):
            a, b = (np.asarray(getattr(x.prediction, name)) for x in (alone, at(together, (slice(None), [index]))))
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_tracking_in_training_passes_over_anchors() -> None:
    """The same as frame by frame, with anchors put into the bank when they are reached; the last two are fillers."""
    made = Tracker(Sam2(CFG, Compute()), training=True)
    images, numbers, real = features(FRAMES), jnp.arange(FRAMES), FRAMES - 2
    anchors = jax.jit(made.prompt_anchors, compiler_options=SAME_BITS)(
        parameters(), at(images, ANCHORS), ANCHORS, np.ones(len(ANCHORS), bool), prompts()
    )

    def of_frame(params: Any, available: Any, bank: MemoryBank, frame: Features, number: jax.Array) -> Tracked:
        image = made.condition(params, anchors, available, bank, frame, number, jnp.int32(real))
        apply = functools.partial(made.sam.apply, {"params": params})
        prediction: Any = apply(image, frame, apply(OBJECTS, method=Sam2.no_prompt), mode="single", method=Sam2.predict)
        memory: Any = apply(frame, prediction, method=Sam2.encode_memory)
        return Tracked(prediction, memory)

    step = jax.jit(of_frame, compiler_options=SAME_BITS)
    bank, expected = made.start(OBJECTS), []
    for number in range(real):
        if number in ANCHORS:
            slot = ANCHORS.tolist().index(number)
            out = Tracked(at(anchors.prediction, slot), anchors.memory[slot])
        else:
            available = (number > ANCHORS) | (np.arange(len(ANCHORS)) == 0)
            out = step(parameters(), available, bank, at(images, number), jnp.int32(number))
        bank = bank.put(jnp.int32(number), out.memory, out.prediction.pointer)
        expected.append(out.prediction)
    track = jax.jit(made.track_in_training, compiler_options=SAME_BITS)
    found = track(parameters(), anchors, images, numbers, numbers < real)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(lambda *x: np.stack(x), *expected))):
        np.testing.assert_allclose(ours[:real], theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
        assert not ours[real:].any()


# which anchors are attended to


def select_by_hand(frame: int, anchors: np.ndarray, available: np.ndarray, limit: int) -> list[int]:
    slots = [slot for slot in range(len(anchors)) if available[slot]]
    chosen = []
    if before := [slot for slot in slots if anchors[slot] < frame]:
        chosen.append(max(before, key=lambda slot: (anchors[slot], -slot)))
    if after := [slot for slot in slots if anchors[slot] >= frame]:
        chosen.append(min(after, key=lambda slot: (anchors[slot], slot)))
    chosen += sorted((s for s in slots if s not in chosen), key=lambda slot: (abs(anchors[slot] - frame), slot))
    return chosen if limit == -1 else chosen[:limit]


@pytest.mark.parametrize("limit", [-1, 2, 3, 5, 9])
def test_select_anchors(limit: int) -> None:
    """Against a search by hand, with ties, frames that occur twice, and empty slots."""
    rng = np.random.RandomState(limit + 1)
    slots, cases = 6, 400
    anchors = rng.randint(0, 12, (cases, slots)).astype(np.int32)
    anchors[::2] = np.sort(anchors[::2])
    available = rng.random_sample((cases, slots)) < 0.8
    available[0] = False
    frames = rng.randint(0, 12, cases).astype(np.int32)
    chosen_slots, chosen = jax.jit(jax.vmap(functools.partial(select_anchors, limit=limit)))(frames, anchors, available)
    assert chosen_slots.shape == (cases, slots if limit == -1 else min(limit, slots))
    for case in range(cases):
        expected = select_by_hand(frames[case], anchors[case], available[case], limit)
        assert np.asarray(chosen_slots)[case][np.asarray(chosen)[case]].tolist() == expected
        assert np.asarray(chosen)[case].sum() == len(expected)


# what is computed, seen in the traced program


@functools.cache
def abstract_arguments(cfg: Sam2Config, training: bool) -> tuple[Any, ...]:
    """Shapes of what `Tracker.track` takes: two objects, eight anchors, two frames."""
    made = Tracker(Sam2(cfg, Compute()), training)
    size, width = cfg.feature_size, cfg.hidden_size

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def images(count: int) -> Any:
        sides = (4 * size, width // 8), (2 * size, width // 4), (size, width)
        return Features(*(shape(count, side, side, channels) for side, channels in sides))  # type: ignore[arg-type]

    def frames(count: int) -> tuple[Any, Any]:
        return shape(count, dtype=jnp.int32), shape(count, dtype=bool)

    params = abstract_parameters(made.sam)
    anchors = jax.eval_shape(made.prompt_anchors, params, images(8), *frames(8), shape(2, 8, 10, width))
    bank = jax.eval_shape(lambda: made.start(2))
    return params, anchors, bank, images(2), *frames(2), shape(dtype=jnp.int32)


def training_arguments(cfg: Sam2Config) -> tuple[Any, ...]:
    """As abstract_arguments, for `Tracker.track_in_training`: one frame is tracked beside the anchors."""
    params, anchors, _, images, *_ = abstract_arguments(cfg, True)
    images = jax.tree.map(lambda x: jax.ShapeDtypeStruct((9, *x.shape[1:]), x.dtype), images)
    return params, anchors, images, jax.ShapeDtypeStruct((9,), jnp.int32), jax.ShapeDtypeStruct((9,), bool)


def products(program: Any) -> int:
    """Multiplications in matrix products and convolutions; those in branches do not count."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += equation.outvars[0].aval.size * int(np.prod(depth))
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            total += equation.outvars[0].aval.size * kernel.size // equation.outvars[0].aval.shape[-1]
        elif equation.primitive.name != "cond":
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def test_anchors_do_not_pay_for_tracking() -> None:
    """Whether a frame is an anchor stays a branch: only the other one holds matrix products."""
    program = jax.make_jaxpr(Tracker(Sam2(CFG, Compute())).track)(*abstract_arguments(CFG, False)).jaxpr
    assert products(program) == 0
    branches = [e.params["branches"] for e in equations(program) if e.primitive.name == "cond"]
    innermost = [pair for pair in branches if not any(e.primitive.name == "cond" for b in pair for e in equations(b))]
    assert len(innermost) == 1
    tracked, anchor = (products(branch.jaxpr) for branch in innermost[0])
    positions, width = CFG.feature_size**2, CFG.hidden_size
    keys = (CFG.max_anchors_attended + CFG.num_maskmem - 1) * positions
    assert tracked > 2 * (2 * positions * keys * width)  # two objects: logits and averages of the cross-attention
    assert anchor == 0


@pytest.mark.parametrize("training", [False, True])
def test_training_holds_the_parameters_once_for_all_videos(training: bool) -> None:
    """vmap turns a branch that videos take differently into a choice, with a copy of what it uses for each."""
    made = Tracker(Sam2(CFG, Compute()), training)
    track, (params, *arguments) = made.track, abstract_arguments(CFG, training)
    if training:
        track, (params, *arguments) = made.track_in_training, training_arguments(CFG)
    videos = jax.tree.map(lambda x: jax.ShapeDtypeStruct((7, *x.shape), x.dtype), arguments)
    program = jax.make_jaxpr(jax.vmap(track, (None, *(0 for _ in arguments))))(params, *videos).jaxpr
    kernel = params["memory_encoder"]["mask_conv3"]["kernel"].shape
    copies = [e for e in equations(program) if any(out.aval.shape == (7, *kernel) for out in e.outvars)]
    assert bool(copies) != training


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_training_computes_attention_once(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a frame's attention has found is kept for the backward pass, in which all else is computed again."""
    for module in (memory, splash, tracker_module):
        monkeypatch.setattr(module, "target_platform", lambda: platform)
    cfg = dataclasses.replace(CFG, memory_layers=3)
    made = Tracker(Sam2(cfg, Compute(attention="splash")), training=True)

    def loss(params: Any, *arguments: Any) -> jax.Array:
        return made.track_in_training(params, *arguments).low_res.sum()

    program = jax.make_jaxpr(jax.value_and_grad(loss))(*training_arguments(cfg)).jaxpr
    names = kernels(program)
    forward, backward = (sum(kind in name for name in names) for kind in ("fwd", "dkv"))
    assert forward == backward == len(names) / 2 > 0
    # a TPU projects a layer's keys again rather than keep those of all layers
    keys = (cfg.num_maskmem - 1 + cfg.max_anchors_attended) * cfg.feature_size**2
    shapes = [out.aval.shape for equation in equations(program) for out in equation.outvars]
    of_layers = [x for x in shapes if x[:3] == (3, 2, 1) and x[3] >= keys and x[4:] == (cfg.hidden_size,)]
    assert bool(of_layers) == (platform == "cpu")


# the tracker at full size; the trunk is no part of it
FULL = dataclasses.replace(virst_7b().sam2, hiera=CFG.hiera)
PAIRS = 4096 * (3 + 6) * 4096  # of queries and keys, for one object


def largest_array(function: Any, *arguments: Any) -> int:
    """Elements of the largest array that a function makes."""
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return max(out.aval.size for equation in equations(program) for out in equation.outvars)


@pytest.mark.parametrize("attention", ["auto", "plain"])
def test_pairs_of_queries_and_keys(attention: str) -> None:
    """No array holds all of them, unless the oracle is asked for."""
    made = Tracker(Sam2(FULL, Compute(attention=attention)))
    size = largest_array(made.track, *abstract_arguments(FULL, False))
    assert size >= 2 * PAIRS if attention == "plain" else size < PAIRS / 4


def test_pairs_of_queries_and_keys_in_the_backward_pass() -> None:
    made = Tracker(Sam2(FULL, Compute()), training=True)

    def gradient(params: Any, *arguments: Any) -> Any:
        return jax.grad(lambda p: made.track_in_training(p, *arguments).low_res.sum())(params)

    assert largest_array(gradient, *training_arguments(FULL)) < PAIRS


def test_one_program_tracks_videos_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virst_jax.inference.steps.jax.jit", functools.partial(jax.jit, compiler_options=SAME_BITS))
    network = Network(VirstConfig(sam2=CFG), {"sam2": parameters()})
    rng = np.random.RandomState(3)
    for length, anchors in ((3, [1]), (10, [0, 7]), (5, [4])):
        video = rng.randint(0, 256, (length, CFG.image_size, CFG.image_size, 3), np.uint8)
        images = [network.encode_batch(frame[None], 1)[0] for frame in video]
        tokens = rng.standard_normal((2, 3, 4, CFG.hidden_size)).astype(np.float32)
        batch = network.start([images[i] for i in anchors], anchors, jnp.asarray(tokens), slots=3)
        chunks = list(propagate(network, [batch], images, length, (30, 40), keep_tracked=True))
        results = np.concatenate([chunk.tracked[0].prediction.low_res for chunk in chunks])
        assert len(results) == length
        assert np.isfinite(results).all()
    assert {name: step._cache_size() for name, step in network._compiled.items()} == dict.fromkeys(network._compiled, 1)
    assert network.num_compiled == len(network._compiled)
