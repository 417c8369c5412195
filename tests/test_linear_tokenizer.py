"""The linear tokenizer is exactly principal component analysis of patches, and its scales do what they say."""

import pytest
import torch

from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer


def clips(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.rand(5, 16, 16, 3, generator=generator)
    weights = torch.rand(count, 5, generator=generator)
    return (torch.einsum("fk,khwc->fhwc", weights / weights.sum(1, keepdim=True), shapes) * 255).to(torch.uint8)


def fitted(latent_dim=12, whitening=0.5, batches=3):
    tokenizer = LinearTokenizer(16, 16, 8, 8, latent_dim)
    tokenizer.fit(clips().chunk(batches), whitening)
    return tokenizer


def test_all_components_give_every_frame_back():
    tokenizer = fitted(192)
    frames = clips(seed=1)[:20][None]
    again = (tokenizer.decode(tokenizer.encode(frames)) * 255).round()
    assert (again - frames.float()).abs().max() <= 1


def test_the_error_of_the_kept_components_is_the_smallest_there_is():
    """Oracle: the singular values of the centred patches that are left out are the error, no projection does better."""
    tokenizer = fitted(3)
    frames = clips()[None]
    patches = tokenizer._patches(frames.float() / 255)[0]
    centred = (patches - patches.mean(0)).reshape(-1, 192).double()
    expected = torch.linalg.svdvals(centred)[3:].square().sum()
    rebuilt = tokenizer._patches(tokenizer.decode(tokenizer.encode(frames)))[0]
    assert ((rebuilt - patches).double().square().sum() - expected).abs() < 0.01 * expected + 1e-3


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_unit_spread_and_whitening_sets_their_shares(whitening):
    latents = fitted(4, whitening).encode(clips()[None])[0]
    assert latents.square().mean().item() == pytest.approx(1, rel=1e-3)
    power = latents.square().mean((0, 1))
    plain = fitted(4, 0.0).encode(clips()[None])[0].square().mean((0, 1))
    expected = plain ** (1 - whitening)
    assert torch.allclose(power / power.sum(), expected / expected.sum(), atol=1e-3)


def test_the_fit_does_not_depend_on_how_the_frames_are_batched():
    a, b = fitted(batches=1), fitted(batches=7)
    frames = clips(seed=2)[:5][None]
    assert torch.allclose(a.decode(a.encode(frames)), b.decode(b.encode(frames)), atol=1e-4)


def test_two_fits_with_equal_shapes_have_different_hashes():
    assert fitted(whitening=0.5).fingerprint() != fitted(whitening=0.4).fingerprint()
    assert fitted().fingerprint() == fitted().fingerprint()


@pytest.mark.parametrize(("patch", "latent_dim"), [((5, 8), 4), ((8, 8), 0), ((8, 8), 193)])
def test_sizes_that_do_not_fit_are_refused(patch, latent_dim):
    with pytest.raises(ValueError, match=r"divide|latent_dim"):
        LinearTokenizer(16, 16, *patch, latent_dim)
