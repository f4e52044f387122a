"""Trains VIRST: python train.py --config=NAME --workdir=DIR [--config.key=value ...]

The same command goes on where an earlier run stopped, or was killed. See virst_jax/training/recipe.py for what a
config says and configs/ for recipes; virst_jax/commands/train.py defines the arguments. With --dry-run it does
everything once, in short. With --compile-only --topology=v5e:4x4 it compiles the steps for that hardware, without it,
and prints what a device needs.

An installed package has this file as virst_jax.train; there `virst train` runs it.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from virst_jax import cli
from virst_jax.api import EMBEDDED, Model, find_folder, find_model
from virst_jax.commands import train as command
from virst_jax.config import TrackerConfig, VirstConfig, get_preset
from virst_jax.data.prompts import Tokenizer, load_tokenizer
from virst_jax.data.samples import Source, Video
from virst_jax.errors import UserError
from virst_jax.evaluation.held_out import Segment
from virst_jax.io import buckets, lock, model_folder, remote, tracker_folder
from virst_jax.models.virst import Virst
from virst_jax.parallel import compiler_flags, processes, sharding
from virst_jax.pretraining import tasks as _pretraining  # noqa: F401, adds its kinds of batch
from virst_jax.pretraining.mimetic import mimic_attention
from virst_jax.profiling.trace import Trace
from virst_jax.training import dry_run, folders, recipe
from virst_jax.training.checkpoints import METRIC, TrainCheckpoints
from virst_jax.training.evaluate import evaluate, held_out_videos
from virst_jax.training.goodput import Goodput, open_goodput
from virst_jax.training.log import TrainLog
from virst_jax.training.meter import Meter
from virst_jax.training.start import Start, StateLayout
from virst_jax.training.step import TrainState, make_train_step
from virst_jax.training.streams import Stream, choose_stream, open_streams, stage_seed
from virst_jax.training.tasks import Batch, check_kind
from virst_jax.training.time_use import CHECKPOINT, COMPILE, DATA, EVALUATION, STEPS, TimeUse
from virst_jax.training.tracking import open_tracker
from virst_jax.types import PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place

EXPORT = "model"


def train(config: ConfigDict, workdir: "Place") -> None:
    """Runs all stages of a recipe; those that have left their model are passed over."""
    run, start = open_run(config)
    stages = recipe.stages(config)
    with alone_in(workdir), sharding.use_mesh(run.mesh):
        goodput = open_goodput(config.get("goodput") or {}) if processes.is_main() else None
        for stage in stages:
            folder = workdir / stage.name
            if not folders.is_whole(folder / EXPORT, run.cfg):
                train_stage(run, stage, folder, remote.local_copy(start) if start else None, goodput=goodput)
            start = folder / EXPORT
            if goodput:
                goodput.before += stage.steps
        if goodput:
            goodput.close()


def rehearse(config: ConfigDict, workdir: "Place", each: int = dry_run.EACH) -> None:
    """Does all that `train` does once, in a folder that is removed at the end, and prints what it took.

    Every data set is read first. Then every stage takes `each` steps of every kind of batch, is stopped after one of
    each and goes on from its checkpoint, evaluates on a held-out video, and leaves a model to the next stage.

    Raises:
      UserError: what would have ended the run.
    """
    short = dry_run.in_short(config)
    run, start = open_run(short)
    stages = recipe.stages(config)
    dry_run.check_data(stages, short, run.cfg, run.tokenizer, tqdm.write if processes.is_main() else lambda _: None)
    place = workdir / dry_run.FOLDER
    reports = []
    with alone_in(workdir), sharding.use_mesh(run.mesh), thrown_away(place), processes.together():
        for stage in stages:
            folder, brief = place / stage.name, dry_run.shortened(stage, each)
            origin = remote.local_copy(start) if start else None
            begun = train_stage(run, brief, folder, origin, until=len(dry_run.used(stage)))
            rest = train_stage(run, brief, folder, origin)
            start = folder / EXPORT
            if processes.is_main():
                reports.append(dry_run.StageReport.of(stage, begun, rest, folder, EXPORT))
    if processes.is_main():
        dry_run.print_report(reports)


@contextlib.contextmanager
def thrown_away(place: "Place") -> Iterator[None]:
    """Removes a folder before, since a run that was killed leaves it behind, and after."""

    def remove() -> None:
        processes.barrier("dry run")
        if processes.is_main():
            buckets.remove(place) if buckets.is_bucket(place) else shutil.rmtree(place, ignore_errors=True)
        processes.barrier("dry run")

    remove()
    try:
        yield
    finally:
        remove()


def open_run(config: ConfigDict) -> tuple["Run", Path | None]:
    """What all stages share, and the model folder to start from (None: random parameters)."""
    mesh = sharding.make_mesh(**recipe.plain(config.mesh))
    fault = compiler_flags.known_fault(mesh.devices.flat[0].device_kind)
    if fault and processes.is_main():
        tqdm.write(fault, file=sys.stderr)
    cfg, start, tokenizer_folder = starting_point(config)
    tokenizer = load_tokenizer(tokenizer_folder, cfg.seg_token_id)
    if tokenizer.num_rows > cfg.llm.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.num_rows} tokens, the network {cfg.llm.vocab_size} rows")
    sharding.check_mesh(cfg, mesh)
    for data in (data for stage in recipe.stages(config) for data in stage.data):
        check_kind(cfg, data.batch.kind)
    return Run(config, cfg, tokenizer, tokenizer_folder, mesh, Segmenter(cfg, tokenizer)), start


@contextlib.contextmanager
def alone_in(workdir: "Place") -> Iterator[None]:
    """Holds the folder, which is made if it is not there, against other runs.

    Raises:
      UserError: another run is at work there.
    """
    if not processes.is_main():  # of one run, which the main process locks
        yield
        return
    with lock.exclusive(workdir):
        yield


def starting_point(config: ConfigDict) -> tuple[VirstConfig, Path | None, Path]:
    """The network, the model folder to start from (None: random parameters), and the tokenizer's folder."""
    start = find_start(config.model.init) if config.model.init else None
    base = folders.read_config(start) if start else get_preset(config.model.preset)
    cfg = recipe.network(base, config)
    if config.model.tokenizer:
        return cfg, start, remote.local_copy(config.model.tokenizer)
    if start is None or isinstance(cfg, TrackerConfig):  # a tracker alone reads no text
        return cfg, start, EMBEDDED["tiny"] / model_folder.TOKENIZER
    return cfg, start, start / model_folder.TOKENIZER


def find_start(name: str) -> Path:
    """The folder of a model or of a tracker alone. Raises UserError: there is none."""
    folder = find_folder(name)
    return folder if tracker_folder.is_tracker(folder) else find_model(name)


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    config: ConfigDict  # the recipe
    cfg: VirstConfig
    tokenizer: Tokenizer
    tokenizer_folder: Path
    mesh: Mesh
    segmenter: "Segmenter"


def train_stage(
    run: Run,
    stage: recipe.Stage,
    folder: "Place",
    start: Path | None,
    *,
    goodput: Goodput | None = None,
    until: int | None = None,
) -> TimeUse:
    """Trains one stage from the model in `start` (None: random parameters), or from the stage's last checkpoint.

    Args:
      goodput: is told where the time goes.
      until: the step to leave off at, with a checkpoint and without a model, as a stop does; None: at the end.
    """
    config, cfg, mesh = run.config, run.cfg, run.mesh
    use = TimeUse(listener=goodput)
    seed = stage_seed(int(config.seed), stage.name)
    layout = StateLayout.of(cfg, stage, mesh)
    checkpoints = TrainCheckpoints(folder / "checkpoints", config.checkpoint.keep)
    begin = checkpoints.latest_step() or 0
    if goodput:
        goodput.go_on(begin)
    streams = open_streams(
        stage,
        cfg,
        run.tokenizer,
        mesh,
        seed=seed,
        step=begin,
        data_root=config.data_root,
        threads=config.threads,
        workers=config.workers,
    )
    steps = {name: compile_step(run, stage, layout, stream, seed) for name, stream in streams.items()}
    origin = Start(cfg, stage, layout, mesh, start, int(config.seed), initialize=random_parameters(cfg))
    state = checkpoints.restore(begin, layout.abstract, origin.frozen()) if begin else origin.state()

    videos = open_held_out(config, streams)
    log = open_log(config, folder, begin) if processes.is_main() else None
    bar = tqdm(total=stage.steps, initial=begin, desc=stage.name, disable=log is None, dynamic_ncols=True)

    def count_flops(stream: Stream, batch: Batch) -> float:
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        examples = jax.tree.leaves(batch)[0].shape[0]
        return stream.task.count_flops(cfg, batch, layout.trained).shared_by(devices, examples).model

    def is_due(step: int) -> bool:
        return videos is not None and (step == stage.steps or _divides(config.eval.every, step))

    def score(state: TrainState, step: int) -> None:
        assert videos is not None
        summary = evaluate(run.segmenter.using(state), videos, step, log, stop.now)
        if not summary:
            raise processes.Stopped
        checkpoints.add_score(step, summary[METRIC])
        use.lap(EVALUATION)

    meter = Meter(folder, count_flops, bar, log, use, stage.groups)
    trace = open_trace(config, folder)
    compiled: set[str] = set()
    use.lap("start")
    try:
        with processes.together(), processes.Stop() as stop:
            if begin and is_due(begin) and checkpoints.score(begin) is None:  # a stop or a kill cut it short
                score(state, begin)
                meter.restart()
            for step in range(begin, stage.steps):
                stream = streams[choose_stream(stage, seed, step)]
                arrays = stream.next()
                use.lap(DATA)
                trace.before(step - begin)
                batch = stream.batch(sharding.global_batch(arrays, mesh))
                with jax.transfer_guard("disallow"):  # what is not on the devices yet would be waited for every time
                    state, metrics = steps[stream.name](state, batch)
                meter.add(step + 1, stream, metrics, arrays, batch)
                trace.after(step + 1 - begin, state)
                done, stopped = step + 1 == stage.steps, stop.at_step()  # waits for the step before
                use.lap(STEPS if stream.name in compiled else COMPILE)
                compiled.add(stream.name)
                leave = step + 1 == until
                if not (done or stopped or leave or _divides(config.checkpoint.every, step + 1)):
                    continue
                meter.flush()
                use.lap(STEPS)
                if log:
                    log.send()  # rows of all steps that no later run takes again
                checkpoints.save(state, wait=stopped or done or leave)  # before the evaluation, which may take long
                use.lap(CHECKPOINT)
                if stopped:
                    raise processes.Stopped
                if leave:
                    return use
                if is_due(step + 1):
                    score(state, step + 1)
                meter.restart()
            # what virst_jax.load and the next stage read
            folders.save(folder / EXPORT, cfg, state.all_params(averaged=True), run.tokenizer_folder)
            use.lap("export")
            stop.check()
            return use
    finally:
        trace.close()
        bar.close()
        if log:
            tqdm.write(f"{stage.name}: {use.summary()}", file=sys.stderr)
            log.close()
        checkpoints.close()


def open_log(config: ConfigDict, folder: "Place", start: int) -> TrainLog:
    """The log of a stage, which tells the service that a recipe asks for."""
    tracker = open_tracker(config.get("tracking") or {}, folder, recipe.plain(config))
    return TrainLog(folder, start, tracker)


def open_trace(config: ConfigDict, folder: "Place") -> Trace:
    """The trace that a recipe asks for; recipes of before ask for none.

    Raises:
      UserError: it would lie in a bucket.
    """
    asked = config.get("profile") or {"first": 0, "steps": 0, "folder": ""}
    place = Path(asked["folder"]) if asked["folder"] else folder / "profile"
    if asked["steps"] and not isinstance(place, Path):
        raise UserError(
            f"{place}: traces cannot be written into a bucket; set --config.profile.folder to a local folder"
        )
    return Trace(Path(place), int(asked["first"]), int(asked["steps"]))


def compile_step(run: Run, stage: recipe.Stage, layout: StateLayout, stream: Stream, seed: int) -> Any:
    """(state, batch) -> (state, metrics) for a stream's batches; the state is donated."""
    axes = sharding.BATCH_AXES
    step = make_train_step(run.cfg, stage.optim, stage.groups, stream.task.loss, seed=seed, mesh_axes=axes)
    return jax.jit(
        step,
        in_shardings=(layout.shardings, sharding.batch_sharding(run.mesh)),
        out_shardings=(layout.shardings, sharding.replicated(run.mesh)),
        donate_argnums=0,
    )


def random_parameters(cfg: VirstConfig) -> PyTree:
    """A function of a random key that makes the parameters of a network."""
    return lambda key: mimic_attention(nn.meta.unbox(Virst(cfg).init(key)["params"]), cfg)


def open_held_out(config: ConfigDict, streams: dict[str, Stream]) -> Source | None:
    """The videos to evaluate on; None: the recipe wants none, or the stage does not learn to segment them."""
    if not config.eval.videos or not any(stream.task.evaluated for stream in streams.values()):
        return None
    return held_out_videos(recipe.plain(config.eval.source), config.eval.videos, config.data_root)


class Segmenter:
    """The network as a person uses it, compiled once and given the parameters of the moment."""

    def __init__(self, cfg: VirstConfig, tokenizer: Tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.model: Model | None = None

    def using(self, state: TrainState) -> Segment:
        """Segmentation with a state's parameters, the averaged ones if there are any."""
        params = state.all_params(averaged=True)
        if self.model is None:
            self.model = Model(self.cfg, params, self.tokenizer, name="training")
        model = self.model
        model.network.params = params

        def segment(video: Video, texts: Sequence[str]) -> np.ndarray:
            return model.segment(video, texts).masks

        return segment


def _divides(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def main(args: argparse.Namespace) -> int:
    """Trains, or compiles, as the arguments of `virst train` say."""
    config = command.config_of(args)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([""])  # data sets and worker processes look at absl's own flags
    if args.compile_only:
        if not args.topology:
            raise UserError("--topology is missing: name the hardware to compile for, such as v5e:4x4 or h100:8")
        from virst_jax.training.compile_only import compile_only

        cfg = starting_point(config)[0]
        compile_only(config, cfg, args.topology, args.slices, predict=args.effort == "full")
        return 0
    command.check_start(config)
    workdir = command.workdir_of(args)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(buckets.absolute(workdir) / "compiled"))
    flags_set = compiler_flags.apply(recipe.plain(config.get("xla_flags") or {}))
    if config.get("distributed", False):
        processes.start()
    for line in flags_set if processes.is_main() else ():
        tqdm.write(line, file=sys.stderr)
    try:
        with processes.together():
            if args.dry_run:
                rehearse(config, workdir, args.steps or dry_run.EACH)
            else:
                train(config, workdir)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; run the same command to go on") from error
    return 0


if __name__ == "__main__":
    sys.exit(cli.call(command, None, "train.py", main))
