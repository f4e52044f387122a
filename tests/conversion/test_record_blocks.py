"""What recording keeps of every block, heard on a network of the release's names that computes next to nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from conversion.recording import blocks
from conversion.recording import run as recording_run
from conversion.recording.blocks import Blocks, second_moments, write_blocks
from conversion.recording.listening import wrapped
from virst_jax.errors import UserError

torch = pytest.importorskip("torch")
nn = torch.nn
SIDE, WIDTH, CLIPS, FRAMES = 4, 6, 2, 3


class Add(nn.Module):
    """Its input and one more."""

    def __init__(self, *children):
        super().__init__()
        self.blocks = nn.ModuleList(children)

    def forward(self, x):
        return x + 1


class Layer(nn.Module):
    """As a layer of transformers: a tuple, and arguments by name."""

    def forward(self, tgt, **_):
        return tgt + 1, None


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, curr, memory, memory_pos):
        x = curr.transpose(0, 1)
        for layer in self.layers:
            x, _ = layer(tgt=x)
        return (x + memory.mean()).transpose(0, 1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = Add(Add(), Add())

    def forward(self, images):
        x = self.trunk(images).permute(0, 2, 3, 1)
        for block in self.trunk.blocks:
            x = block(x)
        return {"backbone_fpn": [x.permute(0, 3, 1, 2) + i for i in range(3)]}


class TwoWayBlock(nn.Module):
    def forward(self, queries, keys, query_pe, key_pe):
        return queries + 1, keys + 2


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(), TwoWayBlock()])

    def forward(self, src, pos, tokens):
        queries, keys = tokens, src.flatten(2).transpose(1, 2)
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=tokens, key_pe=pos)
        return queries + 10, keys


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Transformer()

    def forward(self, image, tokens):
        masks, ious, _, score = self.predict_masks(image, tokens)
        return masks[:, 1:], ious[:, 1:], score

    def predict_masks(self, image, tokens):
        hs, _ = self.transformer(image, 0 * image, tokens)
        return image[:, :4], hs[:, 1, :4], hs[:, 2:6], hs[:, 0, :1]


class Fuser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Add(), Add()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask_downsampler, self.fuser = Add(), Fuser()

    def forward(self, image, mask):
        mask = self.mask_downsampler(mask)
        return self.fuser(image + mask)


class Tracker(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_encoder, self.memory_attention = Encoder(), Attention()
        self.sam_mask_decoder, self.memory_encoder = Decoder(), MemoryEncoder()

    def forward_image(self, images):
        out = self.image_encoder(images)
        out["vision_features"] = out["backbone_fpn"][-1]
        return out

    def _get_image_feature(self, state, frame_idx, batch_size):
        levels = self.forward_image(state[frame_idx][None])["backbone_fpn"]
        return None, None, [x.flatten(2).permute(2, 0, 1) for x in levels]

    def track_step_eval(self, frame_idx, features, prompt=None):
        """With a prompt: an anchor, whose memory is encoded later."""
        if prompt is None:
            self.memory_attention(curr=features, memory=torch.full((5, 1, 2), 2.0), memory_pos=torch.ones(5, 1, 2))
        image = torch.full((1, WIDTH, SIDE, SIDE), float(frame_idx))
        self.sam_mask_decoder(image, torch.zeros(1, 7, WIDTH) if prompt is None else prompt)
        if prompt is None:
            self.memory_encoder(image, 10 * image)

    def _run_memory_encoder(self, inference_state, frame_idx):
        self.memory_encoder(*torch.ones(2, 1, WIDTH, SIDE, SIDE))


def network():
    virst, model = nn.Module(), nn.Module()
    virst.model = model
    model.vision_tower = nn.Module()
    model.vision_tower.vision_tower = nn.Module()
    tower = model.vision_tower.vision_tower.encoder = nn.Module()
    tower.patch_embed, tower.blocks, tower.vision_layernorm = Add(), nn.ModuleList([Add()]), Add()
    model.mm_projector = nn.Module()
    model.mm_projector.mlp = Add()
    model.layers, model.norm = nn.ModuleList([Layer(), Layer()]), Add()
    model.seg_prompter = nn.Module()
    model.seg_prompter.memory_norm, model.seg_prompter.decoder = Add(), nn.ModuleList([Layer()])
    model.seg_model = Tracker()
    return virst


def run(virst, video):
    model = virst.model
    tower = model.vision_tower.vision_tower.encoder
    tower.patch_embed(torch.zeros(CLIPS, 3, 4, 8, 8))
    x = tower.vision_layernorm(tower.blocks[0](torch.zeros(CLIPS, 5, WIDTH)))
    for clip in x:
        model.mm_projector.mlp(clip[None])
    x = torch.zeros(1, 7, WIDTH)
    for layer in model.layers:
        x, _ = layer(x)
    model.norm(x)
    model.seg_model.forward_image(video[:2])
    model.seg_prompter.memory_norm(torch.zeros(9, 1, WIDTH))
    model.seg_prompter.decoder[0](tgt=torch.zeros(8, 1, WIDTH))
    for prompt in (3.0, 5.0):  # the second anchor on frame 0 replaces the first
        prompts = torch.full((1, 7, WIDTH), prompt)
        model.seg_model.track_step_eval(frame_idx=0, features=None, prompt=prompts)
    model.seg_model._run_memory_encoder(inference_state={}, frame_idx=0)
    for t in range(FRAMES):
        _, _, levels = model.seg_model._get_image_feature(video, t, 1)
        if t:
            model.seg_model.track_step_eval(frame_idx=t, features=levels[-1])


def test_maps_are_those_of_all_frames_when_these_are_encoded_in_parts():
    virst, kept = network(), Blocks()
    seg_model = virst.model.seg_model
    for owner, name in ((virst, "prepare_inputs_labels_for_multimodal"), (seg_model, "init_state")):
        setattr(owner, name, None)
    seg_model.add_new_prompt = None
    video = torch.arange(FRAMES * 3 * SIDE * SIDE).reshape(FRAMES, 3, SIDE, SIDE).float()
    with recording_run._listening(virst, recording_run._Heard(), 1, kept):
        seg_model.forward_image(video)
    assert len(kept.arrays["maps"]) == FRAMES


def test_every_block_is_kept():
    virst, video, kept = (
        network(),
        torch.arange(FRAMES * 3 * SIDE * SIDE).reshape(FRAMES, 3, SIDE, SIDE).float(),
        Blocks(),
    )
    with kept.listening(virst):
        run(virst, video)
    outcome = {
        "pred_masks": torch.ones(1, 1, 8, 8),
        "obj_ptr": torch.ones(1, WIDTH),
        "object_score_logits": torch.tensor([[2.0]]),
        "maskmem_features": torch.arange(2 * SIDE * SIDE).reshape(1, 2, SIDE, SIDE).bfloat16(),
    }
    kept.finish([0], dict.fromkeys(range(FRAMES), outcome), {"prompts": torch.ones(1, 2)})
    arrays = kept.arrays
    assert arrays["vision.pixels"].shape == (1, 4, 8, 8, 3)
    assert arrays["vision.embed"].shape == (1, 5, WIDTH)
    assert [arrays[f"vision.{n}"].max() for n in ("embed", "block0", "norm")] == [0, 1, 2]
    assert arrays["projector.tokens"].shape == (1, 5, WIDTH)
    assert arrays["visual"].shape == (CLIPS, 5, WIDTH)
    assert [arrays[f"llm.{n}"].max() for n in ("fused", "layer0", "layer1", "norm")] == [0, 1, 2, 3]
    np.testing.assert_array_equal(arrays["image.pixels"], video[:1].permute(0, 2, 3, 1))
    np.testing.assert_array_equal(arrays["image.block1"], arrays["image.embed"] + 2)
    np.testing.assert_array_equal(arrays["image.fpn2"], arrays["image.block1"] + 2)
    np.testing.assert_array_equal(arrays["maps"][:1], arrays["image.fpn2"])
    assert len(arrays["maps"]) == 2
    np.testing.assert_array_equal(arrays["frame0.top"], arrays["maps"][0])
    assert arrays["fusion.keys"].shape == (1, 9, WIDTH)
    assert arrays["fusion.layer0"].shape == (1, 8, WIDTH)
    assert "frame0.keys" not in arrays
    assert arrays["frame2.keys"][0, 0] == 5
    np.testing.assert_array_equal(arrays["frame2.attention1"], arrays["frame2.enter"] + 2)
    flat = arrays["frame2.conditioned"].reshape(1, SIDE * SIDE, -1)
    np.testing.assert_array_equal(flat, arrays["frame2.attention1"] + 2)
    assert arrays["frame0.decoder.tokens"].shape == (1, 7, WIDTH)
    decoder = (
        "decoder.tokens",
        "decoder0.tokens",
        "decoder1.tokens",
        "decoder.final",
        "decoder.ious",
        "decoder.object",
    )
    assert [arrays[f"frame0.{n}"].max() for n in decoder] == [5, 6, 7, 17, 17, 17]
    assert [arrays[f"frame2.{n}"].max() for n in decoder] == [0, 1, 2, 12, 12, 12]
    assert arrays["frame2.decoder1.image"].shape == (1, SIDE * SIDE, WIDTH)
    assert [arrays[f"frame2.{n}.image"].max() for n in ("decoder", "decoder0", "decoder1")] == [2, 4, 6]
    assert arrays["frame2.decoder.masks"].shape == (1, 4, SIDE, SIDE)
    assert arrays["frame2.encoder.mask"].shape == (1, SIDE, SIDE, WIDTH)
    for t, (image, mask) in enumerate([(1, 2), (1, 11), (2, 21)]):
        kept_values = [arrays[f"frame{t}.{n}"].max() for n in ("encoder.mask", "encoder.sum", "encoder0", "encoder1")]
        assert kept_values == [mask, image + mask, image + mask + 1, image + mask + 2]
    assert arrays["frame1.score"].shape == ()
    np.testing.assert_array_equal(arrays["frame1.memory"][1], [1, 17])
    assert arrays["anchors"].tolist() == [0]
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32"), np.dtype("int32")}


def test_network_is_left_as_it_was():
    virst = network()
    kept = Blocks()
    with kept.listening(virst):
        assert "forward_image" in vars(virst.model.seg_model)
        assert "predict_masks" in vars(virst.model.seg_model.sam_mask_decoder)
    before = dict(kept.arrays)
    run(virst, torch.zeros(FRAMES, 3, SIDE, SIDE))
    assert kept.arrays == before == {}
    assert "forward_image" not in vars(virst.model.seg_model)
    assert "predict_masks" not in vars(virst.model.seg_model.sam_mask_decoder)


def test_wrapped_twice():
    class Owner:
        def method(self):
            return "m"

    owner = Owner()
    with wrapped(owner, "method", lambda call: call() + "1"):
        with wrapped(owner, "method", lambda call: call() + "2"):
            assert owner.method() == "m12"
        assert owner.method() == "m1"
    assert owner.method() == "m"


def test_moments_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    keys, positions = rng.normal(size=(2, 9, 4)).astype(np.float32)
    moments = second_moments(keys, positions)
    order = rng.permutation(9)
    np.testing.assert_allclose(second_moments(keys[order], positions[order]), moments, rtol=1e-6)
    assert np.abs(second_moments(keys, positions[order]) - moments).max() > 0.1
    assert moments[0, 0] == 9


def test_size_is_told_and_room_is_asked_for(tmp_path, monkeypatch):
    told: list[str] = []
    path = tmp_path / "e2e_a.blocks.npz"
    write_blocks(path, {"a": np.zeros(500_000)}, told.append)
    assert told == [f"{path}: 1 tensors of blocks, 4 MB"]
    assert np.load(path)["a"].shape == (500_000,)
    path.unlink()
    monkeypatch.setattr(blocks.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"take 4 MB and 1 MB are free; the case itself is written"):
        write_blocks(path, {"a": np.zeros(500_000)}, told.append)
    assert not path.exists()
