"""Products by oneDNN against torch's own, in every layout that a gradient brings, and where each of them is taken."""

import pytest
import torch
import torch.nn.functional as F

from ahriuwu_cli.models import products
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.training import muon

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request, monkeypatch):
    """Both libraries, whatever this machine would take."""
    monkeypatch.setattr(products, "ONEDNN", request.param)
    monkeypatch.setattr(products, "LEAST", 1)
    return request.param


def leaves(*shapes):
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=drawn).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 4, 8), (1, 8), (0, 8), (3, 0, 8)])
@pytest.mark.parametrize("out", [4, 24])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_float64(library, shape, out, biased):
    x, w, b = leaves(shape, (out, 8), (out,))
    seen = torch.randn((*shape[:-1], out))
    y = products.linear(x, w, b if biased else None)
    (y * seen).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    (F.linear(exact[0], exact[1], exact[2] if biased else None) * seen).sum().backward()
    for mine, true in zip((x, w, b) if biased else (x, w), exact, strict=False):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)


def test_any_layout_of_input_weight_and_gradient(library):
    x, w = leaves((3, 4, 8), (5, 8))
    views = [x, x.transpose(0, 1), x[:, ::2], x[..., ::2]]
    weights = [w, w.T.contiguous().T, w, w[:, ::2]]
    for view, weight in zip(views, weights, strict=True):
        for seen in (torch.ones(()).expand(*view.shape[:-1], 5), torch.randn(5, *view.shape[:-1]).movedim(0, -1)):
            grads = torch.autograd.grad(products.linear(view, weight), (x, w), seen)
            true = torch.autograd.grad(F.linear(view.double(), weight.double()), (x, w), seen.double())
            for mine, exact in zip(grads, true, strict=True):
                torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient(library):
    x, w, b = leaves((6, 8), (4, 8), (4,))
    products.linear(x.detach(), w, b).sum().backward()
    assert x.grad is None
    products.linear(x, w.detach(), b.detach()).sum().backward()
    assert x.grad is not None


def test_who_multiplies(monkeypatch):
    """oneDNN for plain float32 on a CPU where it wins; never for other formats, under autocast or for nothing."""
    called = []
    monkeypatch.setattr(products, "product", lambda x, w, b=None: (called.append(0), F.linear(x, w, b))[1])
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "LEAST", 3 * 8 * 4)
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    with torch.no_grad():
        products.linear(x, w[:3])
        assert not called
        products.linear(x, w)
        assert len(called) == 1
        assert products.library() == "oneDNN"
        for kind in (torch.float64, torch.bfloat16):
            products.linear(x.to(kind), w.to(kind))
        products.linear(x[:0], w)
        with torch.autocast("cpu", torch.bfloat16):
            assert products.linear(x, w).dtype == torch.bfloat16
        monkeypatch.setattr(products, "ONEDNN", False)
        products.linear(x, w)
    assert len(called) == 1
    assert products.library() == "torch"


@pytest.mark.parametrize(
    ("vendor", "capability", "wins"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),  # measured: MKL is the faster one there
        ("GenuineIntel", "AVX512", False),  # MKL knows these
        ("", "AVX512", False),
    ],
)
def test_which_machines(monkeypatch, vendor, capability, wins):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._onednn_wins() is wins
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products._onednn_wins()


def config(**changes):
    settings = {
        "tokens": 5, "latent_dim": 6, "width": 32, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_hidden": 48,
        "registers": 2, "conditioning": "token", "window": 4, "k_max": 8, "action_space": (("binary", 2, (), ()),),
    }  # fmt: skip
    return DynamicsConfig(**settings | changes)


@pytest.mark.parametrize("conditioning", ["add", "token", "modulate"])
def test_a_model_and_its_gradients_agree_by_both_libraries(monkeypatch, conditioning):
    monkeypatch.setattr(products, "LEAST", 1)
    torch.manual_seed(0)
    model, c = Dynamics(config(conditioning=conditioning)), config()
    z, tau = torch.randn(2, 6, c.tokens, c.latent_dim), torch.rand(2, 6)
    inputs = (torch.full_like(tau, 1 / 8), torch.zeros(2, 6, 2), torch.ones(2, 6, dtype=torch.bool))
    found = {}
    for chosen in (True, False):
        monkeypatch.setattr(products, "ONEDNN", chosen)
        model.zero_grad()
        z_hat = model(z, tau, *inputs)
        z_hat.square().mean().backward()
        found[chosen] = [z_hat.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
    for mine, true in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 40), (1, 1, 7)])
def test_muon_makes_the_same_matrices_orthogonal_by_both(monkeypatch, shape):
    monkeypatch.setattr(products, "LEAST", 1)
    torch.manual_seed(0)
    g, found = torch.randn(shape), {}
    for chosen in (True, False):
        monkeypatch.setattr(products, "ONEDNN", chosen)
        found[chosen] = muon.orthogonalise(g)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "ours"), [((1, 256, 704), True), ((64, 16, 16), False)])
def test_muon_chooses_by_the_size_of_one_matrix_not_by_how_many_there_are(monkeypatch, shape, ours):
    called = []
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(muon, "product", lambda a, b: (called.append(0), products.product(a, b))[1])
    muon.orthogonalise(torch.randn(shape))
    assert bool(called) is ours


@pytest.mark.slow
def test_compiled_gradients_by_both_libraries(library):
    """The training path of torch.compile: products in a graph keep their values, gradients and layouts."""
    torch._dynamo.reset()
    x, w, b = leaves((2, 3, 16), (40, 16), (40,))

    def work(x, w, b):
        return products.linear(torch.sin(x), w, b).cos().sum()

    true = torch.autograd.grad(work(x, w, b), (x, w, b))
    mine = torch.autograd.grad(torch.compile(work, dynamic=False)(x, w, b), (x, w, b))
    for a, exact in zip(mine, true, strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_frozen_graph_multiplies_by_the_library_that_wins(monkeypatch):
    """Compiled without gradients, weights are constants, packed for oneDNN where it wins, and for MKL where not."""
    from torch._inductor.utils import run_and_get_code

    x, w = torch.randn(22, 32), torch.nn.Parameter(torch.randn(64, 32), requires_grad=False)
    for chosen, work, called in (
        (True, products.LEAST, "_linear_pointwise"),
        (True, products.LEAST - 1, "mkl_linear"),
        (False, products.LEAST, "mkl_linear"),
    ):
        monkeypatch.setattr(products, "ONEDNN", chosen)
        torch._dynamo.reset()
        module = products.Linear(32, 64, bias=False)
        module.weight = w
        with torch.no_grad(), products.constant_weights(work):
            y, (code, *_) = run_and_get_code(torch.compile(module, dynamic=False), x)
        torch.testing.assert_close(y, F.linear(x, w), rtol=1e-5, atol=1e-5)
        assert called in code, (chosen, called)
    torch._dynamo.reset()
