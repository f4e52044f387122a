"""A whole video through the compiled steps: chunks, expressions, lengths."""

import jax
import numpy as np
import pytest
from test_models_virst import SMALL, random_params

from virst_jax.data.frames import eval_anchors
from virst_jax.data.sequence import splice
from virst_jax.errors import UserError
from virst_jax.inference.steps import Network


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(SMALL, random_params(SMALL))


def prompt(word: int) -> list[int]:
    return [word, word + 1, -200, word + 2, word, SMALL.seg_token_id, word + 1, SMALL.seg_token_id]


def segment(network: Network, video: np.ndarray, words: list[int], chunk: int, slots: int = 4) -> np.ndarray:
    """Low-resolution logits [T, O, L, L]."""
    rng = np.random.default_rng(1)
    side = SMALL.vision.image_size
    clips = rng.standard_normal((1, 4, side, side, 3)).astype(np.float32)
    labels = [-100] * 4 + prompt(0)[4:]
    rows = [splice(prompt(word), labels, 64, SMALL.seg_token_id, length=80) for word in words]
    stack = [
        np.stack([getattr(r, key) for r in rows]) for key in ("token_ids", "visual_index", "mask", "seg_positions")
    ]
    seg_frames = np.linspace(0, len(video) - 1, 8).round().astype(int)
    features = network.encode_frames(video[i] for i in seg_frames)
    understood = network.understand(clips, features.top, *stack)
    anchors = np.asarray(eval_anchors(8))
    state = network.prompt_anchors(
        jax.tree.map(lambda x: x[anchors], features), seg_frames[anchors], understood.prompts[:, :, anchors], slots
    )
    return np.stack([np.asarray(f.prediction.low_res) for f in network.track(state, video, len(video), chunk=chunk)])


def video(count: int) -> np.ndarray:
    size = SMALL.sam2.image_size
    return np.random.default_rng(count).standard_normal((count, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_chunks_do_not_matter(network, count):
    frames = video(count)
    whole = segment(network, frames, [3, 7], chunk=4)
    assert whole.shape == (count, 2, SMALL.sam2.low_res_size, SMALL.sam2.low_res_size)
    np.testing.assert_array_equal(segment(network, frames, [3, 7], chunk=3), whole)
    np.testing.assert_array_equal(segment(network, frames, [3, 7], chunk=4, slots=6), whole)


def test_expressions_do_not_see_each_other(network):
    frames = video(6)
    both = segment(network, frames, [3, 7], chunk=4)
    alone = np.concatenate([segment(network, frames, [word], chunk=4) for word in (3, 7)], axis=1)
    np.testing.assert_allclose(both, alone, rtol=1e-4, atol=2e-5 * np.abs(both).max())
    np.testing.assert_allclose(
        segment(network, frames, [7, 3], chunk=4), both[:, ::-1], rtol=1e-4, atol=2e-5 * np.abs(both).max()
    )
    # what one word changes is ten times what the order of sums does
    assert np.abs(both[:, 0] - both[:, 1]).max() > 2e-4 * np.abs(both).max()


def test_videos_of_any_length_share_the_compiled_functions(network):
    segment(network, video(5), [3, 7], chunk=4)
    compiled = network.num_compiled
    for count in (2, 7, 12):
        segment(network, video(count), [3, 7], chunk=4)
    assert network.num_compiled == compiled


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
