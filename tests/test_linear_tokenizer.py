"""The linear tokenizer is exactly principal component analysis of patches, and its scales do what they say.

With a gradient weight it is that of another metric, whose matrix is made here by going through pairs of pixels.
"""

import pytest
import torch

from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer


def clips(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.rand(5, 16, 16, 3, generator=generator)
    weights = torch.rand(count, 5, generator=generator)
    return (torch.einsum("fk,khwc->fhwc", weights / weights.sum(1, keepdim=True), shapes) * 255).to(torch.uint8)


def fitted(latent_dim=12, whitening=0.5, batches=3, gradient_weight=0.0):
    tokenizer = LinearTokenizer(16, 16, 8, 8, latent_dim, gradient_weight)
    tokenizer.fit(clips().chunk(batches), whitening)
    return tokenizer


def metric(height, width, weight):
    """(P, P): x^T W x is the sum of squares and, weighted, of the squares of differences of neighbours in a patch."""
    place = {(i, j, k): (i * width + j) * 3 + k for i in range(height) for j in range(width) for k in range(3)}
    matrix = torch.eye(len(place), dtype=torch.float64)
    for (i, j, k), a in place.items():
        for neighbour in ((i + 1, j, k), (i, j + 1, k)):
            if (b := place.get(neighbour)) is not None:
                difference = torch.zeros(len(place), dtype=torch.float64)
                difference[a], difference[b] = 1, -1
                matrix += weight * difference.outer(difference)
    return matrix


@pytest.mark.parametrize("gradient_weight", [0.0, 2.0])
def test_all_components_give_every_frame_back(gradient_weight):
    tokenizer = fitted(192, gradient_weight=gradient_weight)
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


@pytest.mark.parametrize("weight", [0.3, 4.0])
def test_with_a_gradient_weight_the_error_in_that_metric_is_the_smallest_there_is(weight):
    """Oracle: as above, of patches times a root of the metric; and the same components leave more of it in pixels."""
    frames, root = clips()[None], torch.linalg.cholesky(metric(8, 8, weight))
    tokenizer, plain = fitted(3, gradient_weight=weight), fitted(3)
    patches = tokenizer._patches(frames.float() / 255)[0]
    centred = (patches - patches.mean(0)).reshape(-1, 192).double()
    expected = torch.linalg.svdvals(centred @ root)[3:].square().sum()

    def errors(tokenizer):
        scaled = tokenizer.encode(frames) * tokenizer.scale
        rebuilt = (scaled @ tokenizer.components.T)[0].reshape(-1, 192)  # before pixels are cut off at 0 and 1
        return (rebuilt - centred).double()

    mine, pixels = errors(tokenizer), errors(plain)
    assert ((mine @ root).square().sum() / expected).item() == pytest.approx(1, abs=1e-3)
    assert (pixels @ root).square().sum() > 1.001 * expected
    assert mine.square().sum() > pixels.square().sum()


def test_with_a_gradient_weight_components_are_orthonormal_in_that_metric():
    """For patches that are not square, too; so encoding what was decoded changes nothing."""
    tokenizer = LinearTokenizer(16, 16, 16, 4, 7, 2.0)
    tokenizer.fit([clips()])
    d = tokenizer.components.double()
    assert torch.allclose(d.T @ metric(16, 4, 2.0) @ d, torch.eye(7, dtype=torch.float64), atol=1e-4)
    latents = tokenizer.encode(clips()[None])
    assert latents.square().mean().item() == pytest.approx(1, rel=1e-3)
    pixels = tokenizer._frames((latents * tokenizer.scale) @ tokenizer.components.T + tokenizer.mean)
    assert torch.allclose(tokenizer.encode(pixels * 255), latents, atol=1e-3)


def test_the_gradient_weight_is_kept_and_told_and_without_one_files_are_as_before():
    tokenizer = fitted(5, gradient_weight=0.5)
    assert tokenizer.to_json()["gradient_weight"] == 0.5
    again = LinearTokenizer.from_json(tokenizer.to_json())
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == tokenizer.fingerprint() != fitted(5).fingerprint()
    assert torch.equal(again.encode(clips()[None]), tokenizer.encode(clips()[None]))
    assert set(fitted(5).to_json()) == {"height", "width", "patch_height", "patch_width", "latent_dim"}


@pytest.mark.parametrize("weight", [-1, 1000.5, 10**400, float("nan"), float("inf"), True, "1", None, [1]])
def test_gradient_weights_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match="gradient_weight"):
        LinearTokenizer.stored({**fitted(5).to_json(), "gradient_weight": weight})


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
