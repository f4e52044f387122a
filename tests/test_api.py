"""Videos and sentences through the whole program: sharing, batching, streaming, and what the input may be."""

import contextlib
import dataclasses
import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import virst_jax
from helpers.network import CFG, SMALL, params, write_model
from helpers.places import PROGRAMS, ROOT, TOKENIZER
from virst_jax.api import Model, load
from virst_jax.config import Compute, to_json
from virst_jax.data import frames as frame_choice
from virst_jax.data.prompts import ANSWERS, QUESTIONS, build_prompt, load_tokenizer
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import sam_pixels, vlm_pixels
from virst_jax.errors import UserError
from virst_jax.inference import resume
from virst_jax.inference.plan import Options, plan_frames
from virst_jax.inference.steps import Network
from virst_jax.inference.texts import build_texts
from virst_jax.io import model_folder
from virst_jax.io.video import Reader, VideoWriter
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Tracked
from virst_jax.models.virst import Virst
from virst_jax.ops.resize import resize_maps

DOG, CAT, CAR = "the dog", "A red cat   that runs", "what scared the seal?"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CFG, params(), load_tokenizer(TOKENIZER, CFG.seg_token_id), chunk=2, group_size=2)


def video(count: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def three(model):
    """Three expressions at once, in two groups."""
    return model.segment(video(11), [DOG, CAT, CAR])


def test_shapes_and_frames(three):
    assert (three.masks.shape, three.masks.dtype) == ((3, 11, 40, 56), bool)
    assert (three.scores.shape, three.scores.dtype) == ((3, 11), np.float32)
    assert list(three.plan.sampled) == frame_choice.flex_frames(11, 0, max_frames=8)
    assert three.anchors == tuple(three.plan.sampled[i] for i in (0, 7))
    assert three.expressions == (DOG, "a red cat that runs", CAR)
    assert 0 < three.masks.mean() < 1
    assert all(seconds >= 0 for seconds in three.timings.values())


def assert_same(a: Any, b: Any, rows: Any = slice(None)) -> None:
    np.testing.assert_allclose(a.scores, b.scores[rows], atol=2e-5, rtol=0)
    assert (a.masks != b.masks[rows]).mean() < 5e-5  # pixels whose logit is rounding


def test_expressions_do_not_see_each_other(model, three):
    # what an expression changes is far more than what its company does
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(three.scores[i] - three.scores[j]).max() > 1e-3
        assert (three.masks[i] != three.masks[j]).any()
    for i, text in enumerate((DOG, CAT, CAR)):
        assert_same(model.segment(video(11), text), three, slice(i, i + 1))
    assert_same(model.segment(video(11), [CAR, DOG, CAT]), three, [2, 0, 1])


def test_chunks_and_batches_do_not_matter(model, three):
    model.chunk = 11
    whole = model.segment(video(11), [DOG, CAT])
    model.chunk = 2
    np.testing.assert_array_equal(whole.masks, three.masks[:2])
    np.testing.assert_array_equal(whole.scores, three.scores[:2])
    model.batch = 3
    batched = model.segment(video(11), [DOG, CAT])
    model.batch = 1
    np.testing.assert_allclose(batched.scores, three.scores[:2], atol=2e-5)


def test_the_seed_chooses(model, three):
    again = model.segment(video(11), [DOG, CAT, CAR])
    np.testing.assert_array_equal(again.masks, three.masks)
    np.testing.assert_array_equal(again.scores, three.scores)
    plans = {model.segment_stream(video(11), DOG, seed=seed).plan for seed in (0, 1, [1, 2], [1, 3])}
    assert len(plans) == 4


def test_exact_mode_is_the_release_step_by_step(model):
    frames, text = video(11), DOG
    result = model.segment(frames, text, exact=True)
    plan, network, size = result.plan, model.network, CFG.sam2.image_size
    clips = vlm_pixels(frames[list(plan.sampled)], CFG.vision.image_size)
    texts = build_texts(CFG, model.tokenizer, [text], 128, 128, Options())
    question, answer = _templates_of(model, texts)
    prompt = build_prompt(model.tokenizer, text, question_index=question, answer_index=answer, num_seg_tokens=3)
    row = splice(prompt.input_ids.tolist(), prompt.labels.tolist(), 128, CFG.seg_token_id)
    # by the modules themselves, each conversation in one pass
    virst, given, tracker = Virst(CFG), params(), network.steps.tracker

    @jax.jit
    def read(clips: jax.Array, maps: jax.Array, ids: jax.Array, index: jax.Array, mask: jax.Array, seg: jax.Array):
        def run(model: Virst) -> jax.Array:
            visual = model.encode_clips(clips)
            hidden = model.hidden(model.embed(ids, index, visual.reshape(1, -1, visual.shape[-1])), mask)
            return model.prompts(hidden, seg, maps[None])[0]

        return virst.apply({"params": given}, method=run)

    @jax.jit
    def encode(pixels: jax.Array) -> Features:
        return tracker.sam.apply({"params": given["sam2"]}, pixels, method=Sam2.encode_image)

    @jax.jit
    def track(features: Features, prompts: jax.Array) -> Tracked:
        numbers = jnp.asarray(result.anchors)
        prompted = jax.tree.map(lambda x: x[numbers], features)
        anchors = tracker.prompt_anchors(given["sam2"], prompted, numbers, jnp.ones(len(numbers), bool), prompts)
        count, bank = len(frames), tracker.start(1)
        return tracker.track(
            given["sam2"], anchors, bank, features, jnp.arange(count), jnp.ones(count, bool), jnp.int32(count)
        )[1]

    prompts = read(
        clips.reshape(2, 4, *clips.shape[1:]),
        encode(sam_pixels(frames[list(plan.segmentation)], size, "bilinear")).top,
        *(x[None] for x in (row.token_ids, row.visual_index, row.mask, row.seg_positions)),
    )
    features = encode(sam_pixels(frames, size, "bicubic"))
    tracked = track(features, prompts[:, :, np.asarray(plan.anchors)].swapaxes(1, 2)).prediction
    scores = np.asarray(tracked.object_score).T
    masks = np.asarray(resize_maps(tracked.low_res, (40, 56)) > 0).swapaxes(0, 1)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-5)
    assert (result.masks != masks).mean() < 1e-4
    # the shared mode is another computation
    assert np.abs(model.segment(frames, text).scores - scores).max() > 1e-4


def _templates_of(model: Model, texts: Any) -> tuple[int, int]:
    """The wording that was chosen, found by trying all."""
    for question in range(len(QUESTIONS["short"])):
        for answer in range(len(ANSWERS)):
            prompt = build_prompt(model.tokenizer, DOG, question_index=question, answer_index=answer, num_seg_tokens=3)
            tail = prompt.input_ids[np.flatnonzero(prompt.input_ids == -200)[0] + 1 :]
            if np.array_equal(tail, texts.rows[0][0]):
                return question, answer
    raise AssertionError("no known wording")


@pytest.mark.parametrize(("exact", "count"), [(False, 11), (True, 11), (False, 3), (True, 3)])
def test_each_frame_is_encoded_once(model, monkeypatch, exact, count):
    # a frame is known by its colour
    frames = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * 10, (count, 16, 16, 3))
    seen: list[int] = []
    encode = model.network.encode_batch

    def counted(pixels: np.ndarray, *args: Any) -> Any:
        seen.extend(int(frame.mean().round()) // 10 for frame in pixels)
        return encode(pixels, *args)

    monkeypatch.setattr(model.network, "encode_batch", counted)
    plan = model.segment(np.ascontiguousarray(frames), DOG, exact=exact).plan
    twice = set(plan.segmentation) if exact else set()
    assert sorted(seen) == sorted([*range(count), *twice])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_videos(model, count):
    result = model.segment(video(count, 17, 9), [DOG, CAT])
    assert result.masks.shape == (2, count, 17, 9)
    assert np.isfinite(result.scores).all()


def test_nothing_is_compiled_again(model, three):
    for n in (1, 2):  # both sizes of a group
        model.segment(video(9), [DOG, CAT][:n])
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    known = model.network.num_compiled
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        model.segment(video(13, 70, 300), [DOG, CAT, CAR, "x", "y"])
        model.segment(video(2, 11, 7), "the small white bird on the left of the tree")
        model.segment(video(30), ["somebody", CAR])
        jax.jit(lambda x: x + 1)(1.0)  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert model.network.num_compiled == known
    assert len(compiled) == 1


def test_stream_goes_on_from_its_state(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    first = [next(stream) for _ in range(5)]
    state = stream.state()
    stream.close()
    assert [frame.index for frame in first] == [0, 1, 2, 3, 4]
    assert state["next"] == 4
    state = {key: np.array(value) for key, value in state.items()}
    assert {value.dtype.kind for value in state.values()} <= set("iufb")  # what .npz files keep
    rest = list(model.segment_stream(video(11), [DOG, CAT, CAR], state=state))
    assert [frame.index for frame in rest] == list(range(4, 11))
    for frame in [*first, *rest]:
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])
        np.testing.assert_array_equal(frame.scores, three.scores[:, frame.index])


def test_states_of_before_load(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    for _ in range(5):
        next(stream)
    before = {key.replace(".bank.", ".recent."): value for key, value in stream.state().items()}
    stream.close()
    assert "0.recent.0" in before
    for frame in model.segment_stream(video(11), [DOG, CAT, CAR], state=before):
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])


def test_a_stream_that_did_nothing_has_a_state(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    state = stream.state()
    assert set(state) == {"next"}
    frame = next(model.segment_stream(video(11), [DOG, CAT, CAR], state=state))
    np.testing.assert_array_equal(frame.masks, three.masks[:, 0])


def test_damaged_states(model):
    stream = model.segment_stream(video(5), [DOG, CAT])
    for _ in range(3):
        next(stream)
    good = stream.state()
    stream.close()
    low = next(key for key in good if key.endswith(".bfloat16"))
    changes: list[dict[str, Any]] = [
        {key: None} for key in good if key != "0.count"
    ]  # without its count a batch is not there
    changes += [
        {"next": np.array(-1)},
        {"next": np.array([3, 4])},
        {"next": np.array(2.5)},
        {"0.count": None},
        {"0.count": np.array(0)},
        {"0.count": np.array(1)},
        {"0.count": np.array(9)},
        {"0.anchors.4": np.zeros(3, np.float32)},
        {"0.anchors.4": good["0.anchors.4"].astype(np.float64)},
        {"0.bank.0": good["0.bank.0"][:-1]},
        {low: good[low].astype(np.float32)},
        {low: good[low][..., :-1]},
    ]
    for change in changes:
        state = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(UserError, match="the saved state of the tracker does not fit"):
            model.segment_stream(video(5), [DOG, CAT], state=state)
    with pytest.raises(UserError, match="does not fit"):
        model.segment_stream(video(5), DOG, state=good)
    with pytest.raises(UserError, match="does not fit"):
        resume.unpack(good, Network(dataclasses.replace(CFG, max_seg_frames=4), None).steps, 2)


def test_a_closed_stream_ends_its_thread(model):
    before = threading.active_count()
    with model.segment_stream(video(200, 8, 8), DOG) as stream:
        next(stream)
    assert threading.active_count() == before


def open_things() -> tuple[int, int]:
    """Threads of this process, also those of FFmpeg, and open files."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_a_loop_that_is_left_leaks_nothing(model, tmp_path):
    file = tmp_path / "clip.mp4"
    with VideoWriter(file, (48, 64), 25) as writer:
        for frame in video(40, 48, 64):
            writer.write(frame)
    for _ in range(2):  # what stays for good, such as pools of threads, is there after the first
        for _ in model.segment_stream(file, DOG):
            break
    gc.collect()
    gc.disable()  # at once, not some time later
    try:
        before = open_things()
        for _ in range(3):
            for frame in model.segment_stream(file, DOG):
                if frame.index == 2:
                    break
        stream = model.segment_stream(file, DOG)
        next(stream)
        del stream
        threads, files = open_things()
        assert threads <= before[0]  # a pool of before may have ended meanwhile
        assert files <= before[1]
    finally:
        gc.enable()


def test_making_a_stream_reads_nothing(model):
    class Untouched(Reader):
        name, size = "untouched", (8, 8)

        @property
        def num_frames(self) -> int:
            raise AssertionError("the video was read")

        frame_names = num_frames

        def pick(self, indices: Any) -> Any:
            raise AssertionError("the video was read")

    stream = model.segment_stream(Untouched(), DOG, progress=lambda *call: calls.append(call))
    calls: list[Any] = []
    assert repr(stream) == "SegmentationStream('untouched', expressions=['the dog'])"
    with pytest.raises(UserError, match="the expression is empty"):
        model.segment_stream(Untouched(), "")
    with pytest.raises(AssertionError, match="the video was read"):
        next(stream)
    assert calls == [("decode", 0, 0)]


def test_prepare_does_what_comes_first(model, three):
    stream = model.segment_stream(video(11), [DOG, CAT, CAR])
    stream.prepare()
    assert stream.timings["sample"] > 0
    assert stream.timings["track"] == 0
    np.testing.assert_array_equal(next(stream).masks, three.masks[:, 0])


def test_interleaved_streams(model, three):
    """Each hears of its own progress alone, and none is kept alive by the network."""
    calls: dict[str, set[int]] = {"a": set(), "b": set()}

    def listen(name: str) -> Any:
        return lambda stage, done, total: calls[name].add(total) if stage == "track" else None

    a = model.segment_stream(video(11), [DOG, CAT, CAR], progress=listen("a"))
    b = model.segment_stream(video(6), [DOG], progress=listen("b"))
    for frame in a:
        np.testing.assert_array_equal(frame.masks, three.masks[:, frame.index])
        next(b, None)
    assert calls == {"a": {11}, "b": {6}}
    gone = weakref.ref(a)
    del a
    assert gone() is None


def test_progress(model):
    calls: list[tuple[str, int, int]] = []
    model.segment(video(11), DOG, progress=lambda *call: calls.append(call))
    assert [done for stage, done, _ in calls if stage == "track"] == list(range(1, 12))
    encoded = [call for call in calls if call[0] == "encode"]
    assert encoded[-1][1] == encoded[-1][2] == 16


def test_one_image(model, tmp_path):
    image = video(1)[0]
    result = model.segment_image(image, [DOG, CAT])
    assert (result.masks.shape, result.scores.shape, result.anchors) == ((2, 40, 56), (2,), (0,))
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(model.segment_image(tmp_path / "a.png", [DOG, CAT]).masks, result.masks)
    for given in (Image.fromarray(image), image.transpose(2, 0, 1), (image / 255).astype(np.float32)):
        assert model.segment_image(given, [DOG, CAT]) == result
    with pytest.raises(UserError, match="4 frames where one image is wanted"):
        model.segment_stream(video(4), DOG, still=True)


def test_chosen_anchors(model):
    plan = model.segment_stream(video(30), DOG, anchors=[29, 3]).plan
    assert plan.anchor_frames == (3, 29)
    assert list(plan.segmentation) == sorted(plan.segmentation)
    assert len(plan.segmentation) == 8
    other = plan_frames(CFG, 30, Options())
    assert plan.sampled == other.sampled
    assert len(set(plan.segmentation) & set(other.segmentation)) >= 6
    for anchors, message in (([30], "anchor 30 is no frame"), ([], "0 anchors were given"), ([1, 2, 3], "give 1 to 2")):
        with pytest.raises(UserError, match=message):
            next(model.segment_stream(video(30), DOG, anchors=anchors))


def test_draws_of_the_release():
    cfg = dataclasses.replace(CFG, max_video_frames=16)
    numpy_draws, draws = np.random.RandomState(3), random.Random(4)
    options = Options(release_random=(np.random.RandomState(3), random.Random(4)))
    plan = plan_frames(cfg, 50, options)
    sampled = frame_choice.flex_frames(50, max_frames=16, release_random=numpy_draws)
    chosen = frame_choice.segmentation_frames(16, 8, release_random=draws)
    assert list(plan.sampled) == sampled
    assert list(plan.segmentation) == [sampled[i] for i in chosen]
    # question and answer are drawn next
    tokenizer = load_tokenizer(TOKENIZER)
    texts = build_texts(cfg, tokenizer, [DOG], 4, 4, options)
    question, answer = draws.choice(range(3)), draws.choice(range(4))
    prompt = build_prompt(tokenizer, DOG, question_index=question, answer_index=answer, num_seg_tokens=3)
    assert texts.rows[0][0].tolist() == prompt.input_ids.tolist()[-len(texts.rows[0][0]) :]


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        ([], "no expression was given"),
        ("", "the expression is empty"),
        (["the dog", "  "], "the expression is empty"),
        ("the <image> dog", "contains the control token <image>"),
        ("the [SEG] dog", r"contains the control token \[SEG\]"),
        ("dog " * 600, r"takes 6\d\d tokens, at most 512 are read: shorten it"),
        ([7], "the expression must be text, not int 7"),
    ],
)
def test_bad_expressions(model, expressions, message):
    with pytest.raises(UserError, match=message):
        model.segment(video(3), expressions)


@pytest.mark.parametrize("expressions", [None, 7, 2.5])
def test_expressions_of_another_type(model, expressions):
    with pytest.raises(UserError, match="expressions must be a text or a list of texts, not"):
        model.segment("there is no such file.mp4", expressions)  # which would show later


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": "x"}, "the seed must be an integer or a list of integers, not str 'x'"),
        ({"anchors": 3}, "anchors must be a list of frame numbers, not 3"),
        ({"fps": "fast"}, "'fast' frames a second"),
        ({"fps": -1}, "-1 frames a second"),
    ],
)
def test_arguments_of_segment(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.segment(video(3), DOG, **arguments)


def test_videos_as_people_have_them(model, tmp_path):
    frames = video(5, 24, 32)
    result = model.segment(frames, DOG, fps=5)
    assert result.fps == 5
    paths = []
    for i, frame in enumerate(frames):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(frame).save(paths[-1])
    opaque = np.full((*frames.shape[:3], 1), 255, np.uint8)
    for given in (
        frames.transpose(0, 3, 1, 2),
        (frames / 255).astype(np.float32),
        np.concatenate([frames, opaque], axis=-1),
        list(frames),
        (frame for frame in frames),
        [Image.fromarray(frame) for frame in frames],
        paths,
        [str(path) for path in paths],
        jnp.asarray(frames),
    ):
        assert model.segment(given, DOG, fps=5) == result
    grey = np.repeat(frames[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(model.segment(frames[..., 0], DOG).masks, model.segment(grey, DOG).masks)


def test_results_compare_and_show_themselves(model, three):
    again = model.segment(video(11), [DOG, CAT, CAR])
    assert again == three
    assert again.timings != three.timings
    assert dataclasses.replace(three, masks=~three.masks) != three
    assert three != model.segment(video(11), DOG)
    assert three != 3
    assert repr(three) == "Segmentation(masks=bool[3, 11, 40, 56], expressions=" + repr(list(three.expressions)) + ")"
    one, other = (next(model.segment_stream(video(3), DOG)) for _ in range(2))
    assert one == other
    assert dataclasses.replace(one, index=1) != other
    assert one != "frame"
    assert repr(one).startswith("FrameMasks(index=0, masks=bool[1, 40, 56], scores=[")


def test_bad_videos(model, tmp_path):
    with pytest.raises(UserError, match="no such video"):
        model.segment(tmp_path / "none.mp4", DOG)
    with pytest.raises(UserError, match="the video is empty"):
        model.segment(video(0), DOG)


def test_chat_runs_within_the_context(model, monkeypatch):
    inside: list[bool] = []
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield
        entered.pop()

    def spy(*args: Any, **kwargs: Any) -> Any:
        inside.append(bool(entered))
        return np.zeros((1, 1), np.int32), np.ones(1, np.int32)

    monkeypatch.setattr(model.network, "context", context)
    monkeypatch.setattr("virst_jax.api.generate", spy)
    model.chat(video(4), "what is it?")
    assert inside == [True]


def test_chat(model):
    answer = model.chat(video(6), "what is it?", max_new_tokens=4)
    assert isinstance(answer, str)
    assert model.chat(video(6), "what is it?", max_new_tokens=4) == answer
    for question, message in (("", "the question is empty"), ("a <image>", "contains the control token <image>")):
        with pytest.raises(UserError, match=message):
            model.chat(video(6), question)
    for arguments, message in (
        ({"question": None}, "question must be text, not NoneType"),
        ({"max_new_tokens": "x"}, "max_new_tokens is 'x'; give an integer"),
        ({"max_frames": 7.5}, r"max_frames is 7\.5; give an integer"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a number"),
        ({"seed": None, "temperature": "1"}, "temperature is '1'"),
        ({"history": "what?"}, "history holds 'what\\?'; give pairs"),
        ({"history": [("what?",)]}, "give pairs of a question and its answer"),
        ({"history": None}, "history holds None"),
    ):
        with pytest.raises(UserError, match=message):
            model.chat("no such video.mp4", **{"question": "what is it?", **arguments})
    with pytest.raises(UserError, match="max_frames is 2; give at least 4"):
        model.chat(video(6), "what is it?", max_frames=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def test_load(folder, three):
    loaded = virst_jax.load(folder)
    assert isinstance(loaded, virst_jax.Model)
    assert loaded.cfg == CFG
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded.network.params, params())
    assert all(jax.tree.leaves(same))
    low = load(folder, dtype="bfloat16")
    assert low.cfg.compute.dtype == "bfloat16"
    kept = low.network.params["sam2"].pop("prompt_encoder")
    assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(low.network.params)} == {"bfloat16"}
    assert repr(loaded) == f"Model({str(folder)!r}, virst_7b, {num_params() / 1e6:,.1f} M parameters, float32)"


def num_params() -> int:
    return sum(x.size for x in jax.tree.leaves(params()))


def test_dtype_of_activations(monkeypatch):
    tokenizer = load_tokenizer(TOKENIZER, CFG.seg_token_id)
    trained = dataclasses.replace(CFG, compute=Compute(dtype="bfloat16"))
    converted = {"llm": {"embed_tokens": {"embedding": jnp.zeros(2, jnp.bfloat16)}}}
    plain = {"llm": {"embed_tokens": {"embedding": jnp.zeros(2)}}}

    def dtypes() -> list[str]:
        given = ((CFG, plain), (CFG, converted), (trained, plain), (trained, converted))
        return [Model(cfg, params, tokenizer).cfg.compute.dtype for cfg, params in given]

    assert dtypes() == ["float32"] * 4
    monkeypatch.setattr("virst_jax.api._platform", lambda x: "gpu")
    assert dtypes() == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    assert Model(trained, plain, tokenizer, dtype="float32").cfg.compute.dtype == "float32"


def test_load_on_a_device(folder, three):
    (device,) = {x.device for x in jax.tree.leaves(load(folder, device="cpu:0").network.params)}
    assert device == jax.local_devices(backend="cpu")[0]
    model = load(folder, device=device)
    model.group_size = model.chunk = 2
    assert model.segment(video(11), [DOG, CAT, CAR]) == three


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "a model is loaded from a folder or by its name, not from NoneType None"),
        ({"path": 3}, "not from int 3"),
        ({"mesh": "cpu"}, "mesh is 'cpu'; make one with virst_jax.parallel.sharding.make_mesh"),
        ({"mesh": jax.make_mesh((1,), ("x",))}, r"mesh is \('x',\); make one with"),
        ({"mesh": jax.make_mesh((1,), ("x",)), "device": "cpu"}, "exclude each other"),
        ({"device": "warp"}, "device 'warp' is not here"),
        ({"device": "cpu:99"}, "device 'cpu:99' is not here; there are"),
        ({"device": "cpu:x"}, "'x' is no number"),
        ({"device": 7}, "device is 7; give a name such as"),
        ({"compilation_cache": 7}, "compilation_cache is 7; give True, False or a folder"),
    ],
)
def test_arguments_of_load(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        load(**{"path": folder, **arguments})


def test_compiled_programs_are_kept(folder, tmp_path):
    own = tmp_path / "own"
    cases = (({}, "True", tmp_path / "virst_jax"), ({"JAX_COMPILATION_CACHE_DIR": str(own)}, "True", own))
    cases += (({}, str(tmp_path / "given"), tmp_path / "given"), ({}, "False", None))
    for added, given, where in cases:
        kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        run = subprocess.run(
            [sys.executable, PROGRAMS / "compilation_cache.py", folder, given],
            env={**kept, "XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", **added},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        assert run.stdout.strip() == str(where)
        if where is not None:
            assert list(where.glob("*cache*"))


def test_load_refuses(folder, tmp_path):
    with pytest.raises(UserError, match="none: no model there; give a folder that `python -m conver"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="unknown dtype 'int8': choose float32 or bfloat16"):
        load(folder, dtype="int8")
    other = dataclasses.replace(CFG, seg_token_id=17)
    copy = tmp_path / "other"
    copy.mkdir()
    (copy / model_folder.TOKENIZER).symlink_to(folder / model_folder.TOKENIZER)
    (copy / model_folder.PARAMS).symlink_to(folder / model_folder.PARAMS)
    (copy / model_folder.CONFIG).write_text(to_json(other))
    with pytest.raises(UserError, match="the network expects 17"):
        load(copy)
    (copy / model_folder.CONFIG).write_text(to_json(dataclasses.replace(CFG, num_seg_tokens=3, llm=SMALL.llm)))
    with pytest.raises(UserError, match=r"parameters do not fit config\.json"):
        load(copy)


def test_the_package_does_without_jax_until_it_is_used():
    script = "import sys, virst_jax, virst_jax.cli; assert 'jax' not in sys.modules; assert virst_jax.load"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = virst_jax.nothing


def test_four_devices_give_what_one_gives(tmp_path):
    folder, clip, out = tmp_path / "model", tmp_path / "clip.npy", tmp_path / "out.npz"
    model_folder.save_model(folder, CFG, params(), TOKENIZER)
    np.save(clip, video(5))
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    subprocess.run(
        [sys.executable, PROGRAMS / "segment_on_mesh.py", folder, clip, out],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=ROOT,
        check=True,
        timeout=900,
    )
    found = np.load(out)
    assert found["split"] > 0
    expected = load(folder).segment(video(5), [DOG, CAT, CAR])
    scale = np.abs(expected.scores).max()
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4 * scale)
    assert (found["masks"] != expected.masks).mean() < 1e-3
