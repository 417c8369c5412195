"""Perceptual features: the network that is named, its input, and controls that must lie above the floor.

The published weights are a pickle in a wheel, so they are not here: AHRIUWU_FEATURES_WEIGHTS names a converted file.
"""

import ast
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small import small_dataset, small_world
from test_distances import bars, controls, names

import ahriuwu_cli
from ahriuwu_cli.errors import CheckpointError, UserError
from ahriuwu_cli.evaluation import perceptual
from ahriuwu_cli.evaluation.distances import clip_distances
from ahriuwu_cli.evaluation.perceptual import (
    EfficientNetLite0,
    efficientnet_lite0_distance,
    efficientnet_lite0_features,
    load_efficientnet_lite0,
    pad_same,
    perceptual_look,
    tensors_hash,
)
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.rollout import RolloutConfig

CONTEXT, CLIPS = 4, 32
PUBLISHED = os.environ.get("AHRIUWU_FEATURES_WEIGHTS")


def random_network(seed: int = 0) -> EfficientNetLite0:
    """As loud in every layer as a trained one: batch norms that keep the spread of what comes in at about 1."""
    torch.manual_seed(seed)
    network = EfficientNetLite0()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return network


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module", autouse=True)
def small_input():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EfficientNetLite0.look, "__defaults__", (32,))
        yield


@pytest.fixture
def weights(tmp_path, network, monkeypatch):
    """The random network as a file that passes for the published one."""
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    monkeypatch.setattr(perceptual, "WEIGHTS_HASH", tensors_hash(tensors))
    save_file(network.state_dict(), tmp_path / "lite0.safetensors")
    return tmp_path / "lite0.safetensors"


@pytest.fixture(scope="module")
def windows():
    return bars(CLIPS, CONTEXT + 16, seed=1)


@pytest.fixture(scope="module")
def measured(network, windows):
    done = {}

    def embed(clips):
        key = clips.tobytes()
        if key not in done:
            done[key] = efficientnet_lite0_features(network, clips)
        return done[key]

    def measure(generated, finite=None, **others):
        truth = windows[:, CONTEXT:]
        others = {"others": (bars(CLIPS, 16, seed=2), [f"o{i}" for i in range(CLIPS)])} | others
        clips = {"generated": generated, "real_floor": truth, "ceiling": truth}
        return clip_distances(
            embed, clips, name="efficientnet_lite0", episodes=names(CLIPS), reference=bars(64, 16, seed=3),
            finite=finite, **others,
        )  # fmt: skip

    return measure


def test_the_network_has_the_published_number_of_parameters_and_names():
    network = EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    found = network.state_dict()
    assert len(network._blocks) == 16
    for name, shape in {
        "_conv_stem.weight": (32, 3, 3, 3), "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.5._depthwise_conv.weight": (240, 1, 3, 3), "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
        "_bn1.running_var": (1280,), "_fc.weight": (1000, 1280),
    }.items():  # fmt: skip
        assert found[name].shape == shape
    assert "_blocks.0._expand_conv.weight" not in found


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1), (5, 2, 2)]
)
def test_same_padding_is_tensorflows(size, kernel, stride):
    x = torch.arange(1.0, size + 1)
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    wanted = [
        sum(float(x[j]) for j in range(i * stride - before, i * stride - before + kernel) if 0 <= j < size)
        for i in range(out)
    ]
    padded = pad_same(x[None, None, None].expand(1, 1, size, size), (kernel, kernel), (stride, stride))
    ones = torch.ones(1, 1, 1, kernel)
    assert F.conv2d(padded, ones, stride=stride)[0, 0, before].tolist() == wanted
    assert pad_same(x[None, None, None], (1, kernel), (1, stride)).shape[:3] == (1, 1, 1)


def test_maps_halve_five_times_and_the_input_is_scaled_as_in_training(network):
    frames = torch.randint(0, 256, (2, 20, 24, 3), dtype=torch.uint8)
    maps, pooled = network.look(frames, side=64)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert pooled.shape == (2, 1280)
    assert network(frames).shape == (2, 1000)
    seen = []
    hook = network._conv_stem.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    network.look(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3), side=8)
    hook.remove()
    assert seen[0][0, :, :8, :8].unique().tolist() == pytest.approx([-127 / 128])
    assert seen[0][1, :, :8, :8].unique().tolist() == pytest.approx([1.0])


def test_identical_frames_are_0_apart_and_more_blur_or_noise_is_further(network, windows):
    truth, rng = windows[:6, CONTEXT : CONTEXT + 3], np.random.default_rng(0)

    def blurred(times):
        out = truth.astype(float)
        for _ in range(times):
            out = np.mean([np.roll(out, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
        return out.round().astype(np.uint8)

    def noisy(spread):
        return (truth + rng.normal(0, spread, truth.shape)).clip(0, 255).round().astype(np.uint8)

    def distance(frames):
        return efficientnet_lite0_distance(network, frames, truth)

    assert distance(truth).shape == (6, 3)
    assert (distance(truth) == 0).all()
    for row in ([blurred(1), blurred(4)], [noisy(4), noisy(20), noisy(80)]):
        means = [0.0, *(distance(frames).mean() for frames in row)]
        assert all(a < b for a, b in pairwise(means))
    assert distance(noisy(80)).max() < 20


def test_distance_is_the_slow_sum_over_maps_pixels_and_channels(network, windows):
    a, b = windows[:1, :1], windows[1:2, :1]
    wanted = 0.0
    looks = (network.look(torch.from_numpy(x[0]))[0] for x in (a, b))
    for x, y in zip(*looks, strict=True):
        _, _, height, width = x.shape
        for i in range(height):
            for j in range(width):
                u, v = (m[0, :, i, j].double() for m in (x, y))
                wanted += float(((u / u.norm() - v / v.norm()) ** 2).sum()) / (height * width)
    assert float(efficientnet_lite0_distance(network, a, b)[0, 0]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["blur", "mean frame", "frozen", "shuffled", "noise"])
def test_a_broken_video_lies_above_the_real_floor(measured, windows, name):
    found = measured(controls(windows)[name])
    for key in ("efficientnet_lite0_frechet", "efficientnet_lite0_kernel"):
        assert found[key]["generated"] > 1.5 * abs(found[key]["real_floor"])
        assert found[key]["p"] < 0.02


def test_the_truth_has_no_excess_and_fresh_real_clips_lie_at_the_floor(measured, windows):
    same, fresh = measured(windows[:, CONTEXT:]), measured(bars(CLIPS, 16, seed=6))
    for key in ("efficientnet_lite0_frechet", "efficientnet_lite0_kernel"):
        assert same[key]["excess"] == {"value": 0, "lo": 0, "hi": 0}
        assert same[key]["p"] == 1
        assert fresh[key]["p"] > 0.05
    truth = windows[:, CONTEXT:]
    itself = measured(truth, others=(truth, names(CLIPS)))
    assert itself["efficientnet_lite0_frechet"]["generated"] == pytest.approx(0, abs=1e-6)


def test_batch_size_changes_no_feature(network, windows):
    one, other = (efficientnet_lite0_features(network, windows[:5, CONTEXT:], batch=b) for b in (1, 32))
    assert one.shape == (5, 16, 1, 1280)
    assert (one - other).abs().max() < 1e-4


def test_a_frame_that_is_not_finite_is_counted_and_makes_the_distance_null(measured, windows):
    finite = np.ones((CLIPS, 16), bool)
    finite[3, 7] = False
    found = measured(windows[:, CONTEXT:], finite=finite)
    assert found["not_finite_clips"] == 1
    assert found["efficientnet_lite0_frechet"]["generated"] is None
    assert found["efficientnet_lite0_frechet"]["real_floor"] is not None


def test_other_weights_no_file_or_no_path_are_refused_in_a_sentence(weights, tmp_path):
    assert sum(p.numel() for p in load_efficientnet_lite0(weights).parameters()) == 4_652_008
    with pytest.raises(UserError, match=r"pip install -e '\.\[features\]'"):
        load_efficientnet_lite0(None)
    with pytest.raises(CheckpointError, match="cannot read EfficientNet-Lite0"):
        load_efficientnet_lite0(tmp_path / "none.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_efficientnet_lite0(tmp_path / "pickle.safetensors")
    save_file(random_network(seed=1).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="may bear that name"):
        load_efficientnet_lite0(tmp_path / "other.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in random_network().state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="may bear that name"):
        load_efficientnet_lite0(tmp_path / "half.safetensors")


def test_the_hash_is_of_names_shapes_and_values_and_of_nothing_else():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    one = tensors_hash({"a": a, "b": b})
    assert one == tensors_hash({"b": b, "a": a.t().contiguous().t()})
    others = [{"a": a + 1, "b": b}, {"a": a.reshape(3, 2), "b": b}, {"a": a, "c": b}, {"a": a.double(), "b": b}]
    assert len({one, *map(tensors_hash, others)}) == 5


def test_the_look_says_what_it_measured_on_and_a_broken_world_does_not_pass_for_its_ceiling(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(perceptual, "REFERENCE", 32)
    store, world = small_dataset(tmp_path / "a", episodes=24, frames=80), small_world()
    manifest = make_manifest(store, "train", 4, 16, 16, 0)
    config = EvaluationConfig(windows=16, context=4, split="train")
    found = perceptual_look(world, store, config, RolloutConfig(steps=2), manifest, weights=weights)
    json.dumps(found, allow_nan=False)
    assert (found["network"], found["windows"], found["clips"]) == ("efficientnet_lite0", 16, 16)
    assert found["weights_hash"] == perceptual.WEIGHTS_HASH
    by_frame = found["efficientnet_lite0_distance"]
    assert list(by_frame) == ["1", "4", "16"]
    assert 0 < by_frame["16"]["ceiling"] < by_frame["16"]["model"]
    assert {"generated", "real_floor", "ceiling", "persistence", "excess", "p"} == set(
        found["efficientnet_lite0_frechet"]
    )
    short = make_manifest(store, "train", 4, 8, 16, 0)
    with pytest.raises(UserError, match="needs clips of 16 frames, not 8"):
        perceptual_look(world, store, config, RolloutConfig(steps=2), short, weights=weights)


def test_nothing_in_the_package_reads_a_pickle():
    names_of_pickles = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for path in Path(ahriuwu_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in imported} & names_of_pickles, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.jit.load", "torch.hub.load"), path
                assert node.attr != "load_state_dict_from_url", path
            assert not (isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only")), path
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
                assert "load" not in [a.name for a in node.names], path


@pytest.mark.skipif(not PUBLISHED, reason="AHRIUWU_FEATURES_WEIGHTS names no converted file")
def test_the_published_network_knows_a_cat_a_coffee_a_missile_and_a_moped():
    from skimage import data

    network = load_efficientnet_lite0(Path(PUBLISHED))
    photographs = {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657, 744}, "stereo_motorcycle": {665, 670}}
    folder = Path(data.__file__).parent
    for name, classes in photographs.items():
        file = next(folder.glob(f"{'motorcycle_left' if 'motorcycle' in name else name}.*"))
        from PIL import Image

        image = Image.open(file).convert("RGB")
        side, (width, height) = min(image.size), image.size
        square = image.crop(((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
        logits = network(torch.from_numpy(np.array(square))[None])
        assert int(logits.argmax()) in classes, name
