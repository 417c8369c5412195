"""The transformer tokenizer: causal, blind where it is masked, the same through its config, exact in its scale."""

import pytest
import torch

from ahriuwu_cli.models import transformer_tokenizer
from ahriuwu_cli.models.layers import as_bias
from ahriuwu_cli.models.tokenizer import build_tokenizer
from ahriuwu_cli.models.transformer_tokenizer import (
    TransformerTokenizer,
    TransformerTokenizerConfig,
    draw_patch_mask,
)

TINY = TransformerTokenizerConfig(
    height=16, width=24, patch=8, model_width=32, depth_encoder=4, depth_decoder=4, heads=4, kv_heads=2, mlp_hidden=48,
    time_every=2, tokens=5, latent_dim=6, window=3,
)  # fmt: skip


def tiny(seed: int = 0, **fields) -> TransformerTokenizer:
    torch.manual_seed(seed)
    tokenizer = TransformerTokenizer(TransformerTokenizerConfig(**{**TINY.to_json(), **fields})).eval()
    tokenizer.head.weight.data.mul_(10)  # as loud as a trained one, so that nothing hides
    return tokenizer


def clip(batch: int = 2, frames: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 16, 24, 3), generator=generator, dtype=torch.uint8)


def test_frames_become_n_latents_of_d_channels_and_frames_again():
    tokenizer = tiny()
    latents = tokenizer.encode(clip())
    assert (latents.shape, latents.dtype) == ((2, 8, 5, 6), torch.float32)
    assert latents.abs().max() < 1
    frames = tokenizer.decode(latents * 3)
    assert (frames.shape, frames.dtype) == ((2, 8, 16, 24, 3), torch.float32)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert torch.equal(tokenizer.encode(clip()), latents)


def test_forward_is_decode_of_encode_without_the_clamp():
    tokenizer = tiny()
    frames = clip()
    through = tokenizer.decode(tokenizer.encode(frames))
    assert torch.allclose(tokenizer(frames.float() / 255).clamp(0, 1), through, atol=1e-6)


def test_patches_and_frames_are_inverse():
    patches = transformer_tokenizer._to_patches(clip(), 8)
    assert patches.shape == (2, 8, 6, 192)
    assert torch.equal(patches[0, 0, 4], clip()[0, 0, 8:16, 8:16].flatten())  # row 1, column 1 of 2 x 3 patches
    assert torch.equal(transformer_tokenizer._to_frames(patches, TINY), clip())


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_no_latent_depends_on_a_later_frame_and_none_beyond_its_window(changed):
    tokenizer = tiny()
    assert tokenizer.window == 5  # two time layers, each two frames further back
    before, frames = tokenizer.encode(clip()), clip()
    frames[:, changed] = 255 - frames[:, changed]
    moved = (tokenizer.encode(frames) != before).flatten(2).any(-1).all(0)
    assert moved.tolist() == [changed <= t < changed + 5 for t in range(8)]


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_no_decoded_frame_depends_on_later_latents_and_none_beyond_its_window(changed):
    tokenizer = tiny(depth_decoder=2)
    assert tokenizer.decoder_window == 3
    latents = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    before = tokenizer.decode(latents)
    latents[:, changed] += 0.5
    moved = (tokenizer.decode(latents) != before).flatten(2).any(-1).all(0)
    assert moved.tolist() == [changed <= t < changed + 3 for t in range(8)]


def test_a_long_clip_in_chunks_equals_the_whole_clip(monkeypatch):
    tokenizer, frames = tiny(), clip(1, 40)
    latents = tokenizer.encode(frames)
    decoded = tokenizer.decode(latents)
    monkeypatch.setattr(transformer_tokenizer, "CHUNK", 7)
    assert torch.allclose(tokenizer.encode(frames), latents, atol=1e-5)
    assert torch.allclose(tokenizer.decode(latents), decoded, atol=1e-5)
    later = tokenizer.encode(frames[:, 20 - (tokenizer.window - 1) :])[:, tokenizer.window - 1 :]
    assert torch.allclose(later, latents[:, 20:], atol=1e-5)  # what a latent pack relies on


def test_encoder_patches_see_patches_only_and_decoder_latents_see_latents_only():
    """One space layer each: the rows that a change of one token reaches."""
    tokenizer = tiny()
    space = next(block for block in tokenizer.blocks if not block.over_time)
    x = torch.randn(1, 1, 11, 32, generator=torch.Generator().manual_seed(0))  # 6 patches, then 5 latents

    def reached(mask: torch.Tensor, token: int) -> list[bool]:
        changed = x.clone()
        changed[:, :, token] += 1
        return (
            (space(changed, as_bias(mask), None, None) != space(x, as_bias(mask), None, None))
            .any(-1)
            .flatten()
            .tolist()
        )

    assert reached(tokenizer.encoder_sees, 0) == [True] * 11
    assert reached(tokenizer.encoder_sees, 7) == [False] * 6 + [True] * 5
    assert reached(tokenizer.decoder_sees, 7) == [True] * 11
    assert reached(tokenizer.decoder_sees, 0) == [True] * 6 + [False] * 5


def test_what_a_hidden_patch_shows_does_not_matter_and_hiding_one_does():
    tokenizer, frames = tiny(), clip().float() / 255
    mask = torch.zeros(2, 8, 6, dtype=torch.bool)
    mask[0, 2, 4] = True
    hidden = tokenizer(frames, mask)
    assert not torch.equal(hidden[0], tokenizer(frames)[0])
    assert torch.equal(hidden[1], tokenizer(frames)[1])
    frames[0, 2, 8:16, 8:16] = 0.5
    assert torch.equal(tokenizer(frames, mask), hidden)
    frames[0, 2, 8:16, 0:8] = 0.5
    assert not torch.equal(tokenizer(frames, mask), hidden)


def test_every_image_hides_a_share_of_its_own_uniform_up_to_mask_max():
    mask = draw_patch_mask(200, 10, 400, 0.9, torch.Generator().manual_seed(0))
    assert (mask.shape, mask.dtype) == ((200, 10, 400), torch.bool)
    shares = mask.float().mean(-1).flatten().sort().values
    expected = torch.linspace(0, 0.9, len(shares))
    assert (shares - expected).abs().max() < 0.06  # sampling noise; half the range off would be 0.4
    assert torch.equal(mask, draw_patch_mask(200, 10, 400, 0.9, torch.Generator().manual_seed(0)))
    assert not draw_patch_mask(4, 4, 50, 0.0, torch.Generator().manual_seed(0)).any()


def test_latent_tokens_and_patches_have_places():
    tokenizer = tiny()
    latents = tokenizer.encode(clip())
    assert not torch.allclose(tokenizer.decode(latents.flip(2)), tokenizer.decode(latents), atol=1e-3)
    swapped = clip()
    swapped[:, :, :8], swapped[:, :, 8:] = clip()[:, :, 8:], clip()[:, :, :8]
    assert not torch.allclose(tokenizer.encode(swapped), latents, atol=1e-3)


def test_the_gradient_reaches_every_weight_with_and_without_a_hidden_patch():
    tokenizer = tiny()
    mask = draw_patch_mask(2, 8, 6, 0.9, torch.Generator().manual_seed(0))
    (tokenizer(clip().float() / 255, mask) - clip().float() / 255).square().mean().backward()
    dead = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_scaled_latents_have_unit_spread_and_decode_to_the_same_frames():
    tokenizer = tiny()
    raw = tokenizer.encode(clip())
    decoded = tokenizer.decode(raw)
    mean, std = raw.mean(dim=(0, 1)), raw.std()
    tokenizer.set_scale(mean, std)
    scaled = tokenizer.encode(clip())
    assert torch.allclose(scaled * std + mean, raw, atol=1e-6)
    assert torch.allclose(tokenizer.decode(scaled), decoded, atol=1e-6)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be scaled"):
            tokenizer.set_scale(0.0, bad)


def test_a_tokenizer_is_rebuilt_from_its_kind_its_json_and_its_weights():
    tokenizer = tiny(seed=3)
    tokenizer.set_scale(0.1, 0.7)
    again = build_tokenizer("transformer", tokenizer.to_json())
    assert isinstance(again, TransformerTokenizer)
    assert again.fingerprint() != tokenizer.fingerprint()
    again.load_state_dict(tokenizer.state_dict(), strict=True)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.config == tokenizer.config
    assert torch.equal(again.eval().encode(clip()), tokenizer.encode(clip()))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch": 7}, "do not divide into patches"),
        ({"heads": 3}, "not a multiple of heads"),
        ({"kv_heads": 3}, "not a multiple of kv_heads"),
        ({"model_width": 12, "kv_heads": 4}, "odd"),
        ({"time_every": 5}, "no layer sees time"),
        ({"time_every": 1}, "no space layer"),
        ({"tokens": 0}, "tokens must be a whole number"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"heads": True}, "heads must be a whole number"),
        ({"mask_max": 1.0}, "mask_max"),
        ({"mask_max": float("nan")}, "mask_max"),
        ({"mask_max": "0.9"}, "mask_max"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransformerTokenizerConfig(**{**TINY.to_json(), **fields})


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ValueError, match="depth"):
        TransformerTokenizer.from_json({**TINY.to_json(), "depth": 3})
    with pytest.raises(ValueError, match="window"):
        TransformerTokenizer.from_json({k: v for k, v in TINY.to_json().items() if k != "window"})


def test_frames_and_latents_of_another_shape_are_refused():
    tokenizer = tiny()
    with pytest.raises(ValueError, match="wants frames uint8"):
        tokenizer.encode(clip().float())
    with pytest.raises(ValueError, match="wants frames"):
        tokenizer.encode(clip()[:, :, :8])
    with pytest.raises(ValueError, match="wants latents"):
        tokenizer.decode(torch.zeros(1, 1, 5, 7))
