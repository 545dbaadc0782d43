"""Whether what transformers loaded is the model that the files hold, and a causal one.

How: without a word, transformers makes whatever a configuration declares, gives random values to weights that the
files lack, leaves out those that it does not ask for, and loads encoders as causal models; each is found here.
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
"""By the length of a cached file's name: git's hash of a small file, SHA-256 of a large one."""


def refuse_too_large(model: str, build: Callable[[], nn.Module], held: int, bytes_each: int) -> None:
    """`IncompatibleError` where a configuration declares more numbers than weights of `held` bytes are (0: there are
    none), `ResidscopeError` where these, of `bytes_each` (0: not here), do not fit the free memory.

    build: makes the model of the configuration, here without memory.
    """
    try:
        with torch.device("meta"):
            made = build()
    except Exception:  # Of any kind; it is said when the model itself is made.
        return
    n, free = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers())), free_memory()
    if held and n > 2 * held + 2**25:  # A weight may have 4 bits, and any model masks and tables.
        found = f"its weights have {human_bytes(held)}, its config.json declares {n:.3g} numbers"
        raise IncompatibleError(f"{model}: {found}: check that config.json belongs to the weights")
    if free is not None and n * bytes_each > free:
        found = f"takes {human_bytes(n * bytes_each)}, {human_bytes(free)} are free"
        raise ResidscopeError(f"{model}: out of memory: it {found}; give --dtype bfloat16 or a smaller model")


def refuse_missing(model: str, missing: Sequence[str], base_prefix: str) -> None:
    """`IncompatibleError` where weights other than the LM head's are not in the files; base_prefix: of their names."""
    if in_base := [name for name in missing if name.startswith(base_prefix)]:
        what = f"such as {in_base[0]}, and would be random. Check that config.json belongs to the weights"
        raise IncompatibleError(f"{model}: {len(in_base)} weights are missing from its files, {what}")


def refuse_more_blocks(model: str, unused: Iterable[str], base_prefix: str, blocks_name: str, n_layers: int) -> None:
    """`IncompatibleError` where the files hold blocks that the configuration does not count; a warning on stderr where
    they hold other weights that the model does not use.

    unused: names of such weights. blocks_name: of the list of blocks, in the model without its LM head.
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
    """`IncompatibleError` where a block gives no vector of `d_model` for each token, as where several streams run side
    by side, or later tokens change the residual stream of earlier ones: an encoder.

    model: its name and class; longest: positions that the model takes. Other tokens in the second half of a short
    sequence must leave the first half as it was, but for rounding (experts compute together what falls to them).
    """
    n = min(_TRIED_TOKENS, longest or _TRIED_TOKENS) // 2 * 2
    if n == 0 or not isinstance(embedding, nn.Embedding):
        return
    weight = embedding.weight
    place = torch.arange(n, device="cpu" if weight.is_meta else weight.device)  # meta: it lies on a disk until it runs
    ids = place[None] * 7 % len(weight)
    changed = torch.where(place < n // 2, ids, (ids + 1) % len(weight))
    streams: list[list[list[int]]] = []  # shapes of what a block gives, as far as they are that of the first

    def look(module: Any, arguments: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        shapes: list[list[int]] = [list(getattr(part, "shape", ())) for part in parts]
        streams.append([shape for shape in shapes if shape == shapes[0]])

    with block.register_forward_hook(look):
        one, other = (base(input_ids=given, use_cache=False)[0][0, : n // 2].float() for given in (ids, changed))
    if streams and streams[0] != [[1, n, d_model]]:
        found = ", ".join(map(str, streams[0]))
        what = f"a block's output should be one [sequences, tokens, d_model], here {[1, n, d_model]}, found {found}"
        raise IncompatibleError(f"{model}: {what}: this architecture is not supported")
    error = ((one - other).norm(dim=-1) / one.norm(dim=-1)).median().item()
    if error > (1e-4 if weight.dtype == torch.float32 else 2e-2):
        raise IncompatibleError(
            f"{model}: later tokens change the residual stream of earlier ones (by {error:.1g} of its norm), so this"
            " is an encoder, not a causal language model; give a model that predicts the next token"
        )


def refuse_damaged_cache(model: str, files: Iterable[Path]) -> None:
    """`IncompatibleError` where a file of the hub's local cache does not have its hash. files: links in the folder of
    one commit; others, and links to files not named by a hash, are not looked at."""
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
                f" {digest.hexdigest()}. Remove {file}, and it is downloaded again"
            )
