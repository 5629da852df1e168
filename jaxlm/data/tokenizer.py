"""Text to token ids and back: sentencepiece, Hugging Face `tokenizer.json`, plain bytes.

All keep three promises: `encode` adds no special token; `decode` drops bos, eos and pad and shows every other token;
a special token spelled out in user text stays text (see each class for what its library cannot do).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tokenizers

from jaxlm.core.config import nearest

SENTENCEPIECE_FILE, JSON_FILE, BYTES_FILE = "tokenizer.model", "tokenizer.json", "tokenizer.bytes"
JSON_NAMES_FILE = "tokenizer_config.json"
# Names in common use, the more specific first.
USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|BOS|>", "<bos>", "[CLS]", "<|im_start|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|EOS|>", "<eos>", "[SEP]", "<|im_end|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|PAD|>", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>", "<|endoftext|>"),
}
BYTE_PIECES = 256
# The letters of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 and up, in order (GPT-2).
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(BYTE_PIECES + i) for i, byte in enumerate(sorted({*range(BYTE_PIECES)} - {*_PRINTABLE}))}
# sentencepiece writes a space as U+2581, so a real U+2581 must not reach it.
_SPACE_SIGN = "\u2581"


class Symbol(NamedTuple):
    """A special token, and whether it takes the spaces before and after it with it, as some files ask for."""

    id: int
    takes_left: bool = False
    takes_right: bool = False


class Tokenizer(Protocol):
    """What the data pipeline, evaluation and generation need. Instances pickle, so loader workers can have them."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    symbols: Mapping[str, Symbol]  # by name; `encode` never yields one, a chat template's own text may name them

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores where the library can."""
        ...

    def encode_spans(self, text: str, *, inside: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode` and the characters [start, end) each stands for; bytes of one character share its span.

        `inside`: the text follows a special token, so that what a file adds before a whole text is not added.
        """
        ...

    def byte_id(self, byte: int) -> int | None:
        """The token that stands for this one byte of UTF-8, if there is one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bos, eos and pad are left out, bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_id(self, name: str) -> int:
        """The id of a special or user symbol. ValueError with the nearest name."""
        ...

    def files(self) -> dict[str, bytes]:
        """File names and contents that `tokenizer_from_files` turns into this tokenizer again."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of `files`: equal fingerprints, equal ids."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model. bos, eos, pad and control symbols in user text stay text; user-defined symbols do not:
    the library matches them wherever they stand, so a role marker that users must not forge is a control symbol.
    """

    def __init__(self, model: bytes) -> None:
        """Takes the content of a `tokenizer.model`. ValueError if it is damaged or lacks bos, eos or pad."""
        if not model:
            raise ValueError("not a sentencepiece model: the file is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model: {error}") from None
        self._model, processor = model, self._processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        # Many published models have no pad; unk is never produced when every byte has a piece.
        self._bytes = _byte_ids(processor)
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id() if self._bytes else -1
        for option, value in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            if value < 0:
                raise ValueError(f"the sentencepiece model defines no {option}; train it with {option}_id >= 0")
        self._control = {i: processor.id_to_piece(i) for i in range(self.vocab_size)
                         if processor.is_control(i) or processor.is_unknown(i)}
        self._hidden = {self.bos_id, self.eos_id, self.pad_id}
        self.symbols = {name: Symbol(i) for i, name in self._control.items() if processor.is_control(i)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; exact round trip for any string if the model was trained by `train_sentencepiece`."""
        if _SPACE_SIGN not in text or not self._bytes:
            return self._processor.encode(text)
        sign = [self._bytes[byte] for byte in _SPACE_SIGN.encode("utf-8")]
        first, *rest = text.split(_SPACE_SIGN)
        return self._processor.encode(first) + [i for part in rest for i in sign + self._processor.encode(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: str, *, inside: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` with spans. A model's dummy prefix is added inside, too: `decode` drops it after every symbol."""
        ids, spans, start = [], [], 0
        for part in re.split(f"({_SPACE_SIGN})", text) if self._bytes else [text]:
            if part == _SPACE_SIGN and self._bytes:
                sign = self.encode(part)
                ids, spans = ids + sign, spans + [(start, start + 1)] * len(sign)
            else:
                pieces = self._processor.encode(part, out_type="proto").pieces
                chars = {byte: i for i, byte in enumerate(accumulate((len(c.encode()) for c in part), initial=0))}
                ids += [piece.id for piece in pieces]
                spans += [(start + chars[piece.begin], start + chars[piece.end]) for piece in pieces]
            start += len(part)
        return ids, _without_empty(spans)

    def byte_id(self, byte: int) -> int | None:
        """`<0xNN>`, in a model with byte fallback."""
        return self._bytes[byte] if self._bytes else None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control symbols other than bos, eos and pad appear by name."""
        parts, run = [], []
        for i in _checked(ids, self.vocab_size):
            if i in self._hidden:
                continue
            if i in self._control:
                parts += [self._processor.decode(run), self._control[i]]
                run = []
            else:
                run.append(i)
        return "".join(parts) + self._processor.decode(run)

    def token_id(self, name: str) -> int:
        """The id of a piece by its exact name. ValueError with the nearest special name."""
        i = self._processor.piece_to_id(name)
        if i == self._processor.unk_id() and name != self._processor.id_to_piece(i):
            # Symbols stand before the byte pieces, where there are such.
            symbols = [self._processor.id_to_piece(j) for j in range(min(self._bytes, default=0))]
            raise ValueError(f"the tokenizer has no token {name!r}{nearest(name, symbols or self._control.values())}")
        return i

    def files(self) -> dict[str, bytes]:
        """`tokenizer.model`."""
        return {SENTENCEPIECE_FILE: self._model}

    def fingerprint(self) -> str:
        """SHA-256 of the model file."""
        return _fingerprint(self.files())


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`. Special tokens in user text stay text; added tokens that the file does not call
    special are matched by the library. Whether a round trip is exact is up to the file (byte-level BPE: yes).
    """

    def __init__(self, content: bytes, *, bos: str | None = None, eos: str | None = None,
                 pad: str | None = None) -> None:
        """Takes the file's content; names not given are the usual ones. ValueError names what is missing."""
        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"not a tokenizer.json: {error}") from None
        # A file may carry the truncation and padding of the model it was made for; ids here are never cut or filled.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        # Without its special tokens post-processing moves spans only: a space would belong to no token.
        self._tokenizer.post_processor = None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._names = {kind: self._find(kind, name) for kind, name in (("bos", bos), ("eos", eos), ("pad", pad))}
        self.bos_id, self.eos_id, self.pad_id = (self._tokenizer.token_to_id(name) for name in self._names.values())
        self._hidden = {self.bos_id, self.eos_id, self.pad_id}
        added = self._tokenizer.get_added_tokens_decoder()
        self.symbols = {name: Symbol(self._tokenizer.token_to_id(name)) for name in self._names.values()} | {
            token.content: Symbol(i, token.lstrip, token.rstrip) for i, token in added.items() if token.special}

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._names), (self._content,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without the file's post-processing ([CLS], BOS and the like)."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    @functools.cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's post-processor puts before and after a text, ([CLS],) and ([SEP],) for example.

        Cut a text first and put them around it then, and no truncation loses one. ValueError for a post-processor that
        puts tokens elsewhere than around the text.
        """
        whole = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        whole.no_truncation()
        whole.no_padding()
        text = next(name for name in ("a", *whole.get_vocab()) if self.encode(name))
        ids, framed = self.encode(text), whole.encode(text).ids
        for start in range(len(framed) - len(ids) + 1):
            if framed[start:start + len(ids)] == ids:
                return tuple(framed[:start]), tuple(framed[start + len(ids):])
        raise ValueError(f"the post-processor of tokenizer.json turns the ids {ids} into {framed}; only tokens before "
                         "and after a text are supported")

    def encode_spans(self, text: str, *, inside: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` with spans; inside, the space that some files put before a text is left out."""
        encoding = (self._inside if inside else self._tokenizer).encode(text, add_special_tokens=False)
        return encoding.ids, _without_empty(encoding.offsets)

    def byte_id(self, byte: int) -> int | None:
        """`<0xNN>`, or the letter that byte-level BPE writes for the byte."""
        return self._bytes.get(byte)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens other than bos, eos and pad appear by name."""
        ids = _checked(ids, self.vocab_size)
        return self._tokenizer.decode([i for i in ids if i not in self._hidden], skip_special_tokens=False)

    def token_id(self, name: str) -> int:
        """The id of a token by its exact name. ValueError with the nearest added token."""
        i = self._tokenizer.token_to_id(name)
        if i is None:
            raise ValueError(f"the tokenizer has no token {name!r}{nearest(name, self._added())}")
        return i

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` as it was given, and the three names in the form of a `tokenizer_config.json`."""
        names = {f"{kind}_token": name for kind, name in self._names.items()}
        return {JSON_FILE: self._content, JSON_NAMES_FILE: json.dumps(names, ensure_ascii=False).encode("utf-8")}

    def fingerprint(self) -> str:
        """SHA-256 of both files."""
        return _fingerprint(self.files())

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        for names in ({byte: f"<0x{byte:02X}>" for byte in range(BYTE_PIECES)}, BYTE_LETTERS):
            ids = {byte: i for byte, name in names.items() if (i := self._tokenizer.token_to_id(name)) is not None}
            # Elsewhere such a name is a text like any other; here it is half a character.
            if any(self._tokenizer.decode([i]) == "\ufffd" for byte, i in ids.items() if byte >= 0x80):
                return ids
        return {}

    @functools.cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The tokenizer for text after a special token: Metaspace may put a space before the first text only."""
        content = json.loads(self._content)
        splits = content["pre_tokenizer"] or {}
        first = [step for step in (splits, *splits.get("pretokenizers", ())) if step.get("prepend_scheme") == "first"]
        if not first:
            return self._tokenizer
        for step in first:
            step["prepend_scheme"] = "never"
        inside = tokenizers.Tokenizer.from_str(json.dumps(content))
        inside.no_truncation()
        inside.no_padding()
        inside.encode_special_tokens, inside.post_processor = True, None
        return inside

    def _added(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def _find(self, kind: str, name: str | None) -> str:
        if name is not None:
            self.token_id(name)
            return name
        for usual in USUAL_NAMES[kind]:
            if self._tokenizer.token_to_id(usual) is not None:
                return usual
        raise ValueError(f"tokenizer.json has no usual {kind} token; name it with {kind}=..., "
                         f"one of {', '.join(self._added()) or '(no added tokens)'}")


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then bos, eos, pad. Exact for any string; nothing in user text is special."""

    vocab_size, bos_id, eos_id, pad_id = BYTE_PIECES + 3, BYTE_PIECES, BYTE_PIECES + 1, BYTE_PIECES + 2
    _names: Mapping[str, int] = {"<bos>": bos_id, "<eos>": eos_id, "<pad>": pad_id}
    symbols: Mapping[str, Symbol] = {"<bos>": Symbol(bos_id), "<eos>": Symbol(eos_id), "<pad>": Symbol(pad_id)}

    def encode(self, text: str) -> list[int]:
        """One id for each byte."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: str, *, inside: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """One id for each byte, with the place of its character."""
        return self.encode(text), [(i, i + 1) for i, character in enumerate(text) for _ in character.encode("utf-8")]

    def byte_id(self, byte: int) -> int | None:
        """The byte itself."""
        return byte

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; what is no UTF-8 becomes U+FFFD."""
        ids = _checked(ids, self.vocab_size)
        return bytes(i for i in ids if i < BYTE_PIECES).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int:
        """The id of `<bos>`, `<eos>` or `<pad>`; ValueError for anything else."""
        if name not in self._names:
            raise ValueError(f"the byte tokenizer has no token {name!r}{nearest(name, self._names)}")
        return self._names[name]

    def files(self) -> dict[str, bytes]:
        """A marker file: there is nothing to store but the layout."""
        return {BYTES_FILE: b"256 bytes, bos, eos, pad\n"}

    def fingerprint(self) -> str:
        """SHA-256 of the marker."""
        return _fingerprint(self.files())


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes `tokenizer.files()` into a folder, which is created."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def load_tokenizer(path: str | Path, *, bos: str | None = None, eos: str | None = None,
                   pad: str | None = None) -> Tokenizer:
    """A tokenizer from a folder that holds one, from a `.model` or `.json` file, or from the word `bytes`.

    `bos`, `eos`, `pad` name the tokens of a `tokenizer.json` that uses unusual ones. ValueError says what is wrong.
    """
    if str(path) == "bytes":
        return tokenizer_from_files(ByteTokenizer().files(), bos=bos, eos=eos, pad=pad)
    path = Path(path).expanduser()
    known = (SENTENCEPIECE_FILE, JSON_FILE, BYTES_FILE)
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in (*known, JSON_NAMES_FILE) if (path / name).is_file()}
    elif path.is_file():
        name = {".model": SENTENCEPIECE_FILE, ".json": JSON_FILE, ".bytes": BYTES_FILE}.get(path.suffix)
        if name is None:
            raise ValueError(f"{path}: a tokenizer file ends in .model, .json or .bytes")
        files = {name: path.read_bytes()}
    else:
        raise ValueError(f"{path}: no such tokenizer file or folder (the word 'bytes' names the byte tokenizer)")
    try:
        return tokenizer_from_files(files, bos=bos, eos=eos, pad=pad)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def tokenizer_from_files(files: Mapping[str, bytes], *, bos: str | None = None, eos: str | None = None,
                         pad: str | None = None) -> Tokenizer:
    """The inverse of `Tokenizer.files`; names given here win over those in the files. ValueError if none fits."""
    given = {"bos": bos, "eos": eos, "pad": pad}
    if SENTENCEPIECE_FILE in files or JSON_FILE not in files:
        if any(given.values()):
            raise ValueError("bos, eos and pad can be named for a tokenizer.json only")
        if SENTENCEPIECE_FILE in files:
            return SentencePieceTokenizer(files[SENTENCEPIECE_FILE])
        if BYTES_FILE in files:
            return ByteTokenizer()
        raise ValueError(f"holds no {SENTENCEPIECE_FILE}, {JSON_FILE} or {BYTES_FILE}")
    try:
        stored = json.loads(files.get(JSON_NAMES_FILE, b"{}"))
    except ValueError as error:
        raise ValueError(f"{JSON_NAMES_FILE}: {error}") from None
    for kind in given:
        token = stored.get(f"{kind}_token")
        given[kind] = given[kind] or (token.get("content") if isinstance(token, dict) else token)
    return JsonTokenizer(files[JSON_FILE], **given)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if a model of `vocab_size` rows cannot embed every id; more rows (padding) are fine."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"wrong tokenizer: it has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}")


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"id {i} is outside the vocabulary of {vocab_size}")
    return ids


def _without_empty(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in which a token without characters of its own, a part of a character, has those of the next token."""
    filled, following = [], None
    for start, end in reversed(spans):
        following = (start, end) if start < end or following is None else following
        filled.append(following)
    return filled[::-1]


def _byte_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The ids of the 256 byte pieces, or an empty list for a model without byte fallback."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(BYTE_PIECES)]
    return ids if all(processor.is_byte(i) for i in ids) else []


def _fingerprint(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        # The lengths keep two files apart from one that holds both.
        digest.update(f"{name}:{len(files[name])}:".encode() + files[name])
    return digest.hexdigest()
