"""The tokenizer's loss: MSE + 0.2 LPIPS, each term divided by a running RMS of itself (Dreamer 4, section 3.1).

LPIPS is optional: the `lpips` package (extra `lpips`) with backbone weights that the user supplies. Nothing is
downloaded; without it a run trains on MSE and says so.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ahriuwu_cli.errors import UserError

LPIPS_WEIGHT = 0.2
# First convolution of torchvision's published networks, by which a backbone is known: (output channels, kernel side).
BACKBONES = {(64, 11): "alex", (64, 3): "vgg"}


class RunningRMS(nn.Module):
    """Divides a loss term by a running root mean square of itself, so that terms of any size weigh alike.

    In training every call takes the value into the mean square (exponential, bias-corrected: the first result is 1),
    without gradient; in evaluation the state rests. The state lies in buffers, so a resumed run is exact. One call a
    step: each process of a distributed run keeps its own.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"the decay {decay} of a running RMS is not in [0, 1)")
        self.decay = decay
        self.register_buffer("mean_square", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))  # 1 - decay ** calls: what mean_square must be divided by

    def forward(self, value: Tensor) -> Tensor:
        """A scalar term -> the term / its running RMS; a term that was always 0 stays 0."""
        if self.training:
            self.mean_square.lerp_(value.detach().float().square(), 1 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        assert self.weight > 0, "a running RMS was asked for before its first training step"
        rms = (self.mean_square / self.weight).sqrt()
        return torch.where(rms > 0, value / torch.where(rms > 0, rms, 1), value)


def reconstruction_loss(
    reconstruction: Tensor,
    frames: Tensor,
    mse_rms: RunningRMS,
    lpips: LPIPS | None = None,
    lpips_rms: RunningRMS | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and its raw terms {"mse", "lpips"} (detached) of frames (B, T, H, W, 3) in [0, 1], averaged over all."""
    mse = (reconstruction.float() - frames.float()).square().mean()
    loss, terms = mse_rms(mse), {"mse": mse.detach()}
    if lpips is not None:
        assert lpips_rms is not None, "LPIPS needs a running RMS of its own"
        distance = lpips(reconstruction, frames)
        loss, terms["lpips"] = loss + LPIPS_WEIGHT * lpips_rms(distance), distance.detach()
    return loss, terms


class LPIPS(nn.Module):
    """A frozen LPIPS network. `backbone` ("alex" or "vgg") and `sha256` of its weights belong beside every number."""

    def __init__(self, network: nn.Module, backbone: str, sha256: str) -> None:
        super().__init__()
        self.network, self.backbone, self.sha256 = network.eval().requires_grad_(False), backbone, sha256

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)  # its dropout must rest, whatever is trained around it

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of frames (B, T, H, W, 3) in [0, 1]; frames of at least 32 x 32 pixels."""
        a, b = (x.float().flatten(0, 1).permute(0, 3, 1, 2) for x in (a, b))
        return self.network(a, b, normalize=True).mean()


def load_lpips(weights_path: Path) -> LPIPS:
    """LPIPS v0.1 with the backbone weights at `weights_path`: torchvision's AlexNet or VGG16 as a safetensors file.

    Nothing pickled is read: convert the published file once, `safetensors.torch.save_file(state_dict, path)`. Its
    sha256 is recorded beside every number, since only the standard weights make it LPIPS. The linear heads come with
    the package. UserError when the package or the file is missing, or the file is another network; never downloads.
    """
    try:
        with open(weights_path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        published = load_file(weights_path)
    except OSError as error:
        raise UserError(
            f"cannot read LPIPS backbone weights at {weights_path} ({error.strerror}): give torchvision's AlexNet or "
            "VGG16 as safetensors, or train without --lpips-weights"
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"{weights_path} is not a safetensors file ({error}): convert torchvision's AlexNet or VGG16 weights with "
            "safetensors.torch.save_file, or train without --lpips-weights"
        ) from None
    first = published.get("features.0.weight", torch.empty(0, 3, 0, 0))
    backbone = BACKBONES.get((first.shape[0], first.shape[-1]))
    if backbone is None:
        raise UserError(
            f"{weights_path} holds neither torchvision's AlexNet nor its VGG16: a distance on another network is not "
            "LPIPS; give one of them, or train without --lpips-weights"
        )
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch is a RuntimeError
        raise UserError(
            f"LPIPS needs the package lpips and a torchvision made for this PyTorch ({error}): "
            "`pip install 'ahriuwu[lpips]'`, or train without --lpips-weights"
        ) from None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchvision's word on an argument that lpips passes
        network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)  # pnet_rand: no download
    _load_backbone(network.net, published, weights_path)
    return LPIPS(network, backbone, digest)


def _load_backbone(net: nn.Module, published: dict[str, Tensor], path: Path) -> None:
    """Copy torchvision's "features.<i>.<name>" into lpips's "slice<j>.<i>.<name>", every one of them."""
    own = {name: "features." + name.partition(".")[2] for name in net.state_dict()}
    lacking = sorted(set(own.values()) - set(published))
    if lacking:
        raise UserError(f"{path} lacks the backbone weights {', '.join(lacking[:3])}: give torchvision's file as it is")
    net.load_state_dict({name: published[feature] for name, feature in own.items()}, strict=True)
