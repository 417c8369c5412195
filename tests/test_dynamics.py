"""The dynamics: causality, the window's edge, cache = recomputation, and conditioning that cannot be ignored."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import SLOTS, make_clip, random_actions

from ahriuwu_cli.models.block import TimeContext, time_tables
from ahriuwu_cli.models.conditioning import ActionEmbedding, LevelEmbedding
from ahriuwu_cli.models.dynamics import Dynamics, Past, count_parameters, incoming_actions
from ahriuwu_cli.models.dynamics_config import CONDITIONINGS, DynamicsConfig
from ahriuwu_cli.models.kernels import rotate
from ahriuwu_cli.models.layers import Attention, as_bias, rotary, window_mask

VARIANTS = [
    {},
    {"conditioning": "token"},
    {"conditioning": "modulate"},
    {"registers": 3},
    {"kv_heads": 2},
    {"time_every": 1, "depth": 3},
    {"linear_skip": False, "conditioning": "token", "registers": 2, "kv_heads": 1},
    {"window": 2},
    {"predicts": "v"},
    {"predicts": "v", "linear_skip": False},
    {"time_attention": "frame"},
    {"time_attention": "frame", "conditioning": "token", "registers": 2, "kv_heads": 2, "window": 3},
    {"time_attention": "frame", "width": 24},  # an odd number of rotary pairs
]


def named(fields):
    return "-".join(f"{k}={v}" for k, v in fields.items()) or "default"


def relative(a, b):
    return ((a - b).abs().max() / b.square().mean().sqrt()).item()


def by_cache(model, clip, prefill=1):
    """The same clip, frame by frame through a cache: `prefill` frames at once, then one at a time."""
    cache, outputs = model.new_cache(clip.tau.shape[0]), []
    edges = [0, prefill, *range(prefill + 1, clip.tau.shape[1] + 1)]
    for first, stop in itertools.pairwise(edges):
        outputs.append(model.extend(*(x[:, first:stop] for x in clip.inputs), cache, keep=stop - first))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_the_cache_gives_what_recomputation_gives_five_windows_long(make_dynamics, fields):
    model = make_dynamics(**fields)
    clip = make_clip(frames=5 * model.config.window + 3)
    whole = model(*clip.inputs)
    assert relative(by_cache(model, clip), whole) < 1e-4
    assert relative(by_cache(model, clip, prefill=model.config.window), whole) < 1e-4


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_a_clip_behind_its_past_gives_what_a_rollout_gives_frame_by_frame(make_dynamics, fields):
    model = make_dynamics(**fields)
    frames = 2 * model.config.window + 3
    clip, other = make_clip(frames=frames), make_clip(frames=frames, seed=1)
    past = Past(other.z_tau, torch.full_like(clip.tau, 0.125), torch.full_like(clip.d, 0.125))
    cache, by_frame = model.new_cache(clip.tau.shape[0]), []
    for t in range(frames):
        here = slice(t, t + 1)
        shown = [x[:, here] for x in clip.inputs]
        by_frame.append(model.extend(*shown, cache, keep=0))
        model.extend(*(x[:, here] for x in past), *shown[3:], cache, keep=1)
    whole = model(*clip.inputs, past)
    assert whole.shape == clip.z_tau.shape
    assert relative(whole, torch.cat(by_frame, dim=1)) < 1e-4
    assert relative(whole, model(*clip.inputs)) > 1e-2  # where frames see one another


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_a_commit_that_rides_along_equals_a_separate_commit_and_pass(make_dynamics, fields):
    model = make_dynamics(**fields)
    frames = 3 * model.config.window
    clip, draft = make_clip(frames=frames), make_clip(frames=frames, seed=1)
    riding, apart = model.new_cache(2), model.new_cache(2)
    for t in range(frames - 1):
        now = [x[:, t : t + 1] for x in clip.inputs]
        then = [x[:, t + 1 : t + 2] for x in draft.inputs]
        both = [torch.cat(pair, dim=1) for pair in zip(now, then, strict=True)]
        together = model.extend(*both, riding, keep=1)
        committed = model.extend(*now, apart, keep=1)
        passed = model.extend(*then, apart, keep=0)
        torch.testing.assert_close(together, torch.cat([committed, passed], dim=1), atol=1e-4, rtol=1e-4)
        again = model.extend(*then, riding, keep=0)  # a further denoising pass sees the same context
        torch.testing.assert_close(again, passed, atol=1e-4, rtol=1e-4)
        pairs = zip(clip.inputs, draft.inputs, strict=True)
        whole = [torch.cat([x[:, : t + 1], y[:, t + 1 : t + 2]], dim=1) for x, y in pairs]
        torch.testing.assert_close(passed, model(*whole)[:, -1:], atol=1e-4, rtol=1e-4)
    assert riding.frames == apart.frames == frames - 1


def test_more_commits_than_the_window_holds_at_once_are_a_broken_invariant(tiny_dynamics):
    clip = make_clip(frames=7)
    with pytest.raises(AssertionError):
        tiny_dynamics.extend(*clip.inputs, tiny_dynamics.new_cache(2), keep=7)
    with pytest.raises(AssertionError):
        tiny_dynamics.extend(*clip.inputs, tiny_dynamics.new_cache(2), keep=1)


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
@pytest.mark.parametrize("what", ["z_tau", "tau", "d", "actions", "known"])
def test_a_change_in_a_later_frame_never_reaches_an_earlier_one(make_dynamics, fields, what):
    model, clip = make_dynamics(**fields), make_clip()
    changed = {n: x.clone() for n, x in zip(("z_tau", "tau", "d", "actions", "known"), clip.inputs, strict=True)}
    new = {
        "z_tau": lambda x: x + 1,
        "tau": lambda x: torch.where(x == 1, 0.5, 1.0),
        "d": lambda x: torch.where(x == 1, 0.125, 1.0),
        "actions": lambda x: 1 - x,
        "known": lambda x: ~x,
    }[what]
    changed[what][:, 4] = new(changed[what][:, 4])
    before, after = model(*clip.inputs), model(*changed.values())
    assert torch.equal(before[:, :4], after[:, :4])
    moved = (before - after).abs().amax(dim=(0, 2, 3))
    assert moved[4] > 1e-4
    assert moved[5] > 1e-5  # and the frames that follow do see it


@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_frame_sees_exactly_the_window_that_ends_with_itself(make_dynamics, window):
    model = make_dynamics(window=window, depth=2, registers=1)  # one time layer: no relay
    clip = make_clip(frames=12)
    t = 9
    before, held = model(*clip.inputs), by_cache(model, clip)[:, t]
    for age in range(t + 1):
        z = clip.z_tau.clone()
        z[:, t - age] += 3
        moved = (model(z, *clip.inputs[1:]) - before)[:, t].abs().max()
        assert (moved > 1e-4) == (age < window), (age, moved)
        touched = by_cache(model, type(clip)(clip.z_clean, clip.noise, z, *clip.inputs[1:]))[:, t]
        assert ((touched - held).abs().max() > 1e-4) == (age < window)


def test_the_window_mask_is_the_band_of_the_last_window_frames():
    by_hand = torch.tensor([[s <= t and t - s < 3 for s in range(6)] for t in range(6)])
    assert torch.equal(window_mask(6, 3, torch.device("cpu")), by_hand)


def test_clips_do_not_see_each_other(tiny_dynamics):
    clip = make_clip(batch=3)
    alone = tiny_dynamics(*(x[1:2] for x in clip.inputs))
    torch.testing.assert_close(tiny_dynamics(*clip.inputs)[1:2], alone, atol=1e-5, rtol=1e-5)


def test_across_frames_a_token_sees_other_places_of_the_past(make_dynamics):
    """The layer alone: place 0 of the last frame answers to place 2 of the frame before it, or it does not."""
    for kind, sees in (("place", False), ("frame", True)):
        model = make_dynamics(time_attention=kind)
        h = torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(0))
        other = h.clone()
        other[:, 2, 2] += 1
        each = model.config.sequence // model.config.lines
        mask = window_mask(4, 5, h.device).repeat_interleave(each, 0).repeat_interleave(each, 1)
        time = TimeContext(model.config, time_tables(model.config, torch.arange(4)), as_bias(mask))
        attention = model.blocks[0].attention
        change = (time.attend(attention, h) - time.attend(attention, other)).abs().amax(dim=(0, 3))
        assert (change[3, 0] > 1e-3).item() is sees
        assert change[3, 2] > 1e-3  # under both its own place in the past is seen ...
        assert change[:2].max() == 0  # ... and the future is not


def test_across_frames_the_rotary_places_depend_on_the_distance_between_tokens_alone(make_dynamics):
    config = make_dynamics(time_attention="frame", tokens=6).config
    tables = [table.flatten(0, 1) for table in time_tables(config, torch.arange(3))]
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 18, 8)
    scores = (rotate(q, *tables) @ rotate(k, *tables).T).view(3, 6, 3, 6)
    torch.testing.assert_close(scores[1, 1, 0, 3], scores[2, 3, 1, 5])  # one frame back, two places on
    assert (scores[1, 1, 0, 3] - scores[1, 1, 0, 4]).abs() > 1e-3  # another place
    assert (scores[2, 1, 1, 3] - scores[2, 1, 0, 3]).abs() > 1e-3  # another frame


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_permuting_latent_tokens_changes_the_output(make_dynamics, fields, tiny_clip):
    model = make_dynamics(**fields)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(tiny_clip.z_tau[:, :, order], *tiny_clip.inputs[1:])
    assert relative(permuted, model(*tiny_clip.inputs)[:, :, order]) > 0.05
    model.places.zero_()  # without places the tokens cannot be told apart, and this test would notice
    permuted = model(tiny_clip.z_tau[:, :, order], *tiny_clip.inputs[1:])
    change = relative(permuted, model(*tiny_clip.inputs)[:, :, order])
    if model.config.time_attention == "frame":  # but for the rotary places inside attention
        assert change > 0.01
    else:
        assert change < 1e-4


def test_every_token_of_a_frame_is_seen_by_every_other(tiny_dynamics, tiny_clip):
    for n in range(4):
        z = tiny_clip.z_tau.clone()
        z[:, 3, n] += 2
        moved = (
            (tiny_dynamics(z, *tiny_clip.inputs[1:]) - tiny_dynamics(*tiny_clip.inputs))[:, 3].abs().amax(dim=(0, 2))
        )
        assert moved.min() > 1e-4


# Conditioning


def sensitivities(model, clip, frame=4):
    """RMS change of a frame's output when its tau, its d or its action is another, the state being the same."""
    full = lambda value: torch.full_like(clip.tau, value)  # noqa: E731
    base = {"tau": full(0.5), "d": full(0.25), "actions": clip.actions.clone()}

    def output(**changed):
        told = {**base, **changed}
        return model(clip.z_tau, told["tau"], told["d"], told["actions"], clip.known)[:, frame]

    def swapped(name, new):
        value = base[name].clone()
        value[:, frame] = new(value[:, frame])
        return (output(**{name: value}) - output()).square().mean().sqrt().item()

    return {
        "tau": swapped("tau", lambda x: x * 2),
        "d": swapped("d", lambda x: x * 4),
        "action": swapped("actions", lambda x: torch.stack([1 - x[:, 0], x[:, 1], x[:, 2], x[:, 3]], dim=1)),
    }


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("loud", [False, True])
def test_no_condition_is_drowned_by_another_at_init(make_dynamics, conditioning, loud):
    per_seed = [
        sensitivities(make_dynamics(conditioning=conditioning, linear_skip=False, loud=loud, seed=s), make_clip(seed=s))
        for s in range(4)
    ]
    mean = {name: sum(s[name] for s in per_seed) / 4 for name in per_seed[0]}
    assert max(mean["tau"], mean["d"]) < 4 * min(mean["tau"], mean["d"]), mean
    assert max(mean.values()) < 16 * min(mean.values()), mean  # the bug that cost weeks had 158
    assert min(mean.values()) > 1e-4


def test_a_drowned_step_size_is_noticed(make_dynamics):
    model = make_dynamics(linear_skip=False)
    model.level.d_table.mul_(1 / 158)
    found = sensitivities(model, make_clip())
    assert found["tau"] > 16 * found["d"]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_condition_gets_a_gradient_of_its_own_at_init(make_dynamics, conditioning):
    model = make_dynamics(conditioning=conditioning, loud=False).requires_grad_(True)
    clip = make_clip(batch=8)
    (model(*clip.inputs) - clip.z_clean).square().mean().backward()
    norms = [model.level.tau_table.grad.norm(), model.level.d_table.grad.norm()]
    norms += [table.grad.norm() for table in model.action.tables]
    assert min(norms) > 0
    assert max(norms[:2]) < 10 * min(norms[:2])


def test_tau_between_two_grid_points_is_embedded_between_them():
    torch.manual_seed(0)
    level = LevelEmbedding(8, 32)
    level.mix = torch.nn.Identity()
    d = torch.full((1, 3), 0.25)
    low, high, between = level(torch.tensor([[0.125, 0.25, 0.1625]]), d)[0]
    torch.testing.assert_close(between[:16], 0.7 * low[:16] + 0.3 * high[:16])
    torch.testing.assert_close(low[:16], level.tau_table[1])
    torch.testing.assert_close(low[16:], between[16:])
    ends = level(torch.tensor([[0.0, 1.0]]), d[:, :2])[0]
    torch.testing.assert_close(ends[:, :16], level.tau_table[[0, 8]])


def test_every_step_size_has_a_row_of_its_own_and_every_level_another_embedding():
    torch.manual_seed(0)
    level = LevelEmbedding(64, 32)
    sizes = torch.tensor([[2.0**-i for i in range(7)]])
    level.mix = torch.nn.Identity()
    torch.testing.assert_close(level(torch.ones(1, 7), sizes)[0, :, 16:], level.d_table)
    table = level.tau_table.detach()
    assert torch.pdist(table).min() > 1e-2  # 65 levels that can be told apart from the start
    assert level.d_table.shape == (7, 16)


def action_by_hand(module, row):
    """Two buttons, one of three choices, one value scaled from -2..4 to -1..1, summed."""
    buttons, choice, value = module.tables
    total = row[0] * buttons[0] + row[1] * buttons[1] + choice[int(row[2])]
    return total + ((row[3] + 2) / 6 * 2 - 1) * value[0]


def test_an_action_is_the_sum_of_its_components():
    torch.manual_seed(0)
    module = ActionEmbedding(SLOTS, 16)
    actions = random_actions(2, 5, torch.Generator().manual_seed(0))
    actions[0, 0] = torch.tensor([1.0, 1.0, 2.0, 4.0])
    got = module(actions, torch.ones(2, 5, dtype=torch.bool))
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(got[b, t], action_by_hand(module, actions[b, t]))


def test_an_unknown_action_gets_the_learned_embedding_whatever_its_row_says(tiny_dynamics, tiny_clip):
    module = tiny_dynamics.action
    actions, known = tiny_clip.actions, tiny_clip.known.clone()
    known[1, 3] = False
    got = module(actions, known)
    assert torch.equal(got[1, 3], module.unknown)
    assert torch.equal(got[:, 0], module.unknown.expand(2, -1))
    torch.testing.assert_close(got[0, 3], action_by_hand(module, actions[0, 3]))
    other = actions.clone()
    other[1, 3] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    same = [tiny_dynamics(*tiny_clip.inputs[:3], a, known) for a in (actions, other)]
    assert torch.equal(*same)
    heard = [tiny_dynamics(*tiny_clip.inputs[:3], a, tiny_clip.known) for a in (actions, other)]
    assert not torch.equal(*heard)


def test_video_without_any_actions_needs_no_action_space(make_dynamics, tiny_clip):
    model = make_dynamics(action_space=())
    none = torch.zeros(2, 7, 0)
    assert model(*tiny_clip.inputs[:3], none, torch.zeros(2, 7, dtype=torch.bool)).shape == (2, 7, 4, 8)


def test_the_action_that_led_to_frame_t_stands_at_row_t():
    actions = torch.arange(1.0, 7).view(2, 3, 1)
    incoming, known = incoming_actions(actions, torch.tensor([True, False]))
    assert incoming[:, :, 0].tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert known.tolist() == [[False, True, True, True], [False] * 4]


# The parts


def test_the_skip_starts_from_the_best_linear_denoiser(make_dynamics, tiny_clip):
    model, plain = make_dynamics(), make_dynamics(linear_skip=False)
    plain.load_state_dict(model.state_dict())
    t, power = tiny_clip.tau[..., None, None], model.channel_scale**2
    wiener = (1 - t) * power / ((1 - t) ** 2 * power + t**2) * tiny_clip.z_tau
    torch.testing.assert_close(model(*tiny_clip.inputs) - plain(*tiny_clip.inputs), wiener, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("skip", [True, False])
def test_a_network_that_predicts_v_gives_the_z_hat_of_that_velocity(make_dynamics, tiny_clip, skip):
    x = make_dynamics(linear_skip=False)
    v = make_dynamics(linear_skip=skip, predicts="v")
    tau = tiny_clip.tau[..., None, None]
    spread = v.channel_scale**2
    start = (1 - tau) * spread / ((1 - tau) ** 2 * spread + tau**2) if skip else torch.ones_like(tau)
    expected = start * tiny_clip.z_tau - tau * x(*tiny_clip.inputs)  # the same head, read as a velocity
    torch.testing.assert_close(v(*tiny_clip.inputs), expected)


def test_rotary_positions_only_see_distances():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 8, generator=g)
    scores = []
    for start in (0, 3, 100_000):
        tables = rotary(torch.arange(start, start + 6), 8)
        scores.append(rotate(q, *tables) @ rotate(k, *tables).T)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0], q @ k.T, atol=1e-2)


def test_attention_is_softmax_over_normed_queries_and_keys_with_shared_groups():
    torch.manual_seed(0)
    attention = Attention(16, heads=4, kv_heads=2)
    x = torch.randn(3, 1, 5, 16)
    norm = lambda v: v / v.square().mean(-1, keepdim=True).sqrt()  # noqa: E731
    q = norm(attention.q(x).view(3, 5, 4, 4))
    k, v = attention.kv(x).view(3, 5, 2, 2, 4).unbind(2)
    k = norm(k)
    heads = []
    for h in range(4):
        scores = q[:, :, h] @ k[:, :, h // 2].transpose(1, 2) / 2  # sqrt of head width 4
        heads.append(scores.softmax(-1) @ v[:, :, h // 2])
    torch.testing.assert_close(attention(x)[:, 0], attention.out(torch.cat(heads, -1)), atol=1e-5, rtol=1e-4)


def test_blocks_add_to_the_residual_and_are_the_identity_when_their_outputs_are_silenced(make_dynamics, tiny_clip):
    model = make_dynamics(linear_skip=False)
    for block in model.blocks:
        block.attention.out.weight.zero_()
        block.mlp.down.weight.zero_()
    x = model.embed(tiny_clip.z_tau) + model.places
    x = x + (model.level(tiny_clip.tau, tiny_clip.d) + model.action(tiny_clip.actions, tiny_clip.known))[:, :, None]
    torch.testing.assert_close(model(*tiny_clip.inputs), model.head(model.final_norm(x)))


def test_modulation_scales_by_one_plus_and_shifts_the_normed_input_of_both_halves(make_dynamics, tiny_clip):
    block = make_dynamics(conditioning="modulate").blocks[1]  # over space; time layers come first
    g = torch.Generator().manual_seed(0)
    x, condition = torch.randn(2, 7, 4, 32, generator=g), torch.randn(2, 7, 32, generator=g)
    told = block.modulation(condition * torch.sigmoid(condition))[:, :, None]
    scale1, shift1, scale2, shift2 = told[..., :32], told[..., 32:64], told[..., 64:96], told[..., 96:]
    h = x + block.attention(block.attention_norm(x) * (1 + scale1) + shift1)
    by_hand = h + block.mlp(block.mlp_norm(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, condition, None), by_hand)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"width": 4}, "odd"),
        ({"conditioning": "adaln"}, "conditioning"),
        ({"time_every": 9}, "time_every"),
        ({"k_max": 48}, "power of two"),
        ({"window": 1}, "below 2"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_in_a_sentence(make_dynamics, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_dynamics(**fields)


def test_time_layers_stand_at_every_time_every_th_place_from_the_first():
    model = Dynamics(DynamicsConfig(tokens=2, latent_dim=2, width=8, depth=6, heads=2, kv_heads=2, time_every=3))
    assert [block.over_time for block in model.blocks] == [True, False, False, True, False, False]
    assert model.time_layers == 2
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_what_is_left_unread_changes_nothing_of_what_is_read(make_dynamics, fields):
    model = make_dynamics(**fields)
    frames = 2 * model.config.window
    clip = make_clip(frames=frames)
    whole, trimmed = model.new_cache(2), model.new_cache(2)
    for t in range(frames - 1):
        pair = [x[:, t : t + 2] for x in clip.inputs]
        read = model.extend(*pair, trimmed, keep=1, unread=1)
        torch.testing.assert_close(read, model.extend(*pair, whole, keep=1)[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trimmed.keys[:, :, :, : -trimmed.each], whole.keys[:, :, :, : -whole.each])
