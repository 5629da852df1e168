"""Published rewards.

MENTOR (arXiv 2510.18383, specification 3) and the variants of its repository; ToolRL (arXiv 2504.13958). Values of
MENTOR: right answer 0.7, the teacher's set of tools 0.3 (0.06 where the answer is wrong), no unknown tool 0.1.
"""

from jaxlm.reward.compose import GateConfig, RewardConfig, TermConfig
from jaxlm.reward.terms import TermName

ENDED = GateConfig(name="ended", reward=0.0)
ANSWERED = GateConfig(name="answered", reward=0.1)
GATES = (ENDED, ANSWERED, GateConfig(name="teacher_calls", reward=0.1))

CORRECTNESS = TermConfig(name="correctness", weight=0.7)
VALID = TermConfig(name="valid_tools", weight=0.1)


def _mentor(match: TermName) -> RewardConfig:
    """MENTOR with another way to compare the tools."""
    return RewardConfig(terms=(CORRECTNESS, _match(match), VALID), gates=GATES)


def _match(name: TermName) -> TermConfig:
    return TermConfig(name=name, weight=0.3, when_wrong=0.2)


PRESETS = {
    "mentor": _mentor("match_exact_set"),
    # Outcome only: 1.0 or 0.1.
    "sparse": RewardConfig(terms=(TermConfig(name="correctness", weight=0.9),), gates=(ENDED, ANSWERED), base=0.1),
    # ABLATION2: one tool in common suffices; unknown tools are not punished.
    "mentor_overlap": RewardConfig(terms=(CORRECTNESS, _match("match_any_overlap")), gates=GATES),
    # ABLATION3: tools are not compared.
    "mentor_no_match": RewardConfig(terms=(CORRECTNESS, VALID), gates=(ENDED, ANSWERED)),
    # ABLATION4.
    "mentor_f1": _mentor("match_set_f1"),
    # Strict baselines of version 3, whose exact form is not published.
    "mentor_ordered": _mentor("match_ordered"),
    "mentor_ordered_arguments": _mentor("match_ordered_with_arguments"),
    "toolrl": RewardConfig(terms=(TermConfig(name="format"), TermConfig(name="toolrl_match"))),
}
