"""Measure how the latents of a multi-layer sparse autoencoder spread over the layers of a transformer, and how well it
reconstructs each layer."""
