"""A whole video through the compiled steps: chunks, expressions, lengths."""

import numpy as np
import pytest

from helpers.network import CFG, params
from virst_jax.data.frames import eval_anchors
from virst_jax.data.sequence import splice
from virst_jax.errors import UserError
from virst_jax.inference.compiled import CompileWatch, watch_compiling
from virst_jax.inference.plan import Options, check_options
from virst_jax.inference.shared_batches import SharedBatches
from virst_jax.inference.steps import Network
from virst_jax.inference.stream import encode_in_order, propagate
from virst_jax.inference.texts import cut_behind_video
from virst_jax.inference.tiles import MaskTiles
from virst_jax.ops.resize import resize_maps


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(CFG, params())


def prompt(word: int) -> list[int]:
    return [1, 2, -200, word + 2, word, CFG.seg_token_id, word + 1, CFG.seg_token_id]


def segment(network: Network, video: np.ndarray, words: list[int], chunk: int, slots: int = 4) -> np.ndarray:
    """Low-resolution logits [O, T, L, L]."""
    rng = np.random.default_rng(1)
    side = CFG.vision.image_size
    clips = rng.integers(0, 256, (1, 4, side, side, 3), dtype=np.uint8)
    labels = [-100] * 4 + prompt(0)[4:]
    rows = [splice(prompt(word), labels, 64, CFG.seg_token_id) for word in words]
    texts = cut_behind_video(rows, free_slots=64)
    seg_frames = np.linspace(0, len(video) - 1, 8).round().astype(int)
    features = [network.encode_batch(video[i : i + 1], 1)[0] for i in seg_frames]
    tops = [x.top for x in features]
    visual = network.encode_visual(clips, 2)
    cache = network.read_video(visual, texts.prefix_ids, texts.prefix_visual, texts.prefix_mask).cache
    hidden = network.read_text(cache, *texts.batch(0, len(words), len(words)), tops).seg_hidden
    anchors = np.asarray(eval_anchors(8))
    prompts, _ = network.fuse(hidden, tops, np.pad(anchors, (0, slots - len(anchors))))
    batch = network.start([features[i] for i in anchors], seg_frames[anchors].tolist(), prompts, slots)
    known = dict(zip(seg_frames.tolist(), features))
    order = ((i, None if i in known else video[i]) for i in range(len(video)))
    encoded = encode_in_order(SharedBatches(network, 1).join(), order, known)
    chunks = propagate(network, [batch], encoded, len(video), (40, 56), chunk=chunk, keep_tracked=True)
    return np.concatenate([c.tracked[0].prediction.low_res for c in chunks]).swapaxes(0, 1)


def video(count: int) -> np.ndarray:
    size = CFG.sam2.image_size
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_chunks_do_not_matter(network, count):
    frames = video(count)
    whole = segment(network, frames, [3, 7], chunk=4)
    assert whole.shape == (2, count, CFG.sam2.low_res_size, CFG.sam2.low_res_size)
    np.testing.assert_array_equal(segment(network, frames, [3, 7], chunk=3), whole)
    np.testing.assert_array_equal(segment(network, frames, [3, 7], chunk=4, slots=6), whole)


def test_expressions_do_not_see_each_other(network):
    frames = video(6)
    both = segment(network, frames, [3, 7], chunk=4)
    alone = np.concatenate([segment(network, frames, [word], chunk=4) for word in (3, 7)])
    np.testing.assert_allclose(both, alone, rtol=1e-4, atol=2e-5 * np.abs(both).max())
    np.testing.assert_allclose(
        segment(network, frames, [7, 3], chunk=4), both[::-1], rtol=1e-4, atol=2e-5 * np.abs(both).max()
    )
    # what one word changes is ten times what the order of sums does
    assert np.abs(both[0] - both[1]).max() > 2e-4 * np.abs(both).max()


def test_videos_of_any_length_share_the_compiled_functions(network):
    segment(network, video(5), [3, 7], chunk=4)
    compiled = network.num_compiled
    for count in (2, 7, 12):
        segment(network, video(count), [3, 7], chunk=4)
    assert network.num_compiled == compiled


def test_compiling_is_told_to_whom_it_concerns():
    network = Network(CFG, None)
    tiles = MaskTiles((9, 7), CFG.sam2.low_res_size)
    told: dict[str, list[str]] = {"a": [], "b": []}
    a, b = (CompileWatch(told[name].append) for name in told)
    side = CFG.sam2.low_res_size
    for watch, count in ((a, 1), (b, 1), (b, 2), (a, 2)):
        with watch_compiling(watch):
            network.resize_masks(np.zeros((count, side, side), np.float32), *tiles.matrices[0][0])
    network.resize_masks(np.zeros((3, side, side), np.float32), *tiles.matrices[0][0])
    assert told == {"a": ["resize_masks"], "b": ["resize_masks"]}
    assert min(a.seconds, b.seconds) > 0


@pytest.mark.parametrize("size", [(7, 11), (256, 300), (521, 40)])
def test_tiles_make_up_the_masks(size):
    network, side = Network(CFG, None), CFG.sam2.low_res_size
    low_res = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)
    tiles = MaskTiles(size, side)
    masks = tiles.join([[network.resize_masks(low_res, *pair) for pair in row] for row in tiles.matrices])
    expected = np.asarray(resize_maps(low_res, size))
    assert masks.shape == expected.shape
    assert ((masks != (expected > 0)) <= (np.abs(expected) < 1e-6)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(seed="x"), "the seed must be an integer or a list of integers, not str 'x'"),
        (Options(seed=None), "the seed must be an integer"),
        (Options(seed=True), "the seed must be an integer"),
        (Options(seed=[1, 2.5]), "the seed must be an integer"),
        (Options(seed=-1), "the seed is -1; give integers of 0 or more"),
        (Options(anchors=3), "anchors must be a list of frame numbers, not 3"),
        (Options(anchors=[1.5]), "anchors must be a list of frame numbers"),
        (Options(anchors=[]), "0 anchors were given; give 1 to 2"),
        (Options(anchors=[-1]), "anchor -1 is no frame"),
    ],
)
def test_options_that_fit_no_video(options, message):
    with pytest.raises(UserError, match=message):
        check_options(CFG, options)


def test_splice():
    row = splice([1, -200, 2, 9], [-100, -100, 2, 9], 3, seg_token_id=9, length=8)
    assert row.token_ids.tolist() == [1, 0, 0, 0, 2, 9, 0, 0]
    assert row.visual_index.tolist() == [-1, 0, 1, 2, -1, -1, -1, -1]
    assert row.labels.tolist() == [-100, -100, -100, -100, 2, 9, -100, -100]
    assert row.mask.tolist() == [True] * 6 + [False] * 2
    assert row.seg_positions.tolist() == [5]
    assert splice([4, 5], [4, 5], 3, seg_token_id=9).token_ids.tolist() == [4, 5]
    with pytest.raises(UserError, match="6 positions, more than the 5"):
        splice([1, -200, 2, 9], [-100, -100, 2, 9], 3, seg_token_id=9, length=5)
    with pytest.raises(UserError, match="2 image tokens"):
        splice([-200, -200], [-100, -100], 3, seg_token_id=9)
