"""Autoencoders on the Hugging Face hub: fetching the files of one, describing it in a model card, and uploading it.

Reads through `huggingface_hub`, including its cache and `HF_HUB_OFFLINE`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from residscope.errors import ResidscopeError, UsageError, said
from residscope.escape import markdown, printable
from train.checkpoint import Checkpoint
from train.metrics import read_metrics
from train.model_config import SAEConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""owner/name; only the hub knows whether the repository exists."""

UPLOADED = ("*.safetensors", "*.json", "*.jsonl", "*.md", "*.png")
"""The files to upload: not `ckpt.pt`, which may hold the optimiser's state and which other tools do not read."""


def fetch(repo_id: str, *, revision: str | None = None, patterns: Sequence[str]) -> Path:
    """The local folder with the files of hub repository `repo_id` that match `patterns`, of which some may be missing.

    `UsageError` for no such repository or revision; `ResidscopeError` if it may not be read, or offline and not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kind = ResidscopeError
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError:
        reason = "its owner asks for consent: give it on the model's page and log in with `hf auth login`"
    except RevisionNotFoundError:
        kind, reason = UsageError, "the repository has no such revision"
    except RepositoryNotFoundError:
        kind, reason = UsageError, "the hub has no such repository (a private one needs `hf auth login`)"
    except ValueError as error:  # no valid repository id
        kind, reason = UsageError, said(error)
    except Exception as error:  # network errors depend on the HTTP client of the hub library's version
        reason = f"it is not in the local cache and the hub cannot be reached ({said(error)}): "
        reason += "connect, or copy the folder here and give its path"
    raise kind(f"{repo_id}{at}: no such local file or folder, and from the hub: {reason}")


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload the weights, configuration, metrics and card of `folder` to hub repository `repo_id`; returns its address.

    Creates the repository if necessary. The account is that of `hf auth login` or the variable HF_TOKEN. Raises
    `ResidscopeError` if there is nothing to upload, or if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not any(folder.rglob("*.safetensors")):
        raise ResidscopeError(f"{folder}: no .safetensors file to upload; `residscope convert` makes one")
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = "Upload a multi-layer sparse autoencoder"
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=[*UPLOADED], commit_message=message)
    except LocalTokenNotFoundError:
        raise ResidscopeError(f"{repo_id}: not logged in: run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # network errors depend on the HTTP client of the hub library's version
        raise ResidscopeError(f"{repo_id}: the upload failed: {said(error)}") from error
    return f"https://huggingface.co/{repo_id}"


def last_metrics(path: Path) -> dict[str, Any]:
    """The last training line of a metrics file, with the last validation line under "validation"; {} without a file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for line in read_metrics(path):
        if line.get("split") == "validation":
            found["validation"] = line
        else:
            found = {**line, **({"validation": found["validation"]} if "validation" in found else {})}
    return found


def model_card(
    checkpoint: Checkpoint,
    metrics: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    license: str = "unknown",
    repo_id: str = "OWNER/NAME",
    subfolder: str = "",
) -> str:
    """A README.md for the hub: what the autoencoder is, what it was trained on, how well it does, how to use it.

    metrics: as from `last_metrics`. notes: what a format could not express. license: of the weights. repo_id,
    subfolder: where it goes. Unknown values are given as "not recorded".
    """
    model = checkpoint.store.get("model")
    front = {
        "library_name": "residscope",
        "license": printable(license),
        "tags": ["sparse-autoencoder", "multi-layer-sae", "interpretability", "arxiv:2409.04185"],
        **({"base_model": model} if isinstance(model, str) and HUB_ID.fullmatch(model) else {}),
    }
    where = repr(repo_id) + (f", subfolder={subfolder!r}" if subfolder else "")
    parts = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# Multi-layer sparse autoencoder{f' for {markdown(model)}' if model else ''}",
        f"One sparse autoencoder ({_NAMES[checkpoint.config.activation]}) for the residual stream (the output of each "
        "transformer block) of all the layers below (Lawson et al., *Residual Stream Analysis with Multi-Layer SAEs*, "
        "ICLR 2025, arXiv 2409.04185).",
        "## The autoencoder\n\n" + _table(_shape(checkpoint.config)),
        "## Its data\n\n" + _table(_data(checkpoint, metrics)),
        "## How well it does\n\n" + _metrics_table(metrics),
        *(["## Mind\n\n" + "\n".join(f"- {markdown(note)}" for note in notes)] if notes else []),
        "## Use\n\n```python\nfrom residscope import read_sae\n\n"
        f"sae, origin = read_sae({where})  # or a folder\n"
        "out = sae(vectors)  # raw block outputs [N, d_model]; out.codes, out.x_hat\n```\n\n"
        f"`analyze --store acts.zarr --sae {repo_id}` measures how its latents spread over layers.",
    ]
    return "\n\n".join(parts) + "\n"


def _shape(config: SAEConfig) -> dict[str, Any]:
    by_vector = "each vector by its own mean and standard deviation"
    return {
        "d_model": config.d_model,
        "n_latents": config.n_latents,
        "expansion factor": f"{config.n_latents / config.d_model:g}",
        "k": config.active or "-",
        "activation": config.activation,
        "standardisation": by_vector if config.standardize == "vector" else config.standardize,
    }


def _data(checkpoint: Checkpoint, metrics: Mapping[str, Any]) -> dict[str, Any]:
    store, layers = checkpoint.store, checkpoint.store.get("layers")
    return {
        "transformer": store.get("model"),
        "layers": ", ".join(map(str, layers)) if layers else None,
        "tuned lens": store.get("lens") or ("none" if "lens" in store else None),
        "data set": store.get("dataset"),
        "store": store.get("path"),
        "store content hash": store.get("content_hash"),
        "validation documents": _validation(store.get("validation")),
        "vectors trained on": metrics.get("vectors"),
        "tokens trained on": metrics.get("tokens"),
        "steps": metrics.get("step", checkpoint.trainer.get("step")),
    }


_NAMES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka BatchTopK",
    "jumprelu": "JumpReLU",
    "relu": "ReLU",
}


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    splits = {"training": metrics, "validation": metrics.get("validation") or {}}
    names = {
        "fvu": "FVU, mean over layers (lower is better)",
        "l0": "L0, active latents per vector",
        "dead_fraction": "dead latents, share",
    }
    rows = {
        f"{text}, {split}": f"{line[name]:.4g}"
        for split, line in splits.items()
        for name, text in names.items()
        if isinstance(line.get(name), int | float)
    }
    if not rows:
        return "Not recorded."
    per_layer = splits["validation"].get("fvu_per_layer") or metrics.get("fvu_per_layer")
    if per_layer:
        which = "validation" if splits["validation"].get("fvu_per_layer") else "training"
        rows[f"FVU by layer, {which}"] = ", ".join("-" if fvu is None else f"{fvu:.3f}" for fvu in per_layer)
    return _table(rows)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {'not recorded' if value is None else markdown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _validation(found: Any) -> str | None:
    if not isinstance(found, dict) or "fraction" not in found:
        return None
    return f"{found['fraction']} of {found.get('n_documents', 'the')} documents held out, seed {found.get('seed')}"
