"""What the recipes of the full-size network share; every one of them says what it changes."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from virst_jax.data.datasets.mixtures import MEMBERS, mixture

# parameter groups: pattern of the path, factor of the learning rate (0: frozen)
GROUPS = (
    (r"llm/layers/.*/lora_[ab]", 1.0),
    (r"llm/(embed_tokens|lm_head)/.*", 1.0),
    (r"llm/.*", 0.0),
    (r"vision/.*", 0.0),
    (r"projector/.*", 1.0),
    (r"(initial|second)_fusion/.*", 1.0),
    (r"sam2/image_encoder/.*", 0.0),
    (r"sam2/(no_memory_position|mask_downsample/.*)", 0.0),  # nothing that is trained uses them
    (r"sam2/.*", 1.0),
    (r"occ_predictor/.*", 0.0),
)

# the release's arguments (utils/argument.py, scripts): learning rate, weight decay; LoRA r 64, alpha 16, dropout 0.05
OPTIM = {"learning_rate": 1e-5, "warmup_steps": 100, "weight_decay": 0.0, "clip_norm": 1.0, "b2": 0.95}


# Named for what they do; libtpu 0.0.42 does all of its own without being told. None leaves a flag out.
XLA_FLAGS = {
    "tpu": {
        # operations stand between a collective's start and its done
        "xla_tpu_enable_latency_hiding_scheduler": True,
        "xla_enable_async_all_gather": True,
        # a gather is spread over products beside it
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        # products with smaller weights, in MiB, gather them in one piece rather than window by window; 1000000 gains a
        # third of the language model's time with four samples a chip (docs/sharding.md); None: the compiler's choice
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": placeholder(int),
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # collectives of one iteration run beside the products of another
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        # small collectives are sent together, up to so many bytes
        "xla_gpu_all_gather_combine_threshold_bytes": 2**27,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**27,
        "xla_gpu_all_reduce_combine_threshold_bytes": 2**27,
    },
}


def base() -> ConfigDict:
    """A recipe without stages: the released network with adapters, in bfloat16 over float32 master parameters."""
    c = ConfigDict()
    c.model = {
        "preset": "virst_7b",
        "init": "",
        "tokenizer": "",
        "overrides": {
            "llm": {"lora": {"rank": 64, "alpha": 16.0, "dropout": 0.05}},
            "compute": {"dtype": "bfloat16", "remat": "full"},
        },
    }
    c.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "dcn_data": -1, "dcn_fsdp": 1}
    c.seed = 0
    c.distributed = False  # several processes, started by a launcher that jax.distributed.initialize() knows
    c.threads, c.workers = 8, 0
    c.checkpoint = {"every": 500, "keep": 2}
    c.profile = {"first": 10, "steps": 0, "folder": ""}  # steps: how many are traced; folder: STAGE/profile
    c.tracking = {"to": "", "project": "virst"}  # to: wandb or trackio
    c.xla_flags = XLA_FLAGS
    c.goodput = {"job": ""}  # a name: Google's goodput library records the run
    c.data_root = ""  # the folder that holds the data sets' folders; sources may name a root of their own
    c.eval = {"source": {"kind": "mevis", "split": "valid_u"}, "videos": 8, "every": 1000}
    return c


def mixed(groups: dict[str, float], **shape: Any) -> dict[str, Any]:
    """A stage's data: the release's mixture of groups of data sets, sorted by the kind of batch that they need."""
    kinds = {
        "sem_seg": "image",
        "refer_seg": "image",
        "reason_seg": "image",
        "rvos": "video",
        "video_vqa": "video_text",
    }
    weights, data = mixture(groups), {}
    for kind in ("image", "video", "video_text"):
        names = [name for group in groups if kinds[group] == kind for name in MEMBERS[group]]
        if not names:
            continue
        sources = {name: {"weight": weights[name]} for name in names}
        weight = sum(weights[name] for name in names)
        data[kind] = {"kind": kind, "weight": weight, "sources": sources, "packed_length": 0, **shape}
    if "image" in data:
        data["image"] |= {"seg_tokens": 1}  # as the release answers for images
    if "video_text" in data:
        data["video_text"] |= {"conversations": 1, "text_length": 512, "vlm_frames": 32, "policy": "flex"}
    return data
