"""Text as its tokens come: no half characters, no second thoughts, and the end at a stop string.

Everything here runs on the host; states are values, so a caller may keep one per row of a batch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxlm.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Tokens that are decoded together at most (twice that between two cuts); a character has four bytes at most.
WINDOW = 8


class TextState(NamedTuple):
    """The last tokens and how much of their text has been handed out."""

    window: tuple[int, ...] = ()
    num_shown: int = 0  # characters


class TextStream:
    """Decodes a growing list of ids piece by piece: pieces and `rest` together are `tokenizer.decode` of all the ids.

    A piece is text that no further id can change. "한" is the bytes ED 95 9C; as three tokens they give the pieces
    "", "" and "한", where decoding each alone would give U+FFFD thrice. ED followed by "a" gives "" and U+FFFD + "a".
    Only a window of ids is decoded at a time, so the cost of an id does not grow with the text. A `tokenizer.json` with
    byte fallback turns a whole run of byte tokens into U+FFFD if one is wrong, so there a run comes at its end.

    How it knows: bytes 80 and BF can continue any unfinished character, and where none is unfinished each of them is
    an U+FFFD of its own. So a text is final if up to three of them, put behind it, add as many U+FFFD and nothing else.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        ids = [tokenizer.byte_id(byte) for byte in range(256)]
        self._bytes = {i for i in ids if i is not None}
        ends = [i for i in (ids[0x80], ids[0xBF]) if i is not None]
        self._continuations = [(i,) * count for i in ends for count in (1, 2, 3)]
        # What tells two states of a decoder apart: a space may be dropped, bytes may be part of an invalid run.
        self._probes = [tuple(tokenizer.encode(" a"))]
        if None not in (ids[0xC2], ids[0x80]):
            self._probes.append((ids[0xC2], ids[0x80]))

    def push(self, state: TextState, ids: Iterable[int]) -> tuple[TextState, str]:
        """The state after more ids, and the text that has become final. A stream starts with `TextState()`."""
        pieces = []
        for i in ids:
            if i in self._hidden:
                continue
            window = (*state.window, i)
            text = self._tokenizer.decode(window)
            if self._final(window, text):
                pieces.append(text[state.num_shown:])
                state = self._cut(window, text)
            else:
                state = TextState(window, state.num_shown)
        return state, "".join(pieces)

    def rest(self, state: TextState) -> str:
        """What is not final yet, as it reads if nothing follows."""
        return self._tokenizer.decode(state.window)[state.num_shown:]

    def _final(self, window: tuple[int, ...], text: str) -> bool:
        if not text.endswith(REPLACEMENT) and window[-1] not in self._bytes:
            return True
        if not self._continuations:
            return not text.endswith(REPLACEMENT)
        return all(self._tokenizer.decode(window + more) == text + REPLACEMENT * len(more)
                   for more in self._continuations)

    def _cut(self, window: tuple[int, ...], text: str) -> TextState:
        """A shorter window if decoding goes on in the same way behind it."""
        short = window[-WINDOW:]
        if len(window) < 2 * WINDOW:
            return TextState(window, len(text))
        start = self._tokenizer.decode(short)
        same = self._final(short, start) and all(
            self._tokenizer.decode(short + probe)[len(start):] == self._tokenizer.decode(window + probe)[len(text):]
            for probe in self._probes)
        return TextState(short, len(start)) if same else TextState(window, len(text))


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; ValueError for an empty one and for one string in place of a list."""
    if isinstance(stop_strings, str) or not all(isinstance(one, str) and one for one in stop_strings):
        raise ValueError(f"stop strings are a list of strings that are not empty, not {stop_strings!r}")
    return tuple(stop_strings)


def find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the text is cut: the start of the stop string that is complete first, of those the longest.

    So the cut is the same however the text came in pieces: with stop strings "cd", "bcd", "abcde", the text "xabcdef"
    is cut to "xa".
    """
    found = []
    for one in stop_strings:
        start = text.find(one)
        if start >= 0:
            found.append((start + len(one), start))
    return min(found)[1] if found else None


class StopScan(NamedTuple):
    """The end of a text that may be the beginning of a stop string, so is not shown yet."""

    held: str = ""

    def push(self, piece: str, stop_strings: Sequence[str]) -> tuple["StopScan", str, bool]:
        """More text: the state, what may be shown, and whether a stop string is complete: then nothing is held.

        With "</s>" as stop string the pieces "a<", "b</", "s>c" show "a", "<b", "" and stop at the third. At an end
        without a stop string `held` is shown.
        """
        text = self.held + piece
        cut = find_stop(text, stop_strings)
        if cut is not None:
            return StopScan(), text[:cut], True
        longest = max((len(one) for one in stop_strings), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(one.startswith(text[start:]) for one in stop_strings):
                return StopScan(text[start:]), text[:start], False
        return StopScan(), text, False


def stop_at(tokenizer: Tokenizer, ids: Sequence[int], stop_strings: Sequence[str]) -> tuple[int, str | None]:
    """How many ids to keep, up to the one that completes a stop string, and their text before it; all and None without.

    The first n for which `decode(ids[:n])` holds a stop string. With tokens "a b", "</", "s> c", "d" and the stop
    string "</s>": 3 and "a b".
    """
    stop_strings, stream = check_stop_strings(stop_strings), TextStream(tokenizer)
    state, scan, shown = TextState(), StopScan(), []
    for n, i in enumerate(ids, 1):
        state, piece = stream.push(state, [i])
        scan, text, stopped = scan.push(piece, stop_strings)
        shown.append(text)
        if not stopped:
            # The token ends the text: what is not final counts as it reads now.
            _, text, stopped = scan.push(stream.rest(state), stop_strings)
            text = text if stopped else ""
            shown.append(text)
        if stopped:
            return n, "".join(shown)
    return len(ids), None
