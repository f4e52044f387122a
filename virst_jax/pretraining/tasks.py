"""The kinds of batch that pretraining adds to the table of training/tasks.py. Importing this module registers them.

video_patches, image_patches   words of what each patch shows: for the video encoder
video_read, image_read         word embeddings in place of visual tokens: for the language model
image_cells                    words of what each cell of the tracker's features shows: for its image encoder
video_named, image_named       words in place of the hidden states of [SEG]: for the fusion and the tracker
"""

from collections.abc import Iterable

from virst_jax.config import VirstConfig
from virst_jax.pretraining import examples, losses
from virst_jax.profiling.flops import StepCount, StepFlops, StepShape, image_encoder, lm_head
from virst_jax.training.tasks import Task, conversations_shape, for_both, register


def patch_flops(cfg: VirstConfig, batch: losses.PatchBatch, trained: Iterable[str] | None = None) -> StepFlops:
    """Operations of a step with a PatchBatch; arguments as of profiling.flops.StepCount."""
    videos, clips, clip_frames = batch.clips.shape[:3]
    count = StepCount(cfg, videos, trained)
    patches = count.add_visual_tokens(clips, clip_frames, merge=False)
    words = clips * batch.words.shape[2] * lm_head(cfg.llm)
    count.add("words of patches", words, weights=count.trains("llm/embed_tokens"), inputs=patches)
    return count.total()


def cell_flops(cfg: VirstConfig, batch: losses.CellBatch, trained: Iterable[str] | None = None) -> StepFlops:
    """Operations of a step with a CellBatch."""
    videos, frames, cells = batch.words.shape[:3]
    count, llm, sam = StepCount(cfg, videos, trained), cfg.llm, cfg.sam2
    encoder, projection = count.trains("sam2/image_encoder/"), count.trains("second_fusion/seg_proj")
    count.add("image encoder", frames * image_encoder(sam), weights=encoder, inputs=encoder, again=count.remat)
    projected = 2 * llm.vocab_size * llm.hidden_size * sam.hidden_size
    # once for all videos
    count.add("projected words", projected / videos, weights=projection, inputs=False)
    words = frames * cells * 2 * sam.hidden_size * llm.vocab_size
    count.add("words of cells", words, weights=projection, inputs=encoder)
    return count.total()


def named_flops(cfg: VirstConfig, batch: losses.NamedBatch, trained: Iterable[str] | None = None) -> StepFlops:
    """Operations of a step with a NamedBatch."""
    videos, rows, seg_tokens = batch.words.shape
    frames = batch.frames.shape[1]
    anchors = batch.anchors.shape[1]
    shape = StepShape(videos, 0, 1, rows, 0, frames=frames, used=frames, anchors=anchors, seg_tokens=seg_tokens)
    count = StepCount(cfg, videos, trained)
    count.add_segmentation(shape, seg_hidden=count.trains("llm/lm_head"))
    return count.total()


def read_flops(cfg: VirstConfig, batch: losses.ReadBatch, trained: Iterable[str] | None = None) -> StepFlops:
    """Operations of a step with a ReadBatch."""
    shape = conversations_shape(batch, 0, 1)
    count = StepCount(cfg, shape.videos, trained)
    count.add_language_model(shape, embeds=count.trains("llm/embed_tokens"))
    return count.total()


register(
    *for_both(
        "video_patches",
        "image_patches",
        maker=examples.PatchMaker,
        array_shapes=examples.patch_shapes,
        batch=lambda arrays, prefix_len: losses.PatchBatch(**arrays),
        loss=losses.patch_loss,
        count_flops=patch_flops,
    ),
    *for_both(
        "video_read",
        "image_read",
        maker=examples.ReadMaker,
        array_shapes=examples.read_shapes,
        batch=lambda arrays, prefix_len: losses.ReadBatch(**arrays, prefix_len=prefix_len),
        loss=losses.read_parts,
        count_flops=read_flops,
    ),
    Task(
        name="image_cells",
        maker=examples.CellMaker,
        array_shapes=examples.cell_shapes,
        batch=lambda arrays, prefix_len: losses.CellBatch(**arrays),
        loss=losses.cell_loss,
        count_flops=cell_flops,
        is_image=True,
    ),
    *for_both(
        "video_named",
        "image_named",
        maker=examples.NamedMaker,
        array_shapes=examples.named_shapes,
        batch=lambda arrays, prefix_len: losses.NamedBatch(**arrays),
        loss=losses.named_loss,
        count_flops=named_flops,
    ),
)
