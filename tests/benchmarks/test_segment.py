"""The benchmark of segmentation at small sizes: it runs, both sides agree, operations are counted."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import segment, segment_stages
from benchmarks.random_network import parameter_shapes, small_config
from conversion.rules import sam2_rules
from virst_jax.config import Sam2Config, VirstConfig
from virst_jax.profiling import flops

CFG = small_config()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles in half the time, and leaves this process its processors."""
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, processors: None)
    options = {"compiler_options": {"xla_backend_optimization_level": 0}}
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **kwargs: jit(function, **kwargs | options))


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "figures.json"
    code = segment.main(["--size", "small", "--repeats", "1", "--threads", "1", "--json", str(out), *arguments])
    return code, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.torch
def test_names_are_those_of_transformers_and_lead_back() -> None:
    from benchmarks.transformers_sam2 import PREFIX, peer_name
    from helpers.torch_sam2 import release_name

    names = [name.removeprefix(PREFIX) for name, _ in sam2_rules(Sam2Config())]
    rows = [name for name in names if ".point_embeddings." in name]  # a table in transformers
    assert len(rows) == 4
    assert [release_name(peer_name(name)) for name in names if name not in rows] == [n for n in names if n not in rows]


@pytest.mark.torch
@pytest.mark.heavy
@pytest.mark.full_size
def test_tracker_beside_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "CHUNK", 1)  # the step that is compiled already
    code, result = run(tmp_path, "--parts", "encoder,track,propagation,many", "--frames", "3", "--expressions", "2")
    assert code == 0
    names = [row["stage"] for row in result["compared"]]
    parts = ["memory attention", "mask decoder", "memory encoder", "track step"]
    assert names == ["image encoder", *parts, "propagation, 3 frames"]
    for row in result["compared"]:
        assert row["difference"] < 1e-4
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    assert 0.99 < result["compared"][-1]["mask_iou"] <= 1
    assert {"jax", "torch", "transformers"} <= set(result["versions"])
    many = result["many"]
    assert many["expressions"] == 2
    assert many["difference"] < 1e-5
    assert many["ratio"] == pytest.approx(many["separate"] / many["together"])


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that compile fast; the others are lowered below."""
    fast = ("mask resize", "video encoder", "LLM reads the video")
    every = segment_stages.list_stages
    monkeypatch.setattr(segment_stages, "list_stages", lambda *args: [x for x in every(*args) if x.name in fast])
    code, result = run(tmp_path, "--parts", "stages", "--layers", "1")
    assert code == 0
    rows = {row["stage"]: row for row in result["stages"]}
    assert list(rows) == [*fast[:2], f"LLM reads the video, 1 of {CFG.llm.num_layers} layers"]
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / result["peak"])
    assert rows["video encoder"]["seconds_per_frame"] == pytest.approx(rows["video encoder"]["seconds"] / 4)


def counted(cfg: VirstConfig, name: str, expressions: int = 1) -> float:
    """XLA's count for a stage."""
    stage = next(stage for stage in segment_stages.list_stages(cfg, expressions) if stage.name == name)
    shapes, _ = parameter_shapes(cfg)
    params = shapes["sam2"] if stage.parts == ("sam2",) else {part: shapes[part] for part in stage.parts}
    return segment_stages.count_flops(cfg, stage.step, (params, *stage.inputs()), **dict(stage.static))


def test_operations_agree_with_the_formulas() -> None:
    """XLA counts sums and the like too, of which small networks have many."""
    sam, anchors, llm = CFG.sam2, CFG.max_anchors, CFG.llm
    assert 1 < counted(CFG, "image encoder") / flops.image_encoder(sam) < 1.3
    attention = flops.memory_attention(sam, anchors)
    tracking = attention + flops.mask_decoder(sam, 2) + flops.memory_encoder(sam)
    assert 1 < counted(CFG, "track step") / tracking < 1.3
    prompted = flops.mask_decoder(sam, CFG.num_seg_tokens) + flops.mask_prompt(sam) + flops.memory_encoder(sam)
    assert 1 < counted(CFG, "anchors") / (anchors * prompted) < 1.3
    frames = CFG.max_seg_frames
    fusing = flops.second_fusion(CFG.fusion, sam, llm.hidden_size, CFG.num_seg_tokens, frames)
    # XLA leaves out what falls on the padding of the convolutions
    assert 0.8 < counted(CFG, "second fusion") / fusing < 1.3
    rows, text = 2, segment_stages.TEXT
    prefix = CFG.max_video_frames * CFG.vision.tokens_per_frame + segment_stages.PREFIX_TEXT
    reading = rows * (text * flops.llm_weights(llm) + flops.llm_attention(llm, text, prefix + text))
    assert 1 < counted(CFG, "LLM reads the text", rows) / reading < 1.3


def test_take_turns() -> None:
    order: list[str] = []
    seconds = segment_stages.take_turns([lambda: order.append("a"), lambda: jnp.zeros(order.append("b") or 1)], 3)
    assert order == ["a", "b"] * 3
    assert len(seconds) == 2


def test_sides_that_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"stage": "image encoder", "ours": 1.0, "theirs": 2.0, "ratio": 2.0, "difference": 2e-3}
    figures = {"config": "small", "threads": 1, "stages": [], "compared": [row], "many": None}
    monkeypatch.setattr(segment, "measure", lambda result, *args: result.update(figures))
    assert segment.main(["--size", "small"]) == 1
    assert "image encoder" in capsys.readouterr().err
    row["difference"] = 1e-4
    assert segment.main(["--size", "small"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "stages,tracks"], "no part 'tracks'"),
        (["--config", "huge"], "unknown config 'huge'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--threads", "100000"], "--threads 100000"),
        pytest.param(["--config", "tiny", "--parts", "encoder"], "width 64 only, not 16", marks=pytest.mark.torch),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment.main(arguments) == 2
    assert said in capsys.readouterr().err
