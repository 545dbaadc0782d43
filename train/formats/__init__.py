"""Autoencoders in our own and other projects' formats: `train.formats.files` reads and writes them."""
