"""Attempts as a page to read: who wrote what, which calls were made, and where the reward came from."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from jaxlm.core.files import replacing
from jaxlm.rl.episode import Episode, groups_of
from jaxlm.rl.score import Scored
from jaxlm.rl.task import Task

MAX_GROUPS = 8
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
section { margin: 2em 0; } details { border-left: 4px solid #bbb; margin: .6em 0; padding: .2em .8em; }
details.right { border-color: #2a8a43; } details.wrong { border-color: #c0392b; }
summary { cursor: pointer; } pre { white-space: pre-wrap; margin: .3em 0; padding: .4em .6em; border-radius: 4px; }
pre.sampled { background: #e8f1fb; } pre.observed { background: #f3eee2; } pre.call { background: #d3e6f8; }
pre.asked { background: #f2f2f2; }
table { border-collapse: collapse; margin: .3em 0; } td, th { padding: .1em .7em; text-align: right; }
th { font-weight: 600; text-align: left; } .legend span { padding: .1em .5em; border-radius: 3px; margin-right: .6em; }
"""


def write_page(path: Path, scored: Scored, episodes: Sequence[Episode], tasks: Sequence[Task]) -> None:
    """Writes the first groups of an iteration as HTML; the file appears whole or not at all."""
    groups = groups_of(episodes)
    parts = [_group(members, scored, episodes, tasks) for members in groups[:MAX_GROUPS]]
    shown = f"{len(parts)} of {len(groups)} groups" if len(parts) < len(groups) else f"{len(groups)} groups"
    text = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(path.stem)}</title><style>{_STYLE}</style>"
        f"<h1>Iteration {html.escape(path.stem.lstrip('0') or '0')}</h1><p>{shown}, {len(episodes)} attempts</p>"
        "<p class='legend'><span style='background:#e8f1fb'>written by the policy, trained</span>"
        "<span style='background:#d3e6f8'>a call in it</span>"
        "<span style='background:#f3eee2'>what tools said, masked</span></p>" + "".join(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _group(members: Sequence[int], scored: Scored, episodes: Sequence[Episode], tasks: Sequence[Task]) -> str:
    task = tasks[episodes[members[0]].task]
    answers = " or ".join(map(str, task.answers))
    teacher = ", ".join(name for name, _ in task.teacher_calls()) or "none"
    rewards = ", ".join(_number(scored.reward.reward[i]) for i in members)
    attempts = "".join(_attempt(i, scored, episodes[i]) for i in members)
    return (f"<section><h2>{html.escape(task.id)} ({html.escape(task.domain)})</h2>"
            f"<pre class='asked'>{html.escape(task.question)}</pre>"
            f"<p>Accepted: {html.escape(answers)}. Tools of the teacher: {html.escape(teacher)}. Rewards: {rewards}</p>"
            f"{attempts}</section>")


def _attempt(number: int, scored: Scored, one: Episode) -> str:
    reward, right = scored.reward, scored.trajectory.correct[number] == 1
    turns = []
    for i, turn in enumerate(one.turns):
        turns.append(_turn(turn))
        if i < len(one.observations):
            turns += [f"<pre class='observed'>{html.escape(text)}</pre>" for text in one.observations[i]]
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{_number(term[number])}</td></tr>"
                   for name, term in reward.terms.items())
    rows += "".join(f"<tr><th>{html.escape(name)}</th><td>{'passed' if gate[number] else 'failed'}</td></tr>"
                    for name, gate in reward.gates.items())
    said = scored.predictions[number]
    error = f" The judge failed: {html.escape(scored.errors[number])}" if scored.errors[number] else ""
    head = (f"reward {_number(reward.reward[number])}, answer {html.escape('none' if said is None else said)}, "
            f"{one.num_sampled()} tokens, {html.escape(str(one.env.reason))}{error}")
    return (f"<details class='{'right' if right else 'wrong'}'><summary>{head}</summary>{''.join(turns)}"
            f"<table>{rows}</table></details>")


def _turn(text: str) -> str:
    """A turn with its calls set apart."""
    out, rest = [], text
    while "<tool_call>" in rest:
        before, _, rest = rest.partition("<tool_call>")
        call, closed, rest = rest.partition("</tool_call>")
        out += [("sampled", before), ("call", f"<tool_call>{call}{closed}")]
    out.append(("sampled", rest))
    return "".join(f"<pre class='{kind}'>{html.escape(part)}</pre>" for kind, part in out if part.strip())


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}"
