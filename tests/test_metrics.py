"""Metrics against scikit-image and against numbers that can be worked out by hand."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from ahriuwu_cli.evaluation import metrics


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_black_against_white_is_0_db():
    black, white = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 255, np.uint8)
    assert metrics.psnr_per_frame(black, white).tolist() == [0, 0]


def test_identical_frames_have_the_capped_psnr():
    a = pictures(3, 8, 8)
    assert metrics.psnr_per_frame(a, a).tolist() == [60, 60, 60]
    assert metrics.psnr_per_frame(a, a, cap=40).tolist() == [40, 40, 40]
    assert metrics.psnr_of_mse(a, a) == 60


def test_a_constant_error_of_a_tenth_is_20_db_in_uint8_and_in_floats():
    a = np.full((1, 8, 8, 3), 0.5)
    np.testing.assert_allclose(metrics.psnr_per_frame(a, a + 0.1), 20)
    byte = np.full((1, 8, 8, 3), 100, np.uint8)
    np.testing.assert_allclose(metrics.psnr_per_frame(byte, byte + 51), -20 * np.log10(0.2))
    np.testing.assert_allclose(metrics.psnr_per_frame(torch.from_numpy(byte), byte), 60)


def test_the_psnr_of_the_mean_error_is_not_the_mean_of_psnrs():
    a = np.zeros((2, 8, 8, 3))
    b = np.stack([np.full((8, 8, 3), 0.1), np.full((8, 8, 3), 0.01)])  # 20 dB and 40 dB
    assert metrics.psnr_per_frame(a, b).mean() == pytest.approx(30)
    assert metrics.psnr_of_mse(a, b) == pytest.approx(-10 * np.log10((0.01 + 0.0001) / 2))


@pytest.mark.parametrize("size", [(64, 64), (7, 9), (40, 12)])
def test_ssim_equals_scikit_image(size):
    rng = np.random.default_rng(1)
    a = pictures(2, 3, *size)
    b = (0.7 * a + rng.normal(20, 15, a.shape)).clip(0, 255).astype(np.uint8)
    ours = metrics.ssim(a, b)
    assert ours.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        theirs = structural_similarity(
            a[i, j] / 255, b[i, j] / 255, data_range=1, gaussian_weights=False, win_size=7, channel_axis=-1
        )
        assert ours[i, j] == pytest.approx(theirs, abs=1e-6)


def test_ssim_refuses_frames_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 7x7, got 6x8"):
        metrics.ssim(pictures(1, 6, 8), pictures(1, 6, 8))


def test_values_do_not_depend_on_how_many_frames_are_measured_at_once(monkeypatch):
    a, b = pictures(5, 16, 16), pictures(5, 16, 16, seed=1)
    whole = metrics.psnr_per_frame(a, b), metrics.ssim(a, b), metrics.gradient_energy(a)
    monkeypatch.setattr(metrics, "_PIXELS", 1)
    single = metrics.psnr_per_frame(a, b), metrics.ssim(a, b), metrics.gradient_energy(a)
    for x, y in zip(whole, single, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_a_frozen_video_has_motion_ratio_0_and_the_truth_has_1():
    truth = pictures(2, 6, 8, 8)
    frozen = np.repeat(truth[:, :1], 6, axis=1)
    assert metrics.motion_ratio(frozen, truth) == 0
    assert metrics.motion_ratio(truth, truth) == 1
    assert np.isnan(metrics.motion_ratio(truth, frozen))


def test_blur_lowers_sharpness_and_noise_raises_it():
    truth = np.random.default_rng(0).uniform(0.3, 0.7, (4, 16, 16, 3))
    blurred = (truth + np.roll(truth, 1, axis=1) + np.roll(truth, 1, axis=2)) / 3
    noisy = truth + np.random.default_rng(1).normal(0, 0.1, truth.shape)
    assert metrics.sharpness_ratio(truth, truth) == 1
    assert metrics.sharpness_ratio(blurred, truth) < 0.6
    assert metrics.sharpness_ratio(noisy, truth) > 1.2


def test_gradient_energy_by_hand():
    picture = np.zeros((1, 2, 2, 3))
    picture[0, 0, 0] = 1  # one step down and one step right, of two each
    assert metrics.gradient_energy(picture).tolist() == [1.0]


def test_nan_in_a_frame_is_nan_in_its_value_and_in_no_other():
    a = np.full((3, 8, 8, 3), 0.5)
    a[1, 0, 0, 0] = np.nan
    for values in (metrics.psnr_per_frame(a, a), metrics.ssim(a, a), metrics.gradient_energy(a)):
        assert np.isnan(values).tolist() == [False, True, False]
    assert np.isnan(metrics.psnr_of_mse(a, a))


def test_integers_that_are_not_bytes_are_refused():
    with pytest.raises(ValueError, match="int64"):
        metrics.psnr_per_frame(np.zeros((1, 8, 8, 3), np.int64), np.zeros((1, 8, 8, 3), np.int64))


def panned_waves(step, frames=4):
    """A smooth texture that pans by `step` pixels a frame, uint8 (T, 16, 16, 3)."""
    x = np.arange(16) - step * np.arange(frames)[:, None]  # (T, 16)
    values = np.round(127 + 100 * np.sin(2 * np.pi * x / 16)).astype(np.uint8)
    return np.repeat(np.repeat(values[:, None, :, None], 16, axis=1), 3, axis=3)


def cosine(generated, truth):
    return metrics.motion_cosine(*(p.mean() for p in metrics.motion_products(generated, truth)))


def test_motion_cosine_is_1_for_the_truth_0_for_a_frozen_video_and_falls_for_a_pan_to_the_wrong_side():
    truth = panned_waves(0.5)
    frozen = np.repeat(truth[:1], len(truth), axis=0)
    assert cosine(truth, truth) == pytest.approx(1)
    assert cosine(frozen, truth) == 0
    assert cosine(panned_waves(-0.5), truth) < -0.7
    assert 0.2 < cosine(panned_waves(2.5), truth) < 0.9  # the right side, too far
    assert np.isnan(cosine(truth, frozen))


def test_motion_cosine_does_not_ask_how_much_moves_as_the_motion_ratio_does():
    truth = panned_waves(0.5).astype(np.float32) / 255
    faint = truth * 0.25
    assert cosine(faint, truth) == pytest.approx(1)
    assert metrics.motion_ratio(faint, truth) == pytest.approx(0.25)


def test_motion_products_are_means_over_pixels_of_products_of_changes():
    rng = np.random.default_rng(0)
    g, t = rng.random((2, 3, 4, 8, 8, 3))
    dg, dt = np.diff(g, axis=1), np.diff(t, axis=1)
    for found, expected in zip(metrics.motion_products(g, t), (dg * dg, dg * dt, dt * dt), strict=True):
        assert np.allclose(found, expected.mean((-3, -2, -1)), atol=1e-9)


def test_colour_shift_sees_a_tint_and_neither_blur_nor_a_pan():
    rng = np.random.default_rng(0)
    frame = rng.integers(50, 200, (1, 16, 16, 3)).astype(np.uint8)
    tinted = frame.copy()
    tinted[..., 0] += 51
    assert metrics.colour_shift(tinted, frame) == pytest.approx(51 / 255 / 3)
    assert metrics.colour_shift(np.roll(frame, 3, axis=2), frame) == pytest.approx(0, abs=1e-12)
