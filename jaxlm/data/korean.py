"""Korean particles: which of two forms follows a word depends on whether its last sound is a consonant."""

import re

_CLOSING = " \t\"'”’)]}>」』》〉】…"
# How a final digit is read: 영 일 이 삼 사 오 육 칠 팔 구. "l" is a final ㄹ, "c" another consonant, "" a vowel.
_DIGITS = dict(zip("0123456789", ("c", "l", "", "c", "", "", "c", "l", "l", ""), strict=True))
_LETTERS = {"L": "l", "R": "l", "M": "c", "N": "c"}


def final_sound(word: str) -> str | None:
    """`""` after a vowel, `"l"` after ㄹ, `"c"` after another consonant, None if the reading is unknown.

    Digits and single or capital Latin letters are read in Korean (`3` 삼, `KBS` 에스); other Latin words by a rule of
    thumb on their spelling (`Seoul` l, `Tom` c, `Peru` vowel). Closing quotes and brackets are skipped.
    """
    word = word.rstrip(_CLOSING)
    last = word[-1:]
    if "가" <= last <= "힣":
        final = (ord(last) - ord("가")) % 28
        return "" if final == 0 else "l" if final == 8 else "c"
    if "ㄱ" <= last <= "ㅎ":
        return "l" if last == "ㄹ" else "c"
    if "ㅏ" <= last <= "ㅣ":
        return ""
    if last in _DIGITS:
        return _final_of_number(word)
    if last == "%":
        return ""
    if last.isascii() and last.isalpha():
        return _final_of_latin(re.search(r"[A-Za-z]+$", word)[0])
    return None


def particle(word: str, pair: str) -> str:
    """The member of `"은/는"`, `"이/가"`, `"을/를"`, `"과/와"`, `"으로/로"`, `"이다/다"` ... that follows a word.

    The form after a consonant comes first; `으로/로` treats ㄹ as a vowel. A word of unknown reading gets `은(는)`.
    """
    after_consonant, slash, after_vowel = pair.partition("/")
    if not slash:
        raise ValueError(f"a particle pair is written 은/는, got {pair!r}")
    sound = final_sound(word)
    if sound is None:
        return f"{after_consonant}({after_vowel})"
    return after_vowel if not sound or (sound == "l" and after_consonant.startswith("으로")) \
        else after_consonant


class Word(str):
    """A string for templates: `f"{Word('엔'):이다/다}"` is `엔이다`; a format without a slash works as usual."""

    def __format__(self, spec: str) -> str:
        return str(self) + particle(self, spec) if "/" in spec else super().__format__(spec)


def _final_of_number(word: str) -> str:
    digits = re.search(r"[\d,]*(\.\d+)?$", word)
    number = digits[0].replace(",", "")
    zeros = len(number) - len(number.rstrip("0"))
    # After a decimal point each digit is read alone, and so is a lone 0.
    if zeros == 0 or digits[1] or zeros == len(number):
        return _DIGITS[number[-1]]
    # 십, 백, 천, 만, 억, 경 end in a consonant; 조 (12 to 15 zeros) does not.
    return "" if 12 <= zeros <= 15 else "c"


def _final_of_latin(letters: str) -> str:
    if letters.isupper() or len(letters) == 1:
        return _LETTERS.get(letters[-1].upper(), "")
    letters = letters.lower()
    if re.search(r"(l|[bcdgkpt]le)$", letters):
        return "l"
    return "c" if re.search(r"([mnpkbt]|[aeiou]c|[mn]e)$", letters) else ""
