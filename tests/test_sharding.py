"""The rules of sharding, and one small step on 1 and on 8 virtual devices, in one and in two processes."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from virst_jax.config import tiny, virst_7b
from virst_jax.errors import UserError
from virst_jax.models.layers import AXES
from virst_jax.ops.constrain import ACTIVATIONS, activation_rules, constrain
from virst_jax.parallel import sharding

HERE = Path(__file__).parent
SNAPSHOTS = HERE / "data" / "sharding"
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
    with pytest.raises(UserError, match="fsdp=256 divides no axis of the parameter sam2/image_encoder"):
        sharding.parameter_specs(virst_7b(), mesh_of(1, 256, 1))


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

PROGRAM = """
import dataclasses, json, os, sys
import flax, jax, jax.numpy as jnp, numpy as np, optax
data, fsdp, tensor, process, processes, port, out = map(str, sys.argv[1:])
if int(processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process))
from virst_jax.parallel import sharding
from virst_jax.config import Compute, LoraConfig, QwenConfig
from virst_jax.models.qwen2 import Qwen2
from virst_jax.ops.constrain import constrain

cfg = QwenConfig(64, 32, 64, 2, 4, 2, lora=LoraConfig(rank=4))
model = Qwen2(cfg, Compute(remat="full"))
boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 32)), None))["params"]
params = flax.linen.unbox(boxed)
rng = np.random.default_rng(0)
host = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), params)
batch = {"ids": rng.integers(64, size=(8, 3, 10)).astype(np.int32), "weight": rng.random((8, 3, 10), np.float32)}
mesh = sharding.make_mesh(int(data), int(fsdp), int(tensor))
is_box = lambda x: isinstance(x, flax.linen.meta.AxisMetadata)
names = jax.tree.map(lambda b: b.names, boxed, is_leaf=is_box)
specs = {path: sharding.partition("/".join(path), leaf.shape, flax.traverse_util.flatten_dict(names)[path], mesh, 0)
         for path, leaf in flax.traverse_util.flatten_dict(params).items()}
shardings = flax.traverse_util.unflatten_dict(
    {path: jax.sharding.NamedSharding(mesh, spec) for path, spec in specs.items()})
optimizer = optax.adam(1e-2, eps=1e-2)
opt_shardings = sharding.state_shardings(jax.eval_shape(optimizer.init, params), shardings, params, mesh)

def step(params, opt_state, batch):
    def of_row(ids, weight, params):
        embeds = model.apply({"params": params}, ids, method=Qwen2.embed)
        hidden = model.apply({"params": params}, embeds, None)
        logits = model.apply({"params": params}, hidden, method=Qwen2.logits)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return (loss * weight[:, 1:]).mean()
    def loss(params):
        params = sharding.replicate(params, ("norm",))
        rows = jax.vmap(of_row, (0, 0, None), spmd_axis_name=sharding.BATCH_AXES)(batch["ids"], batch["weight"], params)
        return rows.mean()
    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

with sharding.use_mesh(mesh):
    placed = sharding.put_global(host, shardings)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(placed)
    index, count = sharding.process_share(mesh)
    rows = 8 // count
    local = jax.tree.map(lambda x: x[index * rows : (index + 1) * rows], batch)
    run = jax.jit(step, out_shardings=(shardings, opt_shardings, sharding.replicated(mesh)))
    for _ in range(2):
        placed, opt_state, value = run(placed, opt_state, sharding.global_batch(local, mesh))
        jax.block_until_ready(value)
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(placed)
kernel = placed["layers"]["mlp"]["up_proj"]["kernel"]
share = kernel.addressable_shards[0].data.size / kernel.size
if int(process) == 0:
    flat = {"/".join(k): np.asarray(v) for k, v in flax.traverse_util.flatten_dict(whole).items()}
    np.savez(out, loss=np.asarray(value), share=share, devices=jax.device_count(), **flat)
"""


TRAINING = """
import dataclasses, sys
import flax, jax, jax.numpy as jnp, numpy as np
data, fsdp, tensor, process, processes, port, out = map(str, sys.argv[1:])
if int(processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process))
from virst_jax.parallel import sharding
from virst_jax.config import Compute, HieraConfig, tiny
from virst_jax.training.losses import VideoBatch
from virst_jax.models.virst import Virst
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state, make_train_step

cfg = tiny()
hiera = dataclasses.replace(cfg.sam2.hiera, stages=(1, 1, 1, 1), global_att_blocks=(2,))
cfg = dataclasses.replace(
    cfg,
    llm=dataclasses.replace(cfg.llm, num_layers=2, vocab_size=1023),
    vision=dataclasses.replace(cfg.vision, depth=3, image_size=64, pretrained_grid=4),
    sam2=dataclasses.replace(cfg.sam2, hiera=hiera, memory_layers=1, decoder_layers=1, memory_kernel=3,
                             memory_fuser_layers=1, num_multimask=1),
    compute=Compute(attention="plain"),
)
B, O, L, T, A, N, side, image = 4, 2, 100, 3, 2, 2, 64, 128
rng = np.random.default_rng(0)
batch = dict(
    clips=rng.integers(256, size=(B, 1, 4, side, side, 3)).astype(np.uint8),
    token_ids=rng.integers(1000, size=(B, O, L)).astype(np.int32),
    visual_index=np.tile(np.r_[[-1] * 8, :64, [-1] * 28].astype(np.int32), (B, O, 1)),
    labels=np.where(np.arange(L) < 80, -100, rng.integers(1000, size=(B, O, L))).astype(np.int32),
    mask=np.ones((B, O, L), bool),
    seg_positions=np.tile(np.arange(90, 90 + N, dtype=np.int32), (B, O, 1)),
    frames=rng.integers(256, size=(B, T, image, image, 3)).astype(np.uint8),
    targets=rng.random((B, O, T, image, image)) > 0.7,
    anchors=np.tile(np.int32([0, 2]), (B, 1)),
    frames_used=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
)
batch["token_ids"][:, :, :72] = batch["token_ids"][:, :1, :72]
mesh = sharding.make_mesh(int(data), int(fsdp), int(tensor))
optim = OptimConfig(learning_rate=1e-3, warmup_steps=1, eps=1e-2, ema=0.5)
groups = (("occ_predictor/.*", 0.0), ("vision/.*", 0.0), (".*", 1.0))
shapes, _ = sharding.logical_axes(cfg)
parameters = sharding.parameter_shardings(cfg, mesh, replicate_below=0)
abstract = jax.eval_shape(lambda p: init_state(cfg, optim, groups, p), shapes)
shardings = sharding.state_shardings(abstract, parameters, shapes, mesh)
step = make_train_step(cfg, optim, groups, mesh_axes=sharding.BATCH_AXES, dropout=False)
with sharding.use_mesh(mesh):
    draw = np.random.default_rng(1)
    host = jax.tree.map(lambda x: (0.05 * draw.standard_normal(x.shape)).astype(np.float32), shapes)
    begin = jax.jit(lambda p: init_state(cfg, optim, groups, p), out_shardings=shardings)
    state = begin(sharding.put_global(host, parameters))
    index, count = sharding.process_share(mesh)
    rows = B // count
    local = {name: x[index * rows : (index + 1) * rows] for name, x in batch.items()}
    placed = VideoBatch(**sharding.global_batch(local, mesh), shared=72)
    run = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
    state, metrics = run(state, placed)
    jax.block_until_ready(state)
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(state)
kernel = state.params["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
share = kernel.addressable_shards[0].data.size / kernel.size
assert bool(metrics["finite"])
if int(process) == 0:
    flat = {"/".join(k): np.asarray(v) for k, v in flax.traverse_util.flatten_dict(whole.params).items()}
    flat |= {"metric/" + k: np.asarray(v) for k, v in metrics.items()}
    np.savez(out, share=share, devices=jax.device_count(), **flat)
"""


def start(
    out: Path,
    sizes: tuple[int, int, int],
    devices: int,
    process: int = 0,
    processes: int = 1,
    port: int = 0,
    program: str = PROGRAM,
):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true",
    }
    arguments = [*map(str, sizes), str(process), str(processes), str(port), str(out)]
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*running: subprocess.Popen) -> None:
    try:
        for process in running:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "one.npz"
    finish(start(out, (1, 1, 1), 1))
    return dict(np.load(out))


def compare(out: Path, one_device: dict, devices: int, share: float) -> None:
    found = dict(np.load(out))
    assert found.pop("devices") == devices
    assert found.pop("share") == pytest.approx(share)
    expected = {name: value for name, value in one_device.items() if name not in ("devices", "share")}
    assert found.keys() == expected.keys()
    assert any(name.endswith("layers/mlp/up_proj/kernel") and value.std() > 0 for name, value in expected.items())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


def test_eight_devices_equal_one(tmp_path, one_device):
    finish(start(tmp_path / "eight.npz", (2, 2, 2), 8))
    compare(tmp_path / "eight.npz", one_device, 8, share=1 / 4)


def two_processes(out: Path, program: str = PROGRAM) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish(*(start(out, (2, 2, 1), 2, process=i, processes=2, port=port, program=program) for i in range(2)))


def test_two_processes_equal_one(tmp_path, one_device):
    two_processes(tmp_path / "two.npz")
    compare(tmp_path / "two.npz", one_device, 4, share=1 / 2)


@pytest.mark.heavy
def test_training_step_of_the_whole_network(tmp_path):
    """With tracking: 2 x 2 x 2 devices, and two processes of two, give what one device gives."""
    finish(start(tmp_path / "one.npz", (1, 1, 1), 1, program=TRAINING))
    one = dict(np.load(tmp_path / "one.npz"))
    finish(start(tmp_path / "eight.npz", (2, 2, 2), 8, program=TRAINING))
    compare(tmp_path / "eight.npz", one, 8, share=1 / 4)
    two_processes(tmp_path / "two.npz", TRAINING)
    compare(tmp_path / "two.npz", one, 4, share=1 / 2)


def test_tiny_model_has_shardings():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = jax.tree.leaves(sharding.parameter_shardings(tiny(), mesh))
    assert found
    assert all(x.is_fully_replicated for x in found)
