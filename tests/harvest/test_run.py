"""A harvest from end to end: what is stored, what a dry run says, what never reaches the disk."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from harvest import fill
from harvest import run as harvest_run
from harvest.config import HarvestConfig
from harvest.estimate import estimate
from harvest.lens.translators import load_lens
from harvest.run import HarvestResult, harvest
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.options import parse_options
from store.activations import ActivationStore
from store.care.verify import verify
from tests.support.harvesting import SHARD, MakeConfig, ModelFolder, crash_after
from tests.support.lenses import write_lens
from tests.support.models import ARCHITECTURES, D_MODEL, N_LAYERS


def block_outputs(folder: str, token_id: np.ndarray, context: int, batch_size: int) -> np.ndarray:
    """float32 [T, n_layers, D] by transformers and hooks alone, in the same batches."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "gemma" in folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1))

    for block in blocks:
        block.register_forward_hook(keep)
    rows = []
    full = len(token_id) // context * context
    pieces = [token_id[i : min(i + context * batch_size, full)] for i in range(0, full, context * batch_size)]
    for piece in [*pieces, token_id[full:]]:
        if len(piece):
            kept.clear()
            with torch.no_grad():
                model(torch.from_numpy(piece.astype(np.int64)).view(-1, min(context, len(piece))))
            rows.append(torch.stack(kept, 1).numpy())
    return np.concatenate(rows)


def rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_vectors_equal_an_independent_forward_pass(architecture: str, config: MakeConfig) -> None:
    options = config(architecture)
    result = harvest(options)
    store = ActivationStore.open(options.out)
    expected = block_outputs(options.weights.model, store.tokens.token_id, 20, 3)
    assert expected.shape == (result.tokens, N_LAYERS[architecture], D_MODEL)
    np.testing.assert_array_equal(store.read(raw=True), rounded(expected))
    assert result.shards == -(-result.tokens // SHARD) > 3
    assert verify(options.out) == []


@pytest.mark.usefixtures("small_shards")
def test_the_token_table_is_the_packed_text(config: MakeConfig, text_folder: Path) -> None:
    result = harvest(config("llama"))
    tokens = ActivationStore.open(result.out).tokens
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    stream = [ord_of for text in texts if text for ord_of in [*text.encode(), -1]]
    # The tiny tokenizer numbers bytes by their printable form: letters come after the signs before them.
    body = tokens.token_id[~np.isin(tokens.token_id, (256, 257))]
    offset = int(body[0]) - ord(texts[0][0])
    assert (body - offset).tolist() == [b for b in stream if b >= 0]
    assert result.documents == 4
    assert (tokens.token_id == 256).sum() == 4
    assert (tokens.token_id[tokens.position == 0] == 257).all()
    assert result.kept == len(body)
    assert not tokens.keep[np.isin(tokens.token_id, (256, 257))].any()


@pytest.mark.usefixtures("small_shards")
def test_chosen_layers_dtypes_and_codec(config: MakeConfig, tmp_path: Path) -> None:
    whole = ActivationStore.open(harvest(config(store_dtype="float32")).out).read()
    for dtype in ("bfloat16", "float16", "float32"):
        out = tmp_path / f"{dtype}.zarr"
        store = ActivationStore.open(harvest(config(layers=("0,2",), store_dtype=dtype, out=out, codec="zstd")).out)
        assert store.meta.layers == (0, 2)
        expected = torch.from_numpy(whole[:, [0, 2]]).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(store.read(), expected)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 1e-3, 0.05), ("float16", 1e-4, 0.01)])
def test_half_precision_computes_near_the_exact_vectors(
    config: MakeConfig, dtype: str, least: float, most: float
) -> None:
    options = config("gpt_neox", dtype=dtype, store_dtype="float32")
    store = ActivationStore.open(harvest(options).out)
    exact = block_outputs(options.weights.model, store.tokens.token_id, 20, 3)
    error = np.linalg.norm(store.read() - exact) / np.linalg.norm(exact)
    assert least < error < most
    assert store.meta.provenance["compute_dtype"] == dtype


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("indexing", ["tuned-lens", "mlsae-compat"])
def test_a_lens_is_applied_before_storing_and_inverts(config: MakeConfig, tmp_path: Path, indexing: str) -> None:
    folder = write_lens(tmp_path / "lens", n_layers=3, d_model=D_MODEL)
    options = config(lens=str(folder), lens_indexing=indexing, layers=("1-2",), store_dtype="float32")
    store = ActivationStore.open(harvest(options).out)
    plain = block_outputs(options.weights.model, store.tokens.token_id, 20, 3)
    parameters = torch.load(folder / "params.pt", weights_only=True)
    found = store.read()
    lens = load_lens(str(folder), model_id="gpt2", n_layers=3, d_model=D_MODEL, indexing=indexing)  # type: ignore[arg-type]
    for i, layer in enumerate((1, 2)):
        translator = layer + 1 if indexing == "tuned-lens" else layer
        expected = plain[:, layer]
        if translator < 3:
            weight, bias = (parameters[f"{translator}.{name}"].numpy() for name in ("weight", "bias"))
            expected = expected + expected @ weight.T + bias
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-4)
        back = lens.invert(torch.from_numpy(found[:, i]), layer).numpy()
        np.testing.assert_allclose(back, plain[:, layer], rtol=1e-3, atol=1e-3)
    assert store.meta.lens == {"id": "lens", "indexing": indexing, "hash": lens.fingerprint}


@pytest.mark.usefixtures("small_shards")
def test_shards_that_are_written_at_once_are_those_of_one_writer(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"batch_size": 20}  # 400 tokens: four shards of 96 in a batch
    harvest(config(**large))
    monkeypatch.setattr(fill, "n_writers", lambda *_: 4)
    harvest(config(out=tmp_path / "other.zarr", **large))
    one, several = (ActivationStore.open(tmp_path / name) for name in ("acts.zarr", "other.zarr"))
    assert several.content_hash == one.content_hash


@pytest.mark.usefixtures("small_shards")
def test_the_control_has_the_same_tokens_and_other_vectors(config: MakeConfig, tmp_path: Path) -> None:
    trained = ActivationStore.open(harvest(config()).out)
    random = ActivationStore.open(harvest(config(random_init=True, out=tmp_path / "random.zarr")).out)
    np.testing.assert_array_equal(trained.tokens.token_id, random.tokens.token_id)
    assert trained.content_hash != random.content_hash
    assert random.meta.provenance["random_init"] is True


def test_a_dry_run_writes_nothing(config: MakeConfig, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    found = estimate(config(dry_run=True, max_tokens=100))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert found.bytes_per_token == 3 * D_MODEL * 2
    assert (found.tokens, found.bytes) == (100, 100 * 3 * D_MODEL * 2)
    assert found.tokens_available == harvest(config()).tokens
    assert found.fits
    assert found.tokens_per_second > 0
    assert found.seconds == pytest.approx(100 / found.tokens_per_second)


def test_a_tokenizer_of_another_model_is_named_by_a_dry_run_too(
    config: MakeConfig, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "small"))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4))
    model.save_pretrained(folder)
    for run in (estimate, harvest):
        with pytest.raises(
            ResidscopeError, match=r"small: the tokenizer produces token 2.., but the .* embedding has 100 rows"
        ):
            run(config(model=str(folder)))


def test_a_full_disk_is_refused_before_anything_is_written(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 16_800_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResidscopeError, match=r"--max-tokens.*\d+ tokens would fit; nothing was written"):
        harvest(config())
    assert not config().out.exists()


def spoil(folder: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a tiny model with changed weights."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    for path in folder.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


class WriterAtOnce(ThreadPoolExecutor):
    """A writer that is done with each batch before the main thread looks at how the one before it ended."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        done = super().submit(fn, *args, **kwargs)
        done.exception()
        return done


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("writer", [ThreadPoolExecutor, WriterAtOnce])
def test_values_that_are_not_finite_stop_the_run(
    config: MakeConfig,
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: type[ThreadPoolExecutor],
) -> None:
    """No shard of a batch after the one that holds them is written either: a part of it is missing."""
    monkeypatch.setattr(fill, "ThreadPoolExecutor", writer)

    def poison(model: Any) -> None:
        token = 70  # One token's embedding; it first appears after some clean batches.
        model.transformer.wte.weight[token] = float("nan")

    folder = spoil(model_folder("gpt2"), tmp_path / "nan", poison)
    text = tmp_path / "a.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text.write_text("ab" * 150 + tokenizer.decode([70]) + "ab" * 50)
    options = config(model=str(folder), dataset=str(text))
    with pytest.raises(ResidscopeError, match="layer 0, token 300, dimension 0: the model gives nan"):
        harvest(options)
    store = ActivationStore.open(options.out, partial=True)
    assert store.missing_shards() == [3, 4]
    assert np.isfinite(store.read(slice(0, 288))).all()


def test_float16_overflow_names_the_value_and_bfloat16_takes_it(
    config: MakeConfig, model_folder: ModelFolder, tmp_path: Path
) -> None:
    def grow(model: Any) -> None:
        model.transformer.h[1].mlp.c_proj.bias[5] = 104_000.0

    folder = str(spoil(model_folder("gpt2"), tmp_path / "big", grow))
    with pytest.raises(ResidscopeError, match=r"layer 1, token 0, dimension 5: the value 1\d{5} does not fit .*65504"):
        harvest(config(model=folder, store_dtype="float16"))
    options = config(model=folder, out=tmp_path / "bf16.zarr")
    harvest(options)
    assert ActivationStore.open(options.out).read()[:, 1, 5].min() > 1e5


def test_the_record_has_no_paths_and_the_options_read_back(config: MakeConfig, tmp_path: Path) -> None:
    options = config(layers=("0-1", "2"))
    harvest(options)
    store = ActivationStore.open(options.out)
    assert str(tmp_path) not in repr(store.meta)
    assert store.meta.provenance["architecture"] == "GPT2LMHeadModel"
    assert set(store.meta.provenance["versions"]) >= {"torch", "transformers", "python"}
    words = ["--config", str(tmp_path / "acts.harvest.toml")]
    again = parse_options(HarvestConfig, words, prog="harvest", description="")
    assert again == options


def test_results_are_plain(config: MakeConfig) -> None:
    result = harvest(config())
    assert isinstance(result, HarvestResult)
    assert json.loads(json.dumps(result._asdict()))["tokens"] == result.tokens


def test_several_texts_by_weight(
    config: MakeConfig, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "xyz " * n}) + "\n" for n in range(1, 20)))
    options = config(dataset=(f"{text_folder}:1", f"{tmp_path / 'b.jsonl'}:2"), max_tokens=600)
    assert estimate(options).tokens_available == 591 + sum(4 * n + 1 for n in range(1, 20))
    harvest(options)
    assert "ran out" not in capsys.readouterr().err
    store = ActivationStore.open(options.out)
    first, second = store.meta.provenance["sources"]
    assert (first["dataset"], second["dataset"], second["weight"]) == ("texts", "b.jsonl", 2.0)
    assert first["tokens"] + second["tokens"] == 600
    assert store.meta.provenance["dataset"] == "texts:1 b.jsonl:2"
    assert first["documents"] + second["documents"] == int(store.tokens.document.max()) + 1
    harvest(config(dataset=options.text.dataset, out=tmp_path / "all.zarr"))
    assert "b.jsonl ran out after 779 tokens: its share is 56.9% instead of 66.7%" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.usefixtures("small_shards")
def test_without_packing_each_document_is_run_on_its_own(
    config: MakeConfig, architecture: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": "abcdefgh" * n}) + "\n" for n in (1, 5, 1, 2, 1, 9, 2, 4, 1, 1)))
    options = config(architecture, dataset=(str(text),), pack=False, store_dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 1)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    result = harvest(options)
    store = ActivationStore.open(options.out)
    assert result.documents == 10
    starts = np.flatnonzero(store.tokens.position == 0)
    for start, stop in zip(starts, [*starts[1:], result.tokens], strict=True):
        row = store.tokens.token_id[start:stop]
        one = block_outputs(str(model_folder(architecture)), row, len(row), 1)
        np.testing.assert_allclose(store.read(slice(int(start), int(stop))), one, rtol=1e-4, atol=1e-5)
    assert estimate(options).tokens_available == result.tokens


def test_two_stores_do_not_share_the_options_beside_them(config: MakeConfig) -> None:
    first = config()
    harvest(first)
    options = first.out.with_suffix(".harvest.toml").read_bytes()
    with pytest.raises(
        UsageError, match=r"acts: .*acts.harvest.toml and the files next to it belong to .*acts.zarr: choose"
    ):
        harvest(config(out=first.out.with_suffix("")))
    assert not first.out.with_suffix("").exists()
    assert first.out.with_suffix(".harvest.toml").read_bytes() == options


def test_of_two_stores_that_would_share_options_and_begin_together_one_goes_on(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, begin = config(), harvest_run._begin

    def meanwhile(*arguments: Any) -> ActivationStore:
        monkeypatch.setattr(harvest_run, "_begin", begin)
        store = begin(*arguments)
        harvest(first)
        return store

    monkeypatch.setattr(harvest_run, "_begin", meanwhile)
    with pytest.raises(UsageError, match=r"acts: .* belong to .*acts.zarr: choose"):
        harvest(config(out=first.out.with_suffix("")))
    assert not first.out.with_suffix("").exists()
    assert verify(first.out) == []


@pytest.mark.usefixtures("small_shards")
def test_token_columns_are_harvested_continued_and_recorded(config: MakeConfig, tmp_path: Path) -> None:
    rows = [[257, *range(30), 256], list(range(5, 60)), [7], list(range(80))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    options = config("llama", dataset=(str(path),), token_column="ids")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 1)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    harvest(options)
    store = ActivationStore.open(options.out)
    tokens, opening = store.tokens, store.meta.provenance["opening_ids"]
    assert opening == [257]
    text = tokens.token_id[tokens.position != 0].tolist()
    assert text == [i for row in rows for i in (*row, 256)]
    np.testing.assert_array_equal(tokens.keep, (tokens.position != 0) & (tokens.token_id < 256))
    assert store.meta.provenance["config"]["token_column"] == "ids"
    assert estimate(options).tokens_available == len(tokens.token_id)
    with pytest.raises(IncompatibleError, match="--token-column is 'ids' there and not given here"):
        harvest(config("llama", dataset=(str(path),), text_column="ids"))
    path.write_text(json.dumps({"ids": [5, 258]}) + "\n")
    with pytest.raises(IncompatibleError, match=r"line 1: column 'ids' holds token 258"):
        harvest(config("llama", dataset=(str(path),), token_column="ids", out=tmp_path / "other.zarr"))
