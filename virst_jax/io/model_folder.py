"""A model on disk: a folder with Orbax parameters, config.json and the tokenizer.

MODEL/params/       Orbax, one array a parameter (stacked layers are one)
MODEL/config.json   the VirstConfig
MODEL/tokenizer/    the Qwen2 tokenizer's files, if the model has one
MODEL/digests.json  of parameters and files, compared when the model is loaded; older folders have none
"""

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from virst_jax.config import VirstConfig, from_json, to_json
from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, digests, regular, remote
from virst_jax.models.virst import boxed_shapes
from virst_jax.ops.quantized import is_scale
from virst_jax.parallel import processes
from virst_jax.types import Params, PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

PARAMS, CONFIG, TOKENIZER = "params", "config.json", "tokenizer"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
SKIP_CHECK = "VIRST_SKIP_CHECK"  # environment variable
FLOAT32 = "sam2/prompt_encoder/"  # stays float32, as in the release, whatever the rest computes in: it places points
Config = TypeVar("Config")
CHUNK_BYTES = 1 << 28  # of the stored arrays: hosts of a pod read their shards, not whole arrays


@functools.cache
def parameter_shapes(cfg: VirstConfig) -> PyTree:
    """Shape and dtype of every parameter of a network, computing none: a tree of jax.ShapeDtypeStruct."""
    return nn.meta.unbox(boxed_shapes(cfg))


class _OneByOne(type_handlers.NumpyHandler):
    """Writes numpy arrays one after another and without copies: together they may be larger than memory."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values)):
            for pending in await super().serialize([value], [info], [arg]):
                pending.result()
        return []


def _is_told(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in ("Skipping merge of OCDBT", "object size logging disabled"))


def quiet_shards() -> None:
    """Keeps Orbax from warnings of what is asked of it: a process that writes alone, and a file for each shard."""
    logging.getLogger("absl").addFilter(_is_told)


def one_process() -> ocp.options.MultiprocessingOptions:
    """Orbax's options for a process that waits for no other."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    # None: each is the first among those that it knows of, itself
    return ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )


def write_parameters(path: "Place", params: Params, *, shared: bool = True) -> None:
    """Writes a parameter tree with Orbax, uncompressed: random bits of weights do not shrink.

    Args:
      path: of a folder that all processes see.
      shared: if not, `path` is of a folder of this process. It gets its shards, each a file, so that the files of all
        processes together are the whole tree.
    """
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, _OneByOne(deepcopy_host_arrays=False)), (jax.Array, type_handlers.ArrayHandler())
    )
    if not shared:
        quiet_shards()
    options = ocp.options.MultiprocessingOptions() if shared else one_process()
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=shared, use_compression=False, type_handler_registry=registry, multiprocessing_options=options
    )
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        try:
            checkpointer.save(buckets.absolute(path), args=ocp.args.PyTreeSave(dict(params), save_args=arguments))
        except ValueError as error:
            # tensorstore reports a full disk so
            if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def save_model(path: "Place", cfg: VirstConfig, params: Params, tokenizer: Path | None) -> None:
    """Writes a model folder, which appears whole. All processes of a run call it together.

    Args:
      path: of the folder; one in a bucket is emptied first of what an earlier call has left.
      params: of `Virst(cfg)`, arrays on the host or, sharded or not, on devices.
      tokenizer: folder to copy the tokenizer's files from.

    Raises:
      UserError: the folder exists or cannot be written, or `tokenizer` holds none.
    """

    def describe(part: "Place", written: Params | None) -> None:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, part / TOKENIZER)
        write_description(part, cfg, written)

    save_folder(path, params, describe)


def save_folder(path: "Place", params: Params, describe: Callable[["Place", Params | None], None]) -> None:
    """As `save_model`. describe: writes the rest into a folder, given what was written there; None: read it back."""
    if not buckets.takes_orbax(path):
        _send_folder(path, params, describe)
        return
    with _new_folder(path) as part:
        write_parameters(part / PARAMS, params)  # every process its shards
        if processes.is_main():
            # another process's shards are read back
            describe(part, params if jax.process_count() == 1 else None)


def _send_folder(path: "Place", params: Params, describe: Callable[["Place", Params | None], None]) -> None:
    """As `save_folder`, where Orbax does not write: every process writes its shards to its disk, and sends them."""
    if processes.is_main():
        buckets.remove(path)
    processes.barrier("new folder")
    with remote.outbox(path, jax.process_index()) as part:
        write_parameters(part / PARAMS, params, shared=False)
        buckets.send(part, path, buckets.files_below(part))
        processes.barrier("folder written", buckets.PATIENCE)
        if processes.is_main():
            alone = jax.process_count() == 1
            if not alone:
                shutil.rmtree(part / PARAMS)
                copy = remote.fetch(path / PARAMS)  # with the shards of the others
                copy.rename(part / PARAMS)
                remote.drop(copy)
            describe(part, params if alone else None)
            last = part / digests.FILE  # without it a folder is not whole
            rest = [f for f in buckets.files_below(part) if f != last and PARAMS not in f.relative_to(part).parts]
            buckets.send(part, path, rest)
            buckets.send(part, path, [last])
    processes.barrier("folder there", buckets.PATIENCE)


@contextlib.contextmanager
def _new_folder(path: "Place") -> Iterator["Place"]:
    """As atomic.new_folder, for all processes together: the main one makes the folder, and gives it its name.

    Nothing is renamed in a bucket: there `write_description` ends with the file that makes it whole.
    """
    if buckets.is_bucket(path):
        if processes.is_main():
            buckets.remove(path)
        processes.barrier("new folder")
        yield buckets.place(path)
        processes.barrier("folder written")
    elif processes.is_main():
        with atomic.new_folder(path) as part:
            processes.from_main("new folder", part.name)
            yield part
            processes.barrier("folder written")
    else:
        yield path.with_name(processes.from_main("new folder"))
        processes.barrier("folder written")
    processes.barrier("folder there")


def is_whole(path: "Place", config: str = CONFIG) -> bool:
    """Whether there is a model folder; `config` is the name of its config's file.

    Raises:
      UserError: there is one without that, as several processes of an earlier version left it when killed.
    """
    if buckets.is_bucket(path):
        return (path / digests.FILE).is_file()
    if path.exists() and not (path / config).is_file():
        raise UserError(f"{path}: is not a whole model ({config} is missing); remove it and run the same command again")
    return path.exists()


def write_description(folder: "Place", cfg: VirstConfig, params: Params | None) -> None:
    """Writes what a folder needs beside parameters and tokenizer: config.json and, last, digests.json.

    Args:
      params: what was written; None: it is read from the folder.
    """
    atomic.write_text(folder / CONFIG, to_json(cfg))
    tensors = read_parameters(folder) if params is None else named(params)
    digests.write(folder, tensors, (CONFIG, TOKENIZER, PARAMS))


def named(params: Params) -> Iterator[tuple[str, Any]]:
    """Parameters with their names, the keys that lead to them joined by "/"."""
    return (("/".join(key), value) for key, value in flax.traverse_util.flatten_dict(params).items())


def check_folder(path: str | PurePath, tensors: Iterator[tuple[str, np.ndarray]]) -> tuple[int, int] | None:
    """Compares every parameter and every file of a folder with its digest.

    Args:
      tensors: names and values of the parameters as stored; nothing is read where there are no digests.

    Returns:
      How many parameters and files were compared; None: the folder has no digests.

    Raises:
      UserError: something is damaged.
    """
    stated = digests.read(path)
    if stated is None:
        return None
    files = digests.check_files(path, stated, limit=None)
    return digests.check_tensors(path, stated, tensors), files


def check_model(path: str | PurePath) -> tuple[int, int] | None:
    """As `check_folder`, of a model folder."""
    return check_folder(path, read_parameters(path))


def copy_tokenizer(source: Path, target: "Place") -> None:
    """Copies a tokenizer's files.

    Raises:
      UserError: `source` holds no tokenizer.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise UserError(f"{source}: holds no tokenizer (vocab.json and merges.txt); name its folder with --tokenizer")
    target.mkdir()
    for name in names:
        atomic.write_bytes(target / name, (source / name).read_bytes())


def read_config(path: str | PurePath) -> VirstConfig:
    """The config of a model folder.

    Raises:
      UserError: no model folder, or a broken config.
    """
    file = buckets.place(path) / CONFIG
    if not file.is_file():
        raise UserError(f"{path}: no model ({CONFIG} is missing); give a folder that the converter wrote")
    return from_json(regular.read_text(file, digests.AGAIN), str(file))


def read_parameters(
    path: str | PurePath, budget: int = 1 << 30, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters of a model folder as stored, one after another, for models larger than memory.

    Args:
      budget: bytes that are read at a time; a larger parameter is read alone.
      share: (i, n): the i-th of n parts of them only.

    Yields:
      The keys of the parameter tree joined by "/", and the values.

    Raises:
      UserError: broken.
    """
    _, stored = stored_shapes(path)
    yield from read_arrays(buckets.absolute(buckets.place(path) / PARAMS), stored, budget, share)


def read_arrays(
    folder: "Place", stored: PyTree, budget: int = 1 << 30, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, np.ndarray]]:
    """As `read_parameters`, of a folder that Orbax wrote and what `stored_of` tells of it."""
    flat = flax.traverse_util.flatten_dict(stored)
    batches: list[list[tuple[str, ...]]] = []
    room = 0
    for key, leaf in list(flat.items())[share[0] :: share[1]]:
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if not batches or size > room:
            batches.append([])
            room = budget
        batches[-1].append(key)
        room -= size
    with open_reader(ocp.PyTreeCheckpointHandler) as checkpointer:
        for keys in batches:
            item = flax.traverse_util.unflatten_dict(dict.fromkeys(keys, 0))
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            request = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            try:
                with _quiet():
                    restored = flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=request))
            except Exception as error:
                raise _broken(folder, error) from error
            for key in keys:
                yield "/".join(key), restored.pop(key)


def _broken(folder: "Place", error: Exception) -> UserError:
    # Orbax and TensorStore raise bare Exceptions of a hundred lines; the cause lies at the end of the chain
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    first = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
    return UserError(f"{folder}: broken parameters ({first[:160]}); convert or copy the model again")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what its exceptions say, and what is of no use here."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def stored_shapes(path: str | PurePath) -> tuple[VirstConfig, PyTree]:
    """The config of a model folder, and shape and dtype of what it stores: a tree of Orbax metadata.

    Raises:
      UserError: no model folder, a broken one, or parameters that do not fit its config.
    """
    return stored_of(path, read_config(path), parameter_shapes, CONFIG)


def stored_of(
    path: str | PurePath, cfg: Config, shapes_of: Callable[[Config], PyTree], file: str
) -> tuple[Config, PyTree]:
    """The config of a folder, and shape and dtype of what it stores.

    Args:
      shapes_of: the parameters that a config asks for.
      file: the name of the config's file, for messages.

    Raises:
      UserError: broken parameters, or parameters that do not fit the config.
    """
    try:
        wanted = shapes_of(cfg)
    except Exception as error:  # sizes that do not fit each other end in errors of any module
        raise UserError(
            f"{Path(path) / file}: no network can be built by it ({atomic.reason(error)}); {digests.AGAIN}"
        ) from error
    return cfg, _stored_arrays(buckets.absolute(buckets.place(path) / PARAMS), wanted, file)


def _stored_arrays(folder: "Place", wanted: PyTree, config: str) -> PyTree:
    """Shape and dtype of the arrays in a folder that Orbax wrote: a tree of its metadata.

    Args:
      wanted: a tree of arrays or shapes that should be there.
      config: the file that asks for them.

    Raises:
      UserError: broken, or other arrays than those wanted.
    """
    regular.require_plain(folder, digests.AGAIN)
    with open_reader() as checkpointer:
        try:
            with _quiet():
                stored = checkpointer.metadata(folder).item_metadata
            stored = stored.tree if hasattr(stored, "tree") else stored
        except Exception as error:
            raise _broken(folder, error) from error
    if not stored:
        raise _broken(folder, ValueError("their list cannot be read" if folder.is_dir() else "there are none"))
    _compare_shapes(str(folder), stored, wanted, config)
    return stored


def open_reader(handler: Any = None) -> Any:
    """An Orbax checkpointer, by default a StandardCheckpointer, that waits for no other process.

    Each reads its shards, or a model of its own.
    """
    options = one_process()
    if handler is not None:
        return ocp.Checkpointer(handler(multiprocessing_options=options), multiprocessing_options=options)
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def load_model(
    path: str | PurePath, dtype: str | None = None, shardings: PyTree = None, *, check: bool = True
) -> tuple[VirstConfig, PyTree]:
    """Reads a model folder. Waits for no other process: each reads what its devices hold.

    Args:
      dtype: of the parameters, but of those under FLOAT32 and of integers with their scales, which keep theirs; None:
        as stored.
      shardings: a tree of jax.sharding.Sharding like the parameters; None: the first device of this process.
      check: compare the parameters with their digests, if the folder has any. The environment variable
        VIRST_SKIP_CHECK turns it off, too.

    Returns:
      The config and the parameters.

    Raises:
      UserError: no model folder, a broken one, or parameters that do not fit its config.
    """
    cfg, stored = stored_shapes(path)
    return cfg, load_parameters(path, stored, dtype, shardings, FLOAT32, check=check)


def load_parameters(
    path: str | PurePath, stored: PyTree, dtype: str | None, shardings: PyTree, fixed: str, *, check: bool = True
) -> PyTree:
    """The parameters of a folder, compared with their digests.

    Args:
      stored: of the folder's parameters, from `stored_of`.
      dtype, shardings, check: as in `load_model`.
      fixed: beginning of the paths that keep their dtype.

    Raises:
      UserError: broken.
    """
    folder = (Path(path) / PARAMS).absolute()
    target = _array_target(stored, dtype, shardings, fixed)
    stated = _digests_to_check(path) if check else None
    # values of another dtype, or on other hosts, are not what was saved: then the stored ones are read once more
    same = jax.tree.map(lambda have, want: have.dtype == want.dtype, stored, target)
    at_once = jax.process_count() == 1 and all(jax.tree.leaves(same))
    if stated is not None:
        digests.check_files(path, stated)
        if not at_once:
            share = (jax.process_index(), jax.process_count())
            digests.check_tensors(path, stated, read_arrays(folder, stored, share=share))
    params = _load_arrays(folder, target)
    if stated is not None and at_once:
        digests.check_tensors(path, stated, named(params))
    _check_scales(path, params)
    return params


def _check_scales(path: str | PurePath, params: Params) -> None:
    """Refuses scales of integers that are no positive numbers, which digests that are left out would not find."""
    for name, value in named(params):
        if is_scale(name):
            shards = [np.asarray(shard.data) for shard in value.addressable_shards]
            if not all((np.isfinite(shard) & (shard > 0)).all() for shard in shards):
                raise UserError(f"{path}: damaged: {name} holds what is no positive number; {digests.AGAIN}")


def _array_target(stored: PyTree, dtype: str | None, shardings: PyTree, fixed: str) -> PyTree:
    """What `_load_arrays` shall read: shapes with dtypes and shardings."""
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), stored)

    def wanted(path: tuple[Any, ...], have: PyTree, sharding: PyTree) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        keeps = dtype is None or name.startswith(fixed) or is_scale(name) or not jnp.issubdtype(have.dtype, np.floating)
        return jax.ShapeDtypeStruct(have.shape, have.dtype if keeps else dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(wanted, stored, shardings)


def _load_arrays(folder: "Place", target: PyTree) -> PyTree:
    """The arrays of a folder that Orbax wrote, on devices. Raises UserError: broken."""
    with open_reader() as checkpointer:
        try:
            with _quiet():
                return checkpointer.restore(folder, target)
        except Exception as error:
            raise _broken(folder, error) from error


def _digests_to_check(path: str | PurePath) -> digests.Digests | None:
    stated = digests.read(path)
    if stated is not None and os.environ.get(SKIP_CHECK):
        print(f"{path}: its parameters are not compared with their digests ({SKIP_CHECK} is set)", file=sys.stderr)
        return None
    return stated


def _compare_shapes(where: str, stored: PyTree, wanted: PyTree, config: str) -> None:
    have = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(stored)}
    want = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(wanted)}
    wrong = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{where}: {len(wrong)} parameters do not fit {config}, first {name}: stored "
            f"{have.get(name, 'not at all')}, config {want.get(name, 'none')}; the folder's parts belong to "
            "different models"
        )
    kinds = {jax.tree_util.keystr(k): _kind(v.dtype) for k, v in jax.tree_util.tree_leaves_with_path(wanted)}
    for key, leaf in jax.tree_util.tree_leaves_with_path(stored):
        name = jax.tree_util.keystr(key)
        if _kind(leaf.dtype) != kinds[name]:
            raise UserError(
                f"{where}: {name} is stored as {leaf.dtype}, {config} asks for {kinds[name]}; the folder's parts "
                "belong to different models"
            )


def _kind(dtype: Any) -> str:
    """An integer type by its name; all floating-point types are one kind, which is cast when it is loaded."""
    return "floating point" if jnp.issubdtype(dtype, np.floating) else str(np.dtype(dtype))
