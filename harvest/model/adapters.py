"""Adapters (LoRA and the like) in a model's folder or repository: recognised, and merged into the weights by peft.

transformers applies an adapter only if peft is installed, and otherwise ignores it silently; here that is an error. The
weights are changed once, after loading, so that any code that reads a weight reads the one that the model uses.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from residscope.errors import IncompatibleError, ResidscopeError
from residscope.reading import CONFIG_BYTES, read_whole, reading

ADAPTER = "adapter_config.json"
NOT_BY_TRANSFORMERS = {"subfolder": "applied-by-harvest.model.adapters"}
"""`adapter_kwargs` of `from_pretrained` that keep transformers from applying an adapter itself."""


def read_adapter(model: str, config: Path) -> tuple[str, str]:
    """From `config`, an adapter_config.json: the adapter's kind with peft's version, for the store's record, and the
    folder or hub id of the model that it was made for ("" if not given). `IncompatibleError` if it is damaged,
    `ResidscopeError` without peft."""
    way_out = "save the adapter again, or remove the file to use the weights without it"
    with reading(f"{model}: {ADAPTER} is not an adapter's configuration", way_out):
        found = json.loads(read_whole(config, CONFIG_BYTES))
        kind, base = str(found["peft_type"]), found.get("base_model_name_or_path") or ""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        what = "and peft is not installed: `pip install peft`, or give the model without its adapter"
        raise ResidscopeError(f"{model}: it has an adapter ({ADAPTER}, {kind}), which peft applies, {what}") from None
    return f"{kind}, peft {version}", str(base)


def with_adapter(model: str, causal_lm: Any, location: str, arguments: dict[str, Any]) -> Any:
    """`causal_lm` with the adapter at `location` (a folder or hub id; arguments: of `from_pretrained`) merged into its
    weights. `IncompatibleError` if it does not fit, or is of a kind that cannot be merged."""
    import peft  # pyright: ignore[reportMissingImports]

    config = peft.PeftConfig.from_pretrained(location, **arguments)
    wrapped: Any = peft.PeftModel(causal_lm, config)
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise IncompatibleError(
            f"{model}: its adapter should be of a kind that can be merged into the weights, such as LORA, found"
            f" {config.peft_type}; give the model without its adapter"
        )
    found = wrapped.load_adapter(location, "default", torch_device="cpu", **arguments)
    for what, names in (("missing from", found.missing_keys), ("not used of", found.unexpected_keys)):
        if names:
            reason = f"such as {sorted(names)[0]}; the adapter belongs to another model, or is damaged"
            raise IncompatibleError(f"{model}: {len(names)} weights are {what} its adapter's files, {reason}")
    return wrapped.merge_and_unload()
