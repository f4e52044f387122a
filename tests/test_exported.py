"""Exported steps: their folder, and that they give the model's masks where Flax and the network's code are missing."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import virst_jax
from helpers.places import ROOT
from virst_jax import cli, exported
from virst_jax.api import EMBEDDED
from virst_jax.config import tiny
from virst_jax.errors import UserError
from virst_jax.inference.abstract import StepCall
from virst_jax.inference.export import PLATFORMS, export_step
from virst_jax.inference.tracker_steps import TrackerSteps
from virst_jax.io import exported_folder
from virst_jax.io.exported_folder import Manifest, StepSpec
from virst_jax.ops import attention
from virst_jax.ops.platform import portable, target_platform

SENTENCE = "the red square"
# of a process that finds neither; without them it must do the same
RUN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "orbax") or f"{name}.".startswith("virst_jax.models."):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Missing())
import numpy as np
from virst_jax import exported

folder, videos, out = sys.argv[1:]
model = exported.load(folder)
np.savez(out, **{name: model.segment(video, "the red square") for name, video in np.load(videos).items()})
try:
    model.segment(np.load(videos)["short"], "the red square " * 30)
except exported.UserError as error:
    print(error)
assert not {"flax", "orbax", "virst_jax.models"} & set(sys.modules)
"""


def scene(count: int, height: int, width: int) -> np.ndarray:
    """A red square that moves, and a blue one that stands."""
    y, x = np.mgrid[:height, :width]
    video = np.full((count, height, width, 3), 90, np.uint8)
    for t, frame in enumerate(video):
        frame[(abs(y - height // 3) < 12) & (abs(x - 20 - 4 * t) < 12)] = (220, 40, 40)
        frame[(abs(y - height * 2 // 3) < 10) & (abs(x - width * 3 // 4) < 10)] = (40, 70, 220)
    return video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny"
    assert cli.main(["export-model", "--model", "tiny", "--out", str(out), "--text-tokens", "128"]) == 0
    return out


@pytest.mark.heavy
def test_masks_are_those_of_the_model(folder: Path, tmp_path: Path) -> None:
    """More frames than are sampled, the last chunk not full, several tiles; and fewer frames than a sample has."""
    videos = {"long": scene(11, 72, 270), "short": scene(3, 90, 64)}
    np.savez(tmp_path / "videos.npz", **videos)
    arguments = [str(folder), str(tmp_path / "videos.npz"), str(tmp_path / "masks.npz")]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens, and the model was exported for 128: shorten the sentence" in done.stdout
    model = virst_jax.load("tiny")
    with np.load(tmp_path / "masks.npz") as masks:
        for name, video in videos.items():
            expected = model.segment(video, SENTENCE).masks[0]
            assert masks[name].dtype == bool
            assert masks[name].any((1, 2)).all()
            np.testing.assert_array_equal(masks[name], expected, err_msg=name)


@pytest.mark.heavy
def test_every_artefact_is_for_its_platform(folder: Path) -> None:
    manifest = exported_folder.read_manifest(folder)
    assert manifest.platforms == ("cpu", "cuda", "tpu")
    for platform in manifest.platforms:
        steps = [step for step in manifest.steps if step.platform == platform]
        assert {step.step for step in steps} == set(exported.STEPS)
        assert sum(step.step == "read_text" for step in steps) == 2
        for step in steps:
            artefact = jax.export.deserialize(bytearray((folder / step.file).read_bytes()))
            assert artefact.platforms == (platform,)
            assert [x.shape for x in artefact.out_avals] == [x.shape for x in step.outputs]
            module = artefact.mlir_module()
            assert not [kernel for kernel in ("tpu_custom_call", "__cudnn", "triton") if kernel in module]
    # each is traced for its platform: the memory encoder of TPUs is folded
    modules = {step.platform: step for step in manifest.steps if step.step == "track"}
    assert len({len((folder / step.file).read_bytes()) for step in modules.values()}) == 3
    stored = {name for name, _ in exported_folder.read_parameters(folder)}
    assert stored == {name for step in manifest.steps for name in step.parameters}


def mask_tile() -> StepCall:
    cfg = tiny()
    shapes = ((4, 1, 32, 32), (256, 32), (256, 32))
    arguments = tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    step = TrackerSteps(cfg.sam2, cfg.compute).resize_masks
    return StepCall("mask tile", step, None, arguments, 1, {"exclusive": False})


def test_a_step() -> None:
    call = mask_tile()
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=x.shape).astype(np.float32) for x in call.arguments]
    for platform in PLATFORMS:
        spec, data = export_step(call, {}, platform)
        assert [x.name for x in spec.inputs] == ["low_res", "rows", "columns"]
        assert [(x.shape, x.dtype) for x in spec.outputs] == [((4, 1, 256, 32), "uint8")]
        artefact = jax.export.deserialize(bytearray(data))
        assert artefact.platforms == (platform,)
        if platform == "cpu":
            np.testing.assert_array_equal(artefact.call(*arrays)[0], call.function(None, *arrays))


def test_a_step_takes_the_parameters_that_it_reads() -> None:
    def step(params, x):
        return x + params["read"]

    shape = jax.ShapeDtypeStruct((2,), np.float32)
    call = StepCall("sum", step, "part", (shape,), 1)
    spec, data = export_step(call, {"part": {"left": {"out": shape}, "read": shape}}, "cpu")
    assert spec.parameters == ("part/read",)
    (out,) = jax.export.deserialize(bytearray(data)).call(np.float32([1, 2]), np.float32([10, 20]))
    assert out.tolist() == [11, 22]


def test_portable_attention_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)

    def traced() -> str:
        return str(jax.make_jaxpr(lambda q: attention.attention(q, q, q))(q))

    with portable("tpu"):
        assert target_platform() == "tpu"
        assert "pallas_call" not in traced()
    assert target_platform() == jax.default_backend()
    monkeypatch.setattr(attention, "target_platform", lambda: "tpu")
    assert "pallas_call" in traced()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder of one step, for TPUs."""
    spec, data = export_step(mask_tile(), {}, "tpu")
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "step.bin").write_bytes(data)
    exported_folder.write_parameters(folder, [("a", np.ones((2, 3), jnp.bfloat16)), ("b", np.float32([5]))])
    step = StepSpec(spec.step, spec.platform, "step.bin", spec.parameters, spec.inputs, spec.outputs)
    exported_folder.write_manifest(folder, Manifest(tiny(), {"jax": jax.__version__}, 1, 4, (step,)))
    return folder


def test_the_folder_is_read_as_it_was_written(made: Path) -> None:
    manifest = exported_folder.read_manifest(made)
    assert manifest.cfg == tiny()
    assert manifest.steps[0].outputs[0].shape == (4, 1, 256, 32)
    stored = dict(exported_folder.read_parameters(made))
    assert stored["a"].dtype == jnp.bfloat16
    assert stored["a"].shape == (2, 3)
    assert stored["b"].tolist() == [5]


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: None, "was exported for tpu, and this device is cpu; export the model with --platforms cpu"),
        (lambda f: (f / "step.bin").unlink(), "step.bin: is missing"),
        (lambda f: (f / "step.bin").write_bytes(b"x"), "step.bin: is not as it was written: damaged or edited"),
        (lambda f: (f / "manifest.json").unlink(), "no exported model there (manifest.json is missing)"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected an object, found a list"),
        (lambda f: (f / "manifest.json").write_text("{}"), "is not of an exported model"),
        (lambda f: edit(f / "manifest.json", version=2), "has version 2, this package reads 1"),
        (lambda f: edit(f / "manifest.json", batch=2), "manifest.json: is not as it was written"),
    ],
)
def test_a_folder_that_cannot_be_run_is_refused(made: Path, damage, message: str) -> None:
    damage(made)
    with pytest.raises(UserError) as caught:
        exported.load(made, device="cpu")
    assert message in str(caught.value)
    assert str(made) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_artefact_that_jax_cannot_read(made: Path) -> None:
    (step,) = exported_folder.read_manifest(made).steps
    (made / "step.bin").write_bytes(b"StableHLO of another time")
    with pytest.raises(UserError, match=r"step.bin: JAX .* cannot read it \(.*\); export the model again"):
        exported._read_step(made, step)


def test_a_model_folder_is_none() -> None:
    with pytest.raises(UserError, match="no exported model there"):
        exported.load(EMBEDDED["tiny"], device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--platforms", "metal"], "--platforms metal: choose some of cpu, cuda, tpu"),
        (["--platforms", ","], "--platforms : choose some of"),
        (["--text-tokens", "8"], "--text-tokens 8: give 64 to 1024"),
        (["--chunk", "0"], "--chunk 0: give 1 to 64 frames"),
        (["--model", "nowhere"], "nowhere: no model there"),
        (["--out", str(ROOT)], "exists already"),
    ],
)
def test_options_that_are_refused(options, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--out", str(tmp_path / "out"), *options]
    assert cli.main(["export-model", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
