"""The tokenizer's loss: MSE + 0.2 LPIPS, each term divided by a running RMS of itself (Dreamer 4, section 3.1).

LPIPS is optional: the `lpips` package (extra `lpips`) with backbone and heads that the user supplies. Nothing is
downloaded or unpickled; without it a run trains on MSE and says so.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ahriuwu_cli.data.tensors import read_tensors
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.training.finite import first_no_weight

LPIPS_WEIGHT = 0.2
MAX_BYTES = 1_000_000_000  # of the file of weights: VGG16 whole takes half of it
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
    """LPIPS v0.1 with backbone and heads from one safetensors file (`build_lpips`); its sha256 stands beside numbers.

    UserError when the package or the file is missing, or the file is another network; nothing is downloaded.
    """
    without = "or train without --lpips-weights"
    try:
        digest = file_hash(weights_path)
        network, backbone = build_lpips(read_tensors(weights_path, MAX_BYTES), weights_path)
    except OSError as error:
        raise UserError(
            f"cannot read LPIPS backbone weights at {weights_path} ({error.strerror}): give torchvision's AlexNet or "
            f"VGG16 with the heads as safetensors, {without}"
        ) from None
    except DataError as error:
        raise UserError(
            f"{weights_path} is not a safetensors file ({error}): convert the published weights with "
            f"safetensors.torch.save_file, {without}"
        ) from None
    except ValueError as error:
        raise UserError(f"{error}; {without}") from None
    return LPIPS(network, backbone, digest)


def build_lpips(tensors: dict[str, Tensor], path: Path) -> tuple[nn.Module, str]:
    """(the package's network, "alex" or "vgg") with the tensors of a file.

    Keys: torchvision's "features.<i>.weight" and ".bias", and the published heads "lin0.model.1.weight" to "lin4...",
    each (1, channels, 1, 1). The package `lpips` would unpickle its own heads and download a backbone, so it is asked
    for neither. ValueError for other contents, UserError without the package.
    """
    first = tensors.get("features.0.weight", torch.empty(0, 3, 0, 0))
    backbone = BACKBONES.get((first.shape[0], first.shape[-1]) if first.ndim else (0, 0))
    if backbone is None:
        raise ValueError(
            f"{path} holds neither torchvision's AlexNet nor its VGG16: a distance on another network is not LPIPS"
        )
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch is a RuntimeError
        raise UserError(
            f"LPIPS needs the package lpips and a torchvision made for this PyTorch ({error}): "
            "`pip install -e '.[lpips]'`, or leave out --lpips-weights"
        ) from None
    if bad := first_no_weight(tensors):
        raise ValueError(f"{path} is no trained network: {bad} is not of finite numbers")
    lacking = [name for name in (f"lin{i}.model.1.weight" for i in range(5)) if name not in tensors]
    if lacking:
        raise ValueError(f"{path} lacks {lacking[0]}: put the published heads lin0 to lin4 in it (docs/evaluation.md)")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchvision's word on an argument that lpips passes
        network = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    try:
        own = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
        lacking = sorted(set(own.values()) - set(tensors))
        if lacking:
            raise ValueError(
                f"{path} lacks the backbone weights {', '.join(lacking[:3])}: give torchvision's as they are"
            )
        network.net.load_state_dict({name: tensors[feature] for name, feature in own.items()}, strict=True)
        for i in range(5):
            head = {"model.1.weight": tensors[f"lin{i}.model.1.weight"]}
            getattr(network, f"lin{i}").load_state_dict(head, strict=True)
    except RuntimeError as error:  # a shape that is not the network's
        raise ValueError(f"{path} is not the published LPIPS on {backbone}: {error}") from None
    return network, backbone
