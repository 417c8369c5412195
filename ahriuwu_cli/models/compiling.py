"""Whether torch.compile works on this machine: known by compiling next to nothing, before any work is done."""

from __future__ import annotations

import torch

from ahriuwu_cli.errors import UserError


def check_compile(device: torch.device | str) -> None:
    """UserError where torch.compile cannot make code for a device: no compiler, no headers, no place for its files."""
    probe = torch.compile(lambda x: x.sin() + 1, dynamic=False)
    try:
        probe(torch.zeros(16, device=device))
    except Exception as error:  # of torch's compiler, of Triton or of the system, all alike to who asked
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"--compile does not work on this machine ({reason}): install a C++ compiler (g++, or another by CXX), or "
            "leave --compile out"
        ) from None
