"""Makes a store's token table from texts: tokenised, mixed by weight, and packed into sequences.

How: each document's tokens, followed by a separator, form one long stream, which is cut into sequences of exactly
`context_length` tokens (the last may be shorter), so that the rest of a document begins the next sequence. Without
packing, each sequence is the beginning of one document; of every 4,096 documents the longest come first, so that
sequences of the same length are neighbours and go through the model together. Every sequence begins with the tokens
that the tokenizer puts before a text (its opening). Nothing is padded.

Shapes: T tokens of the table, n tokens of the stream (T without openings).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from harvest.model.tokenizer import Tokenizer
from harvest.text.encode import encode_documents
from harvest.text.mixing import Mixture
from harvest.text.packing import Packing, sequences
from harvest.text.sources import TextSource
from residscope.errors import IncompatibleError, UsageError
from store.arrays import TokenTable

_PIECE = 1 << 22
"""Tokens that are processed at once, so that the temporaries take little memory compared to the table."""


def make_table(
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    packing: Packing,
    max_tokens: int,
    first: Callable[[int], np.ndarray] | None = None,
) -> tuple[TokenTable, Mixture]:
    """The table of at most `max_tokens` tokens of some texts, and the mixture, which says what each text gave. Raises
    like `pack`. first: see `pack`."""
    limit = packing.stream_length(max_tokens)
    streams = [encode_documents(source.documents(), tokenizer, limit, packing.longest_document) for source in sources]
    mixture = Mixture(streams, [source.choice.weight for source in sources], limit, packing.document_extra)
    with tqdm(total=limit, desc="tokenise", unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def watched() -> Iterator[np.ndarray]:
            for ids in mixture:
                bar.update(len(ids))
                yield ids

        return pack(watched(), packing, max_tokens, first), mixture


def pack(
    documents: Iterable[np.ndarray],
    packing: Packing,
    max_tokens: int,
    first: Callable[[int], np.ndarray] | None = None,
) -> TokenTable:
    """The table of at most `max_tokens` tokens, fewer if documents run out; `IncompatibleError` without text,
    `UsageError` without room for any. first: from the number of documents, which of them to put before the others, bool
    [n_documents]; used only with packing."""
    extra = np.array(packing.separator_ids if packing.packed else (), np.int32)
    more = packing.document_extra
    limit = packing.stream_length(max_tokens)
    room = limit - (not packing.packed) * more  # Without packing, no sequence may have nothing but its opening.
    if room <= 0:
        raise UsageError(f"--max-tokens {max_tokens} leaves no room for text: raise it")
    found: list[np.ndarray] = []
    lengths = array("q")
    n = 0
    for document in documents:
        if n >= room:
            break
        ids = document[: packing.longest_document]
        lengths.append(len(ids))
        n += len(ids) + more
        found.append(ids)
    n = min(n, limit)
    if n == 0:
        way_out = "check --dataset, --split and --text-column (or --token-column)"
        raise IncompatibleError(f"no text found: there are no documents, or all are empty; {way_out}")
    if not packing.packed:
        return _one_each(found, packing, n)
    own = np.frombuffer(lengths, np.int64)
    order = np.arange(len(own), dtype=np.int32)
    if first is not None:
        found[-1] = found[-1][: max(n - int((own + more)[:-1].sum()) - more, 1)]  # Cut the last before it is moved.
        own[-1] = len(found[-1])
        order = order[np.argsort(~first(len(own)), kind="stable")]
        own = own[order]
    stream = np.concatenate([part for i in order.tolist() for part in (found[i], extra)])[:n]  # [n]
    found.clear()
    owner = np.repeat(order, own + more)[:n]  # [n]
    is_text = np.repeat(np.tile([True, False], len(own)), np.stack([own, np.full_like(own, more)], 1).ravel())[:n]
    return _cut(stream, owner, is_text, packing)


def _one_each(documents: list[np.ndarray], packing: Packing, n_tokens: int) -> TokenTable:
    """One sequence per document, the last cut: `n_tokens` in all. Documents are numbered in the table's order."""
    rows = sequences(documents, packing, n_tokens)
    token_id = np.concatenate(rows)
    position = np.concatenate([np.arange(len(row), dtype=np.int32) for row in rows])
    document = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])
    return _with_mask(token_id, document, position, np.ones(n_tokens, bool), packing)


def _cut(stream: np.ndarray, owner: np.ndarray, is_text: np.ndarray, packing: Packing) -> TokenTable:
    """Cut a stream into sequences. stream, owner: token and document ids, int32 [n]; is_text: if text, bool [n]."""
    per_sequence, opening = packing.stream_per_sequence, len(packing.opening)
    n_sequences = -(-len(stream) // per_sequence)
    n_tokens = len(stream) + n_sequences * opening

    def with_openings(column: np.ndarray, opened: np.ndarray) -> np.ndarray:
        """`column` [n] with `opened` [sequences or 1, opening] inserted before each sequence: [T]."""
        full = len(column) // per_sequence
        out = np.empty(n_tokens, column.dtype)
        whole = out[: full * packing.context_length].reshape(full, packing.context_length)
        whole[:, :opening] = opened[:full]
        whole[:, opening:] = column[: full * per_sequence].reshape(full, per_sequence)
        if full < n_sequences:
            rest = out[full * packing.context_length :]
            rest[:opening], rest[opening:] = opened[-1], column[full * per_sequence :]
        return out

    token_id = with_openings(stream, np.array([packing.opening], np.int32))
    document = with_openings(owner, owner[::per_sequence, None])
    keep = with_openings(is_text, np.ones((1, 1), bool))
    position = np.resize(np.arange(packing.context_length, dtype=np.int32), n_tokens)
    return _with_mask(token_id, document, position, keep, packing)


def _with_mask(
    token_id: np.ndarray, document: np.ndarray, position: np.ndarray, keep: np.ndarray, packing: Packing
) -> TokenTable:
    """The table of these columns (int32 [T]). keep: which tokens are text, bool [T]; masked further in place."""
    first = max(len(packing.opening), int(not packing.keep_first_position))
    for start in range(0, len(keep), _PIECE):
        piece = slice(start, start + _PIECE)
        keep[piece] &= (position[piece] >= first) & ~np.isin(token_id[piece], packing.special_ids)
    return TokenTable(token_id, document, position, keep)
