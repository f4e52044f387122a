"""Trains VIRST: python train.py --config=NAME --workdir=DIR [--config.key=value ...]

The same command goes on where an earlier run stopped, or was killed. See virst_jax/training/recipe.py for what a
config says and configs/ for recipes; virst_jax/commands/train.py defines the arguments. With --compile-only
--topology=v5e:4x4 it compiles the steps for that hardware, without it, and prints what a device needs.

An installed package has this file as virst_jax.train; there `virst train` runs it.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from virst_jax import cli
from virst_jax.api import EMBEDDED, Model
from virst_jax.commands import train as command
from virst_jax.config import VirstConfig, get_preset
from virst_jax.data.batches import ExampleMaker, batch_shapes, visual_tokens
from virst_jax.data.pipeline import Mixture, batches
from virst_jax.data.prompts import Tokenizer, load_tokenizer
from virst_jax.data.sources import make_source
from virst_jax.errors import UserError
from virst_jax.evaluation.held_out import Score, score_videos, summarize
from virst_jax.io import atomic, model_folder
from virst_jax.io.visualize import overlay
from virst_jax.models.lora import add_lora
from virst_jax.models.virst import Virst
from virst_jax.parallel import sharding
from virst_jax.pretraining.mimetic import mimic_attention
from virst_jax.profiling import flops
from virst_jax.training import recipe
from virst_jax.training.checkpoints import METRIC, TrainCheckpoints
from virst_jax.training.log import TrainLog
from virst_jax.training.losses import CellBatch, NamedBatch, PatchBatch, ReadBatch, TextBatch, VideoBatch
from virst_jax.training.optim import flatten
from virst_jax.training.step import Batch, TrainState, init_state, make_train_step

EXPORT = "model"
PREFIX_TOKENS = 16  # of the prompt before the video, where no tokenizer tells
PICTURES = 4  # held-out videos of which an evaluation keeps an overlay


def train(config: Any, workdir: Path) -> None:
    """Runs all stages of a recipe; those that have left their model are passed over."""
    mesh = sharding.make_mesh(**recipe.plain(config.mesh))
    base, start, tokenizer_folder = _where_to_start(config)
    cfg = recipe.network(base, config)
    tokenizer = load_tokenizer(tokenizer_folder, cfg.seg_token_id)
    if tokenizer.num_rows > cfg.llm.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.num_rows} tokens, the network {cfg.llm.vocab_size} rows")
    sharding.check_mesh(cfg, mesh)
    stages = recipe.stages(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with sharding.use_mesh(mesh):
        for stage in stages:
            folder = workdir / stage.name
            if not (folder / EXPORT).exists():
                run = Run(config, cfg, tokenizer, tokenizer_folder, stage, folder, mesh, start)
                run.run()
            start = folder / EXPORT


def _where_to_start(config: Any) -> tuple[VirstConfig, Path | None, Path]:
    """Config, folder of the model to start from (None: random parameters), and the tokenizer's folder."""
    start = EMBEDDED.get(config.model.init, Path(config.model.init)) if config.model.init else None
    base = model_folder.read_config(start) if start else get_preset(config.model.preset)
    if config.model.tokenizer:
        return base, start, Path(config.model.tokenizer)
    return base, start, (start or EMBEDDED["tiny"]) / model_folder.TOKENIZER


class Run:
    """One stage of a recipe."""

    def __init__(
        self,
        config: Any,
        cfg: VirstConfig,
        tokenizer: Tokenizer,
        tokenizer_folder: Path,
        stage: recipe.Stage,
        folder: Path,
        mesh: Any,
        start: Path | None,
    ):
        self.config, self.cfg, self.tokenizer, self.tokenizer_folder = config, cfg, tokenizer, tokenizer_folder
        self.stage, self.folder, self.mesh, self.start = stage, folder, mesh, start
        self.seed = int(config.seed)
        step = make_train_step(cfg, stage.optim, stage.groups, seed=self.seed, mesh_axes=sharding.BATCH_AXES)
        shapes = model_folder.parameter_shapes(cfg)
        parameters = sharding.parameter_shardings(cfg, mesh)
        abstract = jax.eval_shape(lambda p: init_state(cfg, stage.optim, stage.groups, p), shapes)
        self.shardings = sharding.state_shardings(abstract, parameters, shapes, mesh)
        self.trained = tuple(flatten(abstract.params))
        self.step = jax.jit(
            step,
            in_shardings=(self.shardings, sharding.batch_sharding(mesh)),
            out_shardings=(self.shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )

    def iterators(self) -> dict[str, Any]:
        index, count = sharding.process_share(self.mesh)
        made = {}
        for number, data in enumerate(self.stage.data):
            sharding.check_batch(data.batch.batch_size, self.mesh)
            sources, weights = [], []
            for name, arguments in data.sources.items():
                values = dict(arguments)
                if values.get("kind", name) != "synthetic":
                    values.setdefault("root", self.config.data_root)
                weights.append(float(values.pop("weight", 1.0)))
                sources.append(make_source(values.pop("kind", name), data.batch.kind, **values))
            made[data.name] = batches(
                sources[0] if len(sources) == 1 else Mixture(sources, weights, self.seed),
                ExampleMaker(self.cfg, self.tokenizer, data.batch),
                seed=self.seed + 1000 * number,
                process_index=index,
                process_count=count,
                threads=self.config.threads,
                workers=self.config.workers,
            )
        return made

    def first_state(self) -> TrainState:
        """The state before the first step, on the mesh."""
        cfg, stage = self.cfg, self.stage

        def begin(params: Any) -> TrainState:
            return init_state(cfg, stage.optim, stage.groups, params)

        if self.start is None:
            random = lambda key: nn.meta.unbox(Virst(cfg).init(key)["params"])  # noqa: E731
            make = lambda key: begin(mimic_attention(random(key), cfg))  # noqa: E731
            return jax.jit(make, out_shardings=self.shardings)(jax.random.key(self.seed))
        stored, params = model_folder.load_model(self.start, shardings=self._stored_shardings())
        params = add_lora(params, stored.llm.lora, cfg.llm.lora, self.seed)
        return jax.jit(begin, out_shardings=self.shardings)(params)

    def _stored_shardings(self) -> Any:
        assert self.start is not None
        return sharding.parameter_shardings(model_folder.read_config(self.start), self.mesh)

    def kind_of(self, step: int) -> str:
        """Which kind of batch a step takes: drawn by weight, the same in every process and after a restart."""
        weights = np.array([data.weight for data in self.stage.data], float)
        rng = np.random.default_rng([self.seed, step])
        return self.stage.data[rng.choice(len(weights), p=weights / weights.sum())].name

    def run(self) -> None:
        config, stage = self.config, self.stage
        iterators = self.iterators()
        shareds = {data.name: ExampleMaker(self.cfg, self.tokenizer, data.batch).shared for data in stage.data}
        saved = TrainCheckpoints(self.folder / "checkpoints", config.checkpoint.keep)
        state = self.first_state()
        state = saved.restore(state, iterators) or state
        begin = int(state.step)
        main = jax.process_index() == 0
        log = TrainLog(self.folder, begin) if main else None
        bar = tqdm(total=stage.steps, initial=begin, desc=stage.name, disable=not main, dynamic_ncols=True)
        meter = Meter(self, bar, log)
        # before, there is nothing to evaluate yet
        segments = any(data.batch.kind in ("video", "image") for data in stage.data)
        try:
            with stop_signals() as stopped:
                for step in range(begin, stage.steps):
                    name = self.kind_of(step)
                    arrays = next(iterators[name])
                    batch = as_batch(sharding.global_batch(arrays, self.mesh), shareds[name])
                    state, metrics = self.step(state, batch)
                    meter.add(step + 1, name, metrics, arrays, batch)
                    done = step + 1 == stage.steps
                    if stopped or done or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
                        meter.flush()
                        due = segments and config.eval.videos and (done or _divides(config.eval.every, step + 1))
                        score = self._evaluate(state, log) if due and not stopped else None
                        saved.save(state, iterators, score, wait=bool(stopped or done))
                        meter.restart()
                    if stopped:
                        raise KeyboardInterrupt
            self.export(state)
        finally:
            bar.close()
            if log:
                log.close()
            saved.close()

    def step_flops(self, batch: Batch) -> flops.StepFlops:
        return flops.step_flops(self.cfg, flops.StepShape.of(batch), self.trained)

    def model(self, state: TrainState) -> Model:
        return Model(self.cfg, state.all_params(averaged=True), self.tokenizer, name=self.stage.name)

    def _evaluate(self, state: TrainState, log: TrainLog | None) -> float:
        """J&F on the held-out videos, logged by category, with overlays of the first few."""
        given = recipe.plain(self.config.eval.source)
        if given["kind"] != "synthetic":
            given = {"root": self.config.data_root, **given}
        source = First(make_source(given.pop("kind"), "video", **given), self.config.eval.videos)
        model = self.model(state)
        scores: list[Score] = []
        shown = 0

        def segment(video: Any, texts: Any) -> np.ndarray:
            nonlocal shown
            masks = model.segment(video, texts).masks
            if log and shown < PICTURES:
                middle = video.num_frames // 2
                frame = video.read_frames([middle])[0]
                log.picture(int(state.step), f"held_out/{shown}", overlay(frame, masks[:, middle]))
                shown += 1
            return masks

        found = score_videos(segment, source)
        for of_video in tqdm(found, total=len(source), desc="held-out videos", leave=False, dynamic_ncols=True):
            scores += of_video
        summary = summarize(scores)
        if log:
            log.write(int(state.step), {f"eval/{key}": value for key, value in summary.items()})
        tqdm.write(f"step {int(state.step)}: " + ", ".join(f"{k} {v:.3f}" for k, v in summary.items()))
        return summary[METRIC]

    def export(self, state: TrainState) -> None:
        """Writes the model folder that `virst_jax.load` and the next stage read."""
        params = state.all_params(averaged=True)
        model_folder.save_model(self.folder / EXPORT, self.cfg, params, self.tokenizer_folder)


class First:
    """The first samples of a source."""

    def __init__(self, source: Any, count: int):
        self.source, self.count = source, min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


class Meter:
    """Reads a step's numbers once the next one runs, so that nothing waits for them; logs, and watches for NaN."""

    def __init__(self, run: Run, bar: Any, log: TrainLog | None):
        self.run, self.bar, self.log = run, bar, log
        self.waiting: tuple[Any, ...] | None = None
        self.cost: dict[str, float] = {}
        device = jax.devices()[0]
        # virtual devices of a CPU share its cores
        self.devices = 1 if device.platform == "cpu" else jax.device_count()
        self.peak, _ = flops.device_peak(device)
        self.restart()

    def restart(self) -> None:
        """Leaves out the time until now, such as that of an evaluation."""
        self.last = time.perf_counter()

    def add(self, step: int, name: str, metrics: Any, arrays: Any, batch: Batch) -> None:
        self.flush()
        if name not in self.cost:
            self.cost[name] = self.run.step_flops(batch).model
        frames = int(np.prod(batch.clips.shape[:3])) if hasattr(batch, "clips") else 0
        self.waiting = (step, name, metrics, arrays, frames)

    def flush(self) -> None:
        """Logs what waits.

        Raises:
          UserError: the loss or the gradient was not finite; the batch is saved.
        """
        if self.waiting is None:
            return
        (step, name, metrics, arrays, frames), self.waiting = self.waiting, None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            path = self.run.folder / f"nan_batch_{step}_{jax.process_index()}.npz"
            atomic.write_npz(path, arrays)
            raise UserError(
                f"step {step} ({name}): the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); the batch is in {path} and changed nothing: lower learning_rate or "
                "clip_norm, and run the same command to go on from the last checkpoint"
            )
        now = time.perf_counter()
        seconds, self.last = max(now - self.last, 1e-6), now
        mfu = flops.utilisation(self.cost[name], seconds, self.devices, self.peak)
        if self.log:
            named = {f"{name}/{key}": value for key, value in values.items()}
            self.log.write(step, {**named, f"{name}/seconds": seconds, f"{name}/mfu": mfu})
        self.bar.set_postfix_str(
            f"{name} loss {values['loss']:.3f}, {seconds:.2f} s/step, {frames / seconds:.1f} frames/s, MFU {mfu:.1%}"
        )
        self.bar.update()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once the user or the system asks to stop; a second request stops at once."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number: int, _: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        tqdm.write("stopping after this step; the checkpoint is written first", file=sys.stderr)

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _divides(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def compile_only(config: Any, topology: str) -> None:
    """Compiles the step of every stage and kind of batch for hardware that need not be there, and prints its cost."""
    from virst_jax.profiling import aot

    base, _, _ = _where_to_start(config)
    cfg = recipe.network(base, config)
    mesh = sharding.make_mesh(**recipe.plain(config.mesh), devices=aot.topology_devices(topology))
    sharding.check_mesh(cfg, mesh)
    shapes, shardings = model_folder.parameter_shapes(cfg), sharding.parameter_shardings(cfg, mesh)
    for stage in recipe.stages(config):
        state = jax.eval_shape(lambda p, s=stage: init_state(cfg, s.optim, s.groups, p), shapes)
        trained = tuple(flatten(state.params))
        step = make_train_step(cfg, stage.optim, stage.groups, mesh_axes=sharding.BATCH_AXES)
        for data in stage.data:
            sharding.check_batch(data.batch.batch_size, mesh)
            shared = visual_tokens(cfg, data.batch) + PREFIX_TOKENS
            arrays = {k: jax.ShapeDtypeStruct(*v) for k, v in batch_shapes(cfg, data.batch, shared).items()}
            batch = as_batch(arrays, shared)
            with sharding.use_mesh(mesh):
                report = aot.compile_report(
                    step,
                    state,
                    batch,
                    sharding.state_shardings(state, shardings, shapes, mesh),
                    sharding.batch_sharding(mesh),
                    topology,
                    parts=_state_parts,
                    flops=flops.step_flops(cfg, flops.StepShape.of(batch), trained).model,
                )
            print(f"{stage.name}, batches of kind {data.name}: {data.batch.batch_size} samples")
            aot.print_report(report)


def _state_parts(state: TrainState) -> dict[str, Any]:
    parts = {"trained parameters": state.params, "frozen parameters": state.frozen, "optimizer": state.opt_state}
    return parts if state.ema is None else {**parts, "averaged parameters": state.ema}


def as_batch(arrays: Mapping[str, Any], shared: int) -> Batch:
    if "targets" in arrays and "words" in arrays:
        return NamedBatch(**arrays)
    if "weights" in arrays:
        return CellBatch(**arrays) if "frames" in arrays else PatchBatch(**arrays)
    if "words" in arrays:
        return ReadBatch(**arrays, shared=shared)
    return (VideoBatch if "frames" in arrays else TextBatch)(**arrays, shared=shared)


def main(args: argparse.Namespace) -> int:
    """Trains, or compiles, as the arguments of `virst train` say."""
    config = command.config_of(args)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([""])  # data sets and worker processes look at absl's own flags
    if args.compile_only:
        if not args.topology:
            raise UserError("--topology is missing: name the hardware to compile for, such as v5e:4x4 or h100:8")
        compile_only(config, args.topology)
        return 0
    workdir = command.workdir_of(args)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    if config.get("distributed", False):
        jax.distributed.initialize()
    try:
        train(config, workdir)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; run the same command to go on") from error
    return 0


if __name__ == "__main__":
    sys.exit(cli.call(command, None, "train.py", main))
