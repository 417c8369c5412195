"""What settings may be, the same on the command line, in a plan and in files: (lowest, highest), both included.

Nothing is imported here, so that the command line and every reader can ask. `as_number` is how all of them read one.
"""

STEPS = (1, 65536)  # K, model passes a frame
WINDOWS = (1, 50_000)  # a result keeps a row for each: more would make it larger than anything of ours reads again
CONTEXT = (1, 10_000)
HORIZON = (1, 100_000)
NOISE_SEEDS = (1, 1024)
BATCH = (1, 65536)  # windows, or clips, at a time
SEED = (0, 2**63 - 1)
FRAME_SKIP = (1, 10_000)  # steps of a source that one stored frame takes
FPS = (0.01, 1000.0)  # frames per second: of a video, a dataset, a world
TAU_CTX = (0.0, 1.0)  # without its upper end, where nothing of the context is left


def as_number(given: object) -> float:
    """`float` of plain digits: `1_5` may be a slip for `1.5`. -0 is 0. ValueError, TypeError, OverflowError."""
    if isinstance(given, str) and ("_" in given or not given.isascii()):
        raise ValueError(given)
    return float(given) + 0.0
