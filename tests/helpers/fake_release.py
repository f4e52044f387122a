"""A checkout that looks like the release from outside and computes next to nothing: what recording is tested with.

Only the names that the recorder touches are there. The network is made of poolings, tables and matrices, at a tracker
size of 64; every output depends on the parameters, the frames and the tokens.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIDE = 64  # of the tracker's images
WORDS = ["<image>", "find", "the", "dog", "cat", "it", "is", "."]

CONFIG = {"hidden_size": 32, "vocab_size": 40, "sam2_config": {"cfg": "large", "checkpoint": "never/read.pt"}}

ARGUMENT = """
from dataclasses import dataclass


@dataclass
class ModelArguments:
    initial_seg_fusion: bool = False


@dataclass
class DataArguments:
    local_num_frames: int = 8
    seg_image_length: int = 8
    seg_image_size: int = 64
    image_aspect_ratio: str = "square"


@dataclass
class TrainingArguments:
    lora_alpha: int = 16
"""

TOWERS = """
import numpy as np
import torch
from PIL import Image
from torch import nn

from timm.layers import to_2tuple

use_flash_attn = True


class UMTVisionConfig:
    def __init__(self, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=448):
        self.hidden_size, self.image_size = hidden_size, image_size


class PretrainVisionTransformer(nn.Module):
    def __init__(self, encoder_embed_dim=1024, encoder_depth=24, encoder_num_heads=16):
        super().__init__()
        self.proj = nn.Linear(3, encoder_embed_dim)


class Processor:
    def __init__(self, size):
        self.size = to_2tuple(size)

    def preprocess(self, images, return_tensors):
        assert return_tensors == "pt"
        pixels = [np.asarray(Image.fromarray(i).resize(self.size, Image.Resampling.BICUBIC)) for i in images]
        return {"pixel_values": torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5}


class UMTVisionTower(nn.Module):
    def __init__(self, name, image_size=448):
        super().__init__()
        self.config = UMTVisionConfig(image_size=image_size)
        assert not use_flash_attn
        self.vision_tower = PretrainVisionTransformer()
        self.image_processor = Processor(image_size)

    def forward(self, images):
        return self.vision_tower.proj(images.mean((3, 4)))
"""

SAM2 = """
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pathlib import Path
from tensordict import tensorclass
from torch import nn

SIDE = 64


@tensorclass
class Unused:
    pass


def compose(config_name):
    assert config_name == "large"
    trunk = {"embed_dim": 144, "stages": [2, 6, 36, 4]}
    neck = SimpleNamespace(backbone_channel_list=[1152, 576, 288, 144])
    return SimpleNamespace(model=SimpleNamespace(image_encoder=SimpleNamespace(trunk=trunk, neck=neck)))


class SegModel(nn.Module):
    num_maskmem, max_cond_frames_in_attn, image_size = 7, 3, SIDE

    def __init__(self, cfg):
        super().__init__()
        trunk, neck = cfg.model.image_encoder.trunk, cfg.model.image_encoder.neck
        self.channels = neck.backbone_channel_list[-1]
        assert self.channels == trunk["embed_dim"]
        self.scale = nn.Parameter(torch.empty(self.channels, 3))
        self.pointer = nn.Linear(256, 256)
        self.sam_prompt_encoder = nn.Linear(2, 2)

    def forward_image(self, images):
        self.largest = max(getattr(self, "largest", 0), len(images))
        fpn = [torch.einsum("bchw,dc->bdhw", F.avg_pool2d(images, s), self.scale) for s in (4, 8, 16)]
        return {"vision_features": fpn[-1], "vision_pos_enc": [x * 0 for x in fpn], "backbone_fpn": fpn}

    def init_state(self, video_path, **kwargs):
        names = sorted(Path(video_path).iterdir())
        images = []
        for name in names:
            image = Image.open(name)
            pixels = torch.tensor(np.asarray(image.convert("RGB").resize((SIDE, SIDE))))
            images.append((pixels.permute(2, 0, 1) / 255.0 - 0.45) / 0.225)
        state = {"images": torch.stack(images), "hw": image.size[::-1]}
        state["cached_features"] = {0: (None, self.forward_image(state["images"][:1]))}
        state["output_dict_per_obj"] = {0: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}}
        return state

    def _frame(self, state, frame_idx, pointer):
        top = self.forward_image(state["images"][frame_idx : frame_idx + 1])["backbone_fpn"][0]
        score = pointer.mean(-1, keepdim=True)
        return {
            "pred_masks": top.mean(1, keepdim=True) - top.mean() + score[..., None, None] * 0,
            "obj_ptr": pointer,
            "object_score_logits": score,
            "maskmem_features": top[:, :8, :8, :8].to(torch.bfloat16),
        }

    def add_new_prompt(self, inference_state, frame_idx, obj_id, prompts):
        outputs = inference_state["output_dict_per_obj"][0]["cond_frame_outputs"]
        outputs[frame_idx] = self._frame(inference_state, frame_idx, self.pointer(prompts.mean(1)))

    def propagate(self, state):
        tracked = state["output_dict_per_obj"][0]
        for t in range(len(state["images"])):
            if t not in tracked["cond_frame_outputs"]:
                last = next(iter(tracked["cond_frame_outputs"].values()))
                tracked["non_cond_frame_outputs"][t] = self._frame(state, t, last["obj_ptr"] * 0.5)
            out = tracked["cond_frame_outputs"].get(t) or tracked["non_cond_frame_outputs"][t]
            mask = F.interpolate(out["pred_masks"], size=state["hw"], mode="bilinear", align_corners=False)
            yield t, (mask[0] > 0).numpy()


def build():
    return SegModel(compose(config_name="large"))
"""

BUILD_SAM = """
import torch


def _load_checkpoint(model, path):
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
"""

VIRST = """
from types import SimpleNamespace

import torch
from torch import nn

from model.sam2 import sam2_virst
from model.videochat import vision_tower_builder


class VirstConfig:
    def __init__(self, **values):
        self.__dict__.update(values)


class Prompter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.seg_proj = nn.Linear(width, 256)

    def forward(self, seg_token, image_token, return_attn):
        frames = image_token.mean((2, 3, 4))
        prompts = self.seg_proj(seg_token)[:, :, None] + frames[:, None, :, None]
        return prompts, frames


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.vision_tower = vision_tower_builder.UMTVisionTower("umt")

    def initialize_module(self):
        assert self.config.sam2_config["checkpoint"] is None
        self.seg_model = sam2_virst.build()
        self.seg_prompter = Prompter(self.config.hidden_size)

    def forward(self, inputs_embeds, labels):
        hidden = [inputs_embeds]
        for layer in self.layers:
            hidden.append(torch.tanh(layer(hidden[-1])))
        return SimpleNamespace(hidden_states=tuple(hidden)), labels


class VirstForCausalLM(nn.Module):
    def __init__(self, config, model_args, seg_token_idx):
        super().__init__()
        self.model, self.fusion, self.seg_token_idx = Model(config), model_args.initial_seg_fusion, seg_token_idx

    def _initialize_keyframe_config(self):
        pass

    def get_vision_tower(self):
        return self.model.vision_tower

    def resize_token_embeddings(self, rows):
        old = self.model.embed_tokens.weight
        self.model.embed_tokens = nn.Embedding.from_pretrained(old[:rows].clone(), freeze=False)

    def prepare_inputs_labels_for_multimodal(self, input_ids, labels, images):
        tokens = self.model.vision_tower(images)
        at = int((input_ids[0] == -200).nonzero()[0])
        text = self.model.embed_tokens(input_ids.clamp(min=0))
        embeds = torch.cat([text[:, :at], tokens, text[:, at + 1 :]], 1)
        ignored = torch.full(tokens.shape[:2], -100)
        return None, None, None, None, embeds, torch.cat([labels[:, :at], ignored, labels[:, at + 1 :]], 1), tokens

    def forward(self, input_ids, labels, attention_mask, images_clip, images_sam, **rest):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert (rest["generation"], rest["seg_evaluate"], rest["modalities"]) == (False, True, ["video"])
        *_, embeds, labels, _ = self.prepare_inputs_labels_for_multimodal(input_ids, labels, images_clip)
        out, _ = self.model(inputs_embeds=embeds + self.fusion, labels=labels)
        seg = out.hidden_states[-1][:, labels[0] == self.seg_token_idx]
        features = self.model.seg_model.forward_image(images_sam[0])["vision_features"]
        prompts, scores = self.model.seg_prompter(seg_token=seg, image_token=features[None], return_attn=True)
        anchors = torch.linspace(0, len(features) - 1, max(1, len(features) // 4)).round().long()
        state = self.model.seg_model.init_state(video_path=rest["video_path"][0])
        for i in anchors.tolist():
            self.model.seg_model.add_new_prompt(
                inference_state=state, frame_idx=rest["frame_ids"][0][0][i], obj_id=0, prompts=prompts[:, :, i]
            )
        return {t: {0: mask} for t, mask in self.model.seg_model.propagate(state)}
"""

TRANSFORMS = """
import torch
import torchvision.transforms.functional as F


class SAM2Transform:
    def __init__(self, size):
        self.size = size

    def __call__(self, frames):
        tensors = [F.to_tensor(F.resize(frame, (self.size, self.size))) for frame in frames]
        return torch.stack([F.normalize(t, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]) for t in tensors])
"""

BASE = """
import torch


def collate_fn(batch, tokenizer):
    ids = torch.stack([item["input_ids"][0] for item in batch])
    labels = torch.stack([item["labels"][0] for item in batch])
    frames = [item["frame_ids"] for item in batch]
    return {"input_ids": ids, "labels": labels, "attention_masks": ids != -1, "frame_ids": frames}
"""

RVOS = """
import json
import random

import numpy as np
import torch
from PIL import Image

from data.transforms import SAM2Transform

_DATA_INFO = {}


class RVOSDataset:
    def __init__(self, tokenizer, data_args, rvos_seg_data, train, rvos_root, **policy):
        assert not train
        assert policy == {"rvos_sample_policy": "flex", "num_frames_sample_range": "8,8"}
        self.root, exp = _DATA_INFO[rvos_seg_data]
        with open(exp) as file:
            (self.name, self.video), = json.load(file)["videos"].items()
        self.sentence = self.video["expressions"]["0"]["exp"].lower()
        self.tokenizer, self.args = tokenizer, data_args

    def _get_item(self, index):
        count = len(self.video["frames"])
        chosen = sorted(np.random.choice(count, min(count, 8), replace=False).tolist())
        paths = [f"{self.root}/JPEGImages/{self.name}/{self.video['frames'][i]}.jpg" for i in chosen]
        frames = [Image.open(p).convert("RGB") for p in paths]
        kept = sorted(random.sample(range(len(chosen)), min(len(chosen), 5)))
        answer = " ".join(f"({i}) [SEG]" for i in range(4)) + " ."
        text = f"<|im_start|> find the {self.sentence} it is {answer}"
        ids = self.tokenizer(text).input_ids
        labels = torch.tensor(ids)
        return {
            "image_path": ",".join(paths),
            "images_sam": SAM2Transform(size=64)([frames[i] for i in kept]),
            "images_clip": self.args.image_processor.preprocess([np.asarray(f) for f in frames], "pt")["pixel_values"],
            "input_ids": [torch.tensor([-200, *ids])],
            "labels": [torch.cat([torch.tensor([-100]), labels])],
            "frame_ids": [[chosen[i] for i in kept]],
        }
"""

FILES = {
    "utils/__init__.py": "",
    "utils/preprocess.py": "",
    "utils/argument.py": ARGUMENT,
    "data/__init__.py": "",
    "data/transforms.py": TRANSFORMS,
    "data/base_dataset.py": BASE,
    "data/rvos_dataset.py": RVOS,
    "model/__init__.py": "",
    "model/VIRST.py": VIRST,
    "model/config.json": json.dumps(CONFIG),
    "model/sam2/__init__.py": "",
    "model/sam2/sam2_virst.py": SAM2,
    "model/sam2/build_sam.py": BUILD_SAM,
    "model/videochat/__init__.py": "",
    "model/videochat/vision_tower_builder.py": TOWERS,
}


def write_release(root: Path) -> Path:
    """Writes the checkout and its tokenizer."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS, *(f"w{i}" for i in range(20))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(root / "model" / "videochat")
    return root
