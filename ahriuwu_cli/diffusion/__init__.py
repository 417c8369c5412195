"""The mathematics: torch only, nothing of ours but itself. A model arrives as the callable `denoise`."""
