"""Word problems and string functions: teachers that are right, splits that do not overlap, words that stay simple."""

import json
import random
import string
from dataclasses import replace
from itertools import chain
from typing import get_args

import pytest

from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_template import HERMES, ChatTemplate
from jaxlm.reward.math_answer import extract_boxed
from jaxlm.reward.verify import judge_rows
from jaxlm.rl import string_functions as strings
from jaxlm.rl import word_problems as words
from jaxlm.rl.demonstration import conversation
from jaxlm.rl.env import Dialogue, EnvConfig, ToolEnv
from jaxlm.rl.string_functions import STRING_TOOLS, StringFunctionConfig, string_function
from jaxlm.rl.task_sources import KNOWN_TOOLS, statistics
from jaxlm.rl.word_problem_domains import PROGRAMS, TRAIN_DOMAINS, UNSEEN_DOMAINS, UNSEEN_PROGRAMS
from jaxlm.rl.word_problems import WordProblemConfig, word_problem, word_problems
from tests.tiny_chat import json_tokenizer

TASKS = {split: word_problems(WordProblemConfig(split=split, count=600)) for split in get_args(words.Split)}
CHAINS = {split: strings.string_functions(StringFunctionConfig(split=split, count=400, max_depth=3))
          for split in get_args(strings.Split)}
TOKENIZER = json_tokenizer()
TEMPLATE = ChatTemplate(HERMES)


def turns_of(task):
    """The teacher's turns as the template writes them, from the marks of what the assistant wrote."""
    row = conversation(task, KNOWN_TOOLS)
    found = chat_ids(TEMPLATE, TOKENIZER, row["messages"], tools=row["tools"], add_generation_prompt=False)
    turns, open_ = [], False
    for i, written in zip(found.ids, found.mask, strict=True):
        if written and not open_:
            turns.append([])
        if written:
            turns[-1].append(i)
        open_ = written
    return found.ids, turns


@pytest.mark.parametrize("tasks", [*TASKS.values(), *CHAINS.values()])
def test_a_teacher_in_the_environment_gets_its_observations_and_an_accepted_answer(tasks):
    with ToolEnv([*KNOWN_TOOLS.values()]) as env:
        for task in tasks:
            state, last = env.reset(task), ""
            told = []
            for message in task.teacher:
                if message["role"] == "tool":
                    assert message["content"] == told.pop(0)
                    continue
                assert not told
                calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
                last = message["content"] + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
                state, observations, done = env.step(state, last)
                told = [one.text for one in observations]
            assert done and state.reason == "answered"
            assert state.invalid == state.failed == state.refused == state.unparsable == 0
            assert list(state.calls) == task.teacher_calls()
            judged = judge_rows([task.judge], [extract_boxed(last)], [task.answers])
            assert judged.correct[0] == 1, task.id


def test_a_conversation_has_the_tokens_of_an_episode_in_which_the_policy_writes_what_the_teacher_wrote():
    names = {name for task in (TASKS["train"][3], CHAINS["train"][1]) for name in task.tools}
    tools = [tool for name, tool in KNOWN_TOOLS.items() if name in names]
    config = EnvConfig(question="Question: {question}")
    dialogue = Dialogue(tools, TEMPLATE, TOKENIZER, config)
    with ToolEnv(tools, config) as env:
        for task in (*TASKS["train"][:6], *CHAINS["train"][:3], replace(TASKS["train"][0], system="Be brief.")):
            row = conversation(task, KNOWN_TOOLS, question=config.question)
            whole = chat_ids(TEMPLATE, TOKENIZER, row["messages"], tools=row["tools"], add_generation_prompt=False).ids
            ids, state = dialogue.prompt_ids(task), env.reset(task)
            for turn in turns_of(task)[1]:
                ids = ids + turn
                state, observations, done = env.step(state, dialogue.turn_text(turn))
                if not done:
                    ids = ids + dialogue.observation_ids(observations)
            assert ids == whole[:len(ids)] and TOKENIZER.decode(whole[len(ids):]).strip() == ""


@pytest.mark.parametrize("split", get_args(words.Split))
def test_a_problem_depends_on_seed_and_index_alone(split):
    config = WordProblemConfig(split=split, count=600)
    assert word_problem(replace(config, count=1), 17) == TASKS[split][17]
    assert word_problems(replace(config, count=20)) == TASKS[split][:20]
    other = word_problems(replace(config, count=20, seed=1))
    assert sum(a.question == b.question for a, b in zip(other, TASKS[split][:20], strict=True)) < 3
    assert len({task.id for task in TASKS[split]}) == 600
    assert len({task.question for task in TASKS[split]}) > 500


def test_the_text_of_a_problem_stays_what_it_was():
    """Another text for a seed would change every experiment that names it."""
    assert TASKS["train"][1].question == "Hugo has 69 rulers and Tom has 75 rulers. How far apart are the two numbers?"
    assert TASKS["train"][1].teacher_calls() == [("subtract", {"a": 69, "b": 75}), ("abs_value", {"x": -6})]
    assert TASKS["train"][1].answers == (6,)


def test_no_program_with_its_numbers_is_in_training_and_in_another_split():
    def flat(call):
        name, given = call
        lists = (one if isinstance(one, list) else [one] for one in given.values())
        return name, tuple(sorted(chain.from_iterable(lists)))

    def computed(tasks):
        """What tasks compute: the names and numbers of their calls, in any order of calls and arguments."""
        return {tuple(sorted(map(flat, task.teacher_calls()))) for task in tasks}

    small = {split: word_problems(WordProblemConfig(split=split, count=1500, digits=1)) for split in TASKS}
    train = computed(TASKS["train"] + small["train"])
    for split in ("held_out", "unseen"):
        other = computed(TASKS[split] + small[split])
        assert len(other) > 100 and not train & other
    for task in TASKS["train"]:
        assert not set(task.id.split("-")) & (set(UNSEEN_DOMAINS) | set(UNSEEN_PROGRAMS))
    # The order of what is added does not make another sum.
    assert words.held_out("add", {"a": 3, "b": 8}) == words.held_out("add", {"a": 8, "b": 3})


def test_unseen_domains_have_words_and_combinations_of_tools_of_their_own():
    def tools(programs):
        return {frozenset(step.tool for step in program.steps()) for program in programs.values()}

    assert len(TRAIN_DOMAINS) >= 6 and len(UNSEEN_DOMAINS) >= 3 and not TRAIN_DOMAINS.keys() & UNSEEN_DOMAINS.keys()
    assert not tools(UNSEEN_PROGRAMS) & tools(PROGRAMS)
    assert set().union(*tools(PROGRAMS)) == set(words.TOOLS)
    asked = {form for domain in TRAIN_DOMAINS.values() for forms in domain.questions.values() for form in forms}
    for domain in UNSEEN_DOMAINS.values():
        assert not {form for forms in domain.questions.values() for form in forms} & asked
        assert not set(domain.things) & {thing for other in TRAIN_DOMAINS.values() for thing in other.things}
    used = {name for domain in UNSEEN_DOMAINS.values() for name in domain.questions}
    assert used >= set(UNSEEN_PROGRAMS) and used & set(PROGRAMS)
    assert {name for domain in TRAIN_DOMAINS.values() for name in domain.questions} == set(PROGRAMS)


def test_questions_name_the_numbers_of_their_programs_and_no_others():
    for domain in (*TRAIN_DOMAINS.values(), *UNSEEN_DOMAINS.values()):
        for name, forms in domain.questions.items():
            for form in forms:
                named = {key for _, key, _, _ in string.Formatter().parse(form) if key}
                assert named - set("nmxy") == set(words.ALL_PROGRAMS[name].numbers), form
                assert form[-1] == "?"


@pytest.mark.parametrize("digits", [1, 2, words.MAX_DIGITS])
@pytest.mark.parametrize("held", [False, True])
def test_every_program_has_sensible_numbers_of_any_size(digits, held):
    for name, program in words.ALL_PROGRAMS.items():
        if name in UNSEEN_PROGRAMS and not held:
            continue
        for seed in range(5):
            numbers = words._draw(random.Random(seed), name, digits, held)
            results = words.run_program(program, numbers)
            assert all(2 <= number < 10 ** (digits + 1) for number in numbers.values())
            assert results[-1] > 0 and results[-1] == int(results[-1]) and words.held_out(name, numbers) == held
            assert len(results) <= 4 and all(len(repr(one)) < 16 for one in results)


def test_statistics_and_sizes_that_a_small_model_can_learn():
    """Limits of the texts, and that all twelve tools are used."""
    found = statistics(TASKS["train"])
    assert found.count == 600 and sum(found.domains.values()) == 600 and set(found.domains) == set(TRAIN_DOMAINS)
    assert set(found.calls) == {1, 2, 3, 4} and sum(found.calls.values()) == 600
    assert set(found.tools) == set(words.TOOLS) and min(found.tools.values()) >= 10
    assert sum(found.tools.values()) == sum(calls * tasks for calls, tasks in found.calls.items())
    least, mean, most = found.question_words
    assert least >= 8 and most <= 42 and 12 < mean < 25
    assert found.vocabulary < 350
    for task in TASKS["train"] + TASKS["unseen"]:
        for message in task.teacher:
            assert message["role"] == "tool" or len(message["content"].split()) <= 12
    assert statistics(TASKS["train"][:1]).question_words[0] == len(TASKS["train"][0].question.split())
    with pytest.raises(ValueError, match="no tasks"):
        statistics([])


def test_options_of_word_problems():
    few = word_problems(WordProblemConfig(count=200, domains=("farm", "shop"), max_calls=2, num_tools=5, remarks=0.0))
    assert {task.domain for task in few} == {"farm", "shop"}
    assert max(len(task.teacher_calls()) for task in few) == 2
    for task in few:
        assert len(task.tools) == 5 and {name for name, _ in task.teacher_calls()} <= set(task.tools)
        assert list(task.tools) == [name for name in words.TOOLS if name in task.tools]
    assert len({task.tools for task in few}) > 50
    plain = word_problems(WordProblemConfig(count=200, remarks=0.0))
    full = word_problems(WordProblemConfig(count=200, remarks=1.0))
    numbers = lambda tasks: sum(map(str.isdigit, " ".join(task.question for task in tasks).replace("?", " ").split()))
    assert all(a.question in b.question or a.question != b.question for a, b in zip(plain, full, strict=True))
    assert [a.answers for a in plain] == [b.answers for b in full] and numbers(full) > numbers(plain) + 150


@pytest.mark.parametrize("split", get_args(words.Split))
def test_a_teacher_that_slips_calls_another_tool_and_goes_on_with_its_result(split):
    right, slips = TASKS[split], word_problems(WordProblemConfig(split=split, count=600, slips=0.6))
    assert all(replace(a, teacher=b.teacher) == b for a, b in zip(right, slips, strict=True)), "the problem is the same"
    changed = total = 0
    for a, b in zip(right, slips, strict=True):
        wrong = [one for one, name in zip(b.teacher_calls(), a.teacher_calls(), strict=True) if one[0] != name[0]]
        for (name, _), (given, _) in zip(a.teacher_calls(), b.teacher_calls(), strict=True):
            assert words.TOOLS[name].parameters["required"] == words.TOOLS[given].parameters["required"]
        changed, total = changed + len(wrong), total + len(a.teacher_calls())
        last = words.TOOLS[b.teacher_calls()[-1][0]].call(**b.teacher_calls()[-1][1])
        assert float(extract_boxed(b.teacher[-1]["content"])) == last
        assert wrong or a.teacher == b.teacher
    assert 0.4 < changed / total < 0.6, "sums, powers and results too long to copy have no other tool"
    word_problems(WordProblemConfig(split=split, count=300, slips=1.0))  # ends


@pytest.mark.parametrize(("fields", "message"), [
    ({"split": "unsen"}, "'unsen' is no split of word problems .did you mean 'unseen'"),
    ({"domains": ("fram",)}, "'fram' is no domain of train .did you mean 'farm'"),
    ({"split": "unseen", "domains": ("farm",)}, "'farm' is no domain of unseen"),
    ({"count": 0}, "count must be at least 1"), ({"digits": 9}, "digits must be from 1 to 4"),
    ({"num_tools": 13}, "num_tools must be from 1 to 12"), ({"remarks": 1.5}, "remarks must be from 0 to 1"),
    ({"max_calls": 0}, "max_calls must be at least 1"), ({"slips": 2.0}, "slips must be from 0 to 1"),
])
def test_wrong_options_of_word_problems(fields, message):
    with pytest.raises(ValueError, match=message):
        WordProblemConfig(**fields)


# ---- string functions

def reference(name, text, number):
    """Each function in another way."""
    vowels = set("aeiou")
    return {"reverse": lambda: "".join(reversed(text)), "repeat": lambda: "".join([text] * (number or 0)),
            "take_first": lambda: "".join(c for i, c in enumerate(text) if i < number),
            "drop_first": lambda: "".join(c for i, c in enumerate(text) if i >= number),
            "rotate": lambda: "".join([*list(text)[number:], *list(text)[:number]]),
            "remove_vowels": lambda: text.translate({ord(c): None for c in vowels}),
            "sort_letters": lambda: "".join(c * text.count(c) for c in sorted(set(text))),
            "double_letters": lambda: "".join(c + c for c in text),
            "swap_ends": lambda: "".join([text[-1], *text[1:-1], text[0]]),
            "mirror": lambda: text + "".join(reversed(text))}[name]()


@pytest.mark.parametrize("split", get_args(strings.Split))
def test_compositions_are_computed_from_the_inside_out(split):
    assert len(STRING_TOOLS) >= 8 and set(strings.PHRASES) == set(strings.TOOLS)
    assert set(strings.QUESTIONS) == set(get_args(strings.Form))
    for task in CHAINS[split]:
        text = task.question.split('"')[1]
        for name, arguments in task.teacher_calls():
            assert arguments["text"] == text
            text = reference(name, text, arguments.get("times", arguments.get("count")))
        assert task.answers == (text,) and task.judge == "exact"
        names = [name for name, _ in task.teacher_calls()]
        if task.question.startswith("What"):
            places = [task.question.index(f"{name}(") for name in names]
            assert places == sorted(places, reverse=True)


def test_held_out_compositions_combine_known_functions_in_unknown_pairs():
    pairs = {split: {pair for task in tasks for pair in zip(*[[name for name, _ in task.teacher_calls()][i:]
                                                              for i in (0, 1)], strict=False)}
             for split, tasks in CHAINS.items()}
    assert not any(strings.held_out_pair(*pair) for pair in pairs["train"])
    for task in CHAINS["held_out"]:
        assert strings.has_held_out([name for name, _ in task.teacher_calls()])
    unknown = pairs["held_out"] - pairs["train"]
    assert len({pair for pair in unknown if strings.held_out_pair(*pair)}) >= 15
    for place in (0, 1):
        assert {pair[place] for pair in pairs["train"]} == set(strings.TOOLS)
    lengths = {split: {len(task.teacher_calls()) for task in tasks} for split, tasks in CHAINS.items()}
    assert lengths == {"train": {1, 2, 3}, "held_out": {2, 3}}


def test_a_composition_depends_on_seed_and_index_alone():
    config = StringFunctionConfig(count=1, max_depth=3)
    assert string_function(config, 42) == CHAINS["train"][42]
    assert string_function(replace(config, seed=1), 42) != CHAINS["train"][42]
    assert all(task.question.startswith("Take") for task in strings.string_functions(
        StringFunctionConfig(count=20, form="words")))
    # Neither a model's huge numbers nor negative ones get far.
    for call in (lambda: strings.repeat("ab", 10**12), lambda: strings.repeat("a", -1),
                 lambda: strings.take_first("ab", -1), lambda: strings.rotate("ab", -1)):
        with pytest.raises(ValueError, match="must not"):
            call()


@pytest.mark.parametrize(("fields", "message"), [
    ({"split": "unseen"}, "'unseen' is no split of string functions"), ({"form": "verse"}, "form must be one of"),
    ({"split": "held_out", "min_depth": 1}, "min_depth must be from 2"), ({"max_depth": 5}, "max_depth must be from 1"),
    ({"min_depth": 3}, "min_depth 3 is above max_depth 2"), ({"letters": 3}, "letters must be from 4"),
    ({"count": 0}, "count must be"),
])
def test_wrong_options_of_string_functions(fields, message):
    with pytest.raises(ValueError, match=message):
        StringFunctionConfig(**fields)


