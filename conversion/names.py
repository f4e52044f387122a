"""Names of parameters: the release's plain ones, out of what training libraries make of them."""

import difflib
import re
from collections.abc import Collection

SEG_MODEL = "model.seg_model."  # under which the release keeps SAM 2.1

# around the whole network, in any order and number: data parallelism, torch.compile, FSDP, PEFT
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
# around a part of it
_INNER = re.compile(
    r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)\."
)
_ADAPTER = re.compile(r"\.(lora_[AB])\.(?:[^.]+\.)?weight$")
# forks and some versions of transformers rename what is called gamma
_GAMMA = re.compile(r"(memory_encoder\.fuser\.layers\.\d+)\.(?:weight|scale|layer_scale)$")
# follow from the config; some versions of the libraries save them all the same
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids|attn\.masked_bias)$"
)
_OTHER_ADAPTERS = re.compile(r"\.(lora_magnitude_vector|lora_embedding_[AB]|lora_E|ia3_l|hada_w|oft_|ranknum)")


def canonical(name: str) -> str:
    """A name without what PEFT, DeepSpeed, FSDP, torch.compile or data parallelism put around or into it."""
    stripped = ""
    while stripped != name:
        stripped = name
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return _GAMMA.sub(r"\1.gamma", _ADAPTER.sub(r".\1.weight", _INNER.sub("", name)))


def precedence(name: str) -> int:
    """Which of two names of the same parameter holds: a module that PEFT trained comes before the one it replaced."""
    return 2 if ".modules_to_save." in name else 0 if ".original_module." in name else 1


def is_buffer(name: str) -> bool:
    """Whether a name is that of a table which follows from the config and is no parameter."""
    return _BUFFER.search(name) is not None


def is_other_adapter(name: str) -> bool:
    """Whether a name belongs to a kind of adapter other than plain LoRA."""
    return _OTHER_ADAPTERS.search(name) is not None


def shown(name: str) -> str:
    """A name as it stands in a message: on one line, not too long."""
    return (name if name.isprintable() else ascii(name))[:200]


def listing(names: Collection[str], limit: int = 12) -> str:
    """Names on one line, those that differ in a number only once."""
    groups: dict[str, int] = {}
    for name in sorted(names):
        pattern = re.sub(r"\d+", "*", shown(name))
        groups[pattern] = groups.get(pattern, 0) + 1
    first = [f"{name} ({count})" if count > 1 else name for name, count in list(groups.items())[:limit]]
    rest = len(groups) - len(first)
    return ", ".join(first) + (f" and {rest} more kinds" if rest > 0 else "")


def nearest(names: Collection[str], known: Collection[str], limit: int = 3) -> str:
    """For the first names of each kind, the known name that is most alike; "" where none is."""
    seen: set[str] = set()
    pairs: list[str] = []
    for name in sorted(names):
        kind = re.sub(r"\d+", "*", name)
        if kind in seen or len(seen) == limit:
            continue
        seen.add(kind)
        found = difflib.get_close_matches(name[:200], known, n=1, cutoff=0.6)
        if found:
            pairs.append(f"{found[0]} for {shown(name)}")
    return "; nearest known: " + ", ".join(pairs) if pairs else ""
