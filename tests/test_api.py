"""Videos and sentences through the whole program: sharing, batching, streaming, and what the input may be."""

import contextlib
import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.network import CFG, params
from helpers.places import TOKENIZER
from helpers.segmenting import CAR, CAT, DOG, video
from virst_jax.api import Model
from virst_jax.data import frames as frame_choice
from virst_jax.data.prompts import ANSWERS, QUESTIONS, build_prompt, load_tokenizer
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import sam_pixels, vlm_pixels
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options, plan_frames
from virst_jax.inference.texts import build_texts
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Tracked
from virst_jax.models.virst import Virst
from virst_jax.ops.resize import resize_maps


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
        ({"fps": True}, "True frames a second"),
        ({"exact": "no"}, "exact is 'no'; give True or False"),
        ({"progress": 3}, "progress is 3; give a function"),
        ({"release_random": 3}, "release_random is 3; give a pair"),
        ({"release_random": ("a", "b")}, "give a pair of numpy.random.RandomState and random.Random"),
    ],
)
def test_arguments_of_segment(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.segment(video(3), DOG, **arguments)


def test_expressions_and_numbers_in_other_forms(model):
    stream = model.segment_stream(video(3), (text for text in [DOG, CAT]), fps=np.float32(5), seed=np.int64(0))
    assert stream.expressions == model.segment_stream(video(3), [DOG, CAT]).expressions
    assert stream.reader.fps == 5
    with pytest.raises(UserError, match="does not fit"):
        model.segment_stream(video(3), DOG, state="x")


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
    found = ", ".join(f"{text!r}: {int(three.masks[i].any((1, 2)).sum())}" for i, text in enumerate(three.expressions))
    assert repr(three) == f"Segmentation(masks=bool[3, 11, 40, 56], frames in which each is found: {found})"
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
    monkeypatch.setattr("virst_jax.inference.chat.generate", spy)
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
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give 1 or more"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"seed": -1}, "seed is -1; give an integer of 0"),
        ({"seed": 2**70}, "give an integer of 0 to"),
        ({"history": "what?"}, "history holds 'what\\?'; give pairs"),
        ({"history": [("what?",)]}, "give pairs of a question and its answer"),
        ({"history": None}, "history holds None"),
    ):
        with pytest.raises(UserError, match=message):
            model.chat("no such video.mp4", **{"question": "what is it?", **arguments})
    with pytest.raises(UserError, match="max_frames is 2; give at least 4"):
        model.chat(video(6), "what is it?", max_frames=2)
