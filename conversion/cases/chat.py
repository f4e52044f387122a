"""Cases of answers in text: chat_*. The distribution of every token, and the text that the most probable ones make.

Axes: N tokens of the answer, L positions, K recorded logits of a token, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.sequence import splice
from virst_jax.inference.steps import Network
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2

from .case import Case, Check, close, detail, exact
from .network import LOW_PRECISION, open_network, video_clips, video_of

TOP = 5  # of whose tokens the agreement is counted
DIVERGENCE = 1e-8  # nats: logits that are 1e-4 apart give half of its square
LOW_DIVERGENCE = 1e-2  # of runs in bfloat16, whose logits are a tenth apart


def run_chat(case: Case) -> None:
    """Reads the question with the release's answer, and answers greedily without it."""
    network, meta, out = open_network(case), case.meta, case.outputs
    low = {case.dtype, meta.get("dtype", "float32")} != {"float32"}
    answer = meta["answer_ids"]
    clips, scale = video_clips(case, network.cfg, video_of(case))
    visual = network.encode_visual(clips, len(clips), scale)
    logits = _logits(network, visual, meta["prompt_ids"], answer)  # [N, V]
    ours = np.take_along_axis(logits, out["ids"], 1)
    case.checks.append(close("logits", ours, out["logits"], LOW_PRECISION if low else 1e-4))
    if case.detailed:
        case.details.append(detail("logits", ours, out["logits"], by_frame=True))
    divergence = kl_divergence(logits, out["ids"], out["logits"], out["rest"])
    bound = LOW_DIVERGENCE if low else DIVERGENCE
    worst, mean = float(divergence.max()), float(divergence.mean())
    note = f"nats, largest of {len(answer)} tokens; mean {mean:.1e}, worst token {int(divergence.argmax())}"
    case.checks.append(Check("KL divergence", worst <= bound, worst, note=note))
    largest = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    shared = np.array([len({*a.tolist()} & {*b.tolist()}) / TOP for a, b in zip(largest, out["ids"][:, :TOP])])
    firsts = int((largest[:, 0] == out["ids"][:, 0]).sum())
    note = f"top-{TOP} agreement {shared.mean():.4f}; the first agrees for {firsts} of {len(answer)} tokens"
    # in bfloat16 tokens that are almost as probable change places, and what follows one is another text
    passed = low or (firsts == len(answer) and shared.min() == 1)
    case.checks.append(Check(f"top {TOP}", bool(passed), note=note))
    found = _greedy(network, visual, meta["prompt_ids"], len(answer))
    same = next((i for i, (a, b) in enumerate(zip(found, answer)) if a != b), len(answer))
    text = exact("greedy answer", found, answer, f"the first {same} of {len(answer)} tokens are equal")
    case.checks.append(dataclasses.replace(text, passed=low or text.passed))


def _embeds(network: Network, visual: list[jax.Array], ids: list[int]) -> tuple[jax.Array, Any]:
    count = sum(x.shape[0] for x in visual)
    row = splice(ids, [-100] * len(ids), count, network.cfg.seg_token_id)
    return network.embed(visual, row.token_ids[None], row.visual_index[None]), jnp.asarray(row.mask[None])


def _logits(network: Network, visual: list[jax.Array], prompt: list[int], answer: list[int]) -> np.ndarray:
    """The logits float32[N, V] before each token of the answer."""
    embeds, mask = _embeds(network, visual, [*prompt, *answer[:-1]])
    model = Qwen2(network.cfg.llm, network.cfg.compute)

    def read(params: Any, embeds: jax.Array, mask: jax.Array) -> Any:
        hidden: Any = model.apply({"params": params}, embeds, mask)
        logits: Any = model.apply({"params": params}, hidden[0, -len(answer) :], method=Qwen2.logits)
        return logits

    with network.context():
        return np.asarray(jax.jit(read)(network.params["llm"], embeds, mask), np.float32)


def _greedy(network: Network, visual: list[jax.Array], prompt: list[int], count: int) -> list[int]:
    embeds, mask = _embeds(network, visual, prompt)
    model = Qwen2(network.cfg.llm, network.cfg.compute)
    with network.context():
        tokens, _ = generate(model, network.params["llm"], embeds, mask, max_new_tokens=count, eos_ids=())
    return [int(token) for token in np.asarray(tokens)[0]]


def kl_divergence(ours: np.ndarray, ids: np.ndarray, theirs: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """How far our distributions are from theirs, in nats, float64[N]; what theirs do not name counts as one token.

    Args:
      ours: logits number[N, V].
      ids: int[N, K], the tokens that are named.
      theirs: number[N, K], their logits.
      rest: number[N], log of the summed exponentials of the others; -inf: there are none.
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    total = np.logaddexp(np.logaddexp.reduce(theirs, 1), rest)
    log_p = np.concatenate([theirs, np.asarray(rest, np.float64)[:, None]], 1) - total[:, None]
    named = np.zeros(ours.shape, bool)
    np.put_along_axis(named, ids, True, 1)
    others = np.logaddexp.reduce(np.where(named, -np.inf, ours), 1)
    log_q = np.concatenate([np.take_along_axis(ours, ids, 1), others[:, None]], 1)
    log_q -= np.logaddexp.reduce(ours, 1)[:, None]
    there = np.isfinite(log_p)
    p = np.where(there, np.exp(np.where(there, log_p, 0)), 0)
    gaps = np.where(there, log_p - np.where(there, log_q, 0), 0)
    # sum p (gap + exp(-gap) - 1): the same sum, as both distributions sum to 1, but of terms that are never negative
    return (p * (gaps + np.expm1(-gaps))).sum(1)
