"""Networks: layers, trunk and cache, tokenizers, dynamics. They use only `tau` of the diffusion package."""
