"""Answers in text to questions about a video.

Source: `chat` of model/videochat/modeling_videochat_flash.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.frames import get_frame_indices
from virst_jax.data.prompts import Tokenizer, build_chat, time_message
from virst_jax.data.sequence import splice
from virst_jax.errors import UserError
from virst_jax.inference.steps import Network
from virst_jax.inference.texts import TEXT_BUCKET, round_up
from virst_jax.io.video import Reader
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2


def answer_question(
    network: Network,
    tokenizer: Tokenizer,
    reader: Reader,
    question: str,
    *,
    history: Sequence[tuple[str, str]],
    max_new_tokens: int,
    max_frames: int,
    temperature: float,
    seed: int,
) -> str:
    """The answer; arguments are as of `Model.chat`.

    Raises:
      UserError: max_frames is less than a clip.
    """
    cfg, clip = network.cfg, network.cfg.vision.clip_frames
    limit = max_frames // clip * clip
    if limit < clip:
        raise UserError(f"max_frames is {max_frames}; give at least {clip}")
    local, count = min(8, limit), reader.num_frames
    if reader.fps > 0:
        numbers = get_frame_indices(
            limit,
            count,
            "dynamic_fps1",
            fps=reader.fps,
            min_num_frames=min(limit, cfg.max_video_frames),
            max_num_frames=limit,
            local_num_frames=local,
        )
        time_text = time_message(reader.duration, len(numbers))
    else:
        # frames without times: as many as there are, in whole clips
        numbers = get_frame_indices(min(limit, max(clip, count // clip * clip)), count, "middle")
        time_text = ""
    numbers += [numbers[-1]] * (-len(numbers) % clip)
    prompt = build_chat(tokenizer, question, time=time_text, history=history)
    unique = sorted(set(numbers))
    side = cfg.vision.image_size
    resized = {n: np.asarray(network.resize(f, side, "bicubic")) for n, f in zip(unique, reader.pick(unique))}
    clips = np.stack([resized[n] for n in numbers]).reshape(-1, clip, side, side, 3)
    visual = network.encode_visual(clips, max(len(clips), cfg.max_video_frames // clip))
    count = len(clips) * visual[0].shape[0]
    length = round_up(len(prompt.input_ids) - 1 + count, TEXT_BUCKET)
    row = splice(prompt.input_ids.tolist(), prompt.labels.tolist(), count, cfg.seg_token_id, length)
    ends = (tokenizer.end_id, tokenizer.pad_id)
    embeds = network.embed(visual, row.token_ids[None], row.visual_index[None])
    with network.context():
        tokens, lengths = generate(
            Qwen2(cfg.llm, cfg.compute),
            network.params["llm"],
            embeds,
            jnp.asarray(row.mask[None]),
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            temperature=temperature,
            rng=jax.random.key(seed) if temperature > 0 else None,
        )
    answer = np.asarray(tokens)[0, : int(lengths[0])].tolist()
    return tokenizer.decode(token for token in answer if token not in ends).strip()
