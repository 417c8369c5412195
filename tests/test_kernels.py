"""The arithmetic between the products: what is differentiated by hand against the plain formulas and autograd."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip

from ahriuwu_cli.models import kernels
from ahriuwu_cli.models.layers import rotary
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig, rollout

KINDS = ("space", "frame", "place")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def plainly(monkeypatch):
    monkeypatch.setattr(kernels, "by_hand", lambda x: False)


def tables(kind, frames, tokens, head_dim):
    if kind == "space":
        return None
    cos, sin = (t.double() for t in rotary(torch.arange(frames), head_dim))
    if kind == "place":
        return cos, sin
    return tuple(t[:, None].expand(-1, tokens, -1).contiguous() for t in (cos, sin))


def test_rms_norm_is_its_formula_and_its_gradient_is_exact():
    x, weight = draw(3, 4, 6), draw(6, seed=1)
    by_formula = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(x, weight), by_formula)
    with torch.no_grad():
        torch.testing.assert_close(kernels.rms_norm(x, weight), by_formula)
    torch.autograd.gradcheck(kernels.rms_norm, (x, weight))


def test_rms_norm_of_zeros_is_zero_and_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    y = kernels.rms_norm(x, torch.ones(4))
    y.sum().backward()
    assert y.abs().max() == 0
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("chunk", [1 << 18, 16])  # in one piece, and in several with a rest
def test_swiglu_is_its_formula_and_its_gradient_is_exact(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    x = draw(5, 3, 10)
    gate, value = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.swiglu(x), gate * torch.sigmoid(gate) * value)
    torch.autograd.gradcheck(kernels.swiglu, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_normed_heads_equal_the_plain_path_and_their_gradient_is_exact(monkeypatch, kind):
    x, gain = draw(2, 3, 5, 2, 4), draw(4, seed=1)
    turn = tables(kind, 3, 5, 4)
    by_hand = kernels.norm_heads(x, gain, kind, turn)
    torch.autograd.gradcheck(lambda x, gain: kernels.norm_heads(x, gain, kind, turn), (x, gain))
    with torch.no_grad():
        torch.testing.assert_close(kernels.norm_heads(x, gain, kind, turn), by_hand)
    plainly(monkeypatch)
    torch.testing.assert_close(kernels.norm_heads(x, gain, kind, turn), by_hand)


@pytest.mark.parametrize("length", [5, kernels.SHORT + 1])
def test_heads_in_bfloat16_attend_in_32_bits_up_to_the_longest_line_that_is_held_in_memory(length):
    q, k, v = (draw(1, 2, length, 2, 8, seed=i).bfloat16() for i in range(3))
    gain, turn = draw(8, seed=3).float(), tables("space", 2, length, 8)

    def attended(q, k, v):
        q, k = (kernels.norm_heads(x, gain, "space", turn) for x in (q, k))
        return kernels.attend(q, k, kernels.split_heads(v, "space"), None)

    with torch.autocast("cpu", torch.bfloat16):
        found = attended(q, k, v)
    assert found.dtype == torch.bfloat16
    exact = attended(q.float(), k.float(), v.float())
    error = (found - exact).norm() / exact.norm()
    assert error < (2e-3 if length <= kernels.SHORT else 2e-2)  # a rounding at the end; else each step's


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_split_into_lines_are_joined_again(kind):
    x = draw(2, 3, 5, 4, 2)
    split = kernels.split_heads(x, kind)
    assert split.shape == {"space": (6, 4, 5, 2), "frame": (2, 4, 15, 2), "place": (2, 20, 3, 2)}[kind]
    assert torch.equal(kernels.join_heads(split, kind, (2, 3, 5)), x.flatten(3))


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_short_lines_equals_pytorchs(groups, masked):
    q, k, v = (draw(3, h, n, 8, seed=i).float() for i, (h, n) in enumerate([(4, 5), (groups, 7), (groups, 7)]))
    bias = torch.zeros(5, 7).masked_fill_(torch.ones(5, 7).triu(3).bool(), -torch.inf) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0, enable_gqa=groups != 4)
    torch.testing.assert_close(kernels.attend(q, k, v, bias), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"conditioning": "token", "registers": 2},
        {"conditioning": "modulate"},
        {"time_attention": "frame", "conditioning": "token", "registers": 2, "kv_heads": 2, "window": 3},
        {"registers": 1, "time_every": 1},
    ],
)
def test_a_model_gives_the_same_outputs_and_gradients_by_hand_and_plainly(
    make_dynamics, tiny_clip, monkeypatch, fields
):
    model = make_dynamics(**fields).requires_grad_(True)

    def run():
        model.zero_grad()
        z_hat = model(*tiny_clip.inputs)
        (z_hat * tiny_clip.noise).sum().backward()
        return [z_hat.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    by_hand = run()
    plainly(monkeypatch)
    for mine, plain in zip(by_hand, run(), strict=True):
        assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_outputs_and_gradients_of_eager_ones(make_dynamics, tiny_clip):
    models = [make_dynamics(conditioning="token", registers=2, depth=3).requires_grad_(True) for _ in range(2)]
    models[1].compile_blocks()
    results = []
    for model in models:
        z_hat = model(*tiny_clip.inputs)
        (z_hat * tiny_clip.noise).sum().backward()
        results.append([z_hat.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).abs().max() <= 1e-4 * eager.abs().max()


def test_compiled_blocks_have_a_graph_for_every_shape_so_that_no_step_depends_on_the_shapes_before_it(
    make_dynamics, monkeypatch
):
    graphs = []

    def keep(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    model, shapes = make_dynamics(depth=2), range(2, 8)  # more graphs than PyTorch allows
    model.compile_blocks()
    for frames in [*shapes, *shapes]:
        model(*make_clip(frames=frames).inputs)
    assert len(graphs) == 2 * len(shapes)
    assert not any(isinstance(size, torch.SymInt) for inputs in graphs for size in inputs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_rollout_with_compiled_passes_gives_the_frames_of_an_eager_one_long_past_the_window(make_dynamics):
    clip = make_clip(frames=16)
    noise = KeyedNoise(0, ["a", "b"], (4, 8))
    config = RolloutConfig(steps=2, sampler="shortcut")
    made = []
    for compiled in (False, True):
        model = make_dynamics(conditioning="token", registers=2, depth=2)
        if compiled:
            model.compile_passes()
        inputs = (model, clip.z_clean[:, :3], clip.actions, clip.known, config, noise, 8)
        made.append(torch.stack(list(rollout(*inputs))))
        assert (model.compiled_pass is None) != compiled
    assert (made[0] - made[1]).abs().max() <= 1e-4 * made[0].abs().max()
    model.head.weight.data.zero_()
    assert torch.equal(torch.stack(list(rollout(*inputs))), made[1]), "the weights are no constants of the graph"
