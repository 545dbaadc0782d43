"""Checks that what transformers loaded is the model in the files, and a causal one.

How: transformers silently builds whatever a configuration declares, gives random values to weights that the files
lack, ignores weights that it does not use, and loads encoders as causal models; each case is detected here.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harvest.model.hashes import add_file
from residscope.console import counted, human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, said
from residscope.memory import free_memory

_TRIED_TOKENS = 16
_HASHES = {40: hashlib.sha1, 64: hashlib.sha256}
"""By the length of a cached file's name: git's hash for a small file, SHA-256 for a large one."""


def refuse_too_large(model: str, build: Callable[[], nn.Module], held: int, bytes_each: int) -> None:
    """`IncompatibleError` if a configuration declares more numbers than weights of `held` bytes can have (0: no weight
    files), `ResidscopeError` if these, with `bytes_each` (0: not in main memory), do not fit in free memory.

    build: makes the configuration's model; called here on the meta device, which takes no memory.
    """
    try:
        with torch.device("meta"):
            made = build()
    except Exception:  # Any error is reported when the real model is made.
        return
    n, free = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers())), free_memory()
    if held and n > 2 * held + 2**25:  # A weight may have only 4 bits, and models have masks and tables.
        found = f"its weights have {human_bytes(held)}, its config.json declares {n:.3g} numbers"
        raise IncompatibleError(f"{model}: {found}: check that config.json belongs to the weights")
    if free is not None and n * bytes_each > free:
        found = f"takes {human_bytes(n * bytes_each)}, {human_bytes(free)} are free"
        raise ResidscopeError(f"{model}: out of memory: it {found}; give --dtype bfloat16 or a smaller model")


def refuse_missing(model: str, missing: Sequence[str], base_prefix: str) -> None:
    """`IncompatibleError` if weights whose names begin with `base_prefix` (all but the LM head's) are missing."""
    if in_base := [name for name in missing if name.startswith(base_prefix)]:
        what = f"such as {in_base[0]}, and would be random. Check that config.json belongs to the weights"
        raise IncompatibleError(f"{model}: {len(in_base)} weights are missing from its files, {what}")


def refuse_more_blocks(model: str, unused: Iterable[str], base_prefix: str, blocks_name: str, n_layers: int) -> None:
    """`IncompatibleError` if the files have more blocks than the configuration says; a warning on stderr if they have
    other weights that the model does not use.

    unused: names of all unused weights. blocks_name: of the list of blocks, in the model without its LM head.
    """
    unused = sorted(unused)
    block = re.compile(rf"(?:{re.escape(base_prefix)}\.)?{re.escape(blocks_name)}\.(\d+)\.")
    beyond = [int(found[1]) for found in map(block.match, unused) if found and int(found[1]) >= n_layers]
    if beyond:
        raise IncompatibleError(
            f"{model}: its files have blocks 0 to {max(beyond)}, its configuration {n_layers} (num_hidden_layers):"
            f" check that config.json belongs to the weights. To store the first blocks alone, --layers"
            f" 0-{n_layers - 1}; to shorten a model permanently, save it again with save_pretrained"
        )
    if unused:
        what = f"{counted(len(unused), 'weight')} of its files {'is' if len(unused) == 1 else 'are'} not used"
        print(f"warning: {model}: {what}, such as {unused[0]}", file=sys.stderr)


@torch.inference_mode()
def refuse_unknown_stream(
    model: str, base: Any, block: nn.Module, embedding: Any, d_model: int, longest: int | None
) -> None:
    """`IncompatibleError` if a block does not output one vector of `d_model` per token (some models have several
    parallel streams), or if later tokens change the residual stream of earlier ones, as in an encoder.

    model: its name and class; longest: positions that the model takes. Changing the second half of a short sequence
    must not change the first half, except by rounding (an expert computes all its tokens together).
    """
    n = min(_TRIED_TOKENS, longest or _TRIED_TOKENS) // 2 * 2
    if n == 0 or not isinstance(embedding, nn.Embedding):
        return
    weight = embedding.weight
    place = torch.arange(n, device="cpu" if weight.is_meta else weight.device)  # meta: it is on a disk until it runs
    ids = place[None] * 7 % len(weight)
    changed = torch.where(place < n // 2, ids, (ids + 1) % len(weight))
    streams: list[list[list[int]]] = []  # for each run, the shapes of the block's outputs that equal the first one's

    def look(module: Any, arguments: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        shapes: list[list[int]] = [list(getattr(part, "shape", ())) for part in parts]
        streams.append([shape for shape in shapes if shape == shapes[0]])

    with block.register_forward_hook(look):
        before, after = (base(input_ids=given, use_cache=False)[0][0, : n // 2].float() for given in (ids, changed))
    if streams and streams[0] != [[1, n, d_model]]:
        found = ", ".join(map(str, streams[0]))
        what = f"a block's output should be one [sequences, tokens, d_model], here {[1, n, d_model]}, found {found}"
        raise IncompatibleError(f"{model}: {what}: this architecture is not supported")
    error = ((before - after).norm(dim=-1) / before.norm(dim=-1)).median().item()
    if error > (1e-4 if weight.dtype == torch.float32 else 2e-2):
        raise IncompatibleError(
            f"{model}: later tokens change the residual stream of earlier ones (by {error:.1g} of its norm), so this"
            " is an encoder, not a causal language model; give a model that predicts the next token"
        )


def refuse_damaged_cache(model: str, files: Iterable[Path]) -> None:
    """`IncompatibleError` if a file of the hub's local cache does not have its hash. files: links in the folder of one
    commit; other files, and links to files that are not named by a hash, are not checked."""
    for link in files:
        file = link.resolve()
        new = _HASHES.get(len(file.name))
        if new is None or not link.is_symlink() or not re.fullmatch("[0-9a-f]+", file.name):
            continue
        try:
            digest = new(b"" if new is hashlib.sha256 else f"blob {file.stat().st_size}\0".encode())
            add_file(digest, file)
        except OSError as error:
            raise ResidscopeError(f"{model}: {file} cannot be read ({said(error)})") from None
        if digest.hexdigest() != file.name:
            raise IncompatibleError(
                f"{model}: {link.name} in the hub's local cache is damaged: its hash should be {file.name}, found"
                f" {digest.hexdigest()}. Remove {file}, and it will be downloaded again"
            )
