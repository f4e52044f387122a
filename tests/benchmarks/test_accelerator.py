"""The benchmark of accelerators: parts are run once, failures are recorded, and the small size runs on a CPU."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import accelerator, accelerator_parts
from benchmarks.accelerator_parts import Bench, Part
from benchmarks.random_network import device_params, random_params, small_config


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process keeps its own settings of compiled programs."""
    monkeypatch.setattr(accelerator, "keep_compiled", lambda where: None)


def run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = accelerator.main(["--json", str(path), "--size", "small", "--repeats", "1", *arguments])
    return code, json.loads(path.read_text())["parts"] if path.exists() else {}


def row(value: float, **more: Any) -> dict[str, Any]:
    return {"what": "a call", "value": value, "unit": "ms", "calls": 2} | more


def test_parts_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ran: list[str] = []

    def part(name: str, seconds: float = 1.0, broken: bool = False) -> Part:
        def work() -> list[dict[str, Any]]:
            ran.append(name)
            if broken:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more lines")
            return [row(500.0)]

        return Part(name, seconds, work)

    parts = [part("stage/a"), part("stage/b", broken=True), part("stage/c", 100.0), part("training")]
    monkeypatch.setattr(accelerator, "list_parts", lambda bench: parts)
    path = tmp_path / "figures.json"
    code, done = run(path, "--budget", "50")
    assert (code, ran) == (1, ["stage/a", "stage/b", "training"])
    assert done["stage/b"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    printed = capsys.readouterr().out
    assert "left for another run: stage/c" in printed
    assert "frames/s" not in printed  # two steps have no time
    code, done = run(path)
    assert (code, ran) == (1, ["stage/a", "stage/b", "training", "stage/c"])
    parts[1] = part("stage/b")
    code, _ = run(path, "--again")
    assert (code, ran[4:]) == (0, ["stage/b"])
    # three steps of twice 500 ms for five frames
    assert "1.667" in capsys.readouterr().out


def test_a_part_that_ended_the_process_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    accelerator.Log(path, accelerator.machine("small")).begin("training")
    monkeypatch.setattr(accelerator, "list_parts", lambda bench: [Part("training", 1.0, lambda: [row(1.0)])])
    code, done = run(path)
    assert (code, done["training"]["error"]) == (1, "the process ended within this part")


def test_an_interrupted_part_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "list_parts", lambda bench: [Part("training", 1.0, interrupted)])
    assert run(tmp_path / "figures.json") == (130, {})


def test_numbers_that_do_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "list_parts", lambda bench: [Part("x", 1.0, lambda: [row(1.0, wrong=True)])])
    assert run(tmp_path / "figures.json")[0] == 1


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("[]", [], "no file of this benchmark"),
        ('{"machine": {"device": "NVIDIA H100"}, "parts": {}}', [], "written with device 'NVIDIA H100', not"),
        ("", ["--budget", "0"], "give more than 0"),
        ("", ["--parts", "speed"], "there are parity, stage, video, attention, training, peer"),
    ],
)
def test_what_cannot_be_run(
    content: str, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "figures.json"
    if content:
        path.write_text(content)
    assert accelerator.main(["--json", str(path), "--size", "small", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_quick_parts_on_a_cpu(tmp_path: Path) -> None:
    parts = ("parity/st_fusion/float32", "attention/decoder, tokens")
    code, done = run(tmp_path / "figures.json", "--parts", ",".join(parts))
    assert code == 0
    assert done["parity/st_fusion/float32"]["rows"][0]["value"] < 1e-5
    rows = {row["what"]: row for row in done["attention/decoder, tokens"]["rows"]}
    assert rows["chunked, float32"]["error"] < 1e-6
    assert rows["cudnn, bfloat16"]["note"].startswith("refused: attention 'cudnn' cannot run here")
    assert "splash, float32" not in rows


@pytest.mark.heavy
def test_every_part_on_a_cpu(tmp_path: Path) -> None:
    code, done = run(tmp_path / "figures.json", "--budget", "3000")
    assert code == 0, {name: part["error"] for name, part in done.items() if "error" in part}
    assert {name.split("/")[0] for name in done} == {"parity", "stage", "video", "attention", "training", "peer"}
    assert 1e-5 < done["parity/st_fusion/bfloat16"]["rows"][0]["value"] < 0.1
    assert tuple(Bench("small", 1).calls) == accelerator_parts.STAGES
    (step, share) = done["training"]["rows"]
    assert step["value"] > 0
    assert 0 < share["value"] < 100


def test_predictions_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predicted.json"
    figures = {
        "v5e:1x1": {"1": {"anchors": {"slow": 16.0, "fast": 7.5}}},
        "h100:1": {"1": {"anchors": {"roofline": 1}}},
    }
    path.write_text(json.dumps({"virst_7b": figures}))
    monkeypatch.setattr(accelerator_parts, "PREDICTED", path)
    for device, said in (("v5e", "predicted 16 to 7.5 ms"), ("h100", "roofline 1 ms"), ("", ""), ("v6e", "")):
        monkeypatch.setattr(accelerator_parts, "device_name", lambda kind, device=device: device)
        assert accelerator_parts.predictions("anchors") == said
    assert accelerator_parts.predictions("nothing") == ""


def test_shapes_of_attention_are_the_full_size_networks() -> None:
    shapes = accelerator_parts.shapes(Bench("full", 1).cfg)
    assert shapes["memory, all frames"] == accelerator_parts.Shape(1, 4096, 36864, 1, 1, 256, 64, masked=True)
    assert shapes["LLM, video"] == accelerator_parts.Shape(1, 1088, 1088, 28, 4, 128, 128, causal=True)
    assert shapes["Hiera, 1024 x 64 x 64, 2 heads"].width == 72
    assert shapes["Hiera, 1 x 4096 x 4096, 8 heads"].batch == 1
    assert shapes["UMT"].heads == 16


@pytest.mark.heavy
def test_parameters_of_the_device_are_spread_as_those_of_the_host() -> None:
    cfg = small_config()
    host, device = random_params(cfg, "sam2")["sam2"], device_params(cfg, "float32")["sam2"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), host) == jax.tree.map(lambda x: (x.shape, x.dtype), device)
    pairs = zip(jax.tree.leaves(host), jax.tree.leaves(device))
    for ours, theirs in ((np.asarray(a), np.asarray(b)) for a, b in pairs if a.size > 2000):
        assert theirs.std() == pytest.approx(float(ours.std()), rel=0.15)
        assert theirs.mean() == pytest.approx(float(ours.mean()), abs=0.15 * float(ours.std()))


def test_short_calls_are_timed_together() -> None:
    bench, called = Bench("full", 2), []
    assert 0 < bench.time(lambda: called.append(0)) < 0.02
    assert len(called) > 10
