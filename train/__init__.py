"""Train one multi-layer sparse autoencoder on a store of activations, and keep it in a checkpoint others can read."""
