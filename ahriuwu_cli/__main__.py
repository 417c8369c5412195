"""The program: `ahriuwu`, `python -m ahriuwu_cli` and `torchrun -m ahriuwu_cli` run the same command line."""

import os
import signal


def _stop(number, _):
    os.write(2, b"error: stopped by signal %d before anything was done: start again\n" % number)
    os._exit(128 + number)


for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # `startup` takes over when its own imports are through
    if signal.getsignal(each) is not signal.SIG_IGN:
        signal.signal(each, _stop)


def main() -> None:
    """`cli.main`, with signals minded from before it is imported."""
    from ahriuwu_cli.startup import begin

    begin()
    from ahriuwu_cli.cli import main

    main()


if __name__ == "__main__":
    main()
