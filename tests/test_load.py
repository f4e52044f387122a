"""Models from folders: dtypes, devices, meshes, compiled programs on disk, and what is refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import virst_jax
from helpers import compiling
from helpers.network import CFG, SMALL, params, write_model
from helpers.places import PROGRAMS, ROOT, TOKENIZER
from helpers.segmenting import CAR, CAT, DOG, video
from virst_jax.api import Model, load
from virst_jax.config import Compute, to_json
from virst_jax.data.prompts import load_tokenizer
from virst_jax.errors import UserError
from virst_jax.io import model_folder


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
    with pytest.raises(UserError, match="none: no model there; give a folder that `virst convert`"):
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
    subprocess.run(
        [sys.executable, PROGRAMS / "segment_on_mesh.py", folder, clip, out],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.flags(4)},
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
