"""Which parameters are trained, and how: groups by path, schedules, AdamW.

A path is the parameter's keys joined by "/", such as llm/layers/attn/q_proj/lora_a.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from virst_jax.errors import UserError
from virst_jax.models.tree import flatten, unflatten
from virst_jax.types import Params, PyTree

# one row an iteration: then optax loops over them, which compiles in a fifth of the time
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

Groups = Sequence[tuple[str, float]]  # pattern (full match of a path), factor of the learning rate; 0: frozen


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | muon: orthogonalised updates for matrices and kernels, AdamW for the rest
    learning_rate: float = 1e-5
    warmup_steps: int = 100
    total_steps: int = 1000  # optimizer steps; the rate has come down to final_factor then
    schedule: str = "cosine"  # cosine | linear | constant
    final_factor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the gradients of a step; 0: none
    accumulate: int = 1  # batches an optimizer step
    muon_rms: float = 0.2  # root mean square of muon's updates, before the learning rate
    ema: float = 0.0  # decay of the averaged parameters, per optimizer step; 0: none


def rate_factors(paths: Sequence[str], groups: Groups) -> dict[str, float]:
    """Every path's factor of the learning rate: that of the first pattern that fits it whole.

    Raises:
      UserError: a path that no pattern fits, a pattern that fits no path, or a broken pattern.
    """
    factors: dict[str, float] = {}
    try:
        compiled = [(re.compile(pattern), factor) for pattern, factor in groups]
    except re.error as error:
        raise UserError(f"parameter groups: {error.pattern!r} is no regular expression ({error})") from error
    used = set()
    for path in paths:
        hit = next((i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)), None)
        if hit is None:
            raise UserError(f"parameter groups: none fits {path}; end the table with ('.*', 0.0) to freeze the rest")
        used.add(hit)
        factors[path] = float(compiled[hit][1])
    # the last pattern may stand for a rest that is empty
    idle = [groups[i][0] for i in range(len(groups) - 1) if i not in used]
    if idle:
        raise UserError(f"parameter groups: {idle[0]!r} decides no parameter; fix it or remove it")
    return factors


def group_factors(groups: Groups) -> dict[str, float]:
    """The factors of the learning rate of the groups that are trained, by names that files and charts can have.

    A name is what the pattern has of letters, such as llm/layers/lora_ab for llm/layers/.*/lora_[ab].
    """
    factors: dict[str, float] = {}
    for pattern, factor in groups:
        if factor > 0:
            words = re.sub(r"[^\w/]+|_+", "_", pattern)
            plain = "/".join(part.strip("_") for part in re.sub("_+", "_", words).split("/") if part.strip("_"))
            name, count = plain or "rest", 1
            while name in factors:
                count += 1
                name = f"{plain or 'rest'}_{count}"
            factors[name] = float(factor)
    return factors


def split(params: Params, groups: Groups) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Nested parameters as two nested trees: those that are trained, and the frozen ones."""
    flat = flatten(params)
    factors = rate_factors(list(flat), groups)
    trained = unflatten({path: leaf for path, leaf in flat.items() if factors[path] > 0})
    if not trained:
        raise UserError("parameter groups: every parameter is frozen; nothing would be trained")
    return trained, unflatten({path: leaf for path, leaf in flat.items() if factors[path] == 0})


def join(trained: Params, frozen: Params) -> dict[str, PyTree]:
    """The inverse of `split`."""
    return unflatten({**flatten(trained), **flatten(frozen)})


def learning_rate(cfg: OptimConfig) -> optax.Schedule:
    """Optimizer step -> learning rate.

    Raises:
      UserError: an unknown schedule.
    """
    decay = max(1, cfg.total_steps - cfg.warmup_steps)
    end = cfg.learning_rate * cfg.final_factor
    schedules = {
        "cosine": lambda: optax.cosine_decay_schedule(cfg.learning_rate, decay, cfg.final_factor),
        "linear": lambda: optax.linear_schedule(cfg.learning_rate, end, decay),
        "constant": lambda: optax.constant_schedule(cfg.learning_rate),
    }
    if cfg.schedule not in schedules:
        raise UserError(f"unknown schedule {cfg.schedule!r}: choose one of {', '.join(schedules)}")
    warmup = optax.linear_schedule(0.0, cfg.learning_rate, max(1, cfg.warmup_steps))
    # the first step would do nothing at a rate of zero
    shifted = lambda step: warmup(step + 1)  # noqa: E731
    return optax.join_schedules([shifted, schedules[cfg.schedule]()], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, groups: Groups) -> optax.GradientTransformation:
    """Clipping, AdamW or Muon (decay on matrices only), the group's factor, accumulation; for the trained parameters.

    Raises:
      UserError: an unknown optimizer or schedule.
    """

    def scale_by_group(updates: PyTree, state: PyTree, params: PyTree = None) -> PyTree:
        flat = flatten(updates)
        factors = rate_factors(list(flat), [*((p, f) for p, f in groups if f > 0), (".*", 0.0)])
        return unflatten({path: u if factors[path] == 1 else u * factors[path] for path, u in flat.items()}), state

    def matrices(params: PyTree) -> PyTree:
        return unflatten({path: decays(path, leaf) for path, leaf in flatten(params).items()})

    optimizer = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        _directions(cfg),
        optax.add_decayed_weights(cfg.weight_decay, matrices) if cfg.weight_decay else optax.identity(),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_by_group),
        optax.scale_by_learning_rate(learning_rate(cfg)),
    )
    if cfg.accumulate > 1:
        return optax.MultiSteps(optimizer, cfg.accumulate).gradient_transformation()
    return optimizer


def _directions(cfg: OptimConfig) -> optax.GradientTransformation:
    """Gradients -> un-negated updates, before weight decay and learning rate."""
    if cfg.name == "adamw":
        return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    if cfg.name != "muon":
        raise UserError(f"unknown optimizer {cfg.name!r}: choose adamw or muon")

    def numbers(params: PyTree) -> PyTree:
        return unflatten({path: matrix_axes(path, leaf) for path, leaf in flatten(params).items()})

    return optax.contrib.muon(
        -1.0,  # an un-negated update, as scale_by_adam gives
        ns_coeffs=NEWTON_SCHULZ,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        eps=cfg.eps,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=cfg.muon_rms,
    )


def matrix_axes(path: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are a matrix's rows and columns; the others count matrices. None: not a matrix."""
    *modules, name = path.split("/")
    if (
        name not in ("kernel", "lora_a", "lora_b")
        or getattr(leaf, "ndim", 0) < 2
        or modules[-1] in ("lm_head", "dwconv")
    ):
        return None
    axes, fused = leaf.ndim, modules[-1] in ("qkv", "attn", "self_attn")
    if modules[-1].startswith("upscale"):  # in, two of the kernel, out
        return optax.contrib.MuonDimensionNumbers((0,), (1, 2, 3))
    if fused:  # in, queries keys and values, out
        return optax.contrib.MuonDimensionNumbers((axes - 3,), (axes - 1,))
    if axes == 4:  # two of the kernel, in, out
        return optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    return optax.contrib.MuonDimensionNumbers((axes - 2,), (axes - 1,))


def decays(path: str, leaf: jax.Array) -> bool:
    """Whether weight decay applies: to kernels, adapters and embeddings, not to scales, biases or small tables."""
    return path.rsplit("/", 1)[-1] in ("kernel", "lora_a", "lora_b", "embedding") and leaf.ndim >= 2


def update_ema(ema: PyTree, params: PyTree, decay: jax.Array | float) -> PyTree:
    """Averaged parameters float32: decay * average + (1 - decay) * present ones."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)
