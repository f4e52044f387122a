"""How parameters, optimizer state, batches and activations are split over a mesh of devices.

The mesh has three axes. `data`: copies of the parameters, each with its own share of the batch. `fsdp`: shares of
the parameters, and of the batch; a layer's weights are gathered when it runs. `tensor`: shares of the language model's
and the video encoder's heads and hidden units, on the same batch. Over several TPU slices `data` and `fsdp` extend by
`dcn_data` and `dcn_fsdp`. Modules name logical axes (models.layers.AXES,
ops.constrain.ACTIVATIONS); the tables here are the only place that gives them mesh axes.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from virst_jax.config import TrackerConfig, VirstConfig
from virst_jax.errors import UserError
from virst_jax.models.layers import AXES
from virst_jax.models.tree import flatten, unflatten
from virst_jax.models.virst import boxed_shapes
from virst_jax.ops.constrain import activation_rules
from virst_jax.ops.splash import sharded_over
from virst_jax.types import Params, PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The mesh axes that an axis of a parameter may be split over, the first that fits is taken: it divides the axis and no
# other axis of the parameter has it.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),  # of a scan: every device runs every layer
    "vocab": ("tensor",),  # 151647 has few divisors: falls through to the other axis
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "qkv": (),
    "lora": (),
    "norm": (),
    "token": (),
    "grid": (),
    "kernel": (),
    "group": (),
    "conv_in": ("fsdp",),
    "conv_out": ("tensor",),
}
NEVER_SPLIT = frozenset({"layers", "qkv", "kernel", "group", "grid", "token"})  # not even when nothing else is left

REPLICATE_BELOW = 2**16  # elements of one layer; smaller parameters are not worth a collective
SHARD_ABOVE = 2**20  # elements; a larger parameter that is split over no axis is an error

ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "width": (),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}

# Small parts: the tracker runs in loops over frames, and its weights would be gathered for every frame; the fusion has
# more rows than weights.
GATHERED = ("sam2", "second_fusion")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn_data: int = -1,
    dcn_fsdp: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices with axes data, fsdp and tensor, partitioned by the compiler (AxisType.Auto).

    Of several TPU slices, which the data-centre network (DCN) joins, an axis has its size within a slice times the
    number of slices that it extends over.

    Args:
      data, fsdp, tensor: sizes within a slice; one of them may be -1: what the others leave.
      dcn_data, dcn_fsdp: over how many slices data and fsdp extend; one of them may be -1. Without slices: 1 or -1.
      devices: None: jax.devices(), those of all processes.

    Raises:
      UserError: the sizes do not make up the number of devices or of slices, or slices of different sizes.
    """
    everything = list(jax.devices() if devices is None else devices)
    slices = Counter(getattr(device, "slice_index", 0) for device in everything if device.platform == "tpu")
    if len(set(slices.values())) > 1:
        raise UserError(
            f"the slices have different numbers of chips, {sorted(slices.values())}; use slices of one size"
        )
    count = max(1, len(slices))
    of_slices = _filled({"dcn_data": dcn_data, "dcn_fsdp": dcn_fsdp}, "slices", count)
    owner = "devices" if count == 1 else "devices of a slice"
    sizes = _filled({"data": data, "fsdp": fsdp, "tensor": tensor}, owner, len(everything) // count)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if count > 1:
        placed = mesh_utils.create_hybrid_device_mesh(
            sizes, (*of_slices, 1), devices=everything, allow_split_physical_axes=True
        )
        return Mesh(placed, MESH_AXES, axis_types=types)
    if everything[0].platform == "tpu":
        # neighbours on the wire become neighbours on the mesh; 32 chips of a 16 x 16 torus are one axis and part of one
        placed = mesh_utils.create_device_mesh(sizes, devices=everything, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)
    return Mesh(np.array(everything).reshape(sizes), MESH_AXES, axis_types=types)


def _filled(asked: Mapping[str, int], of: str, count: int) -> tuple[int, ...]:
    """Sizes whose product is `count`, with what the others leave in place of -1."""
    shown = " x ".join(f"{name}={size}" for name, size in asked.items())
    sizes = list(asked.values())
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {shown}: sizes are positive, and one of them may be -1 (the rest of the {count} {of})")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"mesh {shown}: {known} {'does not divide' if -1 in sizes else 'is not'} the number of {of}, {count}; "
            f"choose sizes whose product is {count}, each one of {divisors}"
        )
    return tuple(sizes)


def check_mesh(cfg: VirstConfig, mesh: Mesh) -> None:
    """Refuses a tensor axis that would cut heads of the language model or of the video encoder in two.

    Raises:
      UserError: names the sizes that do.
    """
    if isinstance(cfg, TrackerConfig):
        return
    heads = (cfg.llm.num_heads, cfg.llm.num_kv_heads, cfg.vision.num_heads)
    tensor = mesh.shape["tensor"]
    if any(n % tensor for n in heads):
        good = [n for n in range(1, min(heads) + 1) if all(h % n == 0 for h in heads)]
        raise UserError(
            f"mesh tensor={tensor} does not divide the {heads[0]} heads and {heads[1]} key heads of the language model "
            f"and the {heads[2]} heads of the video encoder of {cfg.name!r}; choose one of {good}"
        )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """What is traced and run inside knows the mesh: sharding constraints, activation rules, TPU kernels."""
    with (
        jax.set_mesh(mesh),
        activation_rules(ACTIVATION_RULES),
        sharded_over(batch=BATCH_AXES, heads=("tensor",)),
    ):
        yield mesh


# Parameters


@functools.lru_cache(maxsize=4)
def logical_axes(cfg: VirstConfig) -> tuple[PyTree, PyTree]:
    """Shapes (ShapeDtypeStruct) and logical axis names (tuple of str) of all parameters of `Virst(cfg)`."""
    boxed = boxed_shapes(cfg)
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    names = jax.tree.map(lambda box: tuple(getattr(box, "names", ())), boxed, is_leaf=is_box)
    return nn.unbox(boxed), names


def partition(
    path: str,
    shape: Sequence[int],
    names: Sequence[str | None],
    mesh: Mesh | AbstractMesh,
    replicate_below: int = REPLICATE_BELOW,
) -> PartitionSpec:
    """The mesh axes of one parameter.

    Every axis takes the mesh axis of its rule. A mesh axis that found no place (it does not divide, or no rule names
    it) then goes to the longest other axis that it divides, so that every mesh axis but `data` splits every parameter
    if it can. Parameters of fewer than `replicate_below` elements a layer stay whole.

    Raises:
      ValueError: an axis without a name, or a name without a rule.
      UserError: a parameter of more than SHARD_ABOVE elements that fsdp or tensor cannot split, and that is not of
        the parts that every device gathers whole in every step.
    """
    if len(names) != len(shape):
        raise ValueError(f"{path}: shape {tuple(shape)} has axis names {tuple(names)}; every axis needs one")
    unknown = [name for name in names if name not in RULES]
    if unknown:
        raise ValueError(f"{path}: no sharding rule for axis {unknown[0]!r}; known are {sorted(RULES)}")
    size = math.prod(shape)
    if math.prod(n for n, name in zip(shape, names) if name != "layers") < replicate_below:
        return PartitionSpec()
    taken: list[tuple[str, ...]] = [()] * len(shape)
    wanted = [axis for axis in MESH_AXES if axis != "data" and mesh.shape[axis] > 1]
    free = list(wanted)
    for i, name in enumerate(names):
        for axis in RULES[str(name)]:
            if axis in free and shape[i] % mesh.shape[axis] == 0:
                taken[i] = (axis,)
                free.remove(axis)
                break
    for axis in list(free):
        order = sorted(range(len(shape)), key=lambda i: -shape[i] // _parts(taken[i], mesh))
        for i in order:
            if names[i] not in NEVER_SPLIT and shape[i] % (_parts(taken[i], mesh) * mesh.shape[axis]) == 0:
                taken[i] = tuple(a for a in MESH_AXES if a in (*taken[i], axis))
                free.remove(axis)
                break
    whole_anyway = path.partition("/")[0] in GATHERED  # in every step; SAM 2's widths are multiples of 9 x 16
    if size > SHARD_ABOVE and free and len(free) == len(wanted) and not whole_anyway:
        axis = max(free, key=lambda a: mesh.shape[a])
        good = [n for n in range(2, mesh.shape[axis]) if any(d % n == 0 for d, a in zip(shape, names) if a != "layers")]
        raise UserError(
            f"mesh {axis}={mesh.shape[axis]} divides no axis of the parameter {path} {tuple(shape)}; choose a divisor "
            f"such as {max((n for n in good if n & (n - 1) == 0), default=1)} and give the rest to data"
        )
    while taken and not taken[-1]:
        taken.pop()
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in taken))


def _parts(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def parameter_specs(cfg: VirstConfig, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> PyTree:
    """PartitionSpecs in the tree of `Virst(cfg)`'s parameters; see `partition` for what it raises."""
    if missing := AXES ^ set(RULES):
        raise ValueError(f"sharding rules and logical axes disagree on {sorted(missing)}")
    shapes, names = logical_axes(cfg)
    flat_names = flatten(names)
    flat = {
        path: partition(path, leaf.shape, flat_names[path], mesh, replicate_below)
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(flat)


def parameter_shardings(cfg: VirstConfig, mesh: Mesh, replicate_below: int = REPLICATE_BELOW) -> PyTree:
    """NamedShardings in the tree of `Virst(cfg)`'s parameters; refuses what `check_mesh` and `partition` refuse."""
    check_mesh(cfg, mesh)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        parameter_specs(cfg, mesh, replicate_below),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def whole_over(shardings: PyTree, axis: str) -> PyTree:
    """The same NamedShardings, but that no array is split over this mesh axis."""

    def without(names: str | tuple[str, ...] | None) -> tuple[str, ...] | str | None:
        if isinstance(names, tuple):
            return tuple(name for name in names if name != axis) or None
        return None if names == axis else names

    def whole(where: NamedSharding) -> NamedSharding:
        return NamedSharding(where.mesh, PartitionSpec(*map(without, where.spec)))

    return jax.tree.map(whole, shardings)


def describe(cfg: VirstConfig, mesh: Mesh) -> str:
    """A line per parameter: path, shape, spec and elements a device."""
    shapes, _ = logical_axes(cfg)
    specs = flatten(parameter_specs(cfg, mesh))
    lines = [f"# {cfg.name} on " + " ".join(f"{axis}={mesh.shape[axis]}" for axis in MESH_AXES)]
    for path, leaf in flatten(shapes).items():
        spec = specs[path]
        text = ", ".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in spec) or "replicated"
        share = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        lines.append(f"{path} [{', '.join(map(str, leaf.shape))}] {text} ({share})")
    return "\n".join(lines) + "\n"


# The rest of a train state


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: PyTree, shardings: PyTree, shapes: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a train state, or of any tree that holds copies of the parameters or of some of them.

    A leaf whose path ends with the path of a parameter of the same shape (moments of Adam, accumulated gradients, an
    average of the parameters) is split like it. Others are replicated if they are small.

    Args:
      state: tree of arrays or ShapeDtypeStructs, as from jax.eval_shape.
      shardings: of the parameters, a nested dict; see `parameter_shardings`.
      shapes: the parameters or their ShapeDtypeStructs, the same tree.
      mesh: the mesh of `shardings`.

    Raises:
      ValueError: a leaf of more than SHARD_ABOVE elements mirrors no parameter.
    """
    leaves = flatten_dict(shapes)
    known = {p: (found, leaves[p].shape) for p, found in flatten_dict(shardings).items()}

    def choose(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(name for name in (_name(key) for key in path) if name is not None)
        for start in range(len(names)):
            if (found := known.get(names[start:])) and found[1] == leaf.shape:
                return found[0]
        if math.prod(leaf.shape) > SHARD_ABOVE:
            raise ValueError(f"{jax.tree_util.keystr(path)} {leaf.shape} mirrors no parameter: it would be replicated")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, state)


def _name(key: Any) -> str | None:
    """The name within a tree's path; positions in tuples and lists have none."""
    value = getattr(key, "key", getattr(key, "name", None))
    return value if isinstance(value, str) else None


def replicate(params: Params, parts: Sequence[str] = GATHERED) -> dict[str, PyTree]:
    """The same parameters with those of `parts` whole on every device; to be called within a jitted step.

    Cast to the compute dtype first: half of the bytes travel. Does nothing without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return dict(params)
    whole = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec())  # noqa: E731
    return {name: jax.tree.map(whole, part) if name in parts else part for name, part in params.items()}


# Data and placement


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the mesh does not divide.

    Raises:
      UserError: names a size that it does.
    """
    ways = _parts(BATCH_AXES, mesh)
    if batch_size % ways or batch_size < 1:
        good = max(1, round(batch_size / ways)) * ways
        raise UserError(
            f"a batch of {batch_size} videos cannot be split over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}; choose a multiple of {ways}, such as {good}"
        )


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, and how many shares there are.

    Processes whose devices differ on the tensor axis alone read the same share.

    Raises:
      UserError: a process holds rows that are no contiguous, equal share.
    """
    ways = _parts(BATCH_AXES, mesh)
    index = batch_sharding(mesh).addressable_devices_indices_map((ways,))
    rows = sorted({(slices or (slice(None),))[0].indices(ways)[0] for slices in index.values()})
    count = len(rows)
    if ways % count or rows[0] % count or rows != list(range(rows[0], rows[0] + count)):
        raise UserError(
            f"process {jax.process_index()} holds the rows {rows} of {ways}: not one equal share of the batch; let "
            "data x fsdp be a multiple of the number of processes"
        )
    return rows[0] // count, ways // count


def global_batch(local: PyTree, mesh: Mesh) -> PyTree:
    """A batch over all devices from the rows that this process has read.

    Args:
      local: tree of numpy arrays, leading axis: the rows of this process's share; see `process_share`.

    Returns:
      The same tree of jax.Arrays, the leading axis as long as all shares together.
    """
    sharding = batch_sharding(mesh)
    _, shares = process_share(mesh)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * shares, *x.shape[1:]))

    return jax.tree.map(put, local)


def put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays, the same on every process, onto the devices: every device gets its share.

    Args:
      tree: numpy arrays (memory-mapped ones are read piece by piece) or fully addressable jax.Arrays.
      shardings: a NamedSharding for every leaf, the same tree.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x[index]))

    return jax.tree.map(put, tree, shardings)
