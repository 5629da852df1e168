"""Tasks of GSM8K, BFCL and reasoning-gym, sources by a line of text, and conversations to imitate."""

import gzip
import importlib.util
import json
import sys
from typing import get_args, get_type_hints

import pytest

from jaxlm.reward.verify import judge_rows
from jaxlm.rl.arithmetic import ARITHMETIC, CALCULATOR
from jaxlm.rl.bfcl import Bfcl, BfclConfig, bfcl, first_accepted, json_schema
from jaxlm.rl.demonstration import conversation, write_conversations
from jaxlm.rl.env import EnvConfig, ToolEnv
from jaxlm.rl.gsm8k import Gsm8kConfig, gsm8k_task, gsm8k_tasks
from jaxlm.rl.gym_tasks import GymConfig, gym_tasks
from jaxlm.rl.string_functions import STRING_TOOLS, StringFunctionConfig, string_functions
from jaxlm.rl.task import Task, read_tasks
from jaxlm.rl.task_sources import (
    KNOWN_TOOLS,
    SOURCES,
    SourceKind,
    open_task_source,
    open_tasks,
    parse_task_source,
)
from jaxlm.rl.word_problems import WordProblemConfig, word_problems

ROW = {"question": "Mia has 1,200 pens and gives away half. She then buys 1.5 times 48. How many pens has she?",
       "answer": "Half of her pens is 1,200 / 2 = <<1,200/2=600>>600 pens.\nShe is happy.\n"
                 "She buys 1.5 x 48 = $<<1.5*48=72>>72 more, in all 600+72+(1-1) = <<600+72+(1-1)=672>>672.\n#### 672"}


def write(path, *rows):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---- gsm8k

def test_a_note_becomes_a_call_and_what_stands_before_it_is_said():
    task = gsm8k_task(ROW, "id", "here")
    assert [(m["role"], m["content"]) for m in task.teacher] == [
        ("assistant", "Half of her pens is"), ("tool", "600.0"), ("assistant", "pens. She is happy. She buys"),
        ("tool", "72.0"), ("assistant", "more, in all"), ("tool", "672"), ("assistant", "The answer is \\boxed{672}.")]
    assert task.teacher_calls() == [("calculator", {"expression": text})
                                    for text in ("1,200/2", "1.5*48", "600+72+(1-1)")]
    assert task.tools == ("calculator",) and task.answers == ("672",) and task.judge == "numeric"


def test_a_note_of_one_operation_can_be_a_call_of_an_arithmetic_function():
    calls = gsm8k_task(ROW, "id", "here", arithmetic=True).teacher_calls()
    assert calls == [("divide", {"a": 1200, "b": 2}), ("multiply", {"a": 1.5, "b": 48}),
                     ("calculator", {"expression": "600+72+(1-1)"})]
    for expression, call in (("3+4", ("add", 3, 4)), ("7-9", ("subtract", 7, 9)), (".5*8", ("multiply", 0.5, 8))):
        row = {"question": "?", "answer": f"<<{expression}={eval(expression)}>>\n#### 1"}
        name, a, b = call
        assert gsm8k_task(row, "id", "here", arithmetic=True).teacher_calls() == [(name, {"a": a, "b": b})]


def test_rows_of_a_file_become_tasks_whose_teachers_replay(tmp_path):
    rows = [ROW, {"question": "No note?", "answer": "It is plain.\n#### 1,000"},
            {"question": "Less?", "answer": "It is <<3-5=-2>>-2.\n#### -2"}]
    path = write(tmp_path / "train.jsonl.gz", *rows)
    tasks = gsm8k_tasks(Gsm8kConfig(path=str(path)))
    assert [len(task.teacher_calls()) for task in tasks] == [3, 0, 1]
    assert [task.answers for task in tasks] == [("672",), ("1000",), ("-2",)]
    assert len({task.id for task in tasks}) == 3
    with ToolEnv([CALCULATOR, *ARITHMETIC]) as env:
        for task in tasks + gsm8k_tasks(Gsm8kConfig(path=str(path), arithmetic=True)):
            results = [env.step(env.reset(task), f"<tool_call>{json.dumps({'name': name, 'arguments': given})}"
                                "</tool_call>")[1][0].text for name, given in task.teacher_calls()]
            assert results == [m["content"] for m in task.teacher if m["role"] == "tool"]
    chosen = lambda **options: [task.question for task in gsm8k_tasks(Gsm8kConfig(path=str(path), **options))]
    assert chosen(min_calls=1) == [ROW["question"], "Less?"] and chosen(max_calls=1, min_calls=1) == ["Less?"]
    assert chosen(count=1) == [ROW["question"]]
    with pytest.raises(ValueError, match="holds no row of GSM8K with so many calls"):
        chosen(min_calls=9)


@pytest.mark.parametrize(("row", "message"), [
    ("{", "2: not JSON"), ("[1]", "2: a row must be an object"), ({"question": "?"}, "2: no field 'answer'"),
    ({"qestion": "?", "answer": "#### 1"}, "2: no field 'question' .did you mean 'qestion'"),
    ({"question": "?", "answer": 3}, "2: field 'answer' must be a text"),
    ({"question": " ", "answer": "#### 1"}, "2: field 'question' is empty"),
    ({"question": "?", "answer": "It is 3."}, "2: field 'answer' must end with a line '#### number'"),
    ({"question": "?", "answer": "#### three"}, "2: field 'answer' must end"),
    ({"question": "?", "answer": "<<2+2=5>>5\n#### 5"}, "2: field 'answer': the note <<2.2=5>> is wrong: it is 4"),
    ({"question": "?", "answer": "<<2+x=5>>5\n#### 5"}, "2: field 'answer': the note .* cannot be computed"),
    ({"question": "?", "answer": "<<1/0=5>>5\n#### 5"}, "2: .* division by zero"),
    ({"question": "?", "answer": "<<2+3>>5\n#### 5"}, "2: field 'answer': a note must be"),
])
def test_rows_that_are_no_gsm8k_are_named_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", ROW, row)
    with pytest.raises(ValueError, match=f"rows.jsonl:{message}"):
        gsm8k_tasks(Gsm8kConfig(path=str(path)))


def test_damaged_and_missing_files(tmp_path):
    path = write(tmp_path / "train.jsonl.gz", ROW)
    path.write_bytes(path.read_bytes()[:-20])
    data = bytearray(write(tmp_path / "bits.jsonl.gz", ROW).read_bytes())
    data[12] = 0xFF  # a kind of block that deflate does not have
    (tmp_path / "bits.jsonl.gz").write_bytes(data)
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    sound = "not a sound gzip file"
    for damaged, message in ((path, "ends in the middle of the gzip stream"), (tmp_path / "bits.jsonl.gz", sound),
                             (tmp_path / "plain.jsonl.gz", sound),
                             (tmp_path / "none.jsonl", "cannot be read: No such file"),
                             (write(tmp_path / "empty.jsonl"), "holds no row")):
        with pytest.raises(ValueError, match=f"{damaged.name}: {message}"):
            gsm8k_tasks(Gsm8kConfig(path=str(damaged)))


# ---- bfcl

WEATHER = {"name": "geo.weather", "description": "Weather of a place.", "parameters": {
    "type": "dict", "required": ["place"], "properties": {
        "place": {"type": "String", "description": "A city."}, "days": {"type": "integer", "optional": True},
        "range": {"type": "tuple", "items": {"type": "float"}}, "type": {"type": "any"},
        "options": {"type": "HashMap", "properties": {"unit": {"type": "string"}}}}}}
BFCL_ROW = {"id": "parallel_0", "question": [[{"role": "system", "content": "Be brief."},
                                              {"role": "user", "content": "Weather in Seoul and Busan?"}]],
            "function": [WEATHER]}
BFCL_ANSWER = {"id": "parallel_0", "ground_truth": [
    {"geo.weather": {"place": ["Seoul", "Seoul, Korea"], "days": ["", 1], "options": [{"unit": ["", "C"]}]}},
    {"geo.weather": {"place": ["Busan"], "days": [3], "range": [[1.5, 2]]}}]}


def bfcl_file(folder, rows=(BFCL_ROW,), answers=(BFCL_ANSWER,), name="BFCL_v4_parallel.json"):
    (folder / "possible_answer").mkdir(exist_ok=True)
    write(folder / "possible_answer" / name.removesuffix(".gz"), *answers)
    return write(folder / name, *rows)


def test_schemas_become_json_schema():
    schema = json_schema(WEATHER["parameters"])
    assert schema == {"type": "object", "required": ["place"], "properties": {
        "place": {"type": "string", "description": "A city."}, "days": {"type": "integer"},
        "range": {"type": "array", "items": {"type": "number"}}, "type": {},
        "options": {"type": "object", "properties": {"unit": {"type": "string"}}}}}
    with pytest.raises(ValueError, match=r"'strng' is no type .did you mean 'string'"):
        json_schema({"type": "strng"})


def test_first_accepted_values():
    accepted = {"a": [1, 2], "b": ["", "x"], "c": [""], "d": [], "e": [{"f": [[2, 3]], "g": ["", 1]}],
                "h": [[{"i": [4]}]]}
    assert first_accepted(accepted) == {"a": 1, "e": {"f": [2, 3]}, "h": [{"i": 4}]}
    assert first_accepted(accepted, ("b", "c")) == {"a": 1, "b": "x", "c": "", "e": {"f": [2, 3]}, "h": [{"i": 4}]}


@pytest.mark.parametrize("name", ["BFCL_v4_parallel.json", "BFCL_v4_parallel.json.gz"])
def test_a_row_is_a_task_whose_answer_is_the_call(tmp_path, name):
    found = bfcl(BfclConfig(path=str(bfcl_file(tmp_path, name=name))))
    task, = found.tasks
    assert (task.id, task.system, task.question) == ("parallel_0", "Be brief.", "Weather in Seoul and Busan?")
    assert (task.judge, task.domain, task.tools) == ("calls", "parallel", ("geo.weather",))
    assert task.teacher_calls() == [("geo.weather", {"place": "Seoul", "options": {}}),
                                    ("geo.weather", {"place": "Busan", "days": 3, "range": [1.5, 2]})]
    text = "\n".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>"
                     for n, a in task.teacher_calls())
    with ToolEnv(found.tools, EnvConfig(max_turns=1)) as env:
        state, _, done = env.step(env.reset(task), text)
    assert done and state.reason == "turns" and state.failed == state.invalid == 0
    calls = [{"name": n, "arguments": a} for n, a in state.calls]
    right = [json.dumps(calls), json.dumps(calls[::-1])]
    wrong = [json.dumps(calls[:1]), json.dumps([calls[0], calls[0]]), "[]",
             json.dumps([calls[0], {**calls[1], "arguments": {**calls[1]["arguments"], "days": 4}}])]
    judged = judge_rows(["calls"] * 6, right + wrong, [task.answers] * 6)
    assert judged.correct.tolist() == [1, 1, 0, 0, 0, 0] and not any(judged.errors)


def test_functions_of_one_name_and_several_schemas_are_kept_apart(tmp_path):
    other = {**WEATHER, "parameters": {"type": "dict", "properties": {"zip": {"type": "integer"}}, "required": ["zip"]}}
    rows = [BFCL_ROW, {**BFCL_ROW, "id": "b", "function": [other]}, {**BFCL_ROW, "id": "c"}]
    answers = [BFCL_ANSWER, {"id": "b", "ground_truth": [{"geo.weather": {"zip": [7]}}]}, {**BFCL_ANSWER, "id": "c"}]
    found = bfcl(BfclConfig(path=str(bfcl_file(tmp_path, rows, answers))))
    assert [task.tools for task in found.tasks] == [("geo.weather",), ("geo.weather_2",), ("geo.weather",)]
    assert found.tasks[1].answers == ([{"geo.weather_2": {"zip": [7]}}],)
    assert found.tasks[1].teacher_calls() == [("geo.weather_2", {"zip": 7})]
    assert [tool.name for tool in found.tools] == ["geo.weather", "geo.weather_2"]


def test_irrelevance_accepts_no_call_and_dialogues_are_left_out_and_counted(tmp_path, caplog):
    dialogue = {**BFCL_ROW, "id": "x", "question": [[{"role": "user", "content": "Hi"},
                                                     {"role": "assistant", "content": "Yes?"},
                                                     {"role": "user", "content": "Rain?"}]]}
    path = write(tmp_path / "BFCL_v4_irrelevance.json", dialogue, {**BFCL_ROW, "id": "irrelevance_1"})
    found = bfcl(BfclConfig(path=str(path)))
    assert isinstance(found, Bfcl) and found.left_out == {"a dialogue of several turns": 1}
    assert "left out 1 rows" in caplog.text
    task, = found.tasks
    assert task.answers == ([],) and not task.teacher
    call = json.dumps([{"name": "geo.weather", "arguments": {"place": "Seoul"}}])
    assert judge_rows(["calls"] * 2, ["[]", call], [task.answers] * 2).correct.tolist() == [1, 0]


@pytest.mark.parametrize(("row", "answer", "message"), [
    ({"id": 3}, {}, "parallel.json:1: field 'id' must be a text"),
    ({"question": []}, {}, "parallel.json:1: field 'question' must hold one list"),
    ({"question": [[{"role": "user"}]]}, {}, "parallel.json:1: field 'question' must hold messages"),
    ({"function": [3]}, {}, "parallel.json:1: field 'function' must hold objects"),
    ({"function": [{"name": "f"}]}, {}, "parallel.json:1: field 'function': f: .*no field 'parameters'"),
    ({"function": [{**WEATHER, "parameters": {"type": "dct"}}]}, {}, "field 'function': geo.weather: 'dct' is no type"),
    ({"function": [{**WEATHER, "name": "other"}]}, {}, "parallel.json:1: the accepted call .* names no function"),
    ({}, {"id": "other"}, "parallel.json:1: 'parallel_0' has no answer in possible_answer"),
    ({}, {"ground_truth": [{"geo.weather": {"place": "Seoul"}}]}, "parallel.json:1: an accepted call must be"),
    ({}, {"ground_truth": None}, "possible_answer/BFCL_v4_parallel.json:1: field 'ground_truth' must be a list"),
])
def test_rows_that_are_no_bfcl_are_named(tmp_path, row, answer, message):
    path = bfcl_file(tmp_path, [{**BFCL_ROW, **row}], [{**BFCL_ANSWER, **answer}])
    with pytest.raises(ValueError, match=message):
        bfcl(BfclConfig(path=str(path)))


def test_files_of_bfcl_that_do_not_convert(tmp_path):
    for name, message in (("BFCL_v4_memory.json", "category memory are no single turn"),
                          ("BFCL_v4_multi_turn_base.json.gz", "category multi_turn_base are no single turn"),
                          ("BFCL_v4_live_relevance.json", "category live_relevance"),
                          ("BFCL_v4_simple_python.json", "needs the accepted calls in .*possible_answer")):
        with pytest.raises(ValueError, match=message):
            bfcl(BfclConfig(path=str(write(tmp_path / name, BFCL_ROW))))
    with pytest.raises(ValueError, match=r"no such file .did you mean 'BFCL_v4_memory.json'"):
        bfcl(BfclConfig(path=str(tmp_path / "BFCL_v4_memry.json")))


# ---- reasoning-gym

def test_tasks_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    tasks = gym_tasks(GymConfig(name="basic_arithmetic", count=5, seed=1, calculator=True))
    assert tasks == gym_tasks(GymConfig(name="basic_arithmetic", count=5, seed=1, calculator=True))
    assert tasks != gym_tasks(GymConfig(name="basic_arithmetic", count=5, seed=2, calculator=True))
    assert len(tasks) == 5 and {task.judge for task in tasks} == {"numeric"} and tasks[0].tools == ("calculator",)
    for task in tasks:
        expression = task.question.removeprefix("Calculate ").rstrip(".=? ").split("?")[0]
        assert task.answers[0] and not task.teacher and expression
    words = gym_tasks(GymConfig(name="caesar_cipher", count=3))
    assert {task.judge for task in words} == {"exact"} and words[0].tools == ()
    with pytest.raises(ValueError, match=r"no 'caesar_ciper' .did you mean 'caesar_cipher'"):
        gym_tasks(GymConfig(name="caesar_ciper"))
    with pytest.raises(ValueError, match="'countdown' accepts several answers"):
        gym_tasks(GymConfig(name="countdown"))


def test_a_missing_reasoning_gym_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"needs the package reasoning_gym: pip install 'jaxlm\[gym\]'"):
        gym_tasks(GymConfig(name="basic_arithmetic"))


# ---- sources

def test_every_kind_of_source_opens_with_the_tools_that_its_tasks_offer(tmp_path):
    assert set(SOURCES) == set(get_args(SourceKind))
    gsm8k = write(tmp_path / "rows.jsonl", ROW)
    saved = write(tmp_path / "tasks.jsonl", *(task.to_json() for task in word_problems(WordProblemConfig(count=30))))
    specs = {"words": "words:unseen?count=3&digits=1&domains=post,ocean&remarks=0.5",
             "strings": "strings:held_out?count=3&max_depth=3&form=words", "gsm8k": f"gsm8k:{gsm8k}?arithmetic=true",
             "bfcl": f"bfcl:{bfcl_file(tmp_path)}", "file": f"{saved}?count=2&domains=farm"}
    if importlib.util.find_spec("reasoning_gym"):
        specs["gym"] = "gym:gcd?count=2"
    assert set(specs) | {"gym"} == set(SOURCES)
    for kind, spec in specs.items():
        assert parse_task_source(spec)[0] == kind
        source = open_task_source(spec)
        assert source.tasks and source.tasks == open_tasks(spec)
        assert len({task.id for task in source.tasks}) == len(source.tasks)
        with ToolEnv(source.tools) as env:
            for task in source.tasks:
                assert env.reset(task).task == task.id
    assert [task.domain for task in open_tasks(specs["file"])] == ["farm", "farm"]
    assert {task.domain for task in open_tasks(specs["words"])} <= {"post", "ocean"}
    assert parse_task_source(f"file:{saved}")[1].path == str(saved)
    assert parse_task_source("gsm8k:/a%20b?count=2")[1].path == "/a%20b"


def test_every_option_of_every_source_can_be_given():
    """A hint that `_value` does not read would show as another exception than ValueError, or as a text."""
    samples = {int: "1", float: "0.5", bool: "true"}
    for kind, (config, _) in SOURCES.items():
        hints = get_type_hints(config)
        first, *options = hints
        target = {"split": "train", "name": "gcd", "path": "x.jsonl"}[first]
        for option in options:
            hint = next((one for one in get_args(hints[option]) if one in samples), hints[option])
            text = {"domains": "farm", "form": "words", "letters": "5"}.get(option, samples.get(hint))
            value = getattr(parse_task_source(f"{kind}:{target}?{option}={text}")[1], option)
            assert value == ((text,) if option == "domains" else hint(text) if hint in samples else text)


@pytest.mark.parametrize(("spec", "message"), [
    ("word:train", "neither a source of tasks .did you mean 'words'"),
    ("tasks.json", "nor a file of the ending .jsonl"),
    ("words:", "says no split"), ("words:trian", "'trian' is no split of word problems .did you mean 'train'"),
    ("words:train?cuont=3", "unknown option 'cuont' .did you mean 'count'"),
    ("words:train?split=unseen", "unknown option 'split'"), ("words:train?count", "option 'count' needs a value"),
    ("words:train?count=1&count=2", "option 'count' is given twice"),
    ("words:train?count=many", "option 'count' must be an integer, got 'many'"),
    ("words:train?remarks=x", "option 'remarks' must be a number"), ("words:train?count=0", "count must be at least 1"),
    ("gsm8k:x?arithmetic=yes", "option 'arithmetic' must be true or false"), ("strings:unseen", "no split of string"),
    ("x.jsonl?count=0", "count must be at least 1"), ("gym:gcd?size=3", "unknown option 'size'"),
    ("words:train?domains=%ff", "codec can't decode"),
])
def test_wrong_lines_are_refused(spec, message):
    with pytest.raises(ValueError, match=f"tasks '.*{message}"):
        open_tasks(spec)


def test_files_of_tasks_name_line_field_and_domain(tmp_path):
    good = word_problems(WordProblemConfig(count=3))
    path = write(tmp_path / "tasks.jsonl", *(task.to_json() for task in good))
    assert open_tasks(str(path)) == good
    with pytest.raises(ValueError, match=r"tasks.jsonl: has no task of the domain 'space'"):
        open_tasks(f"{path}?domains=space")
    broken = {name: value for name, value in good[1].to_json().items() if name != "answers"}
    write(path, good[0].to_json(), broken)
    with pytest.raises(ValueError, match=r"tasks.jsonl:2: field 'answers' is missing"):
        open_tasks(str(path))


# ---- conversations

def test_conversations_are_written_whole_or_not_at_all(tmp_path):
    tasks = [*word_problems(WordProblemConfig(count=5)), *string_functions(StringFunctionConfig(count=5))]
    path = tmp_path / "deep" / "sft.jsonl"
    assert write_conversations(path, tasks, KNOWN_TOOLS, question="Question: {question}") == 10
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [json.loads(json.dumps(conversation(task, KNOWN_TOOLS, question="Question: {question}")))
                    for task in tasks]
    for task, row in zip(tasks, rows, strict=True):
        assert row["messages"][0] == {"role": "user", "content": f"Question: {task.question}"}
        assert [tool["function"]["name"] for tool in row["tools"]] == list(task.tools)
        assert tuple(row["messages"][1:]) == tuple(task.to_json()["teacher"])
    before = path.read_bytes()
    bare = Task("bare", "Q?", (), (1,), "numeric", "d")
    for wrong, message in (([tasks[0], bare], "'bare' has no teacher"), ([], "no task to write")):
        with pytest.raises(ValueError, match=message):
            write_conversations(path, wrong, KNOWN_TOOLS)
    with pytest.raises(ValueError, match="offers the tool 'reverse', which is not here"):
        write_conversations(path, tasks, {tool.name: tool for tool in ARITHMETIC})
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["sft.jsonl"]
    assert len(STRING_TOOLS) + len(ARITHMETIC) + 1 == len(KNOWN_TOOLS)
    saved = write(tmp_path / "tasks.jsonl", *(task.to_json() for task in tasks))
    assert read_tasks(saved) == tasks
