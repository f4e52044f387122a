"""SAM 2 as `transformers` implements it in PyTorch, with the weights of our tracker: what ours is timed against.

Our parameters are given the release's names by the conversion table and from these the names of `Sam2VideoModel`. One
thing is made to follow VIRST, so that both compute the same: the memory of a prompted frame is encoded from its logits;
`transformers` takes its binary mask.

Axes: T frames, S positions of the feature grid, C width, D memory width, R image side, L mask side.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers
from transformers.models.sam2_video import configuration_sam2_video as parts

import torch
from benchmarks.random_network import Past
from conversion.assemble import take_apart
from conversion.rules import sam2_rules
from virst_jax.config import Sam2Config
from virst_jax.errors import UserError
from virst_jax.models.tree import flatten

MEMORY_DIM = 64  # transformers' memory attention knows no other
PREFIX = "model.seg_model."  # of the tracker's names in the release
# (release, transformers), applied in order, all that match; without the prefix
NAMES = [
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^(.*\.(?:blocks|layers)\.\d+\.)norm(\d)\.", r"\1layer_norm\2."),
    (r"^(.*\.(?:blocks|layers)\.\d+\.mlp)\.layers\.0\.", r"\1.proj_in."),
    (r"^(.*\.(?:blocks|layers)\.\d+\.mlp)\.layers\.1\.", r"\1.proj_out."),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    # heads of three layers; the middle one last, for it takes the first one's name
    (r"^((?:mask_decoder\.(?:output_hyper\w+\.\d|\w+_head)|object_pointer_proj))\.layers\.0\.", r"\1.proj_in."),
    (r"^((?:mask_decoder\.(?:output_hyper\w+\.\d|\w+_head)|object_pointer_proj))\.layers\.2\.", r"\1.proj_out."),
    (r"^((?:mask_decoder\.(?:output_hyper\w+\.\d|\w+_head)|object_pointer_proj))\.layers\.1\.", r"\1.layers.0."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^((?:mask_decoder|memory_attention)\..*)\.out_proj\.", r"\1.o_proj."),
    (r"^memory_attention\.norm\.", "memory_attention.layer_norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"^(memory_encoder\.memory_fuser\.layers\.\d+)\.dwconv\.", r"\1.depthwise_conv."),
    (r"^(memory_encoder\.memory_fuser\.layers\.\d+)\.norm\.", r"\1.layer_norm."),
    (r"^(memory_encoder\.memory_fuser\.layers\.\d+)\.pwconv(\d)\.", r"\1.pointwise_conv\2."),
    (r"^(memory_encoder\.memory_fuser\.layers\.\d+)\.gamma$", r"\1.scale"),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_\w+$", "prompt_encoder.shared_embedding.positional_embedding"),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
]
MASK_CONV = re.compile(
    r"^memory_encoder\.mask_downsampler\.encoder\.(\d|10)\."
)  # 0 to 10: convolution, norm, activation
POINTS = "prompt_encoder.point_embed.weight"  # one table of what the release keeps in four modules
GAUSSIAN = "prompt_encoder.shared_embedding.positional_embedding"
GAUSSIAN_AGAIN = "shared_image_embedding.positional_embedding"


def peer_name(name: str) -> str:
    """The name in `Sam2VideoModel` of a parameter of the release, both without prefix."""
    if match := MASK_CONV.match(name):
        index = int(match[1])
        kind = ("conv", "layer_norm")[index % 3]
        return f"memory_encoder.mask_downsampler.layers.{index // 3}.{kind}.{name[match.end() :]}"
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def peer_state(cfg: Sam2Config, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Our parameters of `Sam2` as a state dict of `Sam2VideoModel`."""
    state: dict[str, torch.Tensor] = {}
    points: dict[int, torch.Tensor] = {}
    flat = {f"sam2/{path}": value for path, value in flatten(params).items()}
    for name, value in take_apart(dict(sam2_rules(cfg)), flat.items()):
        tensor, name = torch.from_numpy(np.require(value(), requirements=["C", "W"])), name.removeprefix(PREFIX)
        if match := re.search(r"\.point_embeddings\.(\d)\.weight$", name):
            points[int(match[1])] = tensor
        else:
            state[peer_name(name)] = tensor
    state[POINTS] = torch.cat([points[i] for i in sorted(points)])
    state[GAUSSIAN_AGAIN] = state[GAUSSIAN]
    return state


def peer_config(cfg: Sam2Config) -> Any:
    """The same network in the words of `transformers`: the best of three masks on every frame, as VIRST takes it.

    Raises:
      UserError: `transformers` cannot express it.
    """
    if cfg.memory_dim != MEMORY_DIM:
        raise UserError(
            f"transformers' SAM 2 knows memories of width {MEMORY_DIM} only, not {cfg.memory_dim}: choose --config "
            "virst_7b or --size small, or leave the comparison out with --parts stages,many"
        )
    hiera, width, size = cfg.hiera, cfg.hidden_size, cfg.feature_size
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=hiera.embed_dim,
        num_attention_heads=hiera.num_heads,
        image_size=[cfg.image_size, cfg.image_size],
        num_query_pool_stages=hiera.q_pool,
        blocks_per_stage=list(hiera.stages),
        embed_dim_per_stage=list(hiera.stage_dims),
        num_attention_heads_per_stage=[hiera.num_heads * 2**i for i in range(len(hiera.stages))],
        window_size_per_stage=list(hiera.window_spec),
        window_positional_embedding_background_size=list(hiera.window_pos_embed_bkg_spatial_size),
        global_attention_blocks=list(hiera.global_att_blocks),
        mlp_ratio=hiera.mlp_ratio,
    )
    return transformers.Sam2VideoConfig(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=list(reversed(hiera.stage_dims)),
            backbone_feature_sizes=[[4 * size, 4 * size], [2 * size, 2 * size], [size, size]],
            fpn_hidden_size=width,
            fpn_top_down_levels=list(cfg.fpn_top_down_levels),
        ),
        prompt_encoder_config=parts.Sam2VideoPromptEncoderConfig(
            hidden_size=width, image_size=cfg.image_size, mask_input_channels=cfg.mask_prompt_channels
        ),
        mask_decoder_config=parts.Sam2VideoMaskDecoderConfig(
            hidden_size=width,
            mlp_dim=cfg.decoder_mlp_dim,
            num_hidden_layers=cfg.decoder_layers,
            num_attention_heads=cfg.decoder_heads,
            num_multimask_outputs=cfg.num_multimask,
            iou_head_hidden_dim=cfg.iou_head_dim,
        ),
        image_size=cfg.image_size,
        num_maskmem=cfg.num_maskmem,
        sigmoid_scale_for_mem_enc=cfg.mem_sigmoid_scale,
        sigmoid_bias_for_mem_enc=cfg.mem_sigmoid_bias,
        multimask_max_pt_num=100,  # several masks whatever the number of points
        max_object_pointers_in_encoder=cfg.max_pointers,
        max_cond_frame_num=cfg.max_anchors_attended,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=cfg.memory_layers,
        memory_attention_num_attention_heads=cfg.memory_heads,
        memory_attention_feed_forward_hidden_size=cfg.memory_mlp_dim,
        memory_attention_rope_feat_sizes=[size, size],
        rope_parameters={"rope_type": "axial", "rope_theta": cfg.rope_theta},
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=cfg.memory_dim,
        mask_downsampler_embed_dim=width,
        memory_fuser_num_layers=cfg.memory_fuser_layers,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=4 * width,
        memory_fuser_kernel_size=cfg.memory_kernel,
        memory_fuser_padding=cfg.memory_kernel // 2,
    )


class Peer:
    """`Sam2VideoModel` with our weights, in evaluation mode, float32, on the CPU.

    Args:
      cfg: the network.
      params: of our `Sam2(cfg)`, arrays without logical names.

    Raises:
      UserError: `transformers` cannot express the network.
    """

    def __init__(self, cfg: Sam2Config, params: Mapping[str, Any]):
        self.cfg = cfg
        self.model: Any = transformers.Sam2VideoModel(peer_config(cfg)).eval()
        # strict: a name that does not fit raises
        self.model.load_state_dict(peer_state(cfg, params), assign=True)
        encode = self.model._encode_new_memory
        self.model._encode_new_memory = lambda **kwargs: encode(**kwargs | {"is_mask_from_pts": False})

    @property
    def attention(self) -> str:
        """Which implementation of attention it runs."""
        return str(self.model.config._attn_implementation)

    def open_video(self, frames: torch.Tensor) -> Any:
        """A state for frames float32[T, 3, R, R], normalised."""
        return transformers.Sam2VideoInferenceSession(
            video=frames, video_height=self.cfg.image_size, video_width=self.cfg.image_size, dtype=torch.float32
        )

    def open_with_past(self, features: list[np.ndarray], past: Past) -> Any:
        """A state in which frame T comes next.

        features: of that frame, as `encode` gives them but float32[side, side, width].
        """
        count = len(past.memory)
        state = self.open_video(torch.zeros(count + 1, 1))  # the frame's features are known, the others not asked for
        index, size, cfg = state.obj_id_to_idx(0), self.cfg.feature_size, self.cfg
        maps = [torch.from_numpy(np.array(x)).flatten(0, 1)[:, None] for x in features]
        shape = (1, cfg.hidden_size, size, size)
        position = self.model.vision_encoder.neck.position_encoding(shape, "cpu", torch.float32)
        position = position.flatten(2).permute(2, 0, 1)
        state.cache.cache_vision_features(count, {"vision_feats": maps, "vision_pos_embeds": [position]})
        space = self.model.memory_encoder.position_encoding((1, cfg.memory_dim, size, size), "cpu", torch.float32)
        for t, (memory, pointer) in enumerate(zip(past.memory, past.pointers, strict=True)):
            remembered = {
                "maskmem_features": torch.from_numpy(memory.copy()).to(torch.bfloat16)[:, None],
                "maskmem_pos_enc": space.flatten(2).permute(2, 0, 1),
                "object_pointer": torch.from_numpy(pointer.copy())[None, None],
            }
            kind = "non_cond_frame_outputs" if t else "cond_frame_outputs"
            state.output_dict_per_obj[index][kind][t] = remembered
        return state

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Normalised pixels float32[1, 3, R, R] -> the three maps float32[side * side, 1, width], finest first."""
        return self.model.get_image_features(pixels, return_dict=True).fpn_hidden_states

    def condition(self, state: Any, frame: int) -> torch.Tensor:
        """Memory attention: the features of a frame conditioned on the past, float32[1, C, H, W]."""
        features = state.cache.get_vision_features(frame)
        return self.model._prepare_memory_conditioned_features(
            inference_session=state,
            frame_idx=frame,
            obj_idx=0,
            is_initial_conditioning_frame=False,
            current_vision_features=features["vision_feats"][-1],
            current_vision_positional_embeddings=features["vision_pos_embeds"][-1],
            num_total_frames=state.num_frames,
        )

    def decode(self, state: Any, frame: int, image: torch.Tensor) -> Any:
        """Mask decoder without prompts; image float32[1, C, H, W]. Its outputs, masks at both sizes among them."""
        size = self.cfg.feature_size
        fine = state.cache.get_vision_features(frame)["vision_feats"][:2]
        maps = [x.permute(1, 2, 0).view(1, -1, side, side) for x, side in zip(fine, (4 * size, 2 * size), strict=True)]
        return self.model._single_frame_forward(image_embeddings=[*maps, image], multimask_output=True)

    def encode_memory(self, state: Any, frame: int, high_res: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """Memory encoder: mask logits float32[1, 1, R, R] and object score [1, 1, 1] -> memory bfloat16[S, 1, D]."""
        top = state.cache.get_vision_features(frame)["vision_feats"][-1]
        return self.model._encode_new_memory(
            current_vision_feats=top, pred_masks_high_res=high_res, object_score_logits=score, is_mask_from_pts=False
        )[0]

    def encode_memory_exactly(self, *args: Any) -> torch.Tensor:
        """As `encode_memory`, before it is rounded: float32[S, D]."""
        kept: list[torch.Tensor] = []
        hook = self.model.memory_encoder.register_forward_hook(lambda module, given, out: kept.append(out[0]))
        self.encode_memory(*args)
        hook.remove()
        return kept[0][0].flatten(1).T

    def track(self, state: Any, frame: int) -> dict[str, torch.Tensor]:
        """One frame after others: memory attention, decoder and memory encoder, and what is kept of them."""
        self.model(state, frame_idx=frame)
        return state.output_dict_per_obj[0]["non_cond_frame_outputs"][frame]

    def propagate(self, frames: torch.Tensor, point: tuple[float, float]) -> np.ndarray:
        """Prompts frame 0 of float32[T, 3, R, R] with a point (x, y) in pixels and tracks; logits float32[T, L, L]."""
        state = self.open_video(frames)
        index = state.obj_id_to_idx(0)
        inputs = {
            "point_coords": torch.tensor(point).reshape(1, 1, 1, 2),
            "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
        }
        state.add_point_inputs(index, 0, inputs)
        state.obj_with_new_inputs.append(0)
        self.model(state, frame_idx=0)
        masks = [out.pred_masks[0, 0].numpy() for out in self.model.propagate_in_video_iterator(state, 0)]
        return np.stack(masks)
