"""Defaults that depend on the model and the device."""

from harvest.settings import default_batch_size


def test_the_default_batch_keeps_within_its_bounds() -> None:
    assert default_batch_size(2048, 34_560, "cuda") == 3  # SmolLM2-135M: 256 MiB
    assert default_batch_size(2048, 6_144, "cuda") == 4  # pythia-70m: 8192 tokens
    assert default_batch_size(131_072, 10**6, "cuda") == 1
    assert default_batch_size(256, 6_144, "cpu") == 4
    assert default_batch_size(2048, 6_144, "cpu") == 1
    assert default_batch_size(2048, 34_560, "cuda", "50GB") == 2
    assert default_batch_size(128, 4_608, "cpu", "256MB") == 4  # 6 are a 64th of it
