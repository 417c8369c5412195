"""Sizes of the dynamics, one table: from a laptop's nano to the paper's 1.6B (Dreamer 4, section 4).

Small sizes add the conditioning to their tokens, look back over time in every second layer, and there at all tokens of
past frames, so that what moves sideways is found where it was: measured, on two cores tokens cost more than parameters,
and only across frames did the view turn (docs/log.md). From medium on the layout is the paper's: tokens for (tau, d)
and the action, four registers, time attention in every fourth layer, grouped-query attention.
"""

from __future__ import annotations

_SMALL = {"conditioning": "add", "registers": 0, "time_every": 2, "time_attention": "frame"}
_PAPER = {"conditioning": "token", "registers": 4, "time_every": 4, "linear_skip": False}

SIZES: dict[str, dict] = {
    "nano": {"width": 128, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_hidden": 256, "window": 12, **_SMALL},
    "mini": {"width": 192, "depth": 6, "heads": 4, "kv_heads": 4, "mlp_hidden": 448, "window": 12, **_SMALL},
    "tiny": {"width": 256, "depth": 6, "heads": 4, "kv_heads": 4, "mlp_hidden": 640, "window": 16, **_SMALL},
    "small": {"width": 384, "depth": 8, "heads": 6, "kv_heads": 6, "mlp_hidden": 1024, "window": 24, **_SMALL},
    "medium": {"width": 768, "depth": 12, "heads": 12, "kv_heads": 4, "mlp_hidden": 2048, "window": 64, **_PAPER},
    "large": {"width": 1280, "depth": 20, "heads": 20, "kv_heads": 4, "mlp_hidden": 3456, "window": 128, **_PAPER},
    "xlarge": {"width": 1920, "depth": 36, "heads": 30, "kv_heads": 6, "mlp_hidden": 6144, "window": 192, **_PAPER},
}
