"""Numbers that say how good a world model is: metrics, protocol, evaluation, sweep, verification."""
