import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from conversion.weights_rule import make_input, make_state
from helpers.kernels import equations
from helpers.places import PARITY as DATA
from helpers.qwen2 import SMALL, prompt, random_params, rel_l2, run, to_params
from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.errors import UserError
from virst_jax.models.layers import AXES
from virst_jax.models.lora import LoraDense, merge_lora
from virst_jax.models.qwen2 import Cache, Qwen2, init_cache, rotary_table, rotate_halves

ADAPTED = dataclasses.replace(SMALL, lora=LoraConfig(rank=3, alpha=6.0, dropout=0.5))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def test_equals_the_release() -> None:
    case = json.loads((DATA / "qwen2.json").read_text())
    expected = np.load(DATA / "qwen2.npz")
    config = case["config"]
    cfg = QwenConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
        lora=LoraConfig(rank=0),
    )
    params = to_params(make_state(case["manifest"], case["salt"]))
    mask = expected["mask"].astype(bool)
    assert (mask.sum(1) == [11, 8]).all()
    embeds = jnp.asarray(make_input("qwen2.embeds", (*mask.shape, cfg.hidden_size), case["salt"]))
    model = Qwen2(cfg, Compute())
    hidden, layers = model.apply({"params": params}, embeds, jnp.asarray(mask), return_layers=True)
    logits = model.apply({"params": params}, hidden, method=Qwen2.logits)
    outputs = {"layer0_in": layers[0], "layer1_in": layers[1], "last_hidden": hidden, "logits": logits}
    for name, value in outputs.items():
        assert value.dtype == jnp.float32
        assert rel_l2(np.asarray(value)[mask], expected[name][mask]) <= 1e-5, name


def test_every_parameter_names_its_axes() -> None:
    model = Qwen2(ADAPTED, Compute())
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, 32)), jnp.ones((1, 2), bool))
    shapes, specs = flatten_dict(nn.meta.unbox(abstract)), flatten_dict(nn.get_partition_spec(abstract))
    for path, x in shapes.items():
        names = tuple(specs[path])
        assert len(names) == x.ndim, path
        assert set(names) <= AXES, path
        assert (names[0] == "layers") == (path[1] == "layers"), path
    last = "/".join(sorted({path[-1] for path in shapes}))
    assert last == "bias/embedding/kernel/lora_a/lora_b/scale"
    assert shapes["params", "layers", "attn", "k_proj", "kernel"].shape == (2, 32, 16)
    assert tuple(specs["params", "layers", "mlp", "down_proj", "lora_a"]) == ("layers", "mlp", "lora")


def test_full_size_has_the_parameters_of_the_release() -> None:
    cfg = QwenConfig()
    abstract = jax.eval_shape(
        Qwen2(cfg, Compute()).init, jax.random.key(0), jnp.zeros((1, 1, 3584)), jnp.ones((1, 1), bool)
    )
    sizes = {p: x.size for p, x in flatten_dict(nn.meta.unbox(abstract)).items()}
    adapters = sum(n for p, n in sizes.items() if p[-1].startswith("lora"))
    layer = 3584 * (2 * 3584 + 2 * 512) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    assert sum(sizes.values()) - adapters == 28 * layer + 3584 + 2 * 151647 * 3584
    assert adapters == 28 * 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))


def test_rotary_at_far_positions() -> None:
    positions = np.array([[0, 1, 2047]])
    cos, sin = rotary_table(jnp.asarray(positions), 8, 1e6)
    angles = positions[..., None] * 1e6 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-4)  # 2047 rad in float32
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    out = rotate_halves(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=5e-4)


def test_padding_and_positions() -> None:
    model, params = Qwen2(SMALL, Compute()), random_params(SMALL)
    embeds, mask = prompt(SMALL, (7, 4), 7)
    hidden = run(model, params, embeds, mask)
    alone = run(model, params, embeds[1:, :4], None)
    np.testing.assert_allclose(hidden[1, :4], alone[0], atol=1e-4)
    indices = jnp.tile(jnp.arange(7), (2, 1))
    # scores depend on distances, so only stretching them matters
    np.testing.assert_allclose(run(model, params, embeds, mask, indices + 5), hidden, atol=1e-4)
    assert np.abs(run(model, params, embeds, mask, 3 * indices) - hidden)[0].max() > 1e-2


def test_cache_equals_reading_at_once() -> None:
    model, params = Qwen2(ADAPTED, Compute()), random_params(ADAPTED)
    lengths = (9, 7)
    embeds, mask = prompt(ADAPTED, lengths, 9)
    expected = run(model, params, embeds, mask)
    extend = jax.jit(lambda e, m, cache: model.apply({"params": params}, e, m, cache=cache))
    cache = init_cache(ADAPTED, model.compute, 2, 10)
    # 4 and 2 tokens, then rows get out of step: 2 and 1 more, then one at a time
    hidden, cache = extend(embeds[:, :4], jnp.arange(4) < jnp.array([[4], [2]]), cache)
    assert not cache.empty
    found = [[hidden[0, :4]], [hidden[1, :2]]]
    ends = [4, 2]
    steps: list[tuple[int, tuple[int, int]]] = [(2, (2, 1)), (1, (1, 1)), (1, (1, 1)), (1, (1, 1)), (1, (0, 1))]
    for size, counts in steps:
        piece = jnp.full((2, size, 32), 30.0)
        for row, count in enumerate(counts):
            piece = piece.at[row, :count].set(embeds[row, ends[row] : ends[row] + count])
        hidden, cache = extend(piece, jnp.arange(size) < jnp.array(counts)[:, None], cache)
        for row, count in enumerate(counts):
            found[row].append(hidden[row, :count])
            ends[row] += count
    assert tuple(ends) == lengths
    assert cache.length.tolist() == list(lengths)
    np.testing.assert_array_equal(cache.mask, np.arange(10) < np.array(lengths)[:, None])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.concatenate(found[row]), expected[row, :length], atol=1e-4)


@pytest.mark.parametrize("held", [5, 3])
def test_rows_behind_the_cache_of_one(held: int) -> None:
    """Of five slots, all of which are held or not."""
    model, params = Qwen2(ADAPTED, Compute()), random_params(ADAPTED)
    rest, mask = prompt(ADAPTED, (4, 1, 3), 4)
    prefix, known = prompt(ADAPTED, (held,), 5)
    _, cache = jax.jit(lambda c: model.apply({"params": params}, prefix, known, cache=c))(
        init_cache(ADAPTED, model.compute, 1, 5)
    )

    def behind(cache: Cache, return_layers: bool) -> Any:
        return model.apply({"params": params}, rest, mask, cache, return_layers, method=Qwen2.after_cache)

    read = jax.jit(behind, static_argnums=1)
    found, layers = read(cache, True)
    rows = jnp.concatenate([jnp.repeat(prefix[:, :held], 3, 0), rest], axis=1)
    whole = jnp.pad(mask, ((0, 0), (held, 0)), constant_values=True)
    expected, inputs = jax.jit(lambda: model.apply({"params": params}, rows, whole, return_layers=True))()
    np.testing.assert_allclose(found[mask], expected[:, held:][mask], atol=2e-5)
    np.testing.assert_allclose(layers[:, mask], inputs[:, :, held:][:, mask], atol=2e-5)
    alone, none = read(cache, False)
    assert none is None
    np.testing.assert_allclose(alone[mask], found[mask], atol=2e-5)


def test_rows_that_begin_alike_are_read_as_one() -> None:
    model, params = Qwen2(ADAPTED, Compute()), random_params(ADAPTED)
    shared, lengths = 5, (4, 1, 3)
    rest, mask = prompt(ADAPTED, lengths, 4)
    prefix = prompt(ADAPTED, (shared,), shared)[0]
    rows = jnp.concatenate([jnp.repeat(prefix, 3, 0), rest], axis=1)

    def packed(params: Any) -> Any:
        return model.apply({"params": params}, prefix, rest, mask, method=Qwen2.after_prefix)

    def plain(params: Any) -> Any:
        hidden = model.apply({"params": params}, rows, jnp.pad(mask, ((0, 0), (shared, 0)), constant_values=True))
        return hidden[:1, :shared], hidden[:, shared:]

    def pull(function: Any) -> Any:
        def loss(params: Any) -> Any:
            before, behind = function(params)
            return jnp.sin(before).sum() + (jnp.sin(behind) * mask[..., None]).sum()

        return jax.jit(jax.grad(loss))(params)

    for ours, theirs in zip(jax.jit(packed)(params), jax.jit(plain)(params)):
        valid = jnp.ones(ours.shape[:2], bool) if ours.shape[0] == 1 else mask
        np.testing.assert_allclose(ours[valid], theirs[valid], atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(pull(packed)), jax.tree.leaves(pull(plain))):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * (float(jnp.abs(theirs).max()) + 1e-3))


@pytest.mark.parametrize("impl", ["plain", "chunked"])
def test_packed_rows_are_read_as_rows_of_their_own(impl: str) -> None:
    """Rows of 4, 1 and 3 tokens, and one without, in a row of 10 positions."""
    model, params = Qwen2(ADAPTED, Compute(attention=impl)), random_params(ADAPTED)
    shared, lengths = 5, (4, 1, 3, 0)
    rest, mask = prompt(ADAPTED, lengths, 4)
    prefix = prompt(ADAPTED, (shared,), shared)[0]
    places = jnp.where(mask, jnp.cumsum(mask).reshape(mask.shape) - 1, -1)
    count = sum(lengths)
    tail = jnp.concatenate([rest[mask], prompt(ADAPTED, (2,), 2)[0][0]])[None]

    def packed(params: Any, prefix: jax.Array, tail: jax.Array) -> Any:
        given = (prefix, tail, places >= 0, True, places)
        before, behind = model.apply({"params": params}, *given, method=Qwen2.after_prefix)
        return before[0], behind[0, :count]

    def plain(params: Any, prefix: jax.Array, tail: jax.Array) -> Any:
        apart = tail[0, places] * mask[..., None]
        before, behind = model.apply({"params": params}, prefix, apart, mask, method=Qwen2.after_prefix)
        return before[0], behind[mask]

    def pull(function: Any) -> Any:
        def loss(*given: Any) -> Any:
            before, behind = function(*given)
            return jnp.sin(before).sum() + jnp.sin(behind).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, prefix, tail)

    given = (params, prefix, tail)
    for ours, theirs in zip(jax.jit(packed)(*given), jax.jit(plain)(*given)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    found, expected = pull(packed), pull(plain)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * (float(jnp.abs(theirs).max()) + 1e-3))
    assert (found[1][2][0, count:] == 0).all()  # padding


def test_cache_keeps_to_its_size() -> None:
    model, variables = Qwen2(SMALL, Compute()), {"params": random_params(SMALL)}
    embeds, mask = prompt(SMALL, (4, 3), 5)
    with pytest.raises(UserError, match=r"5 tokens do not fit a cache of 4.*max_length"):
        model.apply(variables, embeds, mask, cache=init_cache(SMALL, model.compute, 2, 4))
    shapes = jax.eval_shape(
        lambda: model.apply(variables, embeds, mask, cache=init_cache(SMALL, model.compute, 2, 6))[1]
    )
    assert isinstance(shapes, Cache)
    assert shapes.k.shape == shapes.v.shape == (2, 2, 6, 2, 8)


def test_merged_adapters_compute_the_same() -> None:
    params = random_params(ADAPTED)
    merged = merge_lora(params, ADAPTED.lora.scale)
    plain = random_params(SMALL)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, plain)
    assert "lora_a" in params["layers"]["attn"]["q_proj"]  # the input is left alone
    embeds, mask = prompt(SMALL, (6, 6), 6)
    adapted = Qwen2(ADAPTED, Compute()).apply({"params": params}, embeds, mask)
    np.testing.assert_allclose(run(Qwen2(SMALL, Compute()), merged, embeds, mask), adapted, atol=1e-4)
    base = {**params, "layers": jax.tree_util.tree_map_with_path(without_b, params["layers"])}
    unadapted = run(Qwen2(ADAPTED, Compute()), base, embeds, mask)
    assert rel_l2(unadapted, adapted) > 0.1


def without_b(path: Any, x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x) if path[-1].key == "lora_b" else x


def test_merging_stacked_bfloat16_kernels() -> None:
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5, 4), (3, 5, 2), (3, 2, 4)))
    node = {"kernel": jnp.asarray(kernel, jnp.bfloat16), "lora_a": a, "lora_b": b, "bias": np.ones(4)}
    merged = merge_lora({"x": {"y": node}, "scale": np.ones(2)}, 0.5)["x"]["y"]
    expected = np.asarray(node["kernel"], np.float32) + 0.5 * np.einsum("lir,lro->lio", a, b)
    assert set(merged) == {"kernel", "bias"}
    assert merged["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["kernel"], jnp.asarray(expected).astype(jnp.bfloat16))
    with pytest.raises(UserError, match=r"x/y has kernel, lora_a;"):
        merge_lora({"x": {"y": {"kernel": kernel, "lora_a": a}}}, 0.5)


def test_adapter_by_hand_and_its_start() -> None:
    layer = LoraDense(Compute(), 3, ("embed", "mlp"), LoraConfig(rank=2, alpha=4.0, dropout=0.5))
    x = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x))["params"]
    a = np.asarray(params["lora_a"])
    # PEFT: Kaiming uniform with a = sqrt(5) is uniform in +-1/sqrt(in)
    assert 0.9 / 20 < np.abs(a).max() <= 1 / 20
    np.testing.assert_allclose(a.std(), 1 / 20 / np.sqrt(3), rtol=0.1)
    assert (params["lora_b"] == 0).all()
    b = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    params = {**params, "lora_b": b}
    base = x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), base + 2.0 * x @ a @ b, atol=1e-5)
    dropped = layer.apply({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - base - 2.0 * x @ a @ b).max() > 0.01
    none = layer.apply(
        {"params": {**params, "lora_b": 0 * b}}, x, deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    np.testing.assert_allclose(none, base, atol=1e-5)  # the base layer knows no dropout


def test_dropout_is_drawn_in_training_only() -> None:
    params, model = random_params(ADAPTED), Qwen2(ADAPTED, Compute())
    embeds, mask = prompt(ADAPTED, (5,), 5)
    one, again, other = (run(model, params, embeds, mask, None, jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - run(model, params, embeds, mask)).max() > 1e-2


def test_rematerialised_gradients_are_equal() -> None:
    params = random_params(SMALL)
    embeds, mask = prompt(SMALL, (5, 4), 5)

    def gradients(policy: str) -> list[jax.Array]:
        model = Qwen2(SMALL, Compute(remat=policy))

        def loss(params: dict[str, Any]) -> jax.Array:
            return jnp.sin(model.apply({"params": params}, embeds, mask)).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    expected = gradients("none")
    assert sum(float(np.abs(x).max()) > 0 for x in expected) == len(expected) - 2  # all but embedding and head
    for policy in ("full", "dots"):
        for one, other in zip(gradients(policy), expected):
            np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, float(np.abs(other).max())))


def test_low_precision() -> None:
    params = random_params(SMALL)
    embeds, mask = prompt(SMALL, (6,), 6)
    half, full = Qwen2(SMALL, Compute(dtype="bfloat16")), Qwen2(SMALL, Compute())
    hidden = run(half, params, embeds, mask)
    logits = half.apply({"params": params}, hidden, method=Qwen2.logits)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    expected = run(full, params, embeds, mask)
    assert rel_l2(np.asarray(hidden, np.float32), expected) < 0.05


def test_products_are_kept_with_their_adapters_added() -> None:
    """remat="dots" keeps a layer's sums; what the adapters add is not kept beside them."""
    params, (embeds, mask) = random_params(ADAPTED), prompt(ADAPTED, (5, 3), 5)

    def gradients(remat: str) -> Any:
        model = Qwen2(ADAPTED, Compute(remat=remat))

        def loss(params: Any) -> jax.Array:
            rngs = {"dropout": jax.random.key(2)}
            out = model.apply({"params": params}, embeds, mask, deterministic=False, rngs=rngs)
            return jnp.square(jnp.asarray(out)).sum()

        return jax.grad(loss)

    program = jax.make_jaxpr(gradients("dots"))(params).jaxpr
    scans = [e for e in equations(program) if e.primitive.name == "scan"]
    forward = [out.aval.shape for out in scans[0].outvars]
    kept = [shape for shape in forward if shape[0] == ADAPTED.num_layers and shape[-1] == ADAPTED.intermediate_size]
    assert kept == [(2, 2, 5, 48)] * 2  # of gate_proj and up_proj
    found, expected = (jax.jit(gradients(remat))(params) for remat in ("dots", "none"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
