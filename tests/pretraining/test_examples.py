"""Examples of the pretraining kinds, and the table that lists them."""

import dataclasses

import numpy as np
import pytest

from helpers.places import ROOT
from virst_jax.config import IGNORE, tiny
from virst_jax.data.batches import BatchConfig, resized
from virst_jax.data.pipeline import SKIPPED, batches
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.pretraining import tasks as pretraining_tasks
from virst_jax.pretraining.patches import paths_in_words
from virst_jax.training.tasks import TASKS, get_task, register

CFG = tiny()
TOKENIZER = load_tokenizer(ROOT / "virst_jax" / "assets" / "tiny" / "tokenizer", CFG.seg_token_id)
PATCHES = {kind: BatchConfig(kind=kind, batch_size=2) for kind in ("video_patches", "image_patches", "image_cells")}
NAMED = {
    kind: BatchConfig(kind=kind, batch_size=2, conversations=12, seg_frames=5, anchors=2)
    for kind in ("video_named", "image_named")
}
READ = {
    kind: BatchConfig(kind=kind, batch_size=2, conversations=5, text_length=80) for kind in ("video_read", "image_read")
}


def make_examples(batch):
    return get_task(batch.kind).make_examples(CFG, TOKENIZER, batch)


def source(batch, **arguments):
    return SyntheticVideos(20, 3, expressions=4, is_image=get_task(batch.kind).is_image, **arguments)


def test_every_kind_is_in_the_table():
    core = {f"{sample}{what}" for sample in ("video", "image") for what in ("", "_text", "_prompted")}
    assert {*PATCHES, *NAMED, *READ} | core == set(TASKS)
    register(TASKS["image_cells"])  # the same again
    with pytest.raises(ValueError, match="'image_cells' is registered already"):
        register(dataclasses.replace(TASKS["image_cells"], count_flops=pretraining_tasks.patch_flops))


PACKED = dataclasses.replace(READ["video_read"], packed_length=160)


@pytest.mark.parametrize(
    "batch",
    [*PATCHES.values(), *NAMED.values(), *READ.values(), PACKED],
    ids=lambda b: f"{b.kind}{'_packed' * bool(b.packed_length)}",
)
def test_shapes_are_as_announced(batch):
    maker = make_examples(batch)
    made = next(batches(source(batch), maker, seed=0, threads=1))
    del made[SKIPPED]
    announced = get_task(batch.kind).shapes(CFG, batch, maker.prefix_len)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (s, np.dtype(d)) for k, (s, d) in announced.items()}


@pytest.mark.parametrize("name", [*PATCHES, *NAMED, *READ])
def test_objects_must_be_known(name):
    batch = {**PATCHES, **NAMED, **READ}[name]
    unknown = dataclasses.replace(source(batch)[0], read_objects=None)
    with pytest.raises(UserError, match=f"no words for the objects of its frames; {name} needs synthetic data"):
        make_examples(batch)(unknown, np.random.default_rng(0))


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_have_the_words_of_what_they_show(kind):
    batch, made = PATCHES[kind], source(PATCHES[kind])
    maker, grid = make_examples(batch), CFG.sam2.feature_size if batch.kind.endswith("cells") else CFG.vision.grid
    first = {word: TOKENIZER.encode(f" {word}")[0] for word in ("red", "circle", "small", "striped", "left")}
    assert len({*first.values()}) == len(first)
    for index in range(4):
        video, scene = made[index], made.scene(index)
        out = maker(video, np.random.default_rng(index))
        words = out["words"].reshape(-1, grid, grid, out["words"].shape[-1])
        numbers = [0] if batch.kind.startswith("image") else np.linspace(0, video.num_frames, 9).astype(int)[:-1]
        weights = out["weights"].reshape(words.shape[:-1])
        assert weights[words[..., 0] == TOKENIZER.encode(" nothing")[0]].sum() == pytest.approx(1, abs=1e-5)
        assert weights.sum() == pytest.approx(2, abs=1e-5)
        if not batch.kind.startswith("image"):
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
                    path = paths_in_words(labels, len(scene.objects))[k - 1]
                    assert place == ("" if batch.kind.endswith("cells") else path)
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
    maker, made = make_examples(batch), source(batch, size=size)
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
    assert steps == (set() if batch.kind.startswith("image") else {1, 2, 3})  # of 16 frames


@pytest.mark.parametrize("kind", NAMED)
def test_nothing_is_named_where_nothing_is(kind):
    video = source(NAMED[kind])[0]
    nothing = dataclasses.replace(video, read_objects=lambda indices: np.zeros((len(indices), *video.size), np.uint8))
    out = make_examples(NAMED[kind])(nothing, np.random.default_rng(0))
    assert (out["words"] == IGNORE).all()
    assert not out["targets"].any()


def test_a_video_too_short_to_be_named():
    batch = dataclasses.replace(NAMED["video_named"], seg_frames=17)
    with pytest.raises(UserError, match="16 frames, seg_frames is 17"):
        make_examples(batch)(source(batch)[0], np.random.default_rng(0))


@pytest.mark.parametrize("name", [*PATCHES, *NAMED])
def test_only_conversations_are_packed(name):
    batch = dataclasses.replace({**PATCHES, **NAMED}[name], packed_length=160)
    with pytest.raises(UserError, match=f"{name!r} have no conversations to pack: leave packed_length at 0"):
        make_examples(batch)


@pytest.mark.parametrize("kind", READ)
def test_reading_shows_the_words_of_objects_first(kind):
    batch, seen = READ[kind], kind.replace("read", "patches")
    maker, patches = (make_examples(b) for b in (batch, dataclasses.replace(batch, kind=seen)))
    for index in range(4):
        video = source(batch)[index]
        read, every = maker(video, np.random.default_rng(3)), patches(video, np.random.default_rng(3))
        assert read["words"].shape == (maker.sizes.visual_tokens, every["words"].shape[-1])
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
    maker = make_examples(PATCHES["video_patches"])
    for index in range(4):
        said = set(maker(made[index], np.random.default_rng(0))["words"].ravel().tolist())
        moves = {thing.motion for thing in made.scene(index).objects} - {"circle"}
        assert {TOKENIZER.encode(f" {word}")[0] for word in moves} <= said
