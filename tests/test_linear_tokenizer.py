"""The linear tokenizer is exactly principal component analysis of patches, and its scales do what they say.

With a gradient weight it is that of another metric, whose matrix is made here by going through pairs of pixels. A
sharpened decoder is, of all linear ones with its gradient energy, that of the least error.
"""

import json

import pytest
import torch
from small import small_dataset, small_world

from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world, save_tokenizer, save_world
from ahriuwu_cli.training.tokenizer_quality import reconstruction


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


def parts(tokenizer, frames):
    """(patches, mean, coordinates before scaling), each (frames x places, values), in float64."""
    patches = tokenizer._patches(frames[None].float() / 255)[0]
    z = (tokenizer.encode(frames[None])[0] * tokenizer.scale).double()
    mean = tokenizer.mean.expand_as(patches)
    return [a.double().flatten(0, 1) for a in (patches, mean, z)]


def energy(patches, side=(8, 8)):
    """Sum of squared differences of neighbours within a patch, by pairs of pixels."""
    laplacian = metric(*side, 1.0) - torch.eye(patches.shape[1], dtype=torch.float64)
    return torch.einsum("np,pq,nq->", patches, laplacian, patches).item()


@pytest.mark.parametrize("gradient_weight", [0.0, 2.0])
@pytest.mark.parametrize("share", [0.95, 1.0])
def test_a_sharpened_decoder_keeps_the_share_of_the_gradient_energy_that_was_asked_for(share, gradient_weight):
    """Of frames of its own and of others, whose mean is another; the encoder is the same to the bit."""
    tokenizer = fitted(3, gradient_weight=gradient_weight)
    for frames in (clips(), clips()[clips()[:, 0, 0, 0] > 125]):
        assert len(frames) > 20
        sharp = tokenizer.sharpened(frames.chunk(3), share)
        x, mean, z = parts(tokenizer, frames)
        assert energy(mean + z @ tokenizer.components.double().T) < 0.9 * energy(x)
        assert energy(mean + z @ sharp.decoder.double().T) == pytest.approx(share * energy(x), rel=1e-3)
        shown = tokenizer._frames((mean + z @ sharp.decoder.double().T).reshape(1, len(frames), 4, 192))
        assert torch.allclose(sharp.decode(sharp.encode(frames[None])).double(), shown.clamp(0, 1), atol=1e-5)
        assert tokenizer.same_latents(sharp)
        assert sharp.same_latents(tokenizer)
        assert torch.equal(sharp.encode(frames[None]), tokenizer.encode(frames[None]))


def test_no_linear_decoder_of_that_gradient_energy_has_less_error():
    """Oracle: others nearby, each made to have the same energy by a factor. And a plain one times a factor is worse."""
    tokenizer = fitted(2, gradient_weight=1.0)
    sharp = tokenizer.sharpened([clips()], 0.98)
    x, mean, z = parts(tokenizer, clips())
    least, laplacian = sharp.decoder.double(), metric(8, 8, 1.0) - torch.eye(192, dtype=torch.float64)

    def error(decoder):
        return (mean + z @ decoder.T - x).square().sum().item()

    def with_energy(decoder):  # the mean's own energy stays: solve a quadratic for the factor
        moved = z @ decoder.T
        a, b, c = (
            torch.einsum("np,pq,nq->", u, laplacian, v).item() for u, v in ((moved, moved), (mean, moved), (mean, mean))
        )
        c -= 0.98 * energy(x)
        return decoder * ((-b + (b * b - a * c) ** 0.5) / a)

    assert error(with_energy(tokenizer.components.double())) > 1.001 * error(least)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            change = torch.randn(least.shape, generator=generator, dtype=torch.float64)
            assert error(with_energy(least + size * change * least.abs().mean())) >= error(least) * (1 - 1e-6)
    assert error(least) > error(tokenizer.components.double())  # likeness has its price


def test_a_sharpened_tokenizer_is_another_by_its_hash_and_comes_back_from_a_file():
    plain = fitted(5)
    sharp = plain.sharpened([clips()], 1)
    again = LinearTokenizer.from_json(sharp.to_json())
    again.load_state_dict(sharp.state_dict())
    assert again.fingerprint() == sharp.fingerprint() != plain.fingerprint()
    assert sum(t.numel() for t in sharp.state_dict().values()) == LinearTokenizer.stored(sharp.to_json())
    assert sum(t.numel() for t in plain.state_dict().values()) == LinearTokenizer.stored(plain.to_json())
    assert not plain.same_latents(fitted(5, whitening=0.4))
    assert not plain.same_latents(fitted(6))
    other_patches = LinearTokenizer(16, 16, 4, 16, 5)
    other_patches.load_state_dict(plain.state_dict())
    assert not plain.same_latents(other_patches)
    assert "sharpness" not in plain.to_json()


def test_what_cannot_be_sharpened_is_refused():
    with pytest.raises(ValueError, match="already"):
        fitted(192).sharpened([clips()], 0.9)
    flat = torch.full((5, 16, 16, 3), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no gradients"):
        fitted(3).sharpened([flat], 0.9)
    for share in (-0.1, 1.1, float("nan"), "1", True, None):
        with pytest.raises(ValueError, match="sharpness"):
            LinearTokenizer.stored({**fitted(5).to_json(), "sharpness": share})


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


def test_a_decoder_is_fitted_by_the_command_and_goes_into_a_world_that_was_trained_without_it(tmp_path, run):
    """As if the tokenizer had had it from the start: the same bytes, and a world that imagines the same latents."""
    save_world(small_world(), tmp_path / "world")
    store = small_dataset(tmp_path / "data")
    own = load_world(tmp_path / "world").tokenizer
    sizes = ("--patch", "8", "--latent-dim", "6", "--gradient-weight", "2")
    words = ("train", "tokenizer", tmp_path / "data", "--json", "--out")
    assert run(*words, tmp_path / "plain", *sizes)[0] == 0
    assert run(*words, tmp_path / "at once", *sizes, "--sharpness", "1")[0] == 0
    code, out, _ = run(*words, tmp_path / "later", "--encoder", tmp_path / "plain", "--sharpness", "1")
    assert code == 0
    assert json.loads(out)["hash"] == load_tokenizer(tmp_path / "at once").fingerprint()
    plain = reconstruction(load_tokenizer(tmp_path / "plain"), store, "val")
    assert json.loads(out)["val_sharpness_ratio"] > plain["sharpness_ratio"]

    export = ("export", tmp_path / "world", "--out", tmp_path / "small", "--weights", "float32", "--overwrite")
    code, _, err = run(*export, "--tokenizer", tmp_path / "later")
    assert (code, err.count("\n")) == (4, 1)
    assert "latents of another encoder" in err
    assert run(*words, tmp_path / "its own", "--encoder", tmp_path / "world", "--sharpness", "1")[0] == 0
    assert run(*export, "--tokenizer", tmp_path / "its own")[0] == 0
    sharp = load_world(tmp_path / "small").tokenizer
    assert own.same_latents(sharp)
    assert sharp.sharpness == 1
    assert "decoded with 1 of the gradient energy" in (tmp_path / "small" / "README.md").read_text()
    assert run("verify", tmp_path / "small", "--no-metrics")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--patch", "8", "--latent-dim", "192", "--sharpness", "0.5"], "--sharpness 0.5: plain decoding keeps"),
        (["--encoder", "{wide}", "--sharpness", "1"], "fit its decoder to frames of its own size"),
        (["--encoder", "{transformer}", "--sharpness", "1"], "this is a transformer one"),
    ],
)
def test_a_decoder_that_cannot_be_fitted_is_refused_in_a_sentence_and_nothing_is_written(tmp_path, run, options, words):
    small_dataset(tmp_path / "data")
    for name, tokenizer in (
        ("wide", LinearTokenizer(32, 16, 8, 8, 4)),
        ("transformer", TransformerTokenizer(TransformerTokenizerConfig(height=16, width=16, model_width=16))),
    ):
        save_tokenizer(tokenizer, tmp_path / name, {})
    given = [o.format(wide=tmp_path / "wide", transformer=tmp_path / "transformer") for o in options]
    code, _, err = run("train", "tokenizer", tmp_path / "data", "--out", tmp_path / "out", *given)
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err
    assert not (tmp_path / "out").exists()
