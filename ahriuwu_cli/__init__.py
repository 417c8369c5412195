"""ahriuwu: train, roll out and evaluate Dreamer-4-style world models from the command line."""

__version__ = "0.1.0"
