import dataclasses

import numpy as np
import pytest

from helpers.places import ROOT
from virst_jax.config import IGNORE, tiny
from virst_jax.data.batches import BatchConfig, DoesNotFit
from virst_jax.data.pipeline import SKIPPED, Mixture, batches
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.samples import Expression, Question, Video
from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.training.tasks import get_task

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
PACKED = {name: dataclasses.replace(KINDS[name], packed_length=150) for name in ("video", "image", "image_text")}


def make_examples(batch):
    return get_task(batch.kind).make_examples(CFG, TOKENIZER, batch)


def source(batch, **arguments):
    task = get_task(batch.kind)
    made = SyntheticQuestions if task.takes_questions else SyntheticVideos
    return made(20, 3, expressions=4, is_image=task.is_image, **arguments)


@pytest.mark.parametrize("batch", [*KINDS.values(), *PACKED.values()], ids=[*KINDS, *(f"packed {n}" for n in PACKED)])
def test_shapes_are_as_announced(batch):
    maker = make_examples(batch)
    made = next(batches(source(batch), maker, seed=0, threads=1))
    assert made.pop(SKIPPED).tolist() == [0, 0]
    announced = get_task(batch.kind).shapes(CFG, batch, maker.prefix_len)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (s, np.dtype(d)) for k, (s, d) in announced.items()}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shared_is_the_same_and_the_rest_is_not(name):
    batch = KINDS[name]
    maker = make_examples(batch)
    out = maker(source(batch)[1], np.random.default_rng(0))
    shared = maker.prefix_len
    for key in ("token_ids", "visual_index", "mask"):
        assert (out[key][:, :shared] == out[key][:1, :shared]).all()
    assert out["mask"][:, :shared].all()
    assert (out["visual_index"][0] >= 0).sum() == maker.sizes.visual_tokens
    assert out["visual_index"][0, shared - 1] == maker.sizes.visual_tokens - 1
    assert len({row.tobytes() for row in out["token_ids"][:4]}) == 4
    # four conversations, and one that fills up
    assert (out["labels"][4] == IGNORE).all()
    assert (out["labels"][:4] != IGNORE).any(1).all()
    if "seg_positions" in out:
        at_seg = np.take_along_axis(out["labels"][:4], out["seg_positions"][:4], 1)
        assert (at_seg == CFG.seg_token_id).all()
        assert out["conversation_valid"].tolist() == [True] * 4 + [False]


def apart(packed, maker, row):
    """The arrays of a packed conversation as they are without packing."""
    length = maker.prefix_len
    places = packed["places"][row]
    given = places >= 0
    assert (given[:-1] >= given[1:]).all()
    padding = {"token_ids": 0, "visual_index": -1, "labels": IGNORE, "mask": False}
    return {
        key: np.concatenate([packed[key][0, :length], np.where(given, packed[key][0, length + places], value)])
        for key, value in padding.items()
    }


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["video", "tracked", "image", "video_text"])
def test_packed_conversations_are_the_same(name, named):
    """All four, and a subset that is taken where the row has no room for all."""
    batch = dataclasses.replace(KINDS[name], name_targets=named)
    plain = make_examples(batch)(source(batch)[1], np.random.default_rng(0))
    taken = {}
    for length in (400, 80):
        maker = make_examples(dataclasses.replace(batch, packed_length=length))
        out = maker(source(batch)[1], np.random.default_rng(0))
        rows = np.flatnonzero((out["places"] >= 0).any(1))
        assert rows.tolist() == list(range(len(rows)))
        every = out["places"][out["places"] >= 0]
        assert every.tolist() == list(range(len(every)))  # without gaps
        assert not out["mask"][0, maker.prefix_len + len(every) :].any()
        wanted = {row.tobytes(): i for i, row in enumerate(plain["token_ids"][:4])}
        for row in rows:
            found = apart(out, maker, row)
            i = wanted[found["token_ids"].tobytes()]
            taken.setdefault(length, []).append(i)
            for key, value in found.items():
                np.testing.assert_array_equal(value, plain[key][i], err_msg=key)
            if "seg_positions" in out:
                own = plain["seg_positions"][i] - maker.prefix_len
                assert (out["seg_positions"][row] == maker.prefix_len + out["places"][row, own]).all()
                assert (out["targets"][row] == plain["targets"][i]).all()
        if "seg_positions" in out:
            assert (out["seg_positions"][len(rows) :] == -1).all()
            assert out["conversation_valid"].tolist() == [i < len(rows) for i in range(5)]
        for key in {"clips", "frames", "anchors", "frames_used"} & out.keys():
            np.testing.assert_array_equal(out[key], plain[key], err_msg=key)  # nothing else is drawn for it
    assert taken[400] == [0, 1, 2, 3]
    assert 0 < len(taken[80]) < 4


@pytest.mark.parametrize("name", ["video", "tracked", "image"])
def test_targets_are_the_masks_of_the_frames_used(name):
    batch = KINDS[name]
    video = source(batch)[2]
    maker = make_examples(dataclasses.replace(batch, policy="flex"))
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
    out = make_examples(batch)(video, np.random.default_rng(1))
    plain = make_examples(KINDS[name])(video, np.random.default_rng(1))
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


def test_explanations_follow_the_masks_or_stand_alone():
    batch = dataclasses.replace(KINDS["image"], text_length=110)
    texts = ("what is it?", "the thing")
    expressions = tuple(Expression(t, str(i), explanation="It is blue.") for i, t in enumerate(texts))
    video = dataclasses.replace(source(batch)[0], expressions=expressions)
    maker, end = make_examples(batch), TOKENIZER.encode("It is blue.<|im_end|>\n")
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
            assert (out["seg_positions"][row] >= 0).all() == marked  # -1: nowhere
    # 0.45, 0.45 and 0.1 of them
    assert 80 < kinds["plain"] < 136
    assert 80 < kinds["explained"] < 136
    assert 8 < kinds["text"] < 48


def test_the_stream_follows_from_the_seed_and_begins_anywhere():
    batch = KINDS["video"]
    maker = make_examples(batch)
    one, two = (batches(source(batch), maker, seed=7, threads=n) for n in (1, 3))
    *first, fourth = (next(one) for _ in range(4))
    for wanted in (*first, fourth):
        made = next(two)
        for key, value in wanted.items():
            np.testing.assert_array_equal(made[key], value, err_msg=key)
    later = batches(source(batch), maker, seed=7, start=3, threads=1)
    np.testing.assert_array_equal(next(later)["frames"], fourth["frames"])
    other = next(batches(source(batch), maker, seed=8, threads=1))
    assert (other["frames"] != first[0]["frames"]).any()


def test_worker_processes_change_nothing():
    batch = KINDS["image_text"]
    maker = make_examples(batch)
    plain = batches(source(batch), maker, seed=7, threads=1)
    worked = batches(source(batch), maker, seed=7, threads=1, workers=2)
    try:
        for _ in range(2):
            assert (next(plain)["clips"] == next(worked)["clips"]).all()
    finally:
        worked.close()
    later = batches(source(batch), maker, seed=7, start=2, threads=1, workers=2)
    try:
        assert (next(plain)["clips"] == next(later)["clips"]).all()
    finally:
        later.close()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 1000])
def test_sources_of_any_size(count):
    batch = KINDS["image_text"]
    maker = make_examples(batch)
    stream = batches(SyntheticQuestions(count, 3, expressions=2, is_image=True), maker, seed=0, threads=1)
    assert len({next(stream)["clips"].tobytes() for _ in range(4)}) > 1 or count == 1


def test_processes_share_a_batch_out():
    batch = dataclasses.replace(KINDS["image"], batch_size=4)
    maker = make_examples(batch)
    whole = batches(source(batch), maker, seed=1, threads=1)
    parts = [batches(source(batch), maker, seed=1, process_index=i, process_count=2, threads=1) for i in (0, 1)]
    for _ in range(2):
        rows = [next(part)["frames"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), next(whole)["frames"])
    with pytest.raises(UserError, match="cannot be shared out over 3"):
        batches(source(batch), maker, seed=1, process_count=3)


class Numbered:
    """Small images that tell their number, and which source they are of."""

    def __init__(self, count, source):
        self.count, self.source = count, source

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.zeros((1, 20, 30, 3), np.uint8)
        pixels[:] = (self.source, *divmod(index, 256))
        mask = np.ones((1, 20, 30), bool)
        return Video("n", 1, (20, 30), (Expression("it"),), lambda n: pixels, lambda i, n: mask, is_image=True)


def shown(mixture, count, **options):
    """Source and number of the first samples."""
    batch = BatchConfig(kind="image", batch_size=50, conversations=1, text_length=80, seg_tokens=1)
    cfg = dataclasses.replace(
        CFG,
        vision=dataclasses.replace(CFG.vision, image_size=32, patch_size=16),
        sam2=dataclasses.replace(CFG.sam2, image_size=16),
    )
    maker = get_task("image").make_examples(cfg, TOKENIZER, batch)
    stream = batches(mixture, maker, threads=1, **options)
    pixels = np.concatenate([next(stream)["frames"][:, 0, 0, 0] for _ in range(count // 50)])
    return [(int(which), 256 * int(high) + int(low)) for which, high, low in pixels]


def test_a_mixture_shows_every_sample_once_an_epoch():
    mixture = Mixture([Numbered(100, 0), Numbered(1000, 1)], [1, 1])
    seen = shown(mixture, 2000, seed=0)
    small, large = ([number for which, number in seen if which == source] for source in (0, 1))
    assert (len(small), len(large)) == (1000, 1000)
    assert set(large) == set(range(1000))  # 433 of them when epochs drew the same samples
    epochs = [small[i : i + 100] for i in range(0, 1000, 100)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own
    assert seen[:100] == shown(mixture, 100, seed=0)
    assert seen[:100] != shown(mixture, 100, seed=1)


def test_a_mixture_draws_by_weight():
    seen = shown(Mixture([Numbered(10, 0), Numbered(10, 1), Numbered(10, 2)], [3, 1, 0]), 400, seed=0)
    assert sum(which == 0 for which, _ in seen) == 300
    assert sum(which == 1 for which, _ in seen) == 100


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([Numbered(3, 0)], [0], "weights"),
        ([Numbered(3, 0)], [1, 1], "weights"),
        ([Numbered(3, 0), Numbered(3, 1)], [1, -1], "weights"),
        ([Numbered(3, 0), Numbered(0, 1)], [1, 1], "source 1 of a mixture is empty"),
    ],
)
def test_mixtures_that_are_none(sources, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sources, weights)


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
    maker = make_examples(KINDS["video"])
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
        make_examples(batch)(sample, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "audio"}, "unknown kind of batch 'audio'"),
        ({"vlm_frames": 6}, "multiple of 4"),
        ({"policy": "first"}, "unknown policy 'first'"),
        (
            {"packed_length": 79},
            r"of 'video' batches must be 0, or from text_length \(80\).* to 400, .* is 79",
        ),
        ({"packed_length": 401}, "what 5 of them take at most; it is 401"),
        ({"kind": "video_prompted", "packed_length": 80}, "'video_prompted' have no conversations to pack"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        make_examples(dataclasses.replace(KINDS["video"], **change))


def test_shapes_of_what_cannot_be_packed():
    batch = BatchConfig(kind="image_prompted", packed_length=160)
    with pytest.raises(UserError, match="'image_prompted' have no conversations to pack: leave packed_length at 0"):
        get_task(batch.kind).shapes(CFG, batch, 0)


class Long:
    """Videos of which every second one has an expression that does not fit."""

    def __init__(self, every=2):
        self.every = every

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return small_video("word " * 90) if index % self.every == 0 else small_video()


def test_samples_that_do_not_fit_are_skipped_and_counted():
    maker = make_examples(KINDS["video"])
    with pytest.raises(DoesNotFit):
        maker(Long()[0], np.random.default_rng(0))
    stream = batches(Long(), maker, seed=0, threads=1)
    skipped = np.concatenate([next(stream)[SKIPPED] for _ in range(20)])
    assert 10 < skipped.sum() < 90  # each draw fits by one half
    with pytest.raises(UserError, match=r"no usable sample in 1000 draws .*no expression or question fits 80"):
        next(batches(Long(every=1), maker, seed=0, threads=1))


def test_videos_without_expressions_are_drawn_again():
    class Sparse:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            video = small_video()
            return video if index == 2 else dataclasses.replace(video, expressions=())

    maker = make_examples(KINDS["video"])
    assert next(batches(Sparse(), maker, seed=0, threads=1))["conversation_valid"][:, 0].all()


def test_questions_and_answers_stand_in_the_text():
    question = Question("q", 1, (("what is it?", "a red circle"),), lambda n: np.zeros((1, 9, 9, 3), np.uint8), True)
    out = make_examples(KINDS["image_text"])(question, np.random.default_rng(0))
    learnt = TOKENIZER.decode(out["labels"][0])
    assert "a red circle" in learnt
    assert "what is it" not in learnt
