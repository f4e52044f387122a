"""Cases of a run of training: loss_curve*. The same batches, without dropout, through our training step.

Axes: S optimizer steps, K batches a step.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.sequence import splice
from virst_jax.models.tree import flatten
from virst_jax.training.losses import TextBatch, text_loss
from virst_jax.training.optim import OptimConfig, learning_rate
from virst_jax.training.step import TrainState, init_state, make_train_step

from ..assemble import take_apart
from ..bisection.operation import MARGIN, epsilon, jitter, relative_error
from ..rules import rule_table
from ..targets import thinned
from .case import Case, Check, within
from .network import network_config, rule_clips, rule_params

RATE = 1e-6  # relative: our rates are float32


def run_loss_curve(case: Case) -> None:
    """Trains twice, the second time from parameters changed by one rounding: that distance is explained by rounding."""
    meta, out = case.meta, case.outputs
    cfg = network_config(case)
    optim = OptimConfig(**meta["optim"])
    groups = _groups(cfg, meta["groups"])
    batches = [_batch(case, cfg, batch) for batch in meta["batches"]]
    params = rule_params(case, cfg)
    train = jax.jit(make_train_step(cfg, optim, groups, text_loss, dropout=False))
    kept_steps = {int(step) for step in meta["kept_steps"]}

    def run(params: Any) -> tuple[np.ndarray, dict[int, dict[str, np.ndarray]]]:
        state: TrainState = init_state(cfg, optim, groups, params)
        losses, kept = [], {}
        for i in range(meta["steps"] * optim.accumulate):
            state, metrics = train(state, batches[i % len(batches)])
            losses.append(float(metrics["loss"]))
            step, rest = divmod(i + 1, optim.accumulate)
            if not rest and step in kept_steps:
                kept[step] = _named(cfg, state.params)
        return np.asarray(losses), kept

    rate = learning_rate(optim)
    smallest = min(factor for _, factor in meta["groups"] if factor > 0)
    ours = np.array([smallest * float(rate(step)) for step in range(meta["steps"])])
    case.checks.append(_relative("rates", ours, out["rates"][: meta["steps"]], RATE))
    losses, parameters = run(params)
    other_losses, others = run(jitter(params, epsilon(case.dtype), seed=0))
    for first, last in _spans(len(losses), optim.accumulate):
        part = slice(first, last)
        moved = np.abs(other_losses[part] / losses[part] - 1).max()
        bound = MARGIN * max(float(moved), epsilon(case.dtype))
        name = f"losses of steps {first // optim.accumulate + 1}-{last // optim.accumulate}"
        case.checks.append(_relative(name, losses[part], out["losses"][part], bound))
    start = _named(cfg, {key: params[key] for key in params})
    for step, named in parameters.items():
        case.checks.append(_parameters(case, step, named, others[step], start))


def _spans(count: int, accumulate: int) -> list[tuple[int, int]]:
    """The first step, up to the tenth, and the rest."""
    ends = sorted({min(count, n * accumulate) for n in (1, 10)} | {count})
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _relative(name: str, ours: np.ndarray, theirs: np.ndarray, bound: float) -> Check:
    error = np.abs(ours - theirs) / np.abs(theirs)
    check = within(name, error, np.zeros_like(error), bound, f"rounding explains {bound:.1e}")
    return dataclasses.replace(check, max_abs=float(np.abs(ours - theirs).max()), relative=float(error.max()))


def _parameters(
    case: Case,
    step: int,
    ours: dict[str, np.ndarray],
    others: dict[str, np.ndarray],
    start: dict[str, np.ndarray],
) -> Check:
    """How far the change of every parameter since the start is from the recorded one; the worst against its bound."""
    rows = []
    for name, value in ours.items():
        theirs, before = case.outputs[f"{step}/{name}"], start[name]
        error = relative_error(value - before, theirs - before)
        # values are float32: their own spacing is part of a small change's error
        spacing = epsilon("float32") * np.linalg.norm(before) / max(float(np.linalg.norm(theirs - before)), 1e-30)
        moved = relative_error(others[name] - before, value - before)
        rows.append((error / (MARGIN * max(moved, float(spacing))), error, name))
    worst = max(rows)
    median = float(np.median([error for _, error, _ in rows]))
    note = f"changes of {len(rows)} parameters, median {median:.1e}; worst {worst[2]}, {worst[0]:.2f} of the bound"
    return Check(f"parameters, step {step}", worst[0] <= 1, None, worst[1], note=note)


def _batch(case: Case, cfg: VirstConfig, given: dict[str, Any]) -> TextBatch:
    clips = rule_clips(case, given["clip"], cfg, case.meta["t_vlm"], case.salt)
    visual = clips.shape[0] * clips.shape[1] * cfg.vision.tokens_per_frame
    row = splice(given["input_ids"], given["labels"], visual, cfg.seg_token_id)
    rows = (jnp.asarray(x)[None, None] for x in (row.token_ids, row.visual_index, row.labels, row.mask))
    return TextBatch(jnp.asarray(clips)[None], *rows)


def _groups(cfg: VirstConfig, patterns: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Groups by our paths, of groups by the release's names."""
    factors: dict[str, float] = {}
    for name, target in rule_table(cfg).items():
        factors[target.path] = next(factor for pattern, factor in patterns if re.fullmatch(pattern, name))
    return [(re.escape(path), factor) for path, factor in factors.items()]


def _named(cfg: VirstConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters by the release's names, thinned as they are recorded."""
    found = take_apart(rule_table(cfg), ((path, np.asarray(x)) for path, x in flatten(params).items()))
    return {name: thinned(read()) for name, read in found}
