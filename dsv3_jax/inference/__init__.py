"""Generation from the latent cache."""
