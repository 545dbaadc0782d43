"""Other projects' configurations: a flipped bit is refused, named, or changes nothing; no key is a silent default."""

import json
from pathlib import Path
from typing import Any

import pytest

from residscope.errors import IncompatibleError
from tests.support import bits
from tests.support.saes import assert_equal, break_config, make_sae
from train.formats.files import LAYOUTS, read_sae, write_sae


def test_a_flipped_bit_is_refused_or_named_or_changes_nothing(tmp_path: Path) -> None:
    """All bits: benchmarks/bench_bits.py."""
    for place in bits.places(tmp_path):
        data, reference, refused = place.file.read_bytes(), place.load(), 0
        for bit in range(3, 8 * len(data), 997):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            place.file.write_bytes(changed)
            try:
                found = place.load()
            except IncompatibleError:
                refused += 1
            else:
                digit = "without" in place.name and bits.harmless(data[bit // 8])
                assert bits.same(reference, found) or found.said != reference.said or digit, (place.name, bit)
        place.file.write_bytes(data)
        assert refused > 0


def theirs(folder: Path, to: Any) -> Path:
    """The configuration of a folder as another tool would write it: without our record."""
    write_sae(make_sae(), folder, to)
    file = folder / LAYOUTS[to].config_file  # type: ignore[index]
    config = json.loads(file.read_text())
    config.pop("residscope", None)
    config.get("metadata", {}).pop("residscope", None)
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("to", "key", "damaged"),
    [
        ("saelens", "normalize_activations", "normalize_activationr"),
        ("saelens", "apply_b_dec_to_input", "apply_b_dec_tn_input"),
        ("saelens", "rescale_acts_by_decoder_norm", "Rescale_acts_by_decoder_norm"),
        ("saelens", "metadata", "letadata"),
        ("saelens", "k", "c"),
        ("mlsae", "standardize", "stindardize"),
        ("sparsify", "transcode", "transcodm"),
    ],
)
def test_a_damaged_name_of_a_key_is_refused(tmp_path: Path, to: Any, key: str, damaged: str) -> None:
    file = theirs(tmp_path, to)
    file.write_text(file.read_text().replace(f'"{key}"', f'"{damaged}"'))
    with pytest.raises(IncompatibleError, match=f"has a key '{damaged}' and no '{key}'"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("to", "key", "taken"),
    [
        ("saelens", "normalize_activations", "none"),
        ("saelens", "apply_b_dec_to_input", "true"),
        ("mlsae", "standardize", "true"),
        ("sparsify", "activation", "topk"),
    ],
)
def test_what_decides_and_is_not_said_is_named(tmp_path: Path, to: Any, key: str, taken: str) -> None:
    file = theirs(tmp_path, to)
    assert read_sae(tmp_path)[1].notes == ()
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"a_new_key": 1, **{name: value for name, value in config.items() if name != key}}))
    unknown, silent = read_sae(tmp_path)[1].notes
    assert "a_new_key" in unknown
    assert f"does not say {key} (taken as {taken})" in silent


@pytest.mark.parametrize(
    ("to", "damage", "message"),
    [
        ("mlsae", {"standardize": 1}, "standardize should be true or false"),
        ("saelens", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input should be true or false"),
        ("saelens", {"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm should be true or false"),
        ("sparsify", {"d_in": "16"}, "says d_in '16', the weights have 16"),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, to: Any, damage: dict[str, Any], message: str) -> None:
    break_config(theirs(tmp_path, to).name, **damage)(tmp_path)
    with pytest.raises(IncompatibleError, match=message):
        read_sae(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"k": 1' + "0" * 5000 + "}"])
def test_a_configuration_that_cannot_be_meant_is_refused(tmp_path: Path, content: str) -> None:
    theirs(tmp_path, "mlsae").write_text(content)
    with pytest.raises(IncompatibleError, match=r"config\.json: not valid JSON"):
        read_sae(tmp_path)


@pytest.mark.parametrize("to", ["mlsae", "saelens", "sparsify"])
def test_what_we_wrote_has_a_check_sum_over_both_files(tmp_path: Path, to: Any) -> None:
    write_sae(make_sae(), tmp_path, to, store={"model": "gpt2"})
    layout = LAYOUTS[to]  # type: ignore[index]
    assert_equal(read_sae(tmp_path)[0], make_sae())
    weights = tmp_path / layout.weights_file
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IncompatibleError, match="its check sum is wrong"):
        read_sae(tmp_path)
    data[-7] ^= 1
    weights.write_bytes(data)
    config = (tmp_path / layout.config_file).read_text()
    (tmp_path / layout.config_file).write_text(config.replace('"k": 5', '"k": 4'))
    with pytest.raises(IncompatibleError, match="its check sum is wrong"):
        read_sae(tmp_path)
