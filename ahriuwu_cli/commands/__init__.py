"""Commands, one file a verb: options to config to a few core calls. Heavy imports stay inside the functions."""
