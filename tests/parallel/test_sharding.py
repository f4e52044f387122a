"""The rules of sharding, and one small step on 1 and on 8 virtual devices, in one and in two processes."""

import dataclasses
import itertools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from configs import stage3
from helpers import compiling
from helpers.places import DATA, PROGRAMS, ROOT
from virst_jax.config import tiny, virst_7b
from virst_jax.errors import UserError
from virst_jax.models.layers import AXES
from virst_jax.ops.constrain import ACTIVATIONS, activation_rules, constrain
from virst_jax.parallel import sharding
from virst_jax.training import recipe
from virst_jax.training.start import StateLayout

SNAPSHOTS = DATA / "sharding"
MESHES = [(4, 4, 1), (1, 16, 1), (1, 4, 4), (8, 32, 1)]


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def full_size():
    shapes, names = sharding.logical_axes(virst_7b())
    return flax.traverse_util.flatten_dict(shapes, sep="/"), flax.traverse_util.flatten_dict(names, sep="/")


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_specs_of_the_full_size_model_are_as_recorded(sizes):
    """VIRST_WRITE_SNAPSHOTS=1 records them anew."""
    path = SNAPSHOTS / f"virst_7b_{'x'.join(map(str, sizes))}.txt"
    text = sharding.describe(virst_7b(), mesh_of(*sizes))
    if os.environ.get("VIRST_WRITE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("sizes", [*MESHES, (1, 8, 1), (2, 2, 2), (1, 64, 4)], ids=str)
def test_no_large_parameter_is_replicated(full_size, sizes):
    shapes, names = full_size
    mesh, whole = mesh_of(*sizes), 0
    for path, leaf in shapes.items():
        spec = sharding.partition(path, leaf.shape, names[path], mesh)
        share = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        if share == leaf.size:
            assert leaf.size <= sharding.SHARD_ABOVE, path
            whole += leaf.size
        elif leaf.size > 2**24:  # what fills the memory is split by fsdp and by tensor
            assert share * mesh.shape["fsdp"] * mesh.shape["tensor"] == leaf.size, path
        used = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        assert "data" not in used
        assert len(used) == len(set(used))
    assert whole < 5e6  # of 8.4e9


def test_every_logical_axis_has_a_rule():
    assert set(sharding.RULES) == AXES
    assert set(sharding.ACTIVATION_RULES) == ACTIVATIONS


def test_unknown_and_unnamed_axes_are_errors():
    with pytest.raises(ValueError, match="no sharding rule for axis 'embde'"):
        sharding.partition("a/kernel", (4, 4), ("embde", "mlp"), mesh_of(1, 2, 1))
    with pytest.raises(ValueError, match="every axis needs one"):
        sharding.partition("a/kernel", (4, 4), ("embed",), mesh_of(1, 2, 1))
    with pytest.raises(ValueError, match="no sharding rule for axis None"):
        sharding.partition("a/kernel", (4, 4), ("embed", None), mesh_of(1, 2, 1))


def test_an_axis_that_does_not_divide_falls_to_another():
    spec = sharding.partition("table", (151647, 3584), ("vocab", "embed"), mesh_of(1, 4, 4))
    assert spec == PartitionSpec(None, ("fsdp", "tensor"))
    assert sharding.partition("bias", (3584,), ("heads",), mesh_of(1, 4, 4)) == PartitionSpec()
    with pytest.raises(UserError, match="fsdp=7 divides no axis of the parameter a/kernel"):
        sharding.partition("a/kernel", (2048, 2048), ("embed", "mlp"), mesh_of(1, 7, 1))


@pytest.mark.parametrize("fsdp", [64, 128, 256])
def test_more_shares_than_the_widths_of_the_tracker_divide_by(full_size, fsdp):
    """What cannot be split is whole on every device, as every step gathers it anyway; all else is split."""
    shapes, names = full_size
    mesh, whole = mesh_of(1, fsdp, 1), 0
    for path, leaf in shapes.items():
        spec = sharding.partition(path, leaf.shape, names[path], mesh)
        share = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        if leaf.size > sharding.SHARD_ABOVE and share == leaf.size:
            assert path.startswith("sam2/image_encoder/"), path
            whole += leaf.size
        elif leaf.size > 2**24:
            assert share * fsdp == leaf.size, path
    assert whole < 70e6  # 140 MB in bfloat16
    assert sharding.parameter_specs(virst_7b(), mesh)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1, 1), "mesh data=3 x fsdp=1 x tensor=1: 3 is not the number of devices, 1"),
        ((-1, 2, 1), "does not divide the number of devices, 1"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "sizes are positive"),
    ],
)
def test_meshes_that_do_not_divide(sizes, words):
    with pytest.raises(UserError, match=words) as error:
        sharding.make_mesh(*sizes, devices=jax.devices()[:1])
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What make_mesh asks a TPU device for."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int, side: int = 2) -> list[Chip]:
    places = [(s, x, y) for s in range(slices) for y in range(side) for x in range(side)]
    return [Chip(i, s, (x, y, 0), process_index=s) for i, (s, x, y) in enumerate(places)]


@pytest.mark.parametrize(
    ("sizes", "shape", "slices_along"),
    [
        ({"fsdp": -1, "data": 1}, (4, 4, 1), "data"),  # a recipe of one slice: every other slice holds a copy
        ({"data": 2, "fsdp": 2}, (8, 2, 1), "data"),
        ({"fsdp": -1, "data": 1, "dcn_data": 1, "dcn_fsdp": -1}, (1, 16, 1), "fsdp"),
        ({"fsdp": 2, "data": 1, "tensor": 2, "dcn_data": 2, "dcn_fsdp": 2}, (2, 4, 2), None),
    ],
)
def test_mesh_of_several_slices(sizes, shape, slices_along):
    mesh = sharding.make_mesh(**sizes, devices=chips(4))
    assert tuple(mesh.shape.values()) == shape
    of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert len({chip.id for chip in mesh.devices.flat}) == 16
    if slices_along is not None:
        axis = sharding.MESH_AXES.index(slices_along)
        assert (np.diff(of, axis=axis) >= 0).all()  # one slice after the other
        others = tuple(i for i in range(3) if i != axis)
        assert (of.min(axis=others) == of.max(axis=others)).all()
    # only data and fsdp cross the network between slices
    assert (of == of[:, :, :1]).all()


def test_mesh_of_a_described_slice():
    """Chips of a described topology of one slice know of no slices."""
    known = [field.name for field in dataclasses.fields(Chip) if field.name != "slice_index"]
    chip = dataclasses.make_dataclass("ChipOfOneSlice", known, frozen=True)
    devices = [chip(*(getattr(of_many, name) for name in known)) for of_many in chips(1)]
    assert dict(sharding.make_mesh(1, -1, devices=devices).shape) == {"data": 1, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("slices", [1, 2])
def test_mesh_axes_that_are_a_part_of_the_torus(slices):
    """8 of 4 x 4 chips, which are no whole axes."""
    mesh = sharding.make_mesh(2, 8, devices=chips(slices, side=4))
    assert tuple(mesh.shape.values()) == (2 * slices, 8, 1)
    assert len({chip.id for chip in mesh.devices.flat}) == 16 * slices
    of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert (of == of[:, :1]).all()


def test_mesh_axes_that_are_a_part_of_a_cube():
    """32 of 4 x 4 x 4 chips."""
    places = itertools.product(range(4), range(4), range(4))
    cube = [Chip(i, 0, place, device_kind="TPU v5p") for i, place in enumerate(places)]
    mesh = sharding.make_mesh(2, 32, devices=cube)
    assert tuple(mesh.shape.values()) == (2, 32, 1)
    assert len({chip.id for chip in mesh.devices.flat}) == 64


def test_slices_that_make_no_mesh():
    with pytest.raises(UserError, match="dcn_data=3 x dcn_fsdp=1: 3 is not the number of slices, 4"):
        sharding.make_mesh(dcn_data=3, devices=chips(4))
    with pytest.raises(UserError, match="data=3 x fsdp=1 x tensor=1: 3 is not the number of devices of a slice, 4"):
        sharding.make_mesh(3, devices=chips(2))
    with pytest.raises(UserError, match=r"different numbers of chips, \[3, 4\]"):
        sharding.make_mesh(devices=chips(2)[:-1])
    with pytest.raises(UserError, match="dcn_data=2 x dcn_fsdp=1: 2 is not the number of slices, 1"):
        sharding.make_mesh(dcn_data=2, devices=jax.devices()[:1])


def test_mesh_of_one_device_and_rest():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_tensor_axis_must_divide_heads():
    sharding.check_mesh(virst_7b(), mesh_of(1, 1, 4))
    with pytest.raises(UserError, match=r"tensor=8 .* choose one of \[1, 2, 4\]"):
        sharding.check_mesh(virst_7b(), mesh_of(1, 1, 8))


def test_batches_must_divide():
    sharding.check_batch(16, mesh_of(2, 4, 2))
    with pytest.raises(UserError, match=r"12 videos .* a multiple of 8, such as 16"):
        sharding.check_batch(12, mesh_of(2, 4, 2))


def test_optimizer_state_is_split_like_the_parameters():
    mesh = mesh_of(1, 2, 2)
    shapes = {
        "a": {"kernel": jax.ShapeDtypeStruct((2048, 1024), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), "f4")}
    }
    specs = {"a": {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec()}}
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    optimizer = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2)
    state = jax.eval_shape(lambda p: {"step": jnp.zeros((), int), "opt": optimizer.init(p), "ema": p}, shapes)
    chosen = sharding.state_shardings(state, shardings, shapes, mesh)
    by_path = {
        jax.tree_util.keystr(path): (leaf.shape, found.spec)
        for (path, leaf), found in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(chosen))
    }
    kernels = [path for path in by_path if path.endswith("['kernel']")]
    assert len(kernels) == 4  # mu, nu, accumulated gradients, average
    assert all(by_path[path][1] == PartitionSpec("fsdp", "tensor") for path in kernels)
    assert all(spec == PartitionSpec() for path, (_, spec) in by_path.items() if path not in kernels)

    with pytest.raises(ValueError, match="mirrors no parameter"):
        sharding.state_shardings({"b": jax.ShapeDtypeStruct((2048, 1024), "f4")}, shardings, shapes, mesh)


def test_frozen_parameters_that_are_whole_on_every_device():
    """They stay split over tensor; what is trained, and its optimizer, stay split over all."""
    mesh, config = mesh_of(2, 16, 4), stage3.get_config()
    cfg, (stage,) = recipe.network(virst_7b(), config), recipe.stages(config)
    split, whole = (StateLayout.of(cfg, dataclasses.replace(stage, frozen=way), mesh) for way in recipe.FROZEN)
    assert whole.shardings.replace(frozen=None) == split.shardings.replace(frozen=None)
    for before, now in zip(jax.tree.leaves(split.abstract.frozen), jax.tree.leaves(whole.abstract.frozen), strict=True):
        names = [axis for axes in before.sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())]
        ways = 16 if "fsdp" in names else 1
        shards = [math.prod(x.sharding.shard_shape(x.shape)) for x in (before, now)]
        assert shards[1] == ways * shards[0]
    kernel = whole.shardings.frozen["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.spec == PartitionSpec(None, None, "tensor")


def test_a_place_for_frozen_parameters_that_is_unknown():
    config = stage3.get_config()
    config.stage3.frozen = "anywhere"
    with pytest.raises(UserError, match=r"stage3\.frozen: must be split or whole, not 'anywhere'"):
        recipe.stages(config)


def test_frozen_weights_that_are_unknown():
    config = stage3.get_config()
    config.stage3.frozen_weights = "int4"
    with pytest.raises(UserError, match=r"stage3\.frozen_weights: must be float or int8, not 'int4'"):
        recipe.stages(config)


def test_constraints_do_nothing_without_a_mesh():
    x = jnp.ones((4, 6))
    assert constrain(x, None, "width") is x
    with sharding.use_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, None, "width") is x
    with pytest.raises(ValueError, match="do not fit an array of shape"):
        constrain(x, "width")
    with pytest.raises(ValueError, match="do not fit"):
        constrain(x, None, "wdith")
    with pytest.raises(ValueError, match="missing or unknown"), activation_rules({"width": ()}):
        pass


# Several devices need a process of their own: their number is settled before JAX starts.


def start(out: Path, meshes: Sequence[str], devices: int, *options: str, program: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.flags(devices),
    }
    command = [sys.executable, str(PROGRAMS / program), *meshes, *options, f"--out={out}/{{}}.npz"]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*running: subprocess.Popen) -> None:
    try:
        for process in running:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()


def one_process(out: Path, program: str) -> None:
    """One device, and eight."""
    finish(start(out, ["1x1x1", "2x2x2"], 8, program=program))


def two_processes(out: Path, program: str, mesh: str, devices: int) -> None:
    """Of so many devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ("--processes=2", f"--port={port}")
    finish(*(start(out, [mesh], devices, *shared, f"--process={i}", program=program) for i in range(2)))


def compare(path: Path, one_device: Path, devices: int, share: float) -> None:
    found, expected = dict(np.load(path)), dict(np.load(one_device))
    assert (found.pop("devices"), expected.pop("devices")) == (devices, 1)
    assert (found.pop("share"), expected.pop("share")) == (pytest.approx(share), 1)
    assert found.keys() == expected.keys()
    assert any(name.endswith("kernel") and value.std() > 0 for name, value in expected.items())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("program", ["sharded_step.py", "sharded_answers.py"], ids=["llm", "answers"])
def test_eight_devices_and_two_processes_equal_one_device(tmp_path, program):
    """Two steps of a language model; the cross-entropy of answers."""
    one_process(tmp_path, program)
    compare(tmp_path / "2x2x2.npz", tmp_path / "1x1x1.npz", 8, share=1 / 4)
    two_processes(tmp_path, program, "2x2x1", devices=2)
    compare(tmp_path / "2x2x1.npz", tmp_path / "1x1x1.npz", 4, share=1 / 2)


@pytest.mark.heavy
def test_devices_of_two_processes_equal_one_device(tmp_path):
    """A step of the whole network, with tracking, which takes more than a minute to compile for each mesh.

    Videos run in turn on each device, which has all axes of the second mesh for itself, but not tensor of the first.
    """
    program = "sharded_training.py"
    finish(start(tmp_path, ["1x1x1"], 1, program=program))
    two_processes(tmp_path, program, "2x2x2", devices=4)
    compare(tmp_path / "2x2x2.npz", tmp_path / "1x1x1.npz", 8, share=1 / 4)
    two_processes(tmp_path, program, "2x2x1", devices=2)
    compare(tmp_path / "2x2x1.npz", tmp_path / "1x1x1.npz", 4, share=1 / 2)


def test_tiny_model_has_shardings():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = jax.tree.leaves(sharding.parameter_shardings(tiny(), mesh))
    assert found
    assert all(x.is_fully_replicated for x in found)
