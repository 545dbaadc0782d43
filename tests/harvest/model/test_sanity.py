"""What transformers loads without a word and is not what it is taken for: each is found and said."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harvest.model import load as models
from harvest.model import sanity
from harvest.model.load import load_model
from harvest.model.names import ModelSpec, resolve_model
from harvest.model.tokenizer import Tokenizer
from residscope.errors import IncompatibleError, ResidscopeError
from tests.support.harvesting import ModelFolder
from tests.support.models import ARCHITECTURES, D_MODEL, tiny_tokenizer


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2, to be changed."""
    return Path(shutil.copytree(model_folder("gpt2"), tmp_path / "copy"))


def bert(*, is_decoder: bool) -> Any:
    sizes: dict[str, Any] = {"hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=260, intermediate_size=64, is_decoder=is_decoder, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertLMHeadModel(config)


def test_an_encoder_is_refused_and_the_same_model_as_a_decoder_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "encoder", bert(is_decoder=False))
    with pytest.raises(
        IncompatibleError, match=r"encoder \(BertLMHeadModel\): later tokens change .* not a causal language model"
    ):
        load_model(resolve_model(str(folder)))
    assert "is_decoder" not in capsys.readouterr().err  # of which the library says that it should be set
    assert load_model(resolve_model(str(save(tmp_path / "decoder", bert(is_decoder=True))))).n_layers == 2


def test_a_decoder_without_embeddings_of_its_own_is_loaded(tmp_path: Path) -> None:
    """The base model of BART's decoder answers `get_input_embeddings` with an error."""
    sizes: dict[str, Any] = {"d_model": D_MODEL, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2}  # its `num_hidden_layers` is the first of these
    config = transformers.BartConfig(vocab_size=260, is_decoder=True, **sizes)
    config.is_encoder_decoder = False
    assert load_model(resolve_model(str(save(tmp_path / "bart", transformers.BartForCausalLM(config))))).n_layers == 2


def test_several_residual_streams_are_refused() -> None:
    class Streams(torch.nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n, self.embedding, self.block = n, torch.nn.Embedding(260, 8), torch.nn.Identity()

        def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            one = self.embedding(input_ids)
            if self.n == 2:
                return (self.block((one, one))[0],)
            streams = self.block(one.expand(self.n, -1, -1, -1) if self.n > 1 else one)
            return (streams.reshape(-1, *streams.shape[-2:])[:1],)

    one, two, four = Streams(1), Streams(2), Streams(4)
    sanity.refuse_unknown_stream("one", one, one.block, one.embedding, 8, None)
    with pytest.raises(IncompatibleError, match=r"^two: a block's output .* found \[1, (\d+), 8\], \[1, \1, 8\]: "):
        sanity.refuse_unknown_stream("two", two, two.block, two.embedding, 8, None)  # as of a reversible model
    with pytest.raises(
        IncompatibleError,
        match=r"^four: a block's output .* here \[1, (\d+), 8\], found \[4, 1, \1, 8\]: .* not supported",
    ):
        sanity.refuse_unknown_stream("four", four, four.block, four.embedding, 8, None)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("of", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("size", [2**20, 2**28])
def test_a_model_larger_than_its_files_is_refused_before_it_is_made(
    architecture: str, of: str, size: int, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(model_folder(architecture), tmp_path / "copy"))
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    name = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner"}.get(of, of)
    file = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | file | {name if architecture == "gpt2" else of: size}))

    def built(*_: object, **__: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", built)
    with pytest.raises(IncompatibleError, match=r"^copy: .*config\.json .*(declares|should be at most)"):
        load_model(resolve_model(str(folder)))


def test_random_weights_that_do_not_fit_the_memory_are_one_line(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve_model(str(gpt2), random_init=True)
    monkeypatch.setattr(sanity, "free_memory", lambda: 10_000)
    with pytest.raises(ResidscopeError, match=r"^copy: out of memory: it takes \d+ kB, 10 kB are free; give --d"):
        load_model(spec)
    monkeypatch.setattr(sanity, "free_memory", lambda: None)
    load_model(spec)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_causal_models_are_loaded_without_a_word(
    architecture: str, dtype: torch.dtype, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(resolve_model(str(model_folder(architecture))), dtype=dtype)
    assert capsys.readouterr().err == ""


def test_a_mixture_of_experts_is_causal(tmp_path: Path) -> None:
    """Experts compute together what falls to them, so that later tokens change how earlier ones are rounded."""
    config = transformers.MixtralConfig(
        vocab_size=260,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    folder = save(tmp_path / "experts", transformers.MixtralForCausalLM(config))
    assert load_model(resolve_model(str(folder)), dtype=torch.bfloat16).n_layers == 3


def test_blocks_that_the_configuration_does_not_count_are_refused(gpt2: Path) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ResidscopeError, match=r"have blocks 0 to 2, its configuration 2 .* --layers 0-1;"):
        load_model(resolve_model(str(gpt2)))
    assert load_model(resolve_model(str(gpt2), random_init=True)).n_layers == 2  # without the files' weights


def test_other_weights_that_are_not_used_are_named(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    file = gpt2 / "model.safetensors"
    tower = {f"vision.h.{i}.weight": torch.zeros(1) for i in (0, 7)}
    save_file(load_file(file) | tower, file, {"format": "pt"})
    assert load_model(resolve_model(str(gpt2))).n_layers == 3
    assert capsys.readouterr().err == "warning: copy: 2 weights of its files are not used, such as vision.h.0.weight\n"


def test_a_damaged_file_of_the_hubs_cache_is_found(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in model_folder("gpt2").iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(data) if large else hashlib.sha1(f"blob {len(data)}\0".encode() + data)
        (blobs / name.hexdigest()).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name.hexdigest()}")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    original = transformers.AutoModelForCausalLM.from_pretrained

    def cached(location: str, **options: Any) -> Any:
        return original(snapshot, **{name: value for name, value in options.items() if name != "revision"})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", cached)
    monkeypatch.setattr(models, "load_config", lambda spec: transformers.AutoConfig.from_pretrained(snapshot))
    spec = ModelSpec(name="owner/gpt2", source="hub", location="owner/gpt2", revision="c0ffee", cached_only=True)
    assert load_model(spec, tokenizer=Tokenizer(None)).n_layers == 3
    for name in ("model.safetensors", "tokenizer.json"):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        with pytest.raises(ResidscopeError, match=f"owner/gpt2: {name} in the hub's local cache is damaged: .* Remove"):
            load_model(spec, tokenizer=Tokenizer(None))
        blob.write_bytes(data)
