"""The rules on translated reasoning, each by examples made by hand that it alone refuses."""

import pytest

from jaxlm.curate.translation_filter import (
    PLAIN_RULES,
    RULES,
    FilterConfig,
    first_failure,
    judge_prompt,
    read_verdict,
    repeated,
    same_answer,
    script_shares,
)

LIMITS = FilterConfig()
SOURCE = r"""Let $x$ be the number of apples. Then $2x + 15 = 1,045$ and so $2x = 1030$.
Dividing by two gives $x = 515$. The answer is \boxed{515}."""
GOOD = r"""사과의 개수를 $x$라고 합시다. 그러면 $2x + 15 = 1,045$이고 따라서 $2x = 1030$입니다.
양변을 2로 나누면 $x=515$입니다. 답은 \boxed{515}입니다."""
BAD = {
    "empty": ("  \n", "사과 \ufffd 개"),
    "script": (SOURCE, SOURCE + GOOD[:20]),
    "residue": (GOOD.replace("사과의 개수를", "苹果的数量设为"),
                GOOD.replace("양변을 2로", "Dividing both sides by two gives")),
    "repetition": (GOOD + " 다시 계산하면 답은 같은 값이 됩니다." * 5, GOOD + "하" * 90),
    "length": (r"답은 $x$, $2x + 15 = 1,045$, \boxed{515}",
               GOOD + " " + " ".join(f"가나다 라마{chr(0xAC00 + i)} 바사아자" for i in range(60))),
    "numbers": (GOOD.replace("515", "514"), GOOD.replace("1030", "1,300")),
    "latex": (GOOD.replace("$2x = 1030$", "1030"), GOOD.replace("2x + 15", "2x - 15")),
    "boxed": (GOOD.replace(r"\boxed{515}", "515"), GOOD + r" \boxed{515}"),
}


def test_a_good_translation_passes_every_rule():
    assert all(rule(SOURCE, GOOD, "ko", LIMITS) is None for rule in RULES.values())
    assert first_failure(SOURCE, GOOD, "ko", LIMITS, translation=True) is None
    assert first_failure(GOOD, SOURCE, "en", LIMITS, translation=True) is None  # and the other way
    assert set(BAD) == set(RULES) and set(PLAIN_RULES) < set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_refuses_what_it_is_for(name):
    for text in BAD[name]:
        reason = RULES[name](SOURCE, text, "ko", LIMITS)
        assert reason and isinstance(reason, str), (name, text)
    text = BAD[name][0]
    assert first_failure(SOURCE, text, "ko", LIMITS, translation=name not in PLAIN_RULES)[0] == name


def test_rules_of_translations_do_not_bind_other_texts():
    assert first_failure(SOURCE, "사과는 맛있는 과일입니다.", "ko", LIMITS, translation=False) is None
    assert first_failure(SOURCE, "사과는 맛있는 과일입니다.", "ko", LIMITS, translation=True)


def test_limits_are_limits():
    """A share at its limit passes, beyond it fails."""
    text = "가나다라마 abcde"
    assert script_shares(text)[:3] == (0.5, 0.5, 0) and script_shares("값은 $x$ \\alpha 입니다 `code` ok").letters == 7
    assert RULES["script"]("", text, "ko", FilterConfig(min_script=0.5)) is None
    assert RULES["script"]("", text, "ko", FilterConfig(min_script=0.51))
    assert RULES["residue"]("", text, "ko", FilterConfig(max_latin=0.5)) is None
    assert RULES["residue"]("", text, "ko", FilterConfig(max_latin=0.49))
    assert RULES["length"]("a" * 10, "b" * 3, "ko", LIMITS) is None
    assert RULES["length"]("a" * 100, "b" * 29, "ko", LIMITS) and RULES["length"]("aa", "b" * 7, "ko", LIMITS)
    # Ten numbers, one of them lost: a tenth.
    source = " ".join(str(i) for i in range(20, 30))
    assert RULES["numbers"](source, source[3:], "ko", LIMITS) is None
    assert RULES["numbers"](source, source[6:], "ko", LIMITS)
    assert RULES["numbers"]("three of 1,000", "1000 가운데 3", "ko", LIMITS) is None
    for wrong in ({"min_script": 1.1}, {"max_lost": -0.1}, {"min_ratio": 3.0}):
        with pytest.raises(ValueError, match=f"filter.{next(iter(wrong))}"):
            FilterConfig(**wrong)


def test_repetition_is_measured_against_the_source():
    table = "\n".join("예 예 예 아니오 예" for _ in range(10))
    assert RULES["repetition"](table, table, "ko", LIMITS) is None
    assert RULES["repetition"]("짧은 글", table, "ko", LIMITS)
    assert repeated("a b a b a b", "words", 2) == pytest.approx(0.6)
    assert repeated("ab", "words", 4) == 0


def test_formulas_may_differ_in_spaces_and_words():
    source = r"So \[ a^2 + b^2 \] and $v = 3 \text{ metres}$"
    assert RULES["latex"](source, r"그래서 \[a^2+b^2\] 그리고 $v=3\text{ 미터}$", "ko", LIMITS) is None
    assert RULES["latex"](source, r"그래서 \[a^2-b^2\] 그리고 $v=3\text{ 미터}$", "ko", LIMITS)


def test_answers():
    assert same_answer(SOURCE, GOOD) is True
    assert same_answer(SOURCE, GOOD.replace("{515}", "{ 515.0 }"), symbolic=False) is True
    assert same_answer(SOURCE, GOOD.replace("{515}", "{155}"), symbolic=False) is False
    assert same_answer(SOURCE, "답은 515") is False and same_answer("no box", GOOD) is None
    assert same_answer(r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", symbolic=False) is False


def test_judge():
    prompt = judge_prompt(r"a \boxed{1}", "b {x}")
    assert r"a \boxed{1}" in prompt and "b {x}" in prompt
    assert [read_verdict(one) for one in ("YES.", " no, because", "<think>No?</think>\nYes", "maybe", "")] == [
        True, False, True, None, None]
