"""Autoencoders in our own and in other projects' formats: `train.formats.files` reads and writes them."""
