"""Checkpoints as people have them: wrapped names, buffers, adapters on some layers, other roots and formats."""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion.assemble import assemble
from conversion.checkpoint import EMBEDDING, HEAD, LORA_A, LORA_B, NEW_IN_SAM2_1, Checkpoint
from conversion.formats.safetensors_dir import SafetensorsDir
from conversion.formats.torch_file import TorchFile, write_torch_file
from conversion.names import canonical, is_buffer, nearest
from conversion.rules import rule_table
from conversion.samples import Samples
from conversion.tracker import check_size, convert_tracker, size_of, tracker_table
from helpers.places import DATA
from helpers.small_checkpoint import Files, assert_equal_trees, peft, small, specs, write_checkpoint
from helpers.torch_archives import Call, Global, Outside, write_archive
from virst_jax.config import SAM2_SIZES, HieraConfig, sam2_preset
from virst_jax.errors import UserError
from virst_jax.io import tracker_folder
from virst_jax.models.lora import merge_lora
from virst_jax.models.tree import flatten

UP_PROJ = "model.layers.3.mlp.up_proj.weight"
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.lm_head.weight", "lm_head.weight"),
        ("module.module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("base_model.model.base_model.model.model.norm.weight", "model.norm.weight"),
        ("module.base_model.model._orig_mod.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.mlp.up_proj.weight", UP_PROJ),
        ("model.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj.weight", UP_PROJ),
        ("model.layers.3._orig_mod.mlp.up_proj.base_layer.weight", UP_PROJ),
        ("model.layers.3.mlp.up_proj.lora_A.default.weight", "model.layers.3.mlp.up_proj.lora_A.weight"),
        ("model.layers.3.mlp.up_proj.lora_B.stage-2.weight", "model.layers.3.mlp.up_proj.lora_B.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("memory_encoder.fuser.layers.1.weight", "memory_encoder.fuser.layers.1.gamma"),
        ("memory_encoder.fuser.layers.1.norm.weight", "memory_encoder.fuser.layers.1.norm.weight"),
        ("model.modules.weight", "model.modules.weight"),
    ],
)
def test_plain_names(name, plain):
    assert canonical(name) == plain
    assert canonical(plain) == plain


def test_no_name_of_the_release_changes():
    for file in sorted((DATA / "manifests").glob("*.json")):
        if "peft" not in file.name:
            for name in json.loads(file.read_text()):
                assert canonical(name) == name
                assert not is_buffer(name)


def test_nearest_names_are_quick_and_few():
    known = list(rule_table(small()))
    assert nearest(["model.layers.0.mlp.up_projj.weight"], known).endswith(
        "model.layers.0.mlp.up_proj.weight for model.layers.0.mlp.up_projj.weight"
    )
    assert nearest(["zzz"], known) == ""
    assert len(nearest([f"model.seg_model.{'x' * 10_000}{i}" for i in range(1000)], known)) < 2000


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Files]:
    return lambda **changes: write_checkpoint(tmp_path, **changes)


def opened(files: Files, **changes):
    f = files.folder
    given = {"vocab_size": 40, "lora": "keep", **changes}
    return Checkpoint(f / "videochat", f / "sam2.pt", f / "virst.pt", **given)


def assembled(checkpoint: Checkpoint):
    cfg = small(checkpoint.rank)
    return assemble(rule_table(cfg), checkpoint.names(), checkpoint.read, where=checkpoint.where)


def tensors_of(path: Path, root: str | None = "model_state_dict") -> dict[str, np.ndarray]:
    with TorchFile(path, root) as file:
        return {name: np.array(file.read(name)) for name in file.names()}


def rewrite(path: Path, change: Callable[[dict], dict], root: str = "model_state_dict", to: str | None = "") -> None:
    """Writes a file again with other names or values, under the same or another root."""
    tensors = change(tensors_of(path, root))
    path.unlink()
    write_torch_file(path, specs(tensors), root=root if to == "" else to)


def test_wrappers_and_buffers(release):
    """Names as FSDP, torch.compile and PEFT leave them, with tables that follow from the config."""

    def wrap(name: str) -> str:
        wrapped = peft(name).replace("base_model.model.", "module._orig_mod.base_model.model.base_model.model.")
        return wrapped.replace(".layers.1.", ".layers.1._fsdp_wrapped_module.")

    files = release(rename=wrap)
    buffers = {
        "module.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.vision_tower.vision_tower.embeddings.position_ids": np.arange(5),
    }
    rewrite(files.folder / "virst.pt", lambda x: {**x, **buffers})
    assert_equal_trees(assembled(opened(files)), files.params)


def test_modules_that_were_trained_come_before_those_they_replaced(release):
    files = release()
    trained = tensors_of(files.folder / "sam2.pt", "model")["obj_ptr_tpos_proj.weight"] + 7
    for order in (1, -1):
        names = ["modules_to_save.default", "original_module"][::order]
        layer = "base_model.model.model.seg_model.obj_ptr_tpos_proj"

        def change(x, names=names, layer=layer):
            x = {n: v for n, v in x.items() if "obj_ptr_tpos_proj" not in n}
            return x | {f"{layer}.{n}.weight": trained if "save" in n else trained * 0 for n in names}

        rewrite(files.folder / "virst.pt", change)
        np.testing.assert_array_equal(opened(files).read("model.seg_model.obj_ptr_tpos_proj.weight"), trained)
    twice = {"lm_head.weight": np.ones(3), "module.lm_head.weight": np.ones(3)}
    rewrite(files.folder / "virst.pt", lambda x: {**x, **twice})
    with pytest.raises(UserError, match="are the same parameter"):
        opened(files)


@pytest.mark.parametrize("root", ["state_dict", "module", "model", None, "ema"])
def test_roots(release, root):
    files = release()
    rewrite(files.folder / "virst.pt", lambda x: x, to=root)
    if root == "ema":
        with pytest.raises(UserError, match=r"found 'ema'; name the root with --root"):
            opened(files)
    given = {"root": "ema"} if root == "ema" else {}
    assert_equal_trees(assembled(opened(files, **given)), files.params)
    rewrite(files.folder / "sam2.pt", lambda x: x, root="model", to=None)
    assert_equal_trees(assembled(opened(files, **given)), files.params)


def test_sharded_bin_and_safetensors(release):
    """VideoChat-Flash as .bin files with their index, VIRST's as safetensors."""
    files = release()
    videochat = files.folder / "videochat"
    with SafetensorsDir(videochat) as source:
        tensors = {name: np.array(source.read(name)) for name in source.names()}
    for file in videochat.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        write_torch_file(videochat / f"pytorch_model-{i}.bin", specs({n: tensors[n] for n in part}), root=None)
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (videochat / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal_trees(assembled(opened(files)), files.params)
    (videochat / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match=r"names 'pytorch_model-1\.bin', which is missing"):
        opened(files)


def only(*layers: str) -> Callable[[dict], dict]:
    """Keeps the adapters of some layers."""
    return lambda x: {n: v for n, v in x.items() if ".lora_" not in n or canonical(n).split(".lora_")[0] in layers}


def test_adapters_on_some_projections(release):
    files = release()
    rewrite(files.folder / "virst.pt", only(Q0))
    kept = assembled(opened(files))
    ours, all_of = flatten(kept), flatten(files.params)
    for path, value in ours.items():
        if not path.endswith(("lora_a", "lora_b")):
            np.testing.assert_array_equal(value, all_of[path], err_msg=path)
        elif path == "llm/layers/attn/q_proj/lora_b":
            np.testing.assert_array_equal(value[0], all_of[path][0])
            assert not value[1].any()
        elif path.endswith("lora_b"):
            assert not value.any()
        else:
            assert np.abs(value[1]).min() > 0  # training can go on from here
            assert np.abs(value[1]).max() <= 24**-0.5 if "down_proj" in path else 16**-0.5
    merged = flatten(assembled(opened(files, lora="merge")))
    wanted = flatten(merge_lora(kept, 16.0 / 4))
    assert merged.keys() == wanted.keys()
    for path, value in merged.items():
        np.testing.assert_allclose(value, wanted[path], rtol=1e-6, atol=1e-5, err_msg=path)


def test_adapters_of_several_ranks_or_elsewhere_can_be_merged(release):
    files = release()

    def change(x):
        x = only(Q0, Q1)(x)
        a, b = (f"base_model.model.{Q1}.{half}.default.weight" for half in ("lora_A", "lora_B"))
        x[a], x[b] = x[a][:2], x[b][:, :2]
        return x

    rewrite(files.folder / "virst.pt", change)
    with pytest.raises(UserError, match=r"of ranks \[2, 4\] can only be merged: give --lora merge"):
        opened(files)
    checkpoint = opened(files, lora="merge")
    down, up, below = (checkpoint._read(Q1 + end) for end in (LORA_A, LORA_B, ".weight"))
    np.testing.assert_allclose(checkpoint.read(Q1 + ".weight"), below + 8 * up @ down, rtol=1e-5, atol=1e-5)
    away = {f"lm_head.lora_{half}.weight": np.ones(s, np.float32) for half, s in (("A", (4, 16)), ("B", (48, 4)))}
    rewrite(files.folder / "virst.pt", lambda x: {**x, **away})
    assert checkpoint.read(HEAD).shape == (40, 16)
    assert EMBEDDING in opened(files, lora="merge").names()
    stray = {f"model.nowhere.lora_{half}.weight": np.ones((4, 4), np.float32) for half in "AB"}
    rewrite(files.folder / "virst.pt", lambda x: {**x, **stray})
    with pytest.raises(UserError, match=r"1 adapters belong to no layer: model\.nowhere"):
        opened(files, lora="merge")
    rewrite(files.folder / "virst.pt", lambda x: {**only()(x), "model.a.lora_magnitude_vector.weight": np.ones(3)})
    with pytest.raises(UserError, match=r"not plain LoRA .*merge_and_unload"):
        opened(files)


def test_what_peft_wrote_beside_the_file(release):
    files = release()
    config = files.folder / "adapter_config.json"
    for told, error in (
        ({"lora_alpha": 16}, None),
        ({"lora_alpha": 32}, r"says lora_alpha 32, and 16 would be used; give --lora-alpha"),
        ({"lora_alpha": 16, "use_rslora": True}, r"scales its adapters in its own way"),
        ([1], None),
    ):
        config.write_text(json.dumps(told))
        if error is None:
            opened(files)
        else:
            with pytest.raises(UserError, match=error):
                opened(files)
    config.write_text(json.dumps({"lora_alpha": 32}))
    opened(files, lora_alpha=32.0)


def test_a_checkpoint_without_embeddings_or_head_is_a_warning(release):
    (warning,) = opened(release()).warnings
    assert f"virst.pt: holds no {EMBEDDING} and no {HEAD}: what then holds [SEG]" in warning


def test_a_whole_checkpoint_gives_no_warning(release):
    assert opened(release(trained_only=False)).warnings == []


def test_sam_2_0_is_named(release, tmp_path):
    files = release()
    new = set(NEW_IN_SAM2_1)
    rewrite(files.folder / "sam2.pt", lambda x: {n: v for n, v in x.items() if n not in new}, root="model")
    with pytest.raises(UserError, match=r"sam2\.pt: a file of SAM 2\.0 .*give sam2\.1_hiera"):
        opened(files)
    with pytest.raises(UserError, match=r"a file of SAM 2\.0"):
        convert_tracker(files.folder / "sam2.pt", tmp_path / "out", progress=False)


def test_renamed_weights_of_the_fuser(release):
    files = release()
    gamma = lambda n: n.replace(".gamma", ".weight") if ".fuser.layers." in n else n  # noqa: E731
    rewrite(files.folder / "sam2.pt", lambda x: {gamma(n): v for n, v in x.items()}, root="model")
    assert_equal_trees(assembled(opened(files)), files.params)


def test_errors_name_the_rule_and_the_nearest_names(release):
    files = release()
    rewrite(
        files.folder / "sam2.pt",
        lambda x: {n.replace("no_mem_embed", "no_memory_embed"): v for n, v in x.items()},
        root="model",
    )
    with pytest.raises(
        UserError, match=r"nearest known: model\.seg_model\.no_mem_embed for model\.seg_model\.no_memory_embed"
    ):
        assembled(opened(files))
    shapes = {"model.norm.weight": (16,), Q0 + ".weight": (3,)}
    table = {name: rule_table(small())[name] for name in shapes}
    with pytest.raises(UserError, match=r"rule: linear to llm/layers/attn/q_proj/kernel"):
        assemble(table, shapes, lambda name: np.zeros(shapes[name]), where="x")


# SAM 2.1 alone


@pytest.mark.parametrize("size", SAM2_SIZES)
def test_every_name_of_the_published_files_is_used_once(size):
    manifest = {n: tuple(s) for n, s in json.loads((DATA / "manifests" / f"sam2.1_{size}.json").read_text()).items()}
    assert len(manifest) == {"tiny": 471, "small": 519, "base_plus": 615, "large": 903}[size]
    cfg = sam2_preset(size)
    wanted = {path: leaf.shape for path, leaf in flatten(tracker_folder.parameter_shapes(cfg)).items()}
    used: list[str] = []
    empty = lambda path, shape, dtype: np.lib.stride_tricks.as_strided(  # noqa: E731
        np.zeros(1, dtype), shape, (0,) * len(shape)
    )

    def read(name: str) -> np.ndarray:
        used.append(name)
        return np.broadcast_to(np.float32(0), manifest[name])

    tree = assemble(
        tracker_table(cfg),
        manifest,
        read,
        where=size,
        expected=wanted,
        allocate=empty,
    )
    assert sorted(used) == sorted(manifest)
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == wanted
    assert size_of(manifest) == size
    check_size(manifest, cfg.hiera, "x")
    other = "large" if size == "tiny" else "tiny"
    with pytest.raises(UserError, match=f"is SAM 2.1 {size}, the config asks for {other}"):
        check_size(manifest, SAM2_SIZES[other], "x")


def test_large_is_the_tracker_of_the_release():
    release = json.loads((DATA / "manifests" / "release_state_dict.json").read_text())
    under = {n.removeprefix("model.seg_model."): s for n, s in release.items() if n.startswith("model.seg_model.")}
    assert under == json.loads((DATA / "manifests" / "sam2.1_large.json").read_text())
    assert sam2_preset("large").hiera == HieraConfig()


@pytest.fixture
def small_sizes(monkeypatch):
    """A published size at the widths of the small network."""
    cfg = dataclasses.replace(small().sam2, max_anchors_attended=-1)
    monkeypatch.setitem(SAM2_SIZES, "tiny", cfg.hiera)
    monkeypatch.setattr("conversion.tracker.sam2_preset", lambda size: cfg)
    return cfg


def test_tracker_alone(release, small_sizes, tmp_path, capsys):
    """As the fine-tunes in the field: bfloat16, saved from a GPU."""
    from conversion import convert

    files = release()
    tensors = tensors_of(files.folder / "sam2.pt", "model")
    entries, storages = {}, {}
    for i, (name, value) in enumerate(tensors.items()):
        half = value.astype(ml_dtypes.bfloat16)
        storage = Outside(("storage", Global("torch BFloat16Storage"), str(i), "cuda:0", half.size))
        strides = tuple(s // 4 for s in value.strides)
        args = (storage, 0, value.shape, strides, False, Call(Global("collections OrderedDict"), ()))
        entries[name] = Call(Global("torch._utils _rebuild_tensor_v2"), args)
        storages[str(i)] = half.tobytes()
    path = write_archive(tmp_path / "tuned.pt", {"model": entries}, storages)
    out = tmp_path / "tracker"
    assert convert.main(["--sam2", str(path), "--out", str(out), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "SAM 2.1 tiny, a tracker" in said
    assert "values read again" in said
    cfg, params = tracker_folder.load_tracker(out)
    assert cfg == small_sizes
    ours = flatten(params)
    for name, target in tracker_table(cfg).items():
        if target.slot is None and target.transform == "same":
            wanted = tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(ours[target.path]), wanted, err_msg=name)
    assert convert.main(["--sam2", str(path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(UserError, match="no tracker"):
        tracker_folder.read_config(tmp_path)
    with pytest.raises(UserError, match="none of the published sizes"):
        convert_tracker(files.folder / "virst.pt", tmp_path / "other", progress=False)


# The check at the end


def test_samples_find_a_changed_value():
    value = np.arange(24.0).reshape(4, 6)
    samples = Samples()
    samples.add("a", None, value, value.dtype)
    stack = np.stack([value, -value])
    for slot in (0, 1):
        samples.add("b", slot, stack[slot], np.dtype(np.float32))
    samples.add("c", None, np.float32(3), np.dtype(np.float32))
    written = {"a": value, "b": stack.astype(np.float32), "c": np.float32(3)}
    count, digest = samples.check("out", written.items())
    assert count == 4 + 8 + 1
    assert samples.check("out", reversed(list(written.items()))) == (count, digest)
    for name, changed in (("a", value + 1), ("b", stack.astype(np.float32)[::-1]), ("c", np.float32(4))):
        with pytest.raises(UserError, match=f"out: {name}"):
            samples.check("out", {**written, name: changed}.items())
    with pytest.raises(UserError, match="out: c was not written"):
        samples.check("out", [(n, v) for n, v in written.items() if n != "c"])


def test_zip_of_something_else_is_no_checkpoint(release):
    files = release()
    with zipfile.ZipFile(files.folder / "virst.pt", "w") as archive:
        archive.writestr("word/document.xml", "text")
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        opened(files)
