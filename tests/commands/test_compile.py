"""The steps of inference compiled for other hardware."""

import json

import jax
import pytest

from helpers.segmenting import three_expressions
from virst_jax import cli
from virst_jax.commands import compile as compile_command
from virst_jax.config import TrackerConfig, sam2_preset, virst_7b
from virst_jax.inference import abstract
from virst_jax.inference.abstract import DEFAULTS
from virst_jax.inference.plan import Options
from virst_jax.io import model_folder


def shapes(cfg, frames, expressions, options=DEFAULTS):
    params = abstract.parameters(model_folder.parameter_shapes(cfg), "float32")
    return params, abstract.step_calls(cfg, params, frames, expressions, options)


def test_steps_of_the_full_size_network_follow_from_one_another():
    _, calls = shapes(virst_7b(), 64, 5)
    steps = {call.name: call for call in calls}
    assert {name: call.calls for name, call in steps.items()} == {
        "image encoder": 64,
        "video encoder": 16,
        "LLM reads the video": 1,
        "LLM reads the sentences": 1,
        "second fusion": 1,
        "anchors": 1,
        "track 4 frames": 16,
        "mask tile": 2 * 4 * 16,
        "embed a conversation": 0,
        "answer in 64 tokens": 0,
    }
    cache, ids, *_ = steps["LLM reads the sentences"].arguments
    assert cache.k.shape[:3] == (28, 1, 16 * 64 + 64)
    assert ids.shape == (8, 128)  # five sentences run as eight
    assert steps["second fusion"].arguments[0].shape == (8, 10, 3584)
    assert steps["anchors"].arguments[3].shape == (8, 8, 10, 256)


@pytest.mark.heavy
def test_shapes_are_those_of_a_real_run(model):
    """Segmenting a video calls the steps with these very shapes, but for lengths of texts."""
    three_expressions()
    seen = {(name, structure, shapes) for name, structure, shapes, _ in model.network._seen}
    _, calls = shapes(model.cfg, 11, 2, Options(chunk=2, group_size=2))
    compared = 0
    for call in calls:
        name = getattr(call.function, "__name__", "")
        if name not in ("encode_batch", "encode_clip", "prompt_anchors", "track", "fuse"):
            continue
        leaves, structure = jax.tree.flatten(call.arguments)
        assert (name, structure, tuple((x.shape, str(x.dtype)) for x in leaves)) in seen, name
        compared += 1
    assert compared == 5


def test_steps_of_a_tracker():
    """Their shapes fit one another: what a step gives, the next one takes."""
    cfg = TrackerConfig(sam2=sam2_preset("tiny"))
    params, calls = shapes(cfg, 10, 3)
    steps = {call.name: call for call in calls}
    assert {name: call.calls for name, call in steps.items()} == {
        "image encoder": 10,
        "a click": 4,
        "track 4 frames": 3,
        "mask tile": 2 * 4 * 3,
    }
    track = steps["track 4 frames"]
    bank, tracked = jax.eval_shape(track.function, params["sam2"], *track.arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), bank) == jax.tree.map(
        lambda x: (x.shape, x.dtype), track.arguments[1]
    )
    assert tracked.prediction.low_res.shape == steps["mask tile"].arguments[0].shape


def test_command(capsys, tmp_path):
    figures = tmp_path / "figures.json"
    figures.write_text('{"tiny": {"cpu:1": {"1": {"anchors": {"temporary_gib": 1.0}}}}}')
    arguments = ["--model", "tiny", "--topology", "cpu:1", "--dtype", "float32", "--json", str(figures)]
    assert cli.main(["compile", *arguments, "--only", "mask"]) == 0
    kept = json.loads(figures.read_text())["tiny"]["cpu:1"]["1"]
    assert list(kept) == ["anchors", "mask tile"]
    assert kept["mask tile"]["temporary_gib"] >= 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny in float32 on cpu:1: 64 frames, 1 sentences" in printed
    assert "mask tile" in printed
    assert "GiB of parameters" in printed
    assert "predicted" not in printed  # no compiler of CPUs says


def test_presets_are_compiled_as_they_are_converted():
    """With merged adapters."""
    assert virst_7b().llm.lora.rank
    assert compile_command._config("virst_7b", "bfloat16").llm.lora.rank == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "nowhere", "--topology", "cpu:1"],
            "neither a model folder nor a preset (tiny, virst_7b, sam2.1_tiny",
        ),
        (["--model", "tiny", "--topology", "cpu:1", "--expressions", "9"], "--expressions 9: give 1 to 8"),
        (["--model", "tiny", "--topology", "cpu:1", "--frames", "0"], "--frames 0: give 1 or more"),
        (["--model", "tiny", "--topology", "cpu:1", "--only", "x"], "no such step; there are image encoder, video"),
        (["--model", "tiny", "--topology", "nothing"], "unknown topology"),
        (["--model", "tiny", "--topology", "v5e:1x1", "--operations", "-1"], "--operations -1: give 0 or more"),
        (["--model", "tiny", "--topology", "v5e:1x1", "--picture", "a.gif"], "a.gif: pictures end in .png, .svg, .pdf"),
        (["--model", "tiny", "--topology", "v5e:1x1", "--picture", "nowhere/a.png"], "nowhere"),
        (
            ["--model", "tiny", "--topology", "cpu:1", "--picture", "a.png"],
            "--picture: times are known of TPUs and NVIDIA",
        ),
        (["--model", "tiny", "--topology", "cpu:1", "--operations", "3"], "--operations: times are known of TPUs"),
    ],
)
def test_what_cannot_be_compiled(arguments, message, capsys):
    assert cli.main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.heavy
def test_a_step_of_a_chip_is_predicted(capsys, tmp_path):
    pytest.importorskip("libtpu")
    arguments = ["--model", "virst_7b", "--topology", "v5e:1x1", "--only", "second fusion"]
    assert cli.main(["compile", *arguments, "--operations", "3", "--picture", str(tmp_path / "times.png")]) == 0
    printed = capsys.readouterr().out
    assert "predicted ms of a call" in printed
    assert "second fusion: the dearest of its operations" in printed
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
