"""What a model needs in memory besides its weights: foreseen, bounded by parts, refused where it is no model's."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import make_clip
from small import small_world
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ahriuwu_cli import memory
from ahriuwu_cli.evaluation.question import verify_world
from ahriuwu_cli.models import cache, needs
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig

SMALL = {"tokens": 4096, "latent_dim": 3, "width": 2, "depth": 1, "heads": 1, "kv_heads": 1, "mlp_hidden": 1,
         "window": 4, "time_every": 1, "k_max": 1}  # fmt: skip
IMAGES = {"model_width": 2, "heads": 1, "kv_heads": 1, "time_every": 2, "depth_encoder": 2, "depth_decoder": 2}
KINDS = [
    {},
    {"conditioning": "modulate", "mlp_hidden": 300},
    {"time_attention": "frame", "window": 12},
    {"time_attention": "frame", "window": 150, "mlp_hidden": 8},
    {"window": 200, "registers": 30, "mlp_hidden": 8},
    {"registers": 600, "mlp_hidden": 8},
]


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, until they die: `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self.known | given:
                self.known.add(key)
                self.now += leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.forget, key, leaf.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_rollout_stays_below_what_is_foreseen_and_not_far_below(make_dynamics, fields, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 0)  # tables of what may be seen that are kept, beside the one in use
    model, clip = make_dynamics(**fields), make_clip(batch=3)
    with Alive() as alive:
        held = model.new_cache(3)
        for t in range(6):
            model.extend(*(x[:, t : t + 2] for x in clip.inputs), held, keep=1)
    foreseen = needs.to_roll_out(model.config, 3)
    assert foreseen / 8 < alive.most < foreseen, (alive.most, foreseen)


def test_frames_of_a_tokenizer_stay_below_what_is_foreseen():
    tokenizer = TransformerTokenizer(TransformerTokenizerConfig(height=128, width=128, window=2))
    with Alive() as alive:
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 2, 128, 128, 3, dtype=torch.uint8)))
    assert alive.most < tokenizer.config.needed < 8 * alive.most


@pytest.mark.parametrize(
    ("window", "heads"), [(9, 1), (40, 16), (120, 1), (120, 16)], ids=["short", "heads", "beyond a chunk", "both"]
)
@pytest.mark.parametrize("most", [64, 16])
def test_long_clips_of_a_tokenizer_stay_below_what_is_foreseen(window, heads, most, monkeypatch):
    fields = IMAGES | {"heads": heads, "kv_heads": 1, "model_width": 2 * heads, "window": window, "mlp_hidden": 4}
    tokenizer = TransformerTokenizer(TransformerTokenizerConfig(16, 16, 2, **fields))
    monkeypatch.setattr(needs, "AT_ONCE", needs.of_a_clip(tokenizer.config, most + window - 1))
    latents = tokenizer.encode(torch.zeros(1, 150, 16, 16, 3, dtype=torch.uint8))
    results = 2 * 4 * 150 * 16 * 16 * 3  # all frames, in parts and put together
    with Alive() as alive:
        tokenizer.decode(latents)
    size = needs.frames_at_once(tokenizer.config, window - 1, 64)
    assert size == most
    foreseen = needs.of_a_clip(tokenizer.config, min(150, size + window - 1)) + results
    assert foreseen / 8 < alive.most < foreseen, (alive.most, foreseen)


def test_large_frames_go_through_a_linear_tokenizer_in_parts_with_the_same_result(monkeypatch):
    world = small_world()
    frames = torch.randint(0, 256, (2, 9, 16, 16, 3), dtype=torch.uint8)
    latents = world.encode(frames)
    shown = world.decode(latents)
    with Alive() as whole:
        world.decode(latents)
    monkeypatch.setattr(needs, "AT_ONCE", 2 * needs.of_pixels(world.tokenizer))  # a frame of both clips
    torch.testing.assert_close(world.encode(frames), latents, atol=1e-5, rtol=1e-5)
    with Alive() as alive:
        again = world.decode(latents)
    assert (again.int() - shown.int()).abs().max() <= 1
    assert alive.most < needs.AT_ONCE + 2 * shown.nbytes < whole.most


@pytest.mark.parametrize("size", SIZES)
def test_every_size_can_be_built_with_any_number_of_tokens_that_its_attention_takes(size):
    most = 4090 if SIZES[size].get("time_attention") != "frame" else 16_384 // SIZES[size]["window"]
    for tokens in (1, 16, 256, most):
        for channels in (1, 64, 12_288):
            DynamicsConfig(tokens=min(tokens, most), latent_dim=channels, **SIZES[size])


@pytest.mark.parametrize(
    "build",
    [
        lambda: DynamicsConfig(**SMALL | {"depth": 64, "window": 1024}),
        lambda: DynamicsConfig(**SMALL | {"mlp_hidden": 100_000}),
        lambda: DynamicsConfig(**SMALL | {"latent_dim": 65_536}),
        lambda: TransformerTokenizerConfig(512, 512, **IMAGES, mlp_hidden=100_000),
        lambda: TransformerTokenizerConfig(512, 512, **IMAGES, window=4096, mlp_hidden=10_000),
        lambda: TransformerTokenizerConfig(16, 16, **IMAGES, window=4000, mlp_hidden=20_000),
        lambda: TransformerTokenizerConfig(
            64, 64, 2, **IMAGES | {"heads": 64, "model_width": 128}, window=64, mlp_hidden=1
        ),
    ],
)
def test_what_needs_gigabytes_beside_weights_of_kilobytes_is_no_model(build):
    with pytest.raises(ValueError, match=r"to make one frame with .* MB of weights takes .* GB of memory"):
        build()


@pytest.mark.parametrize("fields", [{}, {"time_attention": "frame"}], ids=str)
def test_a_long_prompt_goes_through_in_parts_with_the_same_result(make_dynamics, fields, monkeypatch):
    model, clip = make_dynamics(**fields), make_clip(frames=6)
    prompt, last = ([x[:, part] for x in clip.inputs] for part in (slice(5), slice(5, 6)))
    found, passes, run = [], [], model._pass
    monkeypatch.setattr(model, "_pass", lambda z, *rest: passes.append(z.shape[1]) or run(z, *rest))
    for at_once in (needs.AT_ONCE, 2 * needs.of_a_frame(model.config, 2)):
        monkeypatch.setattr(needs, "AT_ONCE", at_once)
        held = model.new_cache(2)
        found.append((model.extend(*prompt, held, keep=5), model.extend(*last, held, keep=0)))
        assert held.frames == 5
    assert passes == [5, 1, 2, 2, 1, 1]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_images_go_through_in_parts_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    tokenizer = TransformerTokenizer(TransformerTokenizerConfig(16, 16, **IMAGES | {"model_width": 8}, window=3)).eval()
    frames = torch.randint(0, 256, (3, 9, 16, 16, 3), dtype=torch.uint8)
    latents = tokenizer.encode(frames)
    shown = tokenizer.decode(latents)
    seen, run = [], tokenizer._to_bottleneck
    monkeypatch.setattr(tokenizer, "_to_bottleneck", lambda x, mask: seen.append(x.shape[:2]) or run(x, mask))
    monkeypatch.setattr(needs, "AT_ONCE", needs.of_a_clip(tokenizer.config, 6))
    torch.testing.assert_close(tokenizer.encode(frames), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(latents), shown, atol=1e-5, rtol=1e-5)
    assert {tuple(shape) for shape in seen} == {(1, 4), (1, 6), (1, 3)}  # four frames, with two before them


def test_tables_that_are_large_are_not_kept_and_say_the_same(make_dynamics, monkeypatch):
    model = make_dynamics(time_attention="frame")

    def looked():
        held, found = model.new_cache(1), []
        for held.frames in range(20):
            found.append(held.look(2, 1))
            assert sum(bias.numel() for _, bias in held._known.values()) <= max(cache.KEPT, found[-1][1].numel())
        return found

    kept = looked()
    monkeypatch.setattr(cache, "KEPT", 0)
    for one, other in zip(kept, looked(), strict=True):
        assert torch.equal(torch.cat([one[0], one[1].flatten()]), torch.cat([other[0], other[1].flatten()]))


def test_a_table_of_what_may_be_seen_is_made_without_one_that_is_larger(make_dynamics):
    held = make_dynamics(time_attention="frame", registers=96, window=8).new_cache(1)  # 100 tokens a frame
    with Alive() as alive:
        _, bias = held.look(8, 8)
    assert bias.shape == (800, 900)
    assert alive.most < 1.1 * bias.nbytes


def test_what_the_machine_does_not_have_is_refused_before_it_is_taken(make_dynamics, monkeypatch):
    model = make_dynamics()
    monkeypatch.setattr(memory, "ALWAYS", 0)
    monkeypatch.setattr(memory, "most", lambda: needs.to_roll_out(model.config, 3))
    model.new_cache(3)
    with pytest.raises(MemoryError):
        model.new_cache(4)
    needs.refuse_beyond_machine(1 << 60, torch.device("cuda"))


def test_a_world_is_not_questioned_on_clips_that_the_machine_cannot_hold(monkeypatch):
    world = small_world()
    config = replace(world.dynamics.config, mlp_hidden=4000, window=12)  # the model's part is by far the largest
    world = replace(world, dynamics=Dynamics(config).eval().requires_grad_(False))
    with Alive() as alive:
        verify_world(world)
    monkeypatch.setattr(memory, "ALWAYS", 0)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "most", lambda: 0.9 * alive.most)
        patched.setattr(world.dynamics, "forward", None)  # it is refused before anything is asked of it
        with pytest.raises(MemoryError):
            verify_world(world)
    monkeypatch.setattr(memory, "most", lambda: 1.2 * alive.most)
    assert verify_world(world)


@pytest.mark.parametrize("window", [1, 3])
def test_what_is_shown_is_never_all_in_float32(window, monkeypatch):
    fields = IMAGES | {"model_width": 8, "window": window} if window > 1 else IMAGES | {"window": 1}
    tokenizer = TransformerTokenizer(TransformerTokenizerConfig(64, 64, 16, tokens=2, latent_dim=2, **fields)).eval()
    world, latents = replace(small_world(), tokenizer=tokenizer), torch.randn(2, 80, 2, 2)
    whole = world.decode(latents)
    assert torch.equal(whole, (tokenizer.decode(latents) * 255).round().to(torch.uint8))
    monkeypatch.setattr(needs, "AT_ONCE", needs.of_a_clip(tokenizer.config, 4))
    with Alive() as alive:
        parts = world.decode(latents)
    assert (parts.int() - whole.int()).abs().max() <= 1
    assert alive.most < 1.5 * whole.nbytes + 2 * needs.AT_ONCE < 4 * whole.nbytes


def test_a_world_of_many_passes_is_questioned_in_the_memory_of_few():
    few = many = None
    for steps in (64, 4096):
        world = small_world()
        world = replace(world, generation=replace(world.generation, sampler="euler", steps=steps))
        with Alive() as alive:
            verify_world(world)
        few, many = many, alive.most
    assert many < 1.2 * few
