"""Chat rows: what is read, refused and dropped, what is a target, and what packing keeps."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data.chat_examples import (
    Chat,
    ChatFormat,
    begins_with_bos,
    chat_batches,
    check_symbols,
    encode_source,
    last_turn,
    train_chat_tokenizer,
    with_bos,
)
from jaxlm.data.chat_template import CHATML, HERMES, HERMES_NAMES, TEMPLATES, ChatTemplate, hermes_names
from jaxlm.data.conversations import ConversationsConfig, open_conversations, open_corpora, read_conversation
from jaxlm.data.pipeline import PipelineConfig
from jaxlm.data.rows import BadRow, SourceConfig
from jaxlm.data.sample_chats import SampleChats
from jaxlm.data.tokenizer import load_tokenizer
from tests.tiny_chat import json_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALLED = {"tools": [TOOL], "messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2? <|im_end|>"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
    {"role": "tool", "content": "3", "tool_call_id": "a"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Gern."}]}
TURNS = ['<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>', "It is 3.<|im_end|>",
         "Gern.<|im_end|>"]


def chat(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def written(form, conversation):
    """The text of each run of targets."""
    ids, loss = form.encode(conversation)
    edges = np.flatnonzero(np.diff(loss, prepend=0, append=0))
    return [form.tokenizer.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("source", [HERMES, HERMES_NAMES])
def test_targets_are_what_the_assistant_wrote(source):
    """Calls and answers with the tokens that end them; not headers, results, tools, nor what a user spells out."""
    form = ChatFormat(ChatTemplate(source), json_tokenizer())
    row = read_conversation(CALLED["messages"], CALLED["tools"])
    assert written(form, row) == TURNS
    last = ChatFormat(form.template, form.tokenizer, "last")
    assert written(last, row) == TURNS[-1:]
    assert np.array_equal(last.encode(row).ids, form.encode(row).ids)
    end = form.tokenizer.token_id("<|im_end|>")
    silent = ChatFormat(form.template, form.tokenizer, excluded=(end,))
    assert written(silent, row) == [turn.removesuffix("<|im_end|>") for turn in TURNS]
    prompt = form.tokenizer.decode(form.prompt(row))
    assert prompt.endswith("<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n")
    assert ("Adds." in prompt) == (source == HERMES) and "add\n" in prompt.replace("}}", "add\n")


def test_last_turn():
    assert last_turn(np.array([1, 1, 0, 1, 1, 0])) == slice(3, 5)
    assert last_turn(np.array([1, 1])) == slice(0, 2)
    assert last_turn(np.array([0, 0])) == slice(2, 2)


def test_rows_of_files(tmp_path):
    """JSONL (also compressed), parquet with nulls in nested columns, text fields; weights, names and filters."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(
        json.dumps(row | {"good": flag}).encode() + b"\n" for row, flag in ((CALLED, "yes"), (chat("a", "b"), "no")))))
    rows = [CALLED, chat("Hi", "Yo")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([
        {"chat": row["messages"], "tools": row.get("tools")} for row in rows]), tmp_path / "b.parquet")
    (tmp_path / "c.tsv").write_text("messages\ttools\n" + json.dumps(CALLED["messages"]) + "\t"
                                    + json.dumps(CALLED["tools"]) + "\n")
    expected = read_conversation(CALLED["messages"], CALLED["tools"])
    assert expected["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": 2}
    opened = [open_conversations(SourceConfig(path=f"{tmp_path}/{name}", **more)) for name, more in (
        ("a.jsonl.gz", {"include": ("good:yes",)}), ("b.parquet", {"text_field": "chat"}), ("c.tsv", {}))]
    assert [len(source) for source in opened] == [1, 2, 1]
    assert [source[0].source for source in opened] == [f"{tmp_path}/{name}" for name in (
        "a.jsonl.gz:1", "b.parquet:1", "c.tsv:2")]
    for source in opened:
        assert json.loads(source[0].text) == expected
    assert json.loads(opened[1][1].text) == chat("Hi", "Yo")


BAD = {
    "messages are a list, not int": {"messages": 3},
    "no field 'messages' .*did you mean 'message'": {"message": []},
    r"message 1: the role is 'asistant' \(did you mean 'assistant'\?\)": {
        "messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]},
    "message 0: the content is not a string but list": {"messages": [{"role": "user", "content": []}]},
    "message 0: tool_calls of the role user": {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]},
    "message 0: a call is an object with a name": {"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]},
    "message 0: the arguments of f are not JSON": {
        "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
    "message 0: the arguments of f are no object": {
        "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
    "tools are a list of objects": {"messages": [], "tools": ["add"]},
    "lone surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_name_file_and_line(tmp_path, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + json.dumps(BAD[message]) + "\n")
    with pytest.raises(ValueError, match=rf"1 of 2 rows read are bad, 0 allowed.*\n.*a\.jsonl:2: .*{message}"):
        open_conversations(SourceConfig(path=str(path)))
    source = open_conversations(SourceConfig(path=str(path)), max_bad_rows=1)
    assert len(source) == 1 and source.dropped == {"bad": 1, "empty": 0, "filtered": 0}


def test_what_is_dropped_is_counted_and_bad_templates_name_the_row(caplog):
    rows = [chat("a", "b"), chat("a", "x" * 60), {"messages": [{"role": "user", "content": "a"}]}, chat("c", "d")]
    form = ChatFormat(ChatTemplate(CHATML), json_tokenizer())
    with caplog.at_level("INFO"):
        chats = encode_source(open_conversations(rows), form, seq_len=50)
    assert len(chats) == 2 and "dropped: 0 bad, 1 too long, 1 without target" in caplog.text
    cut = encode_source(open_conversations(rows), form, seq_len=50, too_long="cut")
    assert len(cut) == 3 and len(cut[1].ids) == 51 and np.array_equal(cut[2].ids, chats[1].ids)
    assert len({one.fingerprint() for one in (chats, cut, encode_source(
        open_conversations(rows), ChatFormat(form.template, form.tokenizer, excluded=(2, 3, 4)), seq_len=50))}) == 3
    tools = [*rows, chat("a", "b") | {"tools": [TOOL]}]
    with pytest.raises(ValueError, match=r"1 of 5 conversations are bad, 0 allowed .*\n  memory:5: the chat template "
                                         "shows no tools"):
        encode_source(open_conversations(tools), form, seq_len=900)
    assert len(encode_source(open_conversations(tools), form, seq_len=900, max_bad_rows=1)) == 3
    with pytest.raises(ValueError, match="no conversation left of 4: dropped 0 bad, 4 too long, 0 without target"):
        encode_source(open_conversations(rows), form, seq_len=3)


def test_packing_keeps_conversations_whole_and_what_counts():
    """Every row is made of whole conversations, each seen once an epoch, with its own targets and positions."""
    form = ChatFormat(ChatTemplate(CHATML), json_tokenizer())
    rows = [chat("q" * (i + 1), "a" * (20 - i)) for i in range(12)]
    chats = encode_source(open_conversations(rows), form, seq_len=200)
    known = {tuple(one.ids.tolist()): one.loss for one in chats}
    config = PipelineConfig(batch_size=2, seq_len=200, packing="first_fit", num_bins=2)
    batches = chat_batches([chats], config)
    seen = []
    for _ in range(6):
        batch = next(batches)
        for row in range(2):
            ids = np.append(batch.tokens[row], batch.targets[row, -1])
            for segment in range(1, batch.segments[row].max() + 1):
                at = np.flatnonzero(batch.segments[row] == segment)
                one = tuple(ids[at[0]:at[-1] + 1].tolist())
                one = one if one in known else tuple(ids[at[0]:at[-1] + 2].tolist())  # the last one fills the row
                seen.append(one)
                np.testing.assert_array_equal(batch.loss_mask[row, at[0]:at[0] + len(one) - 1], known[one][1:])
                np.testing.assert_array_equal(batch.positions[row, at], np.arange(len(at)))
    assert set(seen) == set(known) and len(seen) > len(set(seen))
    with pytest.raises(ValueError, match="concat would cut conversations"):
        chat_batches([chats], PipelineConfig(batch_size=2, seq_len=200))


def test_tokenizer_of_conversations():
    """Special tokens are those that the template writes; `<|im_end|>` ends a text; messages cannot spell them."""
    rows = [read_conversation(CALLED["messages"], CALLED["tools"])] * 3
    template = ChatTemplate(HERMES)
    tokenizer = train_chat_tokenizer(rows, template, 330, symbols=("<think>",))
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>") == 2
    assert {"<|im_start|>", "<tool_call>", "</tool_response>"} <= set(tokenizer.symbols)
    check_symbols(template, tokenizer)
    form = ChatFormat(template, tokenizer)
    ids, loss = form.encode(rows[0])
    assert int((ids == 2).sum()) == 7  # turns; not the one in the user's words
    assert [form.text(ids[last_turn(loss)])] == ["Gern."]
    assert tokenizer.vocab_size == 330 and not any("im_start" in tokenizer.decode([i]) for i in range(10, 330))
    assert "<tool_call>" not in train_chat_tokenizer([chat("a b", "c d")] * 3, ChatTemplate(CHATML), 280).symbols
    bos = with_bos(template, tokenizer)
    assert begins_with_bos(bos, tokenizer) and not begins_with_bos(template, tokenizer)
    assert with_bos(bos, tokenizer) is bos
    assert ChatFormat(bos, tokenizer).encode(rows[0]).ids.tolist() == [1, *ids.tolist()]
    with pytest.raises(ValueError, match=r"does not write <\|im_end\|>"):
        train_chat_tokenizer(rows, ChatTemplate("{{ messages[0]['content'] }}"), 300)


def test_templates():
    assert set(TEMPLATES) == {"chatml", "hermes", "hermes_names", "kormo"}
    assert hermes_names(json_tokenizer()).source == HERMES_NAMES
    with pytest.raises(ValueError, match=r"lacks special tokens that the chat template writes: <\|im_start\|>, <\|im_"):
        check_symbols(ChatTemplate(CHATML), load_tokenizer("bytes"))


def test_sample_and_flags():
    train, held_out = open_corpora(ConversationsConfig())
    assert [source.name for source in (*train, *held_out)] == ["sample_ko", "sample_en", "unseen_facts", "seen_facts"]
    asked = lambda split: {m["content"] for i in range(300) for m in json.loads(
        SampleChats("en", 300, split, 0)[i].text)["messages"][::2]}
    assert not asked("train") & asked("held_out") and len(asked("train")) > 200
    for message, source in {"text has no effect": SourceConfig(path="a.jsonl", text="{a}"),
                            "language has no effect": SourceConfig(path="a.jsonl", language="ko"),
                            "no such file": SourceConfig(path="a.jsonl")}.items():
        with pytest.raises(ValueError, match=message):
            open_conversations(source)
    with pytest.raises(BadRow, match="JSON"):
        read_conversation("[")
    assert isinstance(ChatFormat(ChatTemplate(CHATML), json_tokenizer()).encode(chat("a", "b")), Chat)
