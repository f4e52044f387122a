import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from virst_jax.config import tiny
from virst_jax.models.sam2.memory import MemoryAttention
from virst_jax.models.tree import flatten
from virst_jax.models.virst import Virst
from virst_jax.pretraining.mimetic import mimic_attention


@pytest.fixture(scope="module")
def made():
    """A tiny network as it begins."""
    return nn.meta.unbox(jax.jit(lambda: Virst(tiny()).init(jax.random.key(0)))()["params"])


def test_like_attends_to_like_and_passes_on_what_it_is(made):
    cfg = tiny()
    before, after = flatten(made), flatten(mimic_attention(made, cfg))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    seen, projected = "vision/layers/attn/qkv/kernel", "vision/layers/attn/proj/kernel"
    tracked = {path for path in changed if path.startswith(("sam2/", "second_fusion/"))}
    assert changed - tracked == {"llm/layers/attn/q_proj/kernel", "llm/layers/attn/o_proj/kernel", seen, projected}
    queries, keys, values = np.moveaxis(after[seen], 2, 0)
    np.testing.assert_array_equal(queries, keys)
    np.testing.assert_array_equal(values, before[seen][:, :, 2])
    through = (values @ after[projected])[0]
    assert np.diag(through).mean() > 4 * np.abs(through - np.diag(np.diag(through))).mean()
    llm, name = cfg.llm, "llm/layers/attn/{}_proj/kernel"
    q, k, v, o = (np.asarray(after[name.format(x)]) for x in "qkvo")
    shape = (llm.num_layers, llm.hidden_size, -1, llm.head_dim)
    q, k, v, o = q.reshape(shape), k.reshape(shape), v.reshape(shape), o.swapaxes(1, 2).reshape(shape)
    for layer in range(llm.num_layers):
        for head in range(llm.num_heads):
            read = head // (llm.num_heads // llm.num_kv_heads)
            for left, right in ((q, k), (v, o)):
                product = left[layer, :, head if left is q else read] @ right[layer, :, read if left is q else head].T
                diagonal = np.diag(product)
                assert (diagonal > 0).all()
                assert diagonal.mean() > 4 * np.abs(product - np.diag(diagonal)).mean()


def test_the_tracker_compares_what_is_said_with_what_is_there(made):
    cfg = tiny()
    before, after = flatten(made), flatten(mimic_attention(made, cfg))
    queries = [path for path in before if path.startswith("sam2/mask_decoder") and path.endswith("q_proj/kernel")]
    assert len(queries) == 3 * cfg.sam2.decoder_layers + 1
    for path in queries:
        np.testing.assert_array_equal(after[path], before[path.replace("q_proj", "k_proj")])
        values, out = (path.replace("q_proj", name) for name in ("v_proj", "out_proj"))
        np.testing.assert_allclose(after[out], 0.5 * before[out] + before[values].T, rtol=1e-6)
    quiet = {
        path for path in before if path.startswith("second_fusion") and not np.array_equal(before[path], after[path])
    }
    ends = ("self_attn/out_proj", "cross_attn/o_proj", "fc2")
    assert quiet == {f"second_fusion/layer{i}/{end}/kernel" for i in range(cfg.fusion.num_layers) for end in ends}
    for path in quiet:
        np.testing.assert_allclose(after[path], 0.2 * before[path], rtol=1e-6)


def test_memory_attention_begins_at_its_own_place(made):
    cfg = tiny()
    cfg = dataclasses.replace(cfg, sam2=dataclasses.replace(cfg.sam2, memory_layers=1))
    attention = made["sam2"]["memory_attention"]
    attention = {**attention, "layers": jax.tree.map(lambda x: x[:1], attention["layers"])}
    made = {**made, "sam2": {**made["sam2"], "memory_attention": attention}}
    side, width, depth = cfg.sam2.feature_size, cfg.sam2.hidden_size, cfg.sam2.memory_dim
    rng = np.random.default_rng(0)
    weights = rng.normal(size=width)
    image, memory = rng.normal(size=(1, side**2, width)), rng.normal(size=(1, side**2, depth))
    moved = []
    for params in (made, mimic_attention(made, cfg)):

        def attend(memory, params=params):
            zeros, module = np.zeros_like(image[0]), MemoryAttention(cfg.sam2, cfg.compute)
            out = module.apply({"params": params["sam2"]["memory_attention"]}, image, zeros, memory, 0 * memory)
            return out[0] @ weights

        strength = np.square(jax.jit(jax.jacobian(attend))(memory)[:, 0]).sum(-1)  # [S, S]
        moved.append(strength / strength.sum(1, keepdims=True))
    y, x = np.divmod(np.arange(side**2), side)
    near = np.hypot(y[:, None] - y, x[:, None] - x) < 1.5
    before, after = ((share * near).sum(1).mean() for share in moved)
    assert before < 0.3
    assert after > 0.7
