"""An environment with tools: what a model writes goes in, what its tools say comes out, as text and as token ids.

`ToolEnv` runs the calls of a turn and counts; `Dialogue` writes the ids that the model does not sample. With P for a
prompt, S for sampled ids (the end of turn included) and O for an observation, an episode is

    P S O S O S      mask 0 1 0 1 0 1

and every prompt starts with all that was before: nothing sampled is ever encoded again.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlm.core.config import nearest
from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_template import ChatTemplate, hermes, named_template
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.rl.calls import Bridge, Call, Observation, ObservationFormat, ParseError, end_of_turn, parse_calls
from jaxlm.rl.task import Task
from jaxlm.rl.tool_worker import bounded
from jaxlm.rl.tools import Runner, Tool, ToolLimits, schema_only

# Why an episode is over: the last turn called nothing; its tags did not pair; no turn is left; the tools took too long;
# a turn did not come to its end (the caller says so).
Reason = Literal["answered", "unbalanced", "turns", "time", "length"]

CUT = " [cut]"  # behind what is left of a result; a number that is cut would be another number


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Budgets of an episode, and how it is written."""

    max_turns: int = 5                           # of the assistant
    max_calls_per_turn: int = 8
    max_seconds: float = 60.0                    # of all tools together
    limits: ToolLimits = field(default_factory=ToolLimits)  # of one call
    max_observation_tokens: int | None = None    # of one turn, what the template writes included
    observation: ObservationFormat = "template"
    think: bool = False                          # turns after an observation are made to start with <think>
    question: str = "{question}"                 # the user's message
    template: str = ""                           # `data.chat_template.named_template`; empty: the model's own

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_turns", self.max_turns >= 1, "at least 1"),
            ("max_calls_per_turn", self.max_calls_per_turn >= 1, "at least 1"),
            ("max_seconds", 0 < self.max_seconds < math.inf, "a number above 0"),
            ("max_observation_tokens", self.max_observation_tokens is None or self.max_observation_tokens >= 1,
             "at least 1"),
            ("question", self.question.count("{question}") == 1, "a text that holds {question} once"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class EnvState(NamedTuple):
    """Where an episode stands. A value: a step gives another."""

    task: str                                             # its id
    tools: tuple[str, ...]                                # on offer
    turns: int = 0
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()    # name and arguments of all that could be read, in order
    invalid: int = 0                                      # of them: names that are not on offer
    failed: int = 0                                       # of them: wrong arguments, errors, time limits
    refused: int = 0                                      # of them: not run, beyond the calls of a turn or the time
    unparsable: int = 0                                   # not in calls
    seconds: float = 0.0                                  # of the tools
    reason: Reason | None = None                          # None while the episode goes on

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return self._asdict() | {"tools": [*self.tools], "calls": [[*call] for call in self.calls]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EnvState":
        """The inverse of `to_json`."""
        calls = tuple((name, arguments) for name, arguments in values["calls"])
        return cls(**{**values, "tools": tuple(values["tools"]), "calls": calls})


class ToolEnv:
    """Runs the calls of a model's turns, of any number of episodes; threads may share it. Close it after use."""

    def __init__(self, tools: Sequence[Tool], config: EnvConfig | None = None) -> None:
        self.config = config or EnvConfig()
        self.tools = {tool.name: tool for tool in tools}
        self._runner = Runner(tools, self.config.limits)

    def __enter__(self) -> "ToolEnv":
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes in which tools run."""
        self._runner.close()

    def reset(self, task: Task) -> EnvState:
        """The state before the first turn. ValueError if the task names a tool that is not here."""
        check_tools(task, self.tools)
        return EnvState(task.id, task.tools)

    def step(self, state: EnvState, text: str) -> tuple[EnvState, tuple[Observation, ...], bool]:
        """The state after a turn of the assistant, what its calls brought back, and whether the episode is over.

        Observations also come with the last turn that `max_turns` grants: its calls are run and counted like others.
        Where a task offers no tools, the first turn is the answer.
        """
        if state.reason:
            raise ValueError(f"the episode of task {state.task!r} is over ({state.reason})")
        calls, balanced = parse_calls(text)
        state = state._replace(turns=state.turns + 1)
        if not calls or not state.tools:
            return _count_refused(state, calls)._replace(reason="answered" if balanced else "unbalanced"), (), True
        observations = []
        for call in calls[:self.config.max_calls_per_turn]:
            if state.seconds >= self.config.max_seconds:
                break
            state, told = self._observe(state, call)
            observations.append(Observation(
                call.name if isinstance(call, Call) and call.name in state.tools else "",
                bounded(call.text, self.config.limits.max_chars), bounded(told, self.config.limits.max_chars)))
        if left := calls[len(observations):]:
            state = _count_refused(state, left)
            observations.append(Observation("", "", f"error: {len(left)} more calls were not run; a turn may have "
                                            f"{self.config.max_calls_per_turn}, within the time for tools"))
        if state.seconds >= self.config.max_seconds:
            state = state._replace(reason="time")
        elif state.turns >= self.config.max_turns:
            state = state._replace(reason="turns")
        return state, tuple(observations), state.reason is not None

    def _observe(self, state: EnvState, call: Call | ParseError) -> tuple[EnvState, str]:
        if isinstance(call, ParseError):
            return state._replace(unparsable=state.unparsable + 1), f"error: cannot read the call: {call.message}"
        state = state._replace(calls=(*state.calls, (call.name, call.arguments)))
        if call.name not in state.tools:
            return state._replace(invalid=state.invalid + 1), (
                f"error: there is no tool {call.name!r:.80}{nearest(call.name, state.tools)}; "
                f"the tools are: {', '.join(state.tools)}")
        result = self._runner.run(call.name, call.arguments)
        failed, seconds = state.failed + (not result.ok), state.seconds + result.seconds
        return state._replace(failed=failed, seconds=seconds), result.text


def cut_off(state: EnvState) -> EnvState:
    """The state after a turn that did not come to its end (no token was left): none of its calls counts."""
    return state._replace(turns=state.turns + 1, reason="length")


class Dialogue:
    """The ids of episodes that the model does not sample."""

    def __init__(self, tools: Sequence[Tool], template: ChatTemplate, tokenizer: Tokenizer,
                 config: EnvConfig | None = None) -> None:
        """ValueError if the template has no place for tools or for what they say, or the budget none for a result.

        Also if episodes go on after calls of tools of which only the schema is known: nothing answers them.
        """
        self._config = config or EnvConfig()
        self._template, self._tokenizer = template, tokenizer
        self._tools = {tool.name: tool for tool in tools}
        self.end_of_turn = end_of_turn(template, tokenizer)  # the id that observations follow
        self._bridge = None
        answered = self.end_of_turn
        if tools:
            self._bridge = self._make_bridge()
            self.end_of_turn = self._bridge.end_of_turn
            self._check_budget()
        # Any of these ends a sampled turn; some templates end an answer differently from a call.
        self.stop_ids = tuple(sorted({tokenizer.eos_id, answered, self.end_of_turn} - {None}))

    def _make_bridge(self) -> Bridge:
        """ValueError that says which template has a place for tools, if this one has none."""
        form, own = self._config.observation, not self._config.template
        try:
            chat_ids(self._template, self._tokenizer, [{"role": "user", "content": "question"}],
                     tools=[tool.schema() for tool in self._tools.values()], add_generation_prompt=True)
            return Bridge(self._template, self._tokenizer, form, think=self._config.think)
        except ValueError as error:
            chatml = {"<|im_start|>", "<|im_end|>"} <= set(self._tokenizer.symbols)
            if form != "template" and not chatml:
                raise  # the form of observations is what does not fit, whatever the template
            raise ValueError(f"{error}; {'the chat template that the model brings' if own else self._config.template} "
                             "does not serve tools: give --env.template "
                             f"{'hermes' if chatml else 'FILE, a Jinja file that does'}") from None

    def _check_budget(self) -> None:
        most = self._config.max_observation_tokens
        blind = [tool.name for tool in self._tools.values() if tool.call is schema_only]
        if blind and self._config.max_turns > 1:
            raise ValueError(f"the tool {blind[0]!r} has a schema and nothing behind it (BFCL has such tools), so an "
                             "episode must end with its first turn: give --env.max-turns 1")
        # One more than the calls of a turn, for the words on those that were not run.
        name, num_results = max(self._tools, key=len), self._config.max_calls_per_turn + 1
        least = len(self._bridge.ids([Observation(name, CUT, CUT)] * num_results))
        if most is not None and most < least:
            raise ValueError(f"max_observation_tokens is {most}, but {num_results} results (max_calls_per_turn, and a "
                             f"last word) take {least} even if nothing is left of them")

    def prompt_ids(self, task: Task) -> list[int]:
        """What the model reads first: tools, the task's system message and the question."""
        check_tools(task, self._tools)
        system = [] if task.system is None else [{"role": "system", "content": task.system}]
        user = {"role": "user", "content": self._config.question.replace("{question}", task.question)}
        tools = [self._tools[name].schema() for name in task.tools]
        return chat_ids(self._template, self._tokenizer, [*system, user], tools=tools or None,
                        add_generation_prompt=True).ids

    def observation_ids(self, observations: Sequence[Observation]) -> list[int]:
        """What follows a sampled turn and the id that ended it, up to where the model goes on; all of it masked.

        Beyond `max_observation_tokens` the longest results are cut, all to one number of tokens, and marked.
        """
        assert self._bridge is not None, "without tools there is nothing to observe"
        if self._config.observation != "mentor":
            observations = [one._replace(call="") for one in observations]
        ids, most = self._bridge.ids(observations), self._config.max_observation_tokens
        if most is None or len(ids) <= most:
            return ids
        longest = max(len(self._tokenizer.encode(part)) for one in observations for part in (one.call, one.text))

        def cut(num_tokens: int) -> list[int]:
            return self._bridge.ids([one._replace(call=self._start(one.call, num_tokens),
                                                  text=self._start(one.text, num_tokens)) for one in observations])

        # Searched, because a text may take more tokens in its place than alone: a template may quote it.
        keep = bisect.bisect_right(range(longest + 1), most, key=lambda num_tokens: len(cut(num_tokens))) - 1
        assert keep >= 0, "the constructor checked that marks alone fit"
        return cut(keep)

    def turn_text(self, ids: Sequence[int]) -> str:
        """The text of a sampled turn, for `ToolEnv.step`: without the token that ends it."""
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def _start(self, text: str, num_tokens: int) -> str:
        spans = self._tokenizer.encode_spans(text)[1]
        return text if len(spans) <= num_tokens else text[:spans[num_tokens][0]] + CUT


def episode_template(config: EnvConfig, own: ChatTemplate | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that a configuration names, else the model's own, else `HERMES`. ValueError for an unknown name."""
    return named_template(config.template) or own or hermes(tokenizer)


def check_tools(task: Task, tools: Mapping[str, Tool]) -> None:
    """ValueError with the nearest name if a task offers a tool that is not among these."""
    for name in task.tools:
        if name not in tools:
            raise ValueError(f"task {task.id!r} offers the tool {name!r}, which is not here{nearest(name, tools)}")


def _count_refused(state: EnvState, left: Sequence[Call | ParseError]) -> EnvState:
    calls = [call for call in left if isinstance(call, Call)]
    return state._replace(
        calls=(*state.calls, *((call.name, call.arguments) for call in calls)),
        invalid=state.invalid + sum(call.name not in state.tools for call in calls),
        refused=state.refused + len(calls), unparsable=state.unparsable + len(left) - len(calls))
