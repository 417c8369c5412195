"""A packer as a process of its own, slowed down so that a test can stop it on its way.

python packer.py DATASET TOKENIZER WORKERS PART SECONDS_A_TICK [MOST_BYTES_A_FILE]
"""

import sys
import time
from pathlib import Path


def main() -> None:
    import torch

    from ahriuwu_cli.data import pack_encode, pack_format
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.data.latents import open_pack
    from ahriuwu_cli.errors import UserError
    from ahriuwu_cli.training.checkpoint import load_tokenizer

    dataset, tokenizer, workers, part, pause = sys.argv[1:6]
    if len(sys.argv) > 6:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[6]), resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    pack_format.PART = int(part)
    encode = pack_encode.encode_part

    def slow(*args):
        time.sleep(float(pause))
        return encode(*args)

    pack_encode.encode_part = slow
    try:
        open_pack(
            EpisodeStore.open(Path(dataset)),
            load_tokenizer(tokenizer),
            workers=int(workers),
            progress=lambda done, total: time.sleep(float(pause)),
        )
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
