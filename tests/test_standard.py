"""LPIPS and FVD with the user's weights: refused unless they are what was named, and ordered as the damage is.

The standard weights are not here, so values are proven on random ones of the same architecture.
"""

import hashlib
import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small import SPACE, small_dataset, small_world
from test_distances import bars, controls
from torch import nn

from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation import distances, standard
from ahriuwu_cli.evaluation.looks import check_fits
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.evaluation.standard import (
    I3D,
    Weights,
    frechet_video_distance,
    i3d_logits,
    load_i3d,
    load_lpips,
    lpips_distance,
    resize_as_tensorflow,
    standard_distances,
)
from ahriuwu_cli.rollout import RolloutConfig

CHANNELS = (64, 192, 384, 256, 256)
FEATURES = {
    0: (64, 3, 11, 4, 2),
    3: (192, 64, 5, 1, 2),
    6: (384, 192, 3, 1, 1),
    8: (256, 384, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}


def stored(path, tensors) -> Weights:
    save_file(tensors, path)
    return Weights(path, hashlib.sha256(path.read_bytes()).hexdigest())


class Backbone(nn.Module):
    """The package's AlexNet, typed from the paper's table: slices that end at the five ReLUs."""

    def __init__(self):
        super().__init__()
        for number, (index, (out, inside, kernel, stride, pad)) in enumerate(FEATURES.items(), 1):
            parts = nn.Sequential()
            if index in (3, 6):
                parts.add_module(str(index - 1), nn.MaxPool2d(3, 2))
            parts.add_module(str(index), nn.Conv2d(inside, out, kernel, stride, pad))
            parts.add_module(str(index + 1), nn.ReLU())
            self.add_module(f"slice{number}", parts)

    def forward(self, x):
        found = []
        for number in range(1, 6):
            x = getattr(self, f"slice{number}")(x)
            found.append(x)
        return found


class PackageLPIPS(nn.Module):
    """What `lpips.LPIPS` is, as far as it is used here; it must be asked for no weights, or it would unpickle some."""

    def __init__(self, net, pretrained, pnet_rand, verbose):
        super().__init__()
        assert (net, pretrained, pnet_rand) == ("alex", False, True)
        self.net = Backbone()
        for i, channels in enumerate(CHANNELS):
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))

    def forward(self, a, b, normalize):
        assert normalize
        shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        maps, total = [self.net((2 * x - 1 - shift) / scale) for x in (a, b)], 0
        for i, (x, y) in enumerate(zip(*maps, strict=True)):
            x, y = (v / (v.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
            total = total + getattr(self, f"lin{i}")["model"]((x - y) ** 2).mean(dim=(2, 3), keepdim=True)
        return total


def lpips_tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (out, inside, kernel, _, _) in FEATURES.items():
        spread = (inside * kernel**2 / 2) ** -0.5
        tensors[f"features.{index}.weight"] = torch.randn(out, inside, kernel, kernel, generator=g) * spread
        tensors[f"features.{index}.bias"] = torch.zeros(out)
    for i, channels in enumerate(CHANNELS):
        tensors[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=g)
    return tensors


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=PackageLPIPS))


@pytest.fixture(scope="module")
def i3d():
    torch.manual_seed(0)
    network = I3D()
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return network


def large(clips: np.ndarray) -> np.ndarray:
    return clips.repeat(3, axis=2).repeat(3, axis=3)


def crude(clips: np.ndarray) -> torch.Tensor:
    """A stand-in for I3D: a few numbers of a clip that see brightness, detail, motion and its smoothness."""
    x = torch.from_numpy(clips[:, -16:]).double() / 255
    moved, edges = x.diff(dim=1), x.diff(dim=3)
    far = x[:, 2:] - x[:, :-2]
    values = [
        x.mean((1, 2, 3, 4)),
        moved.abs().mean((1, 2, 3, 4)),
        edges.abs().mean((1, 2, 3, 4)),
        far.abs().mean((1, 2, 3, 4)),
    ]
    return torch.stack(values, dim=1) * 100


def test_path_and_hash_belong_together_and_the_hash_is_a_sha256(tmp_path):
    path = tmp_path / "a.safetensors"
    assert Weights.given("fvd", None, None) is None
    assert Weights.given("fvd", path, "AB" * 32) == Weights(path, "ab" * 32)
    for path_alone, hash_alone in ((path, None), (None, "ab" * 32)):
        with pytest.raises(UserError, match="--fvd-weights and --fvd-hash belong together"):
            Weights.given("fvd", path_alone, hash_alone)
    for wrong in ("ab" * 31, "xy" * 32, ""):
        with pytest.raises(UserError, match="64 digits"):
            Weights.given("lpips", path, wrong)


def test_a_file_with_another_hash_no_file_and_a_pickle_are_refused(tmp_path):
    weights = stored(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert weights.read()["x"].tolist() == [1, 1]
    stored(weights.path, {"x": torch.zeros(2)})
    for load in (load_i3d, load_lpips):
        with pytest.raises(CheckpointError, match=f"not {weights.hash}: give that file") as refused:
            load(weights)
        assert refused.value.exit_code == 4
    with pytest.raises(CheckpointError, match="cannot read weights"):
        Weights(tmp_path / "none", weights.hash).read()
    pickled = tmp_path / "i3d_torchscript.pt"
    pickled.write_bytes(b"PK\x03\x04 a TorchScript archive")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Weights(pickled, hashlib.sha256(pickled.read_bytes()).hexdigest()).read()


def test_lpips_takes_backbone_and_heads_from_the_file(package, tmp_path):
    tensors = lpips_tensors()
    weights = stored(tmp_path / "a.safetensors", tensors | {"classifier.1.weight": torch.ones(2)})
    judge = load_lpips(weights)
    assert (judge.backbone, judge.sha256) == ("alex", weights.hash)
    assert torch.equal(judge.network.net.slice3[1].weight, tensors["features.6.weight"])
    assert torch.equal(judge.network.lin4["model"][1].weight, tensors["lin4.model.1.weight"])
    for gone, why in {
        "lin2.model.1.weight": "lacks lin2",
        "features.0.weight": "holds neither",
        "features.8.bias": "lacks",
    }.items():
        with pytest.raises(CheckpointError, match=why):
            load_lpips(stored(tmp_path / "b.safetensors", {k: v for k, v in tensors.items() if k != gone}))
    odd = tensors | {"lin1.model.1.weight": torch.ones(1, 7, 1, 1)}
    with pytest.raises(CheckpointError, match="not the published LPIPS on alex"):
        load_lpips(stored(tmp_path / "c.safetensors", odd))


def test_lpips_without_its_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lpips\]'"):
        load_lpips(stored(tmp_path / "a.safetensors", lpips_tensors()))


def test_identical_frames_have_lpips_0_and_more_blur_or_noise_is_further(package, tmp_path):
    judge, rng = load_lpips(stored(tmp_path / "a.safetensors", lpips_tensors())), np.random.default_rng(0)
    truth = large(bars(4, 2, seed=1))
    soft = [truth.astype(float)]
    for _ in range(6):
        soft.append(np.mean([np.roll(soft[-1], (i, j), (2, 3)) for i in (-2, 0, 2) for j in (-2, 0, 2)], axis=0))
    blurred = [soft[i].round().astype(np.uint8) for i in (2, 6)]
    noisy = [(truth + rng.normal(0, s, truth.shape)).clip(0, 255).round().astype(np.uint8) for s in (5, 20, 80)]
    assert (lpips_distance(judge, truth, truth) == 0).all()
    for row in (blurred, noisy):
        means = [0.0, *(lpips_distance(judge, frames, truth).mean() for frames in row)]
        assert all(a < b for a, b in pairwise(means))
    whole, parts = (lpips_distance(judge, blurred[0], truth, batch=b) for b in (32, 3))
    assert whole.shape == (4, 2)
    np.testing.assert_allclose(whole, parts, rtol=1e-4)
    assert whole.mean() == pytest.approx(
        float(judge(*(torch.from_numpy(x) / 255 for x in (blurred[0], truth)))), rel=1e-4
    )


def test_i3d_has_the_published_number_of_parameters_and_names():
    network = I3D()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264  # 12.29M and the 400 classes
    found = network.state_dict()
    for name, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7), "Conv3d_2c_3x3.bn.running_var": (192,),
        "Mixed_4d.b2b.conv3d.weight": (64, 24, 3, 3, 3), "Mixed_5c.b1b.conv3d.weight": (384, 192, 3, 3, 3),
        "Mixed_5c.b3b.bn.bias": (128,), "logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,),
    }.items():  # fmt: skip
        assert found[name].shape == shape
    assert not [name for name in found if name.startswith("logits.bn")]


def test_i3d_shrinks_a_clip_as_the_paper_says_and_averages_logits_over_time(i3d):
    shapes = {}
    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: shapes.update({name: tuple(out.shape[2:])}))
        for name, module in i3d.named_children()
    ]
    clip = bars(1, 16, seed=1)
    found = i3d_logits(i3d, clip)
    for hook in hooks:
        hook.remove()
    assert found.shape == (1, 400)
    assert [shapes[k] for k in ("Conv3d_1a_7x7", "Conv3d_2c_3x3", "Mixed_3c", "Mixed_4f", "Mixed_5c", "logits")] == [
        (8, 112, 112), (8, 56, 56), (8, 28, 28), (4, 14, 14), (2, 7, 7), (1, 1, 1)
    ]  # fmt: skip
    longer = np.concatenate([np.zeros_like(clip[:, :4]), clip], axis=1)
    assert torch.allclose(i3d_logits(i3d, longer), found)  # the last 16 frames count


def test_a_unit_is_convolution_batch_norm_and_relu_with_tensorflows_padding():
    torch.manual_seed(0)
    unit = standard._Unit(2, 3, 3, 2).eval()
    nn.init.normal_(unit.bn.weight)
    unit.bn.running_mean.normal_()
    unit.bn.running_var.uniform_(1e-3, 2)
    x = torch.randn(1, 2, 4, 6, 6)
    padded = F.pad(x, (0, 1) * 3)  # even sizes, kernel 3, stride 2: one zero, at the end
    y = F.conv3d(padded, unit.conv3d.weight, stride=2)
    mean, var, gain, bias = (
        v[:, None, None, None] for v in (unit.bn.running_mean, unit.bn.running_var, unit.bn.weight, unit.bn.bias)
    )
    wanted = ((y - mean) / (var + 1e-3).sqrt() * gain + bias).clamp(min=0)
    assert torch.allclose(unit(x), wanted, atol=1e-5)


def test_frames_are_resized_as_tensorflow_1_does():
    x = torch.rand(1, 3, 5, 7)
    found = resize_as_tensorflow(x, 12)
    assert found.shape == (1, 3, 12, 12)
    for i, j in ((0, 0), (1, 5), (11, 11), (7, 2)):
        v, u = i * 5 / 12, j * 7 / 12
        a, b = int(v), int(u)
        c, d = min(a + 1, 4), min(b + 1, 6)
        top = x[..., a, b] * (1 - u + b) + x[..., a, d] * (u - b)
        low = x[..., c, b] * (1 - u + b) + x[..., c, d] * (u - b)
        assert torch.allclose(found[..., i, j], top * (1 - v + a) + low * (v - a), atol=1e-6)
    assert torch.equal(resize_as_tensorflow(x[..., :5], 5), x[..., :5])


def test_i3d_sees_pixels_between_minus_1_and_1(monkeypatch, i3d):
    seen = []
    monkeypatch.setattr(I3D, "forward", lambda self, x: seen.append(x) or x.mean((1, 2, 3, 4))[:, None])
    clip = np.stack([np.zeros((16, 8, 8, 3), np.uint8), np.full((16, 8, 8, 3), 255, np.uint8)])
    assert i3d_logits(i3d, clip).flatten().tolist() == [-1, 1]
    assert seen[0].shape == (2, 3, 16, 224, 224)


def test_weights_of_another_network_are_no_i3d(i3d, tmp_path):
    tensors = dict(i3d.state_dict())
    loaded = load_i3d(stored(tmp_path / "a.safetensors", tensors))
    assert torch.equal(loaded.Mixed_4e.b1b.conv3d.weight, tensors["Mixed_4e.b1b.conv3d.weight"])
    assert not loaded.training
    wrong = {
        "a key too few": {k: v for k, v in tensors.items() if k != "Mixed_3b.b0.bn.bias"},
        "a key too many": tensors | {"Mixed_9z.b0": torch.ones(1)},
        "600 classes": tensors | {"logits.conv3d.weight": torch.ones(600, 1024, 1, 1, 1)},
    }
    for name, other in wrong.items():
        with pytest.raises(CheckpointError, match="not an RGB I3D with 400 classes"):
            load_i3d(stored(tmp_path / f"{name}.safetensors", other))
    bias = tensors["logits.conv3d.bias"]
    for bad in (torch.full_like(bias, torch.nan), torch.ones(bias.shape, dtype=torch.int64)):
        with pytest.raises(CheckpointError, match=r"logits\.conv3d\.bias is not of finite numbers"):
            load_i3d(stored(tmp_path / "bad.safetensors", tensors | {"logits.conv3d.bias": bad}))
    swapped = {"Mixed_4e.b1b.bn.running_var": -tensors["Mixed_4e.b1b.bn.running_var"]}
    with pytest.raises(CheckpointError, match=r"Mixed_4e\.b1b\.bn\.running_var is below 0"):
        load_i3d(stored(tmp_path / "swapped.safetensors", tensors | swapped))


def test_features_that_are_not_finite_are_the_fault_of_the_network_and_end_the_work(monkeypatch, i3d):
    """Else every distance would be null beside a status of ok."""
    monkeypatch.setattr(I3D, "forward", lambda self, x: x.mean((1, 2, 3, 4))[:, None] / 0)
    with pytest.raises(CheckpointError, match="what is not finite"):
        i3d_logits(i3d, np.full((2, 16, 8, 8, 3), 255, np.uint8))


@pytest.mark.parametrize("name", ["blur", "mean frame", "frozen", "shuffled", "noise"])
def test_fvd_of_a_broken_video_lies_above_the_real_floor_and_identical_sets_have_0(name):
    windows = bars(64, 20, seed=1)
    truth, real = windows[:, 4:], bars(64, 16, seed=2)
    found = frechet_video_distance(crude, {"generated": controls(windows)[name], "real_floor": truth}, real)
    assert found["generated"] > 2 * found["real_floor"] > 0
    assert frechet_video_distance(crude, {"generated": real}, real)["generated"] == pytest.approx(0, abs=1e-9)


def test_fvd_refuses_15_frames_and_warns_below_256_clips():
    few, many = bars(64, 16, seed=1), bars(256, 16, seed=2)
    with pytest.raises(UserError, match="clips of 16 frames, but the generated clips have 15"):
        frechet_video_distance(crude, {"generated": few[:, 1:]}, many)
    with pytest.raises(UserError, match="clips of 16 frames, but the real clips have 15"):
        frechet_video_distance(crude, {"generated": few}, many[:, 1:])
    (said,) = frechet_video_distance(crude, {"generated": few}, many)["warnings"]
    assert "FVD of 64 clips is mostly bias" in said
    assert frechet_video_distance(crude, {"generated": many}, few)["warnings"]
    found = frechet_video_distance(crude, {"generated": many}, many)
    assert (found["warnings"], found["clips"], found["real_clips"], found["clip_frames"]) == ([], 256, 256, 16)


def test_a_frame_that_is_not_finite_is_counted_and_makes_fvd_null():
    clips, finite = bars(20, 18, seed=1), np.ones((20, 18), bool)
    finite[4, 1] = False  # before the last 16 frames
    assert frechet_video_distance(crude, {"generated": clips}, clips, finite)["not_finite_clips"] == 0
    finite[5, 2] = False
    found = frechet_video_distance(crude, {"generated": clips, "real_floor": clips}, clips, finite)
    assert (found["not_finite_clips"], found["generated"]) == (1, None)
    assert found["real_floor"] is not None


def test_n_backbone_and_hash_stand_beside_every_number(package, i3d, tmp_path, monkeypatch):
    monkeypatch.setattr(standard, "LPIPS_SIDE", 16)
    monkeypatch.setattr(standard, "i3d_logits", lambda network, clips: crude(clips))
    monkeypatch.setattr(standard, "lpips_distance", lambda judge, a, b, n: np.abs(a.astype(float) - b).mean((2, 3, 4)))
    store, world = small_dataset(tmp_path / "a", episodes=24, frames=80), small_world()
    assert store.action_space == SPACE
    manifest = make_manifest(store, "train", 4, 16, 16, 0)
    config = EvaluationConfig(windows=16, context=4, split="train")
    lpips = stored(tmp_path / "l.safetensors", lpips_tensors())
    fvd = stored(tmp_path / "f.safetensors", dict(i3d.state_dict()))
    found = standard_distances(world, store, config, RolloutConfig(steps=2), manifest, lpips=lpips, fvd=fvd)
    json.dumps(found, allow_nan=False)
    assert (found["lpips"]["backbone"], found["lpips"]["weights_hash"], found["lpips"]["windows"]) == (
        "alex",
        lpips.hash,
        16,
    )
    assert list(found["lpips"]["horizons"]) == ["1", "4", "16"]
    assert set(found["lpips"]["horizons"]["4"]) == {"model", "ceiling", "persistence"}
    assert (found["fvd"]["weights_hash"], found["fvd"]["clips"], len(found["fvd"]["warnings"])) == (fvd.hash, 16, 1)
    assert found["fvd"]["backbone"].startswith("I3D")
    assert found["fvd"]["generated"] > found["fvd"]["real_floor"]
    assert standard_distances(world, store, config, RolloutConfig(steps=2), manifest, lpips=lpips).keys() == {"lpips"}
    short = make_manifest(store, "train", 4, 15, 16, 0)
    with pytest.raises(UserError, match="FVD needs clips of 16 frames, not 15"):
        standard_distances(world, store, config, RolloutConfig(steps=2), short, fvd=fvd)
    for name, what in (("fvd", "FVD"), ("features", "the look at features")):
        with pytest.raises(UserError, match=f"{what} needs clips of 16 frames, not 15"):
            check_fits({name: None}, store, short, 0)
    check_fits({"fvd": None, "lpips": None}, store, manifest, 0)
    with pytest.raises(UserError, match="15 scored clips say nothing"):
        check_fits({"fvd": None}, store, make_manifest(store, "train", 4, 16, 15, 0), 0)
    with monkeypatch.context() as full:
        full.setattr(distances, "_gaps", lambda *_: [])
        with pytest.raises(DataError, match=r"scored windows leave nothing of .*'train'"):
            check_fits({"fvd": None}, store, manifest, 0)
    with monkeypatch.context() as short_gaps:
        short_gaps.setattr(distances, "_gaps", lambda *_: [(0, 3), (9, 14)])
        words = r"leave no 16 frames in a row of .*'train', 5 at most: ask for fewer --windows, or record more"
        with pytest.raises(DataError, match=words):
            check_fits({"fvd": None}, store, manifest, 0)
    monkeypatch.setattr(standard, "LPIPS_SIDE", 32)
    with pytest.raises(UserError, match="LPIPS needs frames of 32 pixels a side, not 16x16"):
        check_fits({"lpips": None}, store, manifest, 0)
    with pytest.raises(UserError, match="LPIPS needs frames of 32 pixels a side, not 16x16"):
        standard_distances(world, store, config, RolloutConfig(steps=2), manifest, lpips=lpips)
