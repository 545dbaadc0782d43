"""Measure how the latents of a multi-layer sparse autoencoder spread over layers, and how well it reconstructs each."""
