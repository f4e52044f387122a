"""The recorder, tried on a checkout that looks like the release from outside (tests/helpers/fake_release.py)."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from conversion import record
from conversion.recording.checkout import TINY
from conversion.weights_rule import make_input, make_tensor, make_video
from helpers.fake_release import SIDE, write_release

torch = pytest.importorskip("torch")

HW = (24, 32)
E2E_KEYS = {"case", "salt", "config", "n_frames", "sam_idx", "hw", "input_ids", "labels", "t_vlm", "cond_frames"}
E2E_KEYS |= {"manifest", "inputs"}
MORE_KEYS = {"state", "dtype", "device", "versions", "seed", "vlm_idx", "anchors", "expression", "prompt", "strides"}
MORE_KEYS |= {"release", "video", "clip", "attention", "like"}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("checkout") / "VIRST")


@pytest.fixture(scope="module")
def frames():
    return make_video(10, *HW, salt=3)


@pytest.fixture(scope="module")
def video(tmp_path_factory, frames):
    folder = tmp_path_factory.mktemp("video") / "a dog"
    folder.mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"img_{t + 5}.png")  # in the order of the numbers, not of the names
    return folder


@pytest.fixture(autouse=True)
def needed(monkeypatch):
    for name in ("hydra", "omegaconf"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def command(fake, out, *more, **options):
    arguments = {"release": fake, "out": out, **options}
    return [f"--{k.replace('_', '-')}={v}" for k, v in arguments.items()] + list(more)


def small(fake, video, out, *more, **options):
    inputs = {"video": video, "expression": "The   DOG", "rule_weights": 2, **options}
    return command(fake, out, "--tiny", *more, **inputs)


@pytest.fixture(scope="module")
def recorded(fake, video, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hydra", "omegaconf"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        assert record.main(small(fake, video, out)) == 0
    return out / "e2e_a_dog.json"


def read(path):
    with np.load(path.with_suffix(".npz")) as arrays:
        return json.loads(path.read_text()), dict(arrays)


# the case


def test_case_has_the_keys_of_an_end_to_end_case(recorded, frames):
    facts, arrays = read(recorded)
    assert set(facts) == E2E_KEYS | MORE_KEYS
    assert facts["case"] == "e2e_a_dog"
    assert facts["state"] == {"from": "rule", "salt": 2}
    assert facts["config"]["tiny"] == {**TINY, "vocab_size": 31}
    assert facts["config"]["seg_token_id"] == 30
    assert facts["expression"] == "the dog"
    assert "find the the dog" in facts["prompt"]
    assert facts["input_ids"].count(30) == facts["labels"].count(30) == 4
    assert (facts["n_frames"], facts["hw"], facts["t_vlm"]) == (10, list(HW), 8)
    assert set(facts["sam_idx"]) <= set(facts["vlm_idx"]) <= set(range(10))
    assert facts["cond_frames"] == sorted(set(facts["anchors"]))
    assert facts["manifest"]["model.embed_tokens.weight"] == [31, 64]
    np.testing.assert_array_equal(arrays["frames"], frames)
    assert sorted(p.name for p in recorded.parent.iterdir()) == ["e2e_a_dog.json", "e2e_a_dog.npz"]


def test_arrays_are_what_the_network_gave(recorded, frames):
    facts, arrays = read(recorded)
    shapes = {k: v.shape for k, v in arrays.items()}
    assert shapes["visual_tokens"] == (1, 8, 64)
    assert shapes["inputs_embeds"] == (1, len(facts["input_ids"]) - 1 + 8, 64)
    assert shapes["hidden_layers"] == (3, 4, 64)
    assert shapes["prompts"] == (1, 4, 5, 256)
    assert shapes["low_res_masks"] == (10, 4, 4)
    assert shapes["video_mask_bits"] == (10, 24, 4)
    assert {k for k in shapes if k.startswith("memory_")} == {f"memory_{t}" for t in range(10)}
    # the tokens' way can be followed by hand
    table = make_tensor("model.embed_tokens.weight", (31, 64), 2)
    seg = np.flatnonzero(np.array(facts["labels"]) == 30) - 1
    text = arrays["inputs_embeds"][0, 8:]
    np.testing.assert_array_equal(text, table[facts["input_ids"][1:]])
    np.testing.assert_array_equal(arrays["hidden_layers"][0], text[seg])
    weight, bias = (make_tensor(f"model.layers.0.{n}", s, 2) for n, s in (("weight", (64, 64)), ("bias", (64,))))
    np.testing.assert_allclose(arrays["hidden_layers"][1], np.tanh(text[seg] @ weight.T + bias), atol=2e-6)
    np.testing.assert_array_equal(arrays["seg_hidden"][0], arrays["hidden_layers"][-1])
    # so can the pixels
    scaled = Image.fromarray(frames[0]).resize((SIDE, SIDE))
    bicubic = (np.asarray(scaled, np.float32) / 255 - 0.45) / 0.225
    np.testing.assert_allclose(arrays["track_pixels"], bicubic.transpose(2, 0, 1)[:, ::16, ::16], atol=1e-6)
    scaled = Image.fromarray(frames[facts["sam_idx"][0]]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    bilinear = (np.asarray(scaled, np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(arrays["sam_pixels"], bilinear.transpose(2, 0, 1)[:, ::16, ::16], atol=1e-6)
    encoder = make_tensor("model.seg_model.scale", (16, 3), 2)
    full = bilinear.transpose(2, 0, 1).reshape(3, 16, 4, 16, 4).mean((2, 4))
    level = np.einsum("chw,dc->dhw", full, encoder)
    steps = tuple(slice(None, None, s) for s in facts["strides"]["seg_fpn0"])
    np.testing.assert_allclose(arrays["seg_fpn0"], level[steps], atol=1e-5)


def test_masks_unpack_to_those_of_the_video(recorded):
    _, arrays = read(recorded)
    masks = np.unpackbits(arrays["video_mask_bits"], axis=-1)[..., : HW[1]]
    assert masks.shape == (10, *HW)
    assert 0.02 < masks.mean() < 0.98


def test_an_earlier_case_is_followed(fake, recorded, tmp_path, capsys):
    assert record.main(command(fake, tmp_path, like=recorded, rule_weights=2, name="e2e_again", encode_batch=0)) == 0
    facts, arrays = read(recorded)
    again, same = read(tmp_path / "e2e_again.json")
    for key in (
        "config",
        "sam_idx",
        "vlm_idx",
        "anchors",
        "input_ids",
        "labels",
        "manifest",
        "clip",
        "video",
        "strides",
    ):
        assert again[key] == facts[key], key
    assert again["like"] == "e2e_a_dog"
    for name, array in arrays.items():
        np.testing.assert_allclose(same[name], array, atol=1e-5, err_msg=name)
    printed = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: float(line.split()[1]) for line in printed if "against" in line}
    assert set(told) == set(arrays) - {"frames"}
    assert max(told.values()) < 1e-5


@pytest.mark.parametrize("clip", [{}, {"clip": {"name": "e2e_made.clip"}}], ids=["no clip", "a clip without salt"])
def test_a_case_of_made_inputs_is_followed(fake, recorded, tmp_path, clip):
    facts, _ = read(recorded)
    kept = {k: facts[k] for k in E2E_KEYS - {"inputs"}}
    like = tmp_path / "e2e_made.json"
    like.write_text(json.dumps({**kept, "case": "e2e_made", "video_salt": 5, "salt": 1, "n_frames": 10} | clip))
    assert record.main(command(fake, tmp_path / "out", like=like, rule_weights=2, name="e2e_other")) == 0
    made, arrays = read(tmp_path / "out" / "e2e_other.json")
    assert made["video"] == {"from": "make_video", "salt": 5}
    assert made["clip"] == {"from": "make_input", "name": "e2e_made.clip", "salt": 1}
    assert made["vlm_idx"] is None
    assert "frames" not in arrays
    pixels = make_input("e2e_made.clip", (1, 8, 3, 112, 112), 1)[0]
    np.testing.assert_array_equal(arrays["clip_pixels"], pixels[..., ::16, ::16])


def test_seed_chooses_frames(fake, video, recorded, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert record.main(small(fake, video, again)) == 0
    assert record.main(small(fake, video, other, seed=1)) == 0
    first = json.loads(recorded.read_text())
    assert read(again / "e2e_a_dog.json")[0]["vlm_idx"] == first["vlm_idx"]
    assert read(other / "e2e_a_dog.json")[0]["vlm_idx"] != first["vlm_idx"]


def test_options_reach_the_network(fake, video, recorded, tmp_path):
    out = small(fake, video, tmp_path, "--initial-fusion", "--attention=sdpa", max_frames=9, encode_batch=2)
    assert record.main(out) == 0
    facts, arrays = read(tmp_path / "e2e_a_dog.json")
    assert facts["config"]["initial_seg_fusion"] is True
    assert facts["attention"] == "sdpa"
    assert facts["n_frames"] == len(arrays["frames"]) == 9
    seg = np.flatnonzero(np.array(facts["labels"]) == 30) - 1
    fused = arrays["hidden_layers"][0] - arrays["inputs_embeds"][0, 8:][seg]  # inputs_embeds are those before fusion
    np.testing.assert_allclose(fused, 1, atol=1e-6)


# checkpoints


@pytest.fixture(scope="module")
def checkpoint(recorded, tmp_path_factory):
    """The three sources; what a later one overlays is other than the rule's in the earlier one."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path_factory.mktemp("checkpoints")
    manifest = json.loads(recorded.read_text())["manifest"]
    rule = {k: torch.as_tensor(make_tensor(k, tuple(s), 2)) for k, s in manifest.items()}
    seg = {k: v for k, v in rule.items() if k.startswith("model.seg_model.")}
    rest = {k: v for k, v in rule.items() if k not in seg}
    prompter = {k: v for k, v in rest.items() if "seg_prompter" in k}
    base = {k: v for k, v in rest.items() if k not in prompter}
    table = torch.cat([base["model.embed_tokens.weight"], torch.ones(9, 64)])  # the release's is longer, too
    shards = {**base, "model.embed_tokens.weight": table, "model.layers.0.bias": torch.zeros(64)}
    (folder / "videochat").mkdir()
    names = sorted(shards)
    for number, part in enumerate((names[:3], [*names[3:], "lm_head.weight"])):
        held = {k: shards.get(k, torch.ones(2)) for k in part}
        save_file(held, folder / "videochat" / f"model-{number}.safetensors")
    torch.save(
        {"model": {k.removeprefix("model.seg_model."): v for k, v in seg.items()}}, folder / "sam2.1_hiera_large.pt"
    )
    trained = {**prompter, "model.layers.0.bias": base["model.layers.0.bias"]}
    trained = {f"base_model.model.{k}": v for k, v in trained.items()}
    torch.save({"model_state_dict": trained}, folder / "virst.pt")
    return folder


def test_a_checkpoint_gives_what_the_rule_gave(fake, video, recorded, checkpoint, tmp_path):
    arguments = command(fake, tmp_path, "--tiny", checkpoint=checkpoint, video=video, expression="the dog")
    assert record.main(arguments) == 0
    facts, arrays = read(tmp_path / "e2e_a_dog.json")
    assert facts["salt"] is None
    state = facts["state"]
    assert (state["from"], state["ignored"]) == ("checkpoint", ["lm_head.weight"])
    files = ["model-0.safetensors", "model-1.safetensors", "sam2.1_hiera_large.pt", "virst.pt"]
    assert [f["name"] for f in state["files"]] == files
    for name, array in read(recorded)[1].items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_a_checkpoint_is_not_compared_with_the_rule(fake, recorded, checkpoint, tmp_path, capsys):
    facts = json.loads(recorded.read_text())
    like = tmp_path / "e2e_rule.json"
    like.write_text(json.dumps({**facts, "salt": 0}))
    like.with_suffix(".npz").write_bytes(recorded.with_suffix(".npz").read_bytes())
    assert record.main(command(fake, tmp_path / "out", checkpoint=checkpoint, like=like)) == 0
    assert "against" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda state: state.pop("base_model.model.model.seg_prompter.seg_proj.bias"), "are in none of the three"),
        (lambda state: state.update({"model.layers.1.bias": torch.zeros(3)}), "model.layers.1.bias is (3,)"),
        (lambda state: state.update(odd=types.SimpleNamespace()), "--trust-checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit(fake, video, checkpoint, tmp_path, capsys, spoil, told):
    content = torch.load(checkpoint / "virst.pt", weights_only=True)
    spoil(content["model_state_dict"])
    torch.save(content, tmp_path / "spoilt.pt")
    options = {"checkpoint": checkpoint, "virst": tmp_path / "spoilt.pt", "video": video, "expression": "x"}
    assert record.main(command(fake, tmp_path / "out", "--tiny", **options)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(fake, video, checkpoint, tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes((checkpoint / "sam2.1_hiera_large.pt").read_bytes()[:100])
    options = {"checkpoint": checkpoint, "video": video, "expression": "x"}
    assert record.main(command(fake, tmp_path / "out", "--tiny", sam2=tmp_path / "cut.pt", **options)) == 2
    assert "cut.pt: does not load" in capsys.readouterr().err


# errors


@pytest.mark.parametrize(
    ("options", "more", "told"),
    [
        ({"release": "nowhere"}, [], "no checkout of the release (model/VIRST.py is missing)"),
        ({"video": "nowhere.mp4"}, [], "nowhere.mp4: no such video"),
        ({"expression": " "}, [], "no inputs"),
        ({"max_frames": 0}, [], "--max-frames 0"),
        ({"encode_batch": -1}, [], "--encode-batch -1"),
        ({"seed": -3}, [], "--seed -3"),
        ({"name": "dog"}, [], "--name 'dog'"),
        ({"name": "e2e_../dog"}, [], "--name 'e2e_../dog'"),
        ({"like": "CASE"}, [], "leave out --video"),
        ({"checkpoint": "nowhere"}, [], "leave out the options that name a checkpoint"),
        ({"out": "FILE/out"}, [], "cannot be written to"),
        ({"device": "cuda"}, [], "torch sees no CUDA device"),
    ],
)
def test_bad_arguments(fake, video, tmp_path, monkeypatch, capsys, options, more, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "FILE").touch()
    given = {"release": fake, "out": "out", "video": video, "expression": "x", "rule_weights": 0, **options}
    assert record.main(["--tiny", *[f"--{k.replace('_', '-')}={v}" for k, v in given.items()], *more]) == 2
    captured = capsys.readouterr()
    *warnings, line = captured.err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert all(w.startswith("warning: ") for w in warnings)
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--video=v", "--expression=x"], "no parameters: give --checkpoint DIR, or --videochat, --sam2, --virst too"),
        (["--video=v", "--expression=x", "--sam2=s", "--virst=s"], "or --videochat too"),
        (["--video=v", "--expression=x", "--checkpoint=none"], "none: no such folder"),
        (["--video=v", "--expression=x", "--checkpoint=two"], "(found: a.pt, b.pt)? give it as --virst"),
        (
            ["--video=v", "--expression=x", "--checkpoint=two", "--virst=two/a.pt"],
            "no such folder; give it as --videochat",
        ),
        (["--video=v", "--expression=x", "--rule-weights=0"], "add --tiny"),
        (["--rule-weights=0", "--like=none.json"], "none.json: no such file; give the JSON of a case"),
        (["--rule-weights=0", "--like=bad.json"], "bad.json: not valid JSON"),
        (["--rule-weights=0", "--like=other.json"], "other.json: not an end-to-end case ('config' is missing)"),
    ],
)
def test_bad_sources_and_cases(fake, tmp_path, monkeypatch, capsys, given, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").mkdir()
    for name in ("two/a.pt", "two/b.pt", "two/sam2.1_hiera_large.pt"):
        (tmp_path / name).touch()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"case": "anchors"}')
    assert record.main([f"--release={fake}", "--out=out", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_case_is_never_overwritten(fake, video, recorded, capsys):
    before = recorded.read_bytes()
    assert record.main(small(fake, video, recorded.parent)) == 2
    assert "e2e_a_dog.json: the case is there already" in capsys.readouterr().err
    assert recorded.read_bytes() == before


def test_torch_is_asked_for(fake, video, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert record.main(small(fake, video, tmp_path)) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_what_the_release_raises_becomes_one_line(fake, video, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(record, "run_release", fails)
    assert record.main(small(fake, video, tmp_path)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its forward pass fails (RuntimeError: two lines); the release was written for transformers 4.40.1" in line
