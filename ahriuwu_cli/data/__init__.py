"""Episodes on disk, recorders and importers, the video codec, latent packs."""
