"""`python -m ahriuwu_cli` and `torchrun -m ahriuwu_cli` run the same command line as `ahriuwu`."""

from ahriuwu_cli.cli import main

if __name__ == "__main__":
    main()
