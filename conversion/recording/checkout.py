"""Opens a checkout of the PyTorch release, builds its network and fills it from a checkpoint or from the rule.

Follows the release's eval.py and model/builder.py in what is built in which order. Everything is done from outside:
the checkout is imported as it is, and only sizes and initialisation are put over it while the network is built.
"""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError
from virst_jax.io.json_files import read_json

from .state import Files, Rule, fill_by_rule, fill_from_files, manifest_of, table_rows
from .stubs import NEEDED, first_line, require, stubbed

COMMIT = "954276f"
TRANSFORMERS, TORCH = "4.40.1", "2.6.0"  # the release's requirements.txt
IMAGE_TOKEN = -200
_MARKS = ("model/VIRST.py", "data/rvos_dataset.py", "utils/preprocess.py")
_ROOTS = ("model", "data", "utils")  # the checkout's top-level packages

# The sizes of the small parity cases: the release's structure, and a network that a laptop runs.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "umt": {"dim": 64, "depth": 4, "heads": 4, "image": 112},
    "hiera": {
        "embed_dim": 16,
        "num_heads": 1,
        "stages": [1, 2, 3, 2],
        "global_att_blocks": [4, 5],
        "window_pos_embed_bkg_spatial_size": [7, 7],
        "window_spec": [8, 4, 16, 8],
    },
}


@dataclass(frozen=True)
class Release:
    """An opened checkout."""

    path: Path
    commit: str
    stubs: list[str]

    def module(self, name: str) -> Any:
        """One of the checkout's modules, say `model.VIRST`.

        Raises:
          UserError: it does not import here.
        """
        with self.blaming(f"{name} does not import"):
            return importlib.import_module(name)

    @contextlib.contextmanager
    def blaming(self, what: str) -> Iterator[None]:
        """Turns whatever the release raises into a UserError that also tells the versions."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the release meets packages of any version
            import transformers

            import torch

            raise UserError(
                f"{self.path}: {what} ({type(error).__name__}: {first_line(error)}); the release was written for "
                f"transformers {TRANSFORMERS} and torch {TORCH}, these are {transformers.__version__} and "
                f"{torch.__version__}: try pip install transformers=={TRANSFORMERS}"
            ) from error


@dataclass
class Network:
    """The release's network, filled and ready to run."""

    virst: Any  # model.VIRST.VirstForCausalLM
    manifest: dict[str, list[int]]  # before adapters: the release's names and shapes
    config: dict[str, Any]
    state: dict[str, Any]
    attention: str


def commit_of(checkout: Path) -> str:
    """The commit that is checked out, or '' where that cannot be told."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@contextlib.contextmanager
def open_checkout(checkout: Path, warn: Callable[[str], None] = lambda line: None) -> Iterator[Release]:
    """The release, importable within the block; afterwards sys.path and sys.modules are as they were.

    Raises:
      UserError: no checkout of the release is there, or a package is missing that it cannot do without.
    """
    missing = [mark for mark in _MARKS if not (checkout / mark).is_file()]
    if missing:
        raise UserError(
            f"{checkout}: no checkout of the release ({missing[0]} is missing): "
            "git clone https://github.com/AIDASLab/VIRST and give its folder as --release"
        )
    commit = commit_of(checkout)
    if not commit.startswith(COMMIT):
        have = f"is at commit {commit[:7]}" if commit else "does not tell its commit"
        warn(f"warning: {checkout} {have}; parity is stated for {COMMIT} (git checkout {COMMIT})")
    require(*NEEDED)
    ours = {k: v for k, v in sys.modules.items() if k.partition(".")[0] in _ROOTS}
    for name in ours:
        del sys.modules[name]
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave nothing in the checkout
    sys.path.insert(0, str(checkout))
    importlib.invalidate_caches()
    try:
        with stubbed() as stubs:
            yield Release(checkout, commit, stubs)
    finally:
        sys.path.remove(str(checkout))
        sys.dont_write_bytecode = bytecode
        for name in [k for k in sys.modules if k.partition(".")[0] in _ROOTS]:
            del sys.modules[name]
        sys.modules.update(ours)


def load_tokenizer(release: Release) -> Any:
    """The release's tokenizer with `[SEG]` added, as eval.py loads it."""
    from transformers import AutoTokenizer

    folder = release.path / "model" / "videochat"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), model_max_length=4096, padding_side="right")
    except Exception as error:  # transformers raises anything on a damaged folder
        raise UserError(f"{folder}: the tokenizer does not load ({first_line(error)})") from error
    tokenizer.add_tokens(["[SEG]"])
    return tokenizer


def build_network(
    release: Release,
    origin: Rule | Files,
    *,
    tiny: dict[str, Any] | None,
    vocab_size: int,
    seg_token_id: int,
    initial_fusion: bool,
    attention: str,
) -> Network:
    """The network in float32 on the CPU, filled, in evaluation mode.

    Args:
      tiny: sizes of a small network (as TINY), or None for the release's own.
      vocab_size: rows of the token table after resizing.
      attention: of the LLM: "eager" or "sdpa".

    Raises:
      UserError: a checkpoint file is missing, damaged, of other sizes, or leaves parameters unset.
    """
    code = release.module("model.VIRST")
    arguments = release.module("utils.argument").ModelArguments(initial_seg_fusion=initial_fusion)
    config = _config(release, code.VirstConfig, tiny, attention)
    config.vocab_size = table_rows(origin.videochat) if isinstance(origin, Files) else vocab_size
    config.sam2_config = {**config.sam2_config, "checkpoint": None}  # its file is read below
    with release.blaming("its network cannot be built"), _sized(release, tiny), _without_init():
        virst = code.VirstForCausalLM(config, model_args=arguments, seg_token_idx=seg_token_id)
        virst.model.initialize_module()
        virst._initialize_keyframe_config()
    config.tokenizer_model_max_length = 4096
    if isinstance(origin, Files):
        manifest, state = fill_from_files(release, virst, origin, vocab_size)
    else:
        manifest, state = manifest_of(virst), {"from": "rule", "salt": origin.salt}
        fill_by_rule(virst, origin.salt)
    virst.eval()
    seg_model = virst.model.seg_model
    facts: dict[str, Any] = {
        "tiny": {**tiny, "vocab_size": vocab_size} if tiny else None,
        "num_maskmem": int(seg_model.num_maskmem),
        "max_cond_frames_in_attn": int(seg_model.max_cond_frames_in_attn),
        "image_size": int(seg_model.image_size),
        "initial_seg_fusion": bool(initial_fusion),
        "seg_token_id": int(seg_token_id),
        "image_token": IMAGE_TOKEN,
    }
    return Network(virst, manifest, facts, state, attention)


def _config(release: Release, kind: Any, tiny: dict[str, Any] | None, attention: str) -> Any:
    path = release.path / "model" / "config.json"
    values = read_json(path, advice="give a checkout of the release").object()
    if tiny:
        llm = {k: v for k, v in tiny.items() if isinstance(v, int) and k != "vocab_size"}
        values.update(llm, mm_hidden_size=tiny["umt"]["dim"])
    with release.blaming("its configuration cannot be built"):
        config = kind(**values)
    for key, value in values.items():
        if not hasattr(config, key):  # newer transformers keep some under other names
            setattr(config, key, value)
    config._attn_implementation = attention
    return config


@contextlib.contextmanager
def _sized(release: Release, tiny: dict[str, Any] | None) -> Iterator[None]:
    """Within the block the release builds its encoders in the sizes of `tiny`."""
    if not tiny:
        yield
        return
    umt, hiera = tiny["umt"], tiny["hiera"]
    tower = release.module("model.videochat.vision_tower_builder")
    tracker = release.module("model.sam2.sam2_virst")
    layers = {"encoder_embed_dim": umt["dim"], "encoder_depth": umt["depth"], "encoder_num_heads": umt["heads"]}
    widths = {"hidden_size": umt["dim"], "num_hidden_layers": umt["depth"], "num_attention_heads": umt["heads"]}
    compose = tracker.compose

    def composed(*args: Any, **kwargs: Any) -> Any:
        cfg = compose(*args, **kwargs)
        trunk = cfg.model.image_encoder.trunk
        for key, value in hiera.items():
            trunk[key] = value
        stages = range(len(hiera["stages"]))
        cfg.model.image_encoder.neck.backbone_channel_list = [hiera["embed_dim"] << i for i in reversed(stages)]
        return cfg

    with contextlib.ExitStack() as stack:
        for module, name, over in (
            (tower, "PretrainVisionTransformer", layers),
            (tower, "UMTVisionConfig", widths),
            (tower, "UMTVisionTower", {"image_size": umt["image"]}),
        ):
            stack.enter_context(_replaced(module, name, _overriding(getattr(module, name), over)))
        stack.enter_context(_replaced(tracker, "compose", composed))
        yield


def _overriding(function: Callable[..., Any], over: dict[str, Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **{**kwargs, **over})


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """No parameter is initialised: all of them are read, and the release builds its 7B decoder three times over."""
    from transformers import PreTrainedModel

    import torch

    names = [n for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(_replaced(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor))
        stack.enter_context(_replaced(PreTrainedModel, "init_weights", lambda self: None))
        yield
