import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from virst_jax.errors import UserError
from virst_jax.models.tree import flatten, unflatten
from virst_jax.training.optim import (
    OptimConfig,
    group_factors,
    join,
    learning_rate,
    make_optimizer,
    rate_factors,
    split,
    update_ema,
)

PARAMS = {
    "llm": {"attn": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "lora_a": jnp.ones((2, 1))}},
    "sam2": {"encoder": {"kernel": jnp.ones((2, 2))}},
}
GROUPS = ((r"sam2/.*", 0.0), (r".*lora_a", 0.5), (r".*", 1.0))


def test_split_and_join():
    trained, frozen = split(PARAMS, GROUPS)
    assert set(flatten(frozen)) == {"sam2/encoder/kernel"}
    assert set(flatten(trained)) == {"llm/attn/kernel", "llm/attn/bias", "llm/attn/lora_a"}
    joined = join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((r"llm/.*", 1.0),), "none fits sam2/encoder/kernel"),
        (((r"lm/.*", 1.0), (r".*", 0.0)), "lm/"),
        (((r"llm/(.*", 1.0), (r".*", 0.0)), "no regular expression"),
        (((r".*", 0.0),), "every parameter is frozen"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(UserError, match=message):
        split(PARAMS, groups)


def test_the_first_pattern_decides():
    factors = rate_factors(["a/lora_a", "a/kernel"], ((r".*lora_a", 2.0), (r"a/.*", 3.0)))
    assert factors == {"a/lora_a": 2.0, "a/kernel": 3.0}


def test_schedule():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=4, total_steps=14, final_factor=0.1)
    rate = learning_rate(cfg)
    assert [float(rate(i)) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(rate(14)) == pytest.approx(0.1)
    assert float(rate(9)) == pytest.approx(0.55)
    with pytest.raises(UserError, match="unknown schedule 'step'"):
        learning_rate(OptimConfig(schedule="step"))


def plain_adamw(cfg, params, gradients, factors):
    """AdamW written out for flat dictionaries of numpy arrays."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    rate = learning_rate(cfg)
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, cfg.clip_norm / norm)
            m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * g
            v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * g**2
            update = m[k] / (1 - cfg.b1**t) / (np.sqrt(v[k] / (1 - cfg.b2**t)) + cfg.eps)
            if not k.endswith("bias"):
                update = update + cfg.weight_decay * params[k]
            params[k] = params[k] - float(rate(t - 1)) * factors[k] * update
    return params


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_equal_adamw(accumulate):
    cfg = OptimConfig(
        learning_rate=0.1, warmup_steps=2, total_steps=6, weight_decay=0.1, clip_norm=0.5, accumulate=accumulate
    )
    trained, _ = split(PARAMS, GROUPS)
    optimizer = make_optimizer(cfg, GROUPS)
    state = optimizer.init(trained)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4):
        batch = [
            jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), trained) for _ in range(accumulate)
        ]
        means.append(flatten(jax.tree.map(lambda *x: np.mean(x, axis=0), *batch)))
        for gradients in batch:
            updates, state = optimizer.update(gradients, state, trained)
            trained = optax.apply_updates(trained, updates)
    start = {k: np.asarray(x) for k, x in flatten(split(PARAMS, GROUPS)[0]).items()}
    factors = {"llm/attn/kernel": 1.0, "llm/attn/bias": 1.0, "llm/attn/lora_a": 0.5}
    wanted = plain_adamw(cfg, start, means, factors)
    for path, value in flatten(trained).items():
        np.testing.assert_allclose(value, wanted[path], rtol=2e-5, err_msg=path)


KERNELS = {
    "llm/layers/attn/q_proj/kernel": (2, 6, 4),  # stacked layers
    "fusion/self_attn/kernel": (6, 3, 4),  # queries, keys and values in one
    "encoder/conv/kernel": (2, 2, 3, 5),
    "decoder/upscale0/kernel": (6, 2, 2, 3),
}


def matrices(path, x):
    """The matrices that a kernel is made of."""
    if "upscale" in path:
        return [x.reshape(len(x), -1)]
    if "self_attn" in path:
        return list(x.swapaxes(0, 1))
    return [x.reshape(-1, x.shape[-1])] if x.ndim == 4 else list(x)


def test_muon_makes_the_updates_of_kernels_orthogonal():
    cfg = OptimConfig(name="muon", learning_rate=0.1, warmup_steps=1, total_steps=5, clip_norm=0.0, muon_rms=0.3)
    shapes = {**KERNELS, "llm/embed_tokens/embedding": (5, 3), "llm/lm_head/kernel": (3, 5), "llm/norm/scale": (4,)}
    groups = ((".*/conv/.*", 0.5), (".*", 1.0))
    rng = np.random.default_rng(0)
    params = unflatten({path: jnp.zeros(shape) for path, shape in shapes.items()})
    gradients = unflatten({path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()})
    optimizer = make_optimizer(cfg, groups)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    flat, before = flatten(updates), flatten(gradients)
    for path, update in flat.items():
        factor = 0.5 if "/conv/" in path else 1.0
        if path not in KERNELS:  # Adam's first step, with Nesterov's momentum
            np.testing.assert_allclose(update, -0.1 * 2.8 / 1.9 * np.sign(before[path]), rtol=1e-3)
            continue
        for matrix, gradient in zip(matrices(path, np.asarray(update)), matrices(path, np.asarray(before[path]))):
            u, _, v = np.linalg.svd(gradient, full_matrices=False)
            scale = -factor * 0.1 * 0.3 * np.sqrt(max(matrix.shape))
            # five steps of Newton and Schulz bring the singular values near 1
            values = np.linalg.svd(matrix / scale, compute_uv=False)
            assert (values > 0.6).all()
            assert (values < 1.3).all()
            along = np.diag(u.T @ (matrix / scale) @ v.T)
            np.testing.assert_allclose(along, values.mean(), atol=0.4)


def test_unknown_optimizer():
    with pytest.raises(UserError, match="choose adamw or muon"):
        make_optimizer(OptimConfig(name="sgd"), ((".*", 1.0),))


def test_average():
    ema = update_ema({"a": jnp.float32(1)}, {"a": jnp.bfloat16(3)}, 0.75)
    assert float(ema["a"]) == 1.5


def test_names_of_groups():
    groups = [(r"llm/layers/.*/lora_[ab]", 1.0), (r"(initial|second)_fusion/.*", 0.3), ("vision/.*", 0.0)]
    groups += [(r"sam2/.*", 0.5), (r"sam2/x?", 0.25), (r"sam2/.*/", 0.125), (".*", 2.0)]
    assert group_factors(groups) == {
        "llm/layers/lora_ab": 1.0,
        "initial_second_fusion": 0.3,
        "sam2": 0.5,
        "sam2/x": 0.25,
        "sam2_2": 0.125,
        "rest": 2.0,
    }
