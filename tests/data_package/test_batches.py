import dataclasses

import numpy as np
import pytest

from helpers.places import ROOT
from virst_jax.config import IGNORE, tiny
from virst_jax.data.batches import BatchConfig, ExampleMaker, batch_shapes, resized
from virst_jax.data.pipeline import Mixture, batches
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.samples import Expression, Question, Video
from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.pretraining.patches import paths_in_words

CFG = tiny()
TOKENIZER = load_tokenizer(ROOT / "virst_jax" / "assets" / "tiny" / "tokenizer", CFG.seg_token_id)
KINDS = {
    "video": BatchConfig(kind="video", batch_size=2, conversations=5, text_length=80),
    "tracked": BatchConfig(
        kind="video", batch_size=2, conversations=5, text_length=80, propagate=True, after=2, before=1
    ),
    "image": BatchConfig(kind="image", batch_size=2, conversations=5, text_length=80, seg_tokens=1),
    "video_text": BatchConfig(kind="video_text", batch_size=2, conversations=5, text_length=80),
    "image_text": BatchConfig(kind="image_text", batch_size=2, conversations=5, text_length=80),
}
PATCHES = {kind: BatchConfig(kind=kind, batch_size=2) for kind in ("video_patches", "image_patches", "image_cells")}
NAMED = {
    kind: BatchConfig(kind=kind, batch_size=2, conversations=12, seg_frames=5, anchors=2)
    for kind in ("video_named", "image_named")
}
READ = {
    kind: BatchConfig(kind=kind, batch_size=2, conversations=5, text_length=80) for kind in ("video_read", "image_read")
}


def source(batch, **arguments):
    made = SyntheticQuestions if batch.is_text else SyntheticVideos
    return made(20, 3, expressions=4, is_image=batch.is_image, **arguments)


@pytest.mark.parametrize("name", [*KINDS, *PATCHES, *NAMED, *READ])
def test_shapes_are_as_announced(name):
    batch = {**KINDS, **PATCHES, **NAMED, **READ}[name]
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    made = next(batches(source(batch), maker, seed=0, threads=1))
    announced = batch_shapes(CFG, batch, maker.shared)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (s, np.dtype(d)) for k, (s, d) in announced.items()}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shared_is_the_same_and_the_rest_is_not(name):
    batch = KINDS[name]
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    out = maker(source(batch)[1], np.random.default_rng(0))
    shared = maker.shared
    for key in ("token_ids", "visual_index", "mask"):
        assert (out[key][:, :shared] == out[key][:1, :shared]).all()
    assert out["mask"][:, :shared].all()
    assert (out["visual_index"][0] >= 0).sum() == maker.num_visual
    assert out["visual_index"][0, shared - 1] == maker.num_visual - 1
    assert len({row.tobytes() for row in out["token_ids"][:4]}) == 4
    # four conversations, and one that fills up
    assert (out["labels"][4] == IGNORE).all()
    assert (out["labels"][:4] != IGNORE).any(1).all()
    if "seg_positions" in out:
        at_seg = np.take_along_axis(out["labels"][:4], out["seg_positions"][:4], 1)
        assert (at_seg == CFG.seg_token_id).all()
        assert out["conversation_valid"].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("name", ["video", "tracked", "image"])
def test_targets_are_the_masks_of_the_frames_used(name):
    batch = KINDS[name]
    video = source(batch)[2]
    maker = ExampleMaker(CFG, TOKENIZER, dataclasses.replace(batch, policy="flex"))
    out = maker(video, np.random.default_rng(5))
    used = out["frames_used"][out["used_valid"]]
    assert set(out["anchors"]) <= set(used)
    every = video.read_frames(range(video.num_frames))
    numbers = [int(np.flatnonzero((every == frame).all((1, 2, 3)))[0]) for frame in out["frames"]]
    assert numbers == sorted(numbers)
    # found again by what is in them: each expression's masks, in some order
    truth = {video.read_masks(i, [numbers[u] for u in used]).tobytes(): i for i in range(len(video.expressions))}
    found = [truth[row[: len(used)].tobytes()] for row in out["targets"][:4]]
    for row, i in enumerate(found):
        text = TOKENIZER.decode(out["token_ids"][row][out["mask"][row]])
        same = [
            e.text
            for k, e in enumerate(video.expressions)
            if (video.read_masks(k, numbers) == video.read_masks(i, numbers)).all()
        ]
        assert any(words in text for words in same), (text, same)


@pytest.mark.parametrize("name", ["video", "image"])
def test_seg_tokens_can_be_taught_to_name_the_target(name):
    batch = dataclasses.replace(KINDS[name], name_targets=True)
    video = source(batch)[4]
    answers = {e.text: e.answer for e in video.expressions}
    assert "" not in answers.values()
    out = ExampleMaker(CFG, TOKENIZER, batch)(video, np.random.default_rng(1))
    plain = ExampleMaker(CFG, TOKENIZER, KINDS[name])(video, np.random.default_rng(1))
    assert all((out[key] == plain[key]).all() for key in out if key != "labels")
    for row in range(4):
        text = TOKENIZER.decode(out["token_ids"][row][out["mask"][row]])
        said = max((t for t in answers if f"{t}" in text), key=len)
        (labelled,) = np.nonzero(out["labels"][row] != IGNORE)
        # the word is predicted where [SEG] stands
        assert labelled.tolist() == (out["seg_positions"][row][: len(labelled)] + 1).tolist()
        words = TOKENIZER.encode(" " + answers[said])[: batch.seg_tokens or CFG.num_seg_tokens]
        assert out["labels"][row][labelled].tolist() == list(words)
    assert (out["labels"][4] == IGNORE).all()


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_have_the_words_of_what_they_show(kind):
    batch, made = PATCHES[kind], source(PATCHES[kind])
    maker, grid = ExampleMaker(CFG, TOKENIZER, batch), CFG.sam2.feature_size if batch.is_cells else CFG.vision.grid
    first = {word: TOKENIZER.encode(f" {word}")[0] for word in ("red", "circle", "small", "striped", "left")}
    assert len({*first.values()}) == len(first)
    for index in range(4):
        video, scene = made[index], made.scene(index)
        out = maker(video, np.random.default_rng(index))
        words = out["words"].reshape(-1, grid, grid, out["words"].shape[-1])
        numbers = [0] if batch.is_image else np.linspace(0, video.num_frames, 9).astype(int)[:-1]
        weights = out["weights"].reshape(words.shape[:-1])
        assert weights[words[..., 0] == TOKENIZER.encode(" nothing")[0]].sum() == pytest.approx(1, abs=1e-5)
        assert weights.sum() == pytest.approx(2, abs=1e-5)
        if not batch.is_image:
            continue
        labels = scene.labels(numbers)
        for k, thing in enumerate(scene.objects, 1):
            for y, x in np.ndindex(grid, grid):
                edges = [-(-128 * i // grid) for i in (y, y + 1, x, x + 1)]
                patch = labels[0, edges[0] : edges[1], edges[2] : edges[3]]
                found = [w for w in words[0, y, x].tolist() if w != IGNORE]
                if (patch == k).mean() > 0.5:
                    texture = [] if thing.texture == "plain" else [thing.texture]
                    said = [thing.color, thing.shape, thing.size, *texture]
                    assert found[: len(said)] == [TOKENIZER.encode(f" {word}")[0] for word in said]
                    place = "".join(map(TOKENIZER.decode, [[i] for i in found[len(said) :]]))
                    assert place == ("" if batch.is_cells else paths_in_words(labels, len(scene.objects))[k - 1])
                    assert weights[0, y, x] > 0
                elif (patch == 0).all():
                    assert found == TOKENIZER.encode(" nothing")
                elif (patch > 0).mean() < 0.1:
                    assert not found
                    assert not weights[0, y, x]


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_what_is_named_is_all_that_its_words_fit(kind, size):
    batch = NAMED[kind]
    maker, made = ExampleMaker(CFG, TOKENIZER, batch), source(batch, size=size)
    side, told, steps, empty = CFG.sam2.image_size, set(), set(), 0
    rows, columns = (np.arange(side) * length // side for length in size)
    for index in range(8):
        video, scene = made[index], made.scene(index)
        out = maker(video, np.random.default_rng(index))
        every = [resized(video.read_frames([i]), side, "bilinear")[0] for i in range(video.num_frames)]
        (numbers,) = zip(*[[i for i, frame in enumerate(every) if (frame == shown).all()] for shown in out["frames"]])
        steps |= set(np.diff(numbers))
        assert (np.diff(out["anchors"]) > 0).all()
        assert out["anchors"].max() < len(numbers)
        labels = scene.labels(numbers)[:, rows][:, :, columns]
        for words, target in zip(out["words"], out["targets"]):
            assert (words[2:] == IGNORE).all()
            said = [None if w == IGNORE else TOKENIZER.decode([w]).strip() for w in words[:2].tolist()]
            fits = [
                k
                for k, thing in enumerate(scene.objects, 1)
                if said[0] in (None, thing.color) and said[1] in (None, thing.shape)
            ]
            assert said != [None, None]
            empty += not target.any()
            assert (target == np.isin(labels, fits)).all()
            told.add(tuple(word is not None for word in said))
    assert told == {(True, True), (True, False), (False, True)}
    assert 2 < empty < 20  # of 96
    assert steps == (set() if batch.is_image else {1, 2, 3})  # of 16 frames


@pytest.mark.parametrize("kind", NAMED)
def test_nothing_is_named_where_nothing_is(kind):
    video = source(NAMED[kind])[0]
    nothing = dataclasses.replace(video, read_objects=lambda indices: np.zeros((len(indices), *video.size), np.uint8))
    out = ExampleMaker(CFG, TOKENIZER, NAMED[kind])(nothing, np.random.default_rng(0))
    assert (out["words"] == IGNORE).all()
    assert not out["targets"].any()


def test_a_video_too_short_to_be_named():
    batch = dataclasses.replace(NAMED["video_named"], seg_frames=17)
    with pytest.raises(UserError, match="16 frames, seg_frames is 17"):
        ExampleMaker(CFG, TOKENIZER, batch)(source(batch)[0], np.random.default_rng(0))


@pytest.mark.parametrize("kind", READ)
def test_reading_shows_the_words_of_objects_first(kind):
    batch, seen = READ[kind], kind.replace("read", "patches")
    maker, patches = (ExampleMaker(CFG, TOKENIZER, b) for b in (batch, dataclasses.replace(batch, kind=seen)))
    for index in range(4):
        video = source(batch)[index]
        read, every = maker(video, np.random.default_rng(3)), patches(video, np.random.default_rng(3))
        assert read["words"].shape == (maker.num_visual, every["words"].shape[-1])
        for clip, thin in zip(every["words"], np.split(read["words"], len(every["words"]))):
            rows = [row.tobytes() for row in clip]
            place = -1
            for row in thin:  # in their order
                place = rows.index(row.tobytes(), place + 1)
            nothing = TOKENIZER.encode(" nothing")[1]
            things = [{row.tobytes() for row in x if row[0] != IGNORE and row[1] != nothing} for x in (clip, thin)]
            assert things[0] == things[1]
        answers = {e.text: e.answer for e in video.expressions}
        for row in range(4):
            text = TOKENIZER.decode(read["token_ids"][row][read["mask"][row]])
            said = max((t for t in answers if t in text), key=len)
            words = TOKENIZER.encode(" " + answers[said])[: CFG.num_seg_tokens]
            assert read["labels"][row][read["labels"][row] != IGNORE].tolist() == words


def test_motion_is_a_word_of_video_patches():
    made = source(PATCHES["video_patches"])
    maker = ExampleMaker(CFG, TOKENIZER, PATCHES["video_patches"])
    for index in range(4):
        said = set(maker(made[index], np.random.default_rng(0))["words"].ravel().tolist())
        moves = {thing.motion for thing in made.scene(index).objects} - {"circle"}
        assert {TOKENIZER.encode(f" {word}")[0] for word in moves} <= said


def test_explanations_follow_the_masks_or_stand_alone():
    batch = dataclasses.replace(KINDS["image"], text_length=110)
    texts = ("what is it?", "the thing")
    expressions = tuple(Expression(t, str(i), explanation="It is blue.") for i, t in enumerate(texts))
    video = dataclasses.replace(source(batch)[0], expressions=expressions)
    maker, end = ExampleMaker(CFG, TOKENIZER, batch), TOKENIZER.encode("It is blue.<|im_end|>\n")
    kinds = {"plain": 0, "explained": 0, "text": 0}
    for seed in range(120):
        out = maker(video, np.random.default_rng(seed))
        for row in range(2):
            labels = out["labels"][row]
            told, marked = labels[labels != IGNORE].tolist()[-len(end) :] == end, (labels == CFG.seg_token_id).any()
            assert told or marked
            kinds["plain" if not told else "explained" if marked else "text"] += 1
            assert out["conversation_valid"][row] == marked
            assert (labels[out["seg_positions"][row]] == CFG.seg_token_id).all() == marked
    # 0.45, 0.45 and 0.1 of them
    assert 80 < kinds["plain"] < 136
    assert 80 < kinds["explained"] < 136
    assert 8 < kinds["text"] < 48


def test_the_stream_follows_from_the_seed_and_goes_on_from_its_state():
    batch = KINDS["video"]
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    one, two = (batches(source(batch), maker, seed=7, threads=n) for n in (1, 3))
    first = [next(one) for _ in range(3)]
    state = one.get_state()
    fourth = next(one)
    for wanted in (*first, fourth):
        made = next(two)
        for key, value in wanted.items():
            np.testing.assert_array_equal(made[key], value, err_msg=key)
    restored = batches(source(batch), maker, seed=7, threads=1)
    restored.set_state(state)
    np.testing.assert_array_equal(next(restored)["frames"], fourth["frames"])
    other = next(batches(source(batch), maker, seed=8, threads=1))
    assert (other["frames"] != first[0]["frames"]).any()


def test_worker_processes_change_nothing():
    batch = KINDS["image_text"]
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    plain = batches(source(batch), maker, seed=7, threads=1)
    worked = batches(source(batch), maker, seed=7, threads=1, workers=2)
    try:
        for _ in range(2):
            assert (next(plain)["clips"] == next(worked)["clips"]).all()
        state, wanted = worked.get_state(), next(worked)
        worked.set_state(state)
        assert (next(worked)["clips"] == wanted["clips"]).all()
    finally:
        worked.close()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 1000])
def test_sources_of_any_size(count):
    batch = KINDS["image_text"]
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    stream = batches(SyntheticQuestions(count, 3, expressions=2, is_image=True), maker, seed=0, threads=1)
    assert len({next(stream)["clips"].tobytes() for _ in range(4)}) > 1 or count == 1


def test_processes_share_a_batch_out():
    batch = dataclasses.replace(KINDS["image"], batch_size=4)
    maker = ExampleMaker(CFG, TOKENIZER, batch)
    whole = batches(source(batch), maker, seed=1, threads=1)
    parts = [batches(source(batch), maker, seed=1, process_index=i, process_count=2, threads=1) for i in (0, 1)]
    for _ in range(2):
        rows = [next(part)["frames"] for part in parts]
        together = {frame.tobytes() for frame in next(whole)["frames"]}
        assert together == {frame.tobytes() for part in rows for frame in part}
    with pytest.raises(UserError, match="cannot be shared out over 3"):
        batches(source(batch), maker, seed=1, process_count=3)


def test_mixture_draws_by_weight():
    one, two = (SyntheticVideos(10, seed, is_image=True) for seed in (1, 2))
    mixture = Mixture([one, two], [3, 1])
    names = {one[i].name for i in range(10)}
    share = np.mean([mixture[i].name in names for i in range(400)])
    assert 0.67 < share < 0.83
    assert mixture[17].name == Mixture([one, two], [3, 1])[17].name
    with pytest.raises(UserError, match="weights"):
        Mixture([one], [0])


def small_video(text="the thing", frames=3):
    pixels = np.zeros((frames, 20, 30, 3), np.uint8)
    pixels[:] = np.arange(frames)[:, None, None, None]
    return Video(
        "short",
        frames,
        (20, 30),
        (Expression(text),),
        lambda n: pixels[list(n)],
        lambda i, n: pixels[list(n), ..., 0] > 0,
    )


def test_short_videos_are_filled_up_and_resized():
    maker = ExampleMaker(CFG, TOKENIZER, KINDS["video"])
    out = maker(small_video(), np.random.default_rng(0))
    assert out["frames"].shape[1:3] == (128, 128)
    assert out["clips"].shape[2:4] == (96, 96)
    assert sorted(set(out["frames"][:, 0, 0, 0].tolist())) == [0, 1, 2]
    used = out["frames"][out["frames_used"], 0, 0, 0] > 0
    assert (out["targets"][0].all((1, 2)) == used).all()


@pytest.mark.parametrize(
    ("batch", "sample", "message"),
    [
        (KINDS["video"], small_video("word " * 90), "no expression or question fits 80 positions"),
        (KINDS["image"], small_video(), "another kind"),
        (KINDS["video"], dataclasses.replace(small_video(), read_masks=None), "masks are not public"),
    ],
)
def test_samples_that_cannot_be_used(batch, sample, message):
    with pytest.raises(UserError, match=message):
        ExampleMaker(CFG, TOKENIZER, batch)(sample, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "audio"}, "unknown kind of batch 'audio'"),
        ({"vlm_frames": 6}, "multiple of 4"),
        ({"policy": "first"}, "unknown policy 'first'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        ExampleMaker(CFG, TOKENIZER, dataclasses.replace(KINDS["video"], **change))


def test_videos_without_expressions_are_drawn_again():
    class Sparse:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            video = small_video()
            return video if index == 2 else dataclasses.replace(video, expressions=())

    maker = ExampleMaker(CFG, TOKENIZER, KINDS["video"])
    assert next(batches(Sparse(), maker, seed=0, threads=1))["conversation_valid"][:, 0].all()


def test_questions_and_answers_stand_in_the_text():
    question = Question("q", 1, (("what is it?", "a red circle"),), lambda n: np.zeros((1, 9, 9, 3), np.uint8), True)
    out = ExampleMaker(CFG, TOKENIZER, KINDS["image_text"])(question, np.random.default_rng(0))
    learnt = TOKENIZER.decode(out["labels"][0])
    assert "a red circle" in learnt
    assert "what is it" not in learnt
