"""Preference rows: every form read, every fault named, ids and masks of completions alone, batches that resume."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_examples import ChatFormat
from jaxlm.data.chat_template import CHATML, HERMES, KORMO, ChatTemplate
from jaxlm.data.preference_batches import (
    PreferenceBatchConfig,
    PreferenceBatches,
    held_out_batches,
    make_batch,
    plan_epoch,
)
from jaxlm.data.preference_examples import PreferenceSet, encode_preferences
from jaxlm.data.preference_rows import PreferenceDataConfig, open_preference_rows, open_preferences, read_preference
from jaxlm.data.rows import BadRow, SourceConfig
from jaxlm.data.sample_preferences import SamplePreferences
from tests.tiny_chat import json_tokenizer

TOKENIZER = json_tokenizer()
FORM = ChatFormat(ChatTemplate(CHATML), TOKENIZER)
user, says = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
PAIR = {"messages": [user("2+2?")], "chosen": [says("4")], "rejected": [says("five")]}
JUDGED = {"messages": [user("2+2?")], "completion": [says("4")], "label": True}


def encode(rows, form=FORM, *, seq_len=200, paired=True, **options):
    return encode_preferences(open_preference_rows(rows), form, seq_len=seq_len, paired=paired, **options)


@pytest.mark.parametrize("row", [
    PAIR,
    {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
    {"prompt": [user("2+2?")], "chosen": "4", "rejected": [says("five")]},
    {"prompt": "2+2?", "chosen": [user("2+2?"), says("4")], "rejected": [user("2+2?"), says("five")]},
    {"chosen": [user("2+2?"), says("4")], "rejected": [user("2+2?"), says("five")]},
    {"chosen": json.dumps([user("2+2?"), says("4")]), "rejected": json.dumps([user("2+2?"), says("five")])},
    {**PAIR, "tools": None, "score_chosen": 8.0, "prompt": None},
])
def test_forms_of_pairs(row):
    assert read_preference(row) == PAIR


def test_forms_of_judged_rows_and_longer_ones():
    for label in (True, 1, "true", "1"):
        assert read_preference({"prompt": "2+2?", "completion": "4", "label": label}) == JUDGED
    assert not read_preference({"prompt": "2+2?", "completion": "4", "label": "False"})["label"]
    turns = [user("Hi"), says("Hello"), user("2+2?")]
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    tool = {"role": "tool", "content": "4"}
    row = read_preference({"chosen": [*turns, call, tool, says("4")], "rejected": [*turns, says("five")],
                           "tools": [{"name": "add"}]})
    assert [one["role"] for one in row["chosen"]] == ["assistant", "tool", "assistant"]
    assert row["messages"] == turns and row["rejected"] == [says("five")] and row["tools"] == [{"name": "add"}]


@pytest.mark.parametrize(("message", "row"), [
    ("no field 'rejected'", {"prompt": "a", "chosen": "b"}),
    ("no field 'chosen'", {"prompt": "a", "choosen": "b", "rejected": "c"}),
    ("no field 'label'", {"prompt": "a", "completion": "b"}),
    ("no field 'prompt'", {"completion": "b", "label": True}),
    ("one form a row", {**PAIR, "label": True}),
    ("mean the same", {**PAIR, "prompt": "a"}),
    ("begin with no message in common", {"chosen": "b", "rejected": "c"}),
    ("the prompt is empty", {"prompt": "", "chosen": "b", "rejected": "c"}),
    (r"rejected must be what the assistant says .* got \['user', 'assistant'\]", {
        "prompt": "a", "chosen": "b", "rejected": [user("A"), says("c")]}),
    ("chosen must be what the assistant says", {"prompt": "a", "chosen": [], "rejected": "c"}),
    ("field 'chosen': message 0: the role is 'bot'", {
        "prompt": "a", "chosen": [{"role": "bot", "content": "b"}], "rejected": "c"}),
    ("field 'chosen': messages are a list, not int", {"prompt": "a", "chosen": 3, "rejected": "c"}),
    ("label must be true or false, got 'good'", {"prompt": "a", "completion": "b", "label": "good"}),
])
def test_bad_rows(message, row):
    with pytest.raises(BadRow, match=message):
        read_preference(row)


def test_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:3: no field 'rejected'"):
        open_preference_rows(SourceConfig(path=str(path)))
    source = open_preference_rows(SourceConfig(path=str(path)), max_bad_rows=1)
    assert json.loads(source[0].text) == PAIR and source[0].source.endswith("pairs.jsonl:1")
    table = tmp_path / "judged.tsv"
    table.write_text("prompt\tcompletion\tlabel\tscore\n2+2?\t4\ttrue\t1\n")
    assert json.loads(open_preference_rows(SourceConfig(path=str(table)))[0].text) == JUDGED
    table.write_text("prompt\tanswer\n2+2?\t4\n")
    with pytest.raises(ValueError, match=r"judged\.tsv: no field 'chosen'"):
        open_preference_rows(SourceConfig(path=str(table)))
    for message, spec in {"weight has an effect on mixtures": f"{path}?weight=2", "text_field has no effect":
                          f"{path}?text_field=a"}.items():
        with pytest.raises(ValueError, match=message):
            open_preferences(PreferenceDataConfig(path=(spec,)))
    with pytest.raises(ValueError, match="the same name"):
        open_preferences(PreferenceDataConfig(held_out=("sample:ko?name=a", "sample:en?name=a")))


def test_ids_are_those_of_the_conversation_and_only_completions_count():
    [one] = encode([{**PAIR, "messages": [user("Hi"), says("Hello"), user("2+2?")]}]).examples
    for side, answer in ((one.first, "4"), (one.second, "five")):
        whole = chat_ids(FORM.template, TOKENIZER, [user("Hi"), says("Hello"), user("2+2?"), says(answer)],
                         add_generation_prompt=False).ids
        ids = [*one.prompt, *side.ids]
        assert ids == whole[:len(ids)] and TOKENIZER.decode(whole[len(ids):]) == "\n"
        assert side.loss.all() and FORM.text(side.ids) == answer and side.ids[-1] == TOKENIZER.token_id("<|im_end|>")
    # Of several turns only those of the assistant.
    form = ChatFormat(ChatTemplate(HERMES), TOKENIZER)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    [one] = encode([{**PAIR, "chosen": [call, {"role": "tool", "content": "4"}, says("4")]}], form).examples
    text = TOKENIZER.decode(one.first.ids[one.first.loss == 0])
    assert "tool_response" in text and "add" not in text and len(one.second.ids) == 5


def test_a_prompt_asks_for_reasoning_if_an_answer_has_some():
    tokenizer = json_tokenizer(("<|BOS|>", "<|EOS|>", "<|PAD|>", "<|BOT|>", "<|EOT|>", "<think>", "</think>"))
    form, thought = ChatFormat(ChatTemplate(KORMO), tokenizer), {"reasoning_content": "two and two"}
    [plain] = encode([PAIR], form).examples
    assert tokenizer.decode(plain.prompt).endswith("<think>\n\n</think>\n")
    assert form.text(plain.first.ids) == "4" and plain.first.loss.all() and plain.second.loss.all()
    row = {**PAIR, "chosen": [says("4") | thought], "rejected": [says("five") | thought]}
    [one] = encode([row], form).examples
    assert tokenizer.decode(one.prompt).endswith("<think>\n") and "two and two" in tokenizer.decode(one.first.ids)
    [mixed] = encode([{**row, "rejected": [says("five")]}], form).examples
    empty = tokenizer.decode(mixed.second.ids[mixed.second.loss == 0])
    assert empty == "\n</think>\n" and form.text(mixed.second.ids) == "five"


def test_what_is_dropped_is_counted():
    rows = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "rejected": [says("  ")]},
            {**PAIR, "messages": [user("x" * 100)]}, {**PAIR, "chosen": [says("y" * 100)]}]
    dropped = {"same": 1, "empty": 1, "too long": 2, "bad": 0}
    found = encode(rows, seq_len=60)
    assert len(found.examples) == 1 and found.dropped == dropped
    found = encode(rows, seq_len=60, too_long="cut")
    assert len(found.examples) == 2 and found.dropped == dropped | {"too long": 1}
    whole, [_, cut] = encode(rows[3:4]).examples[0], found.examples
    assert len(cut.prompt) + len(cut.second.ids) == 61 and len(cut.prompt) < len(whole.prompt)
    np.testing.assert_array_equal(cut.prompt, whole.prompt[-len(cut.prompt):])
    np.testing.assert_array_equal(cut.first.ids, whole.first.ids)
    with pytest.raises(ValueError, match="no row left of 2: dropped 1 same, 1 empty"):
        encode(rows[1:3])


def test_a_prompt_that_changes_with_what_follows_is_bad():
    form = ChatFormat(ChatTemplate(CHATML + "{% if add_generation_prompt %}?{% endif %}"), TOKENIZER)
    with pytest.raises(ValueError, match="1 of 1 rows are bad") as error:
        encode([PAIR], form)
    assert "memory:1: chosen: with this completion after it the prompt has other tokens, from token" in str(error.value)
    assert encode([PAIR, PAIR], max_bad_rows=1).dropped == {"bad": 0}


def test_completions_that_the_template_writes_alike_are_the_same():
    form = ChatFormat(ChatTemplate(CHATML.replace("message['content']", "(message['content'] | trim)")), TOKENIZER)
    assert encode([PAIR, {**PAIR, "rejected": [says(" 4")]}], form).dropped == {"same": 1, "bad": 0}


def test_pairs_and_judged_rows():
    with pytest.raises(ValueError, match=r"memory:2: is judged alone .* kto"):
        encode([PAIR, JUDGED])
    found = encode([PAIR, JUDGED], paired=False).examples
    assert [one.desirable for one in found] == [True, False, True] and all(one.second is None for one in found)
    assert [FORM.text(one.first.ids) for one in found] == ["4", "five", "4"]


def many(count, paired=True, **options):
    rows = [{"prompt": f"{i}" * (1 + i % 23), "chosen": "a" * (1 + i % 5), "rejected": "b" * (1 + i % 7)}
            for i in range(count)]
    return encode(rows, paired=paired, **options)


def test_batches_as_the_docstring_says():
    config = PreferenceBatchConfig(batch_size=3, seq_len=64, least_width=32)
    [one] = encode([PAIR]).examples
    batch = make_batch([one], [0], config)
    for side, said in ((batch.first, one.first), (batch.second, one.second)):
        ids, start = [*one.prompt, *said.ids], len(one.prompt)
        assert side.tokens.shape == (3, 64 if len(ids) > 33 else 32)
        assert side.tokens[0, :len(ids) - 1].tolist() == ids[:-1] and side.targets[0, :len(ids) - 1].tolist() == ids[1:]
        assert side.targets[0][side.loss_mask[0] > 0].tolist() == said.ids.tolist()
        assert side.loss_mask[0, :start - 1].sum() == 0 and side.segments[0].sum() == len(ids) - 1
        assert not side.segments[1:].any() and not side.loss_mask[1:].any()
    assert batch.desirable is None and config.widths() == [32, 64]
    assert PreferenceBatchConfig(seq_len=100, least_width=16).widths() == [16, 32, 64, 100]


def test_judged_rows_get_the_completion_of_another():
    examples = many(4, paired=False).examples
    config = PreferenceBatchConfig(batch_size=3, seq_len=64)
    batch = make_batch(examples, [0, 5, 2], config)
    assert batch.desirable.tolist() == [1, 0, 1]
    for row, (own, other) in enumerate([(0, 5), (5, 2), (2, 0)]):
        expected = [*examples[own].prompt, *examples[other].first.ids]
        assert batch.second.tokens[row, :len(expected) - 1].tolist() == expected[:-1]
    alone = make_batch(examples, [7], config)
    assert alone.second.targets[0][alone.second.loss_mask[0] > 0].tolist() == examples[0].first.ids.tolist()


def test_an_epoch_has_every_row_once_and_widths_of_its_own():
    widths = [64 if i % 3 else 32 for i in range(50)]
    plan = plan_epoch(widths, 4, seed=1, epoch=0)
    assert plan.num_dropped == 2 and sorted(Counter(i for one in plan.batches for i in one).values()) == [1] * 48
    mixed = [one for one in plan.batches if len({widths[i] for i in one}) > 1]
    assert all(len(one) == 4 for one in plan.batches) and len(mixed) <= 1
    assert plan == plan_epoch(widths, 4, seed=1, epoch=0) != plan_epoch(widths, 4, seed=1, epoch=1)
    assert plan != plan_epoch(widths, 4, seed=2, epoch=0)
    companions = [{frozenset(one) for one in plan_epoch(widths, 4, seed=1, epoch=epoch).batches} for epoch in (0, 1)]
    assert companions[0] != companions[1]  # other neighbours, not only another order


def test_the_stream_resumes_and_is_shared():
    config = PreferenceBatchConfig(batch_size=4, seq_len=64, least_width=32)
    rows = [many(9), PreferenceSet("more", many(5).examples, {})]
    stream, same = PreferenceBatches(rows, config, seed=3), lambda a, b: all(
        np.array_equal(x, y) for side in ("first", "second") for x, y in zip(getattr(a, side), getattr(b, side),
                                                                             strict=True))
    batches = [next(stream) for _ in range(8)]
    again = PreferenceBatches(rows, config, seed=3)
    for _ in range(5):
        next(again)
    state = json.loads(json.dumps(again.get_state()))
    resumed = PreferenceBatches(rows, config, seed=3)
    resumed.set_state(state)
    assert all(same(next(resumed), one) for one in batches[5:])
    assert stream.stats()["data/epoch"] == 2 and 0 < stream.stats()["data/padding"] < 1
    halves = [PreferenceBatches(rows, config, seed=3, loader=i, loaders=2) for i in range(2)]
    first = [next(half).first.tokens for half in halves]
    np.testing.assert_array_equal(np.concatenate(first), batches[0].first.tokens)
    with pytest.raises(ValueError, match="not the data"):
        PreferenceBatches([many(14)], config).set_state(state)
    with pytest.raises(ValueError, match="14 rows give no batch of 16"):
        PreferenceBatches(rows, PreferenceBatchConfig(batch_size=16, seq_len=64))
    with pytest.raises(ValueError, match="least_width at most"):
        PreferenceBatchConfig(seq_len=32)


def test_held_out_batches_have_all_rows():
    examples = many(11).examples
    batches = held_out_batches(examples, PreferenceBatchConfig(batch_size=4, seq_len=64, least_width=32))
    targets = sum(int(side.loss_mask.sum()) for one in batches for side in (one.first, one.second))
    assert targets == sum(int(side.loss.sum()) for one in examples for side in (one.first, one.second))


def test_embedded_pairs():
    """Well-formed, different, the same on every call, and apart between the splits."""
    asked = {}
    for split in ("train", "held_out"):
        rows = [json.loads(one.text) for one in SamplePreferences("both", 300, split, 0)]
        assert rows == [json.loads(one.text) for one in SamplePreferences("both", 300, split, 0)]
        assert all(row["chosen"] != row["rejected"] for row in rows)
        asked[split] = {row["messages"][0]["content"] for row in rows}
        found = encode_preferences(open_preference_rows(SourceConfig(path="sample:both", documents=40, split=split)),
                                   FORM, seq_len=200, paired=True)
        assert len(found.examples) == 40
    assert not asked["train"] & asked["held_out"]
