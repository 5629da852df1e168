"""Another tokenizer for a model that exists: tokens of both keep their rows, new ones start from their pieces."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken

from jaxlm.data.tokenizer import (
    BYTE_LETTERS,
    BYTE_PIECES,
    JSON_FILE,
    Tokenizer,
    tokenizer_from_files,
)
from jaxlm.train.pretrained import Pretrained

RowInit = Literal["mean", "random"]
ROLES = ("bos", "eos", "pad")
_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}


class Correspondence(NamedTuple):
    """For each id of a new tokenizer the ids of the old one that it stands for: one if shared, none if nothing fits."""

    pieces: list[tuple[int, ...]]
    shared: frozenset[int]  # new ids whose row is that of one old token
    dropped: int            # old tokens that have no row any more


def correspond(old: Tokenizer, new: Tokenizer) -> Correspondence:
    """Which old tokens make up each new one.

    bos, eos and pad meet by their role, other tokens by the bytes they stand for, in whatever form the two files write
    them; what the old tokenizer lacks is spelled with its tokens. With old a, b, ab and new b, ab, abb:

        b -> (b,)    ab -> (ab,)    abb -> (ab, b)    shared: b, ab    dropped: 1
    """
    known: dict[bytes, int] = {}
    old_bytes = token_bytes(old)
    # What `encode` writes wins over a byte piece that stands for the same: it is the one that was trained.
    single = _byte_pieces(old)
    for i in sorted(range(old.vocab_size), key=lambda i: i not in single):
        if old_bytes[i]:
            known[old_bytes[i]] = i
    roles = {getattr(new, f"{role}_id"): getattr(old, f"{role}_id") for role in reversed(ROLES)}
    pieces, shared = [], set()
    for i, content in enumerate(token_bytes(new)):
        match = roles.get(i, known.get(content) if content else None)
        if match is not None:
            shared.add(i)
        pieces.append((match,) if match is not None else _spell(old, content))
    kept = {pieces[i][0] for i in shared}
    return Correspondence(pieces, frozenset(shared), sum(bool(old_bytes[i]) and i not in kept
                                                         for i in range(old.vocab_size)))


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of UTF-8 that each id stands for; those of its name for a special token, none for an id in a gap."""
    names = {one.id: name for name, one in tokenizer.symbols.items()}
    single = _byte_pieces(tokenizer)
    letters = _byte_level_names(tokenizer)
    # A decoder may drop a space at the beginning, so each token is decoded behind a letter.
    anchor = tokenizer.encode("a")
    behind = len(tokenizer.decode(anchor))
    found = []
    for i in range(tokenizer.vocab_size):
        if i in names:
            found.append(names[i].encode("utf-8"))
        elif i in single:
            found.append(bytes([single[i]]))
        elif i in letters:
            found.append(letters[i])
        else:
            found.append(tokenizer.decode([*anchor, i])[behind:].encode("utf-8"))
    return found


def _byte_pieces(tokenizer: Tokenizer) -> dict[int, int]:
    return {i: byte for byte in range(BYTE_PIECES) if (i := tokenizer.byte_id(byte)) is not None}


def _byte_level_names(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Ids and bytes of a byte-level BPE, whose tokens may be parts of characters; nothing for other kinds."""
    content = tokenizer.files().get(JSON_FILE)
    if content is None:
        return {}
    content = json.loads(content)
    if '"ByteLevel"' not in json.dumps(content.get("decoder")):
        return {}
    added = {token["id"] for token in content.get("added_tokens", ())}
    return {i: bytes(_BYTES[letter] for letter in name) for name, i in content["model"]["vocab"].items()
            if i not in added and all(letter in _BYTES for letter in name)}


def _spell(old: Tokenizer, content: bytes) -> tuple[int, ...]:
    """The old tokens of some bytes: those of the text, or byte tokens where a character is cut."""
    try:
        return tuple(old.encode(content.decode("utf-8")))
    except UnicodeDecodeError:
        single = [old.byte_id(byte) for byte in content]
        return tuple(i for i in single if i is not None)


def mean_rows(rows: np.ndarray, correspondence: Correspondence, num_rows: int, *, seed: int) -> np.ndarray:
    """rows [V, D] of the old tokens to [num_rows, D]: a new token is the mean of its pieces, so its logit is theirs.

        e_new = 1/|pieces| sum_{i in pieces} e_i

    A token without pieces and a row beyond the tokenizer is the mean of all rows: its logit is the mean of all, where
    a row of zeros could win.
    """
    del seed  # nothing is drawn
    result = np.broadcast_to(rows.mean(axis=0), (num_rows, rows.shape[1])).copy()
    for i, pieces in enumerate(correspondence.pieces):
        if pieces:
            result[i] = rows[list(pieces)].mean(axis=0)
    return result


def random_rows(rows: np.ndarray, correspondence: Correspondence, num_rows: int, *, seed: int) -> np.ndarray:
    """As `mean_rows`, but new tokens are drawn from N(mean, std), each channel's over the old rows [V, D]."""
    result = mean_rows(rows, correspondence, num_rows, seed=seed)
    rng, mean, std = np.random.default_rng(seed), rows.mean(axis=0), rows.std(axis=0)
    for i in range(len(correspondence.pieces)):
        if i not in correspondence.shared:
            result[i] = rng.normal(mean, std)
    return result


ROW_INITS: Mapping[str, Callable[..., np.ndarray]] = {"mean": mean_rows, "random": random_rows}


def change_vocabulary(model: Pretrained, tokenizer: Tokenizer, *, init: RowInit = "mean", multiple: int = 1,
                      seed: int = 0) -> tuple[Pretrained, Correspondence]:
    """The model with embedding (and head, if untied) for `tokenizer`, and what became of the tokens.

    Logits of shared tokens stay what they were for a text of shared tokens. The vocabulary is rounded up to `multiple`.
    The model has to learn its new tokens: train it. ValueError for a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so nobody knows what its rows stand for")
    if multiple < 1:
        raise ValueError(f"multiple must be positive, got {multiple}")
    correspondence = correspond(model.tokenizer, tokenizer)
    num_rows = math.ceil(tokenizer.vocab_size / multiple) * multiple
    known = model.tokenizer.vocab_size  # rows beyond it are padding and say nothing

    def rows(leaf: Any, draw: int) -> np.ndarray:
        leaf = np.asarray(leaf)
        # float32 for the means, whatever the weights are kept in.
        made = ROW_INITS[init](leaf[:known].astype(np.float32), correspondence, num_rows, seed=seed + draw)
        return made.astype(leaf.dtype)

    params = {**model.params, "embed": {"embedding": rows(model.params["embed"]["embedding"], 0)}}
    if not model.config.tie_embeddings:
        params["head"] = {"kernel": rows(np.asarray(model.params["head"]["kernel"]).T, 1).T}
    start = (tokenizer.bos_id,) if model.start else ()  # ids before a text are BOS or none
    return model._replace(config=replace(model.config, vocab_size=num_rows), params=params, tokenizer=tokenizer,
                          start=start), correspondence


def with_tokens(tokenizer: Tokenizer, names: Sequence[str], *, control: bool) -> Tokenizer:
    """The tokenizer with whole tokens behind its others; `control`: text that spells one out stays text.

    ValueError for a tokenizer without `tokenizer.json`, and for a name that is empty, repeated or a token already.
    """
    files = tokenizer.files()
    if JSON_FILE not in files:
        raise ValueError("tokens can be added to a tokenizer.json only; train a sentencepiece model with them instead")
    inner = tokenizers.Tokenizer.from_str(files[JSON_FILE].decode("utf-8"))
    for name in names:
        if not name or names.count(name) > 1 or inner.token_to_id(name) is not None:
            raise ValueError(f"{name!r} cannot be added: a new token has a name that is not empty and not yet a token")
    inner.add_tokens([AddedToken(name, special=control, normalized=False) for name in names])
    return tokenizer_from_files({**files, JSON_FILE: inner.to_str().encode("utf-8")})
