"""KORMo's chat format by hand and as transformers has it; hybrid data; reasoning that would be lost; its export."""

import json
import re
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.log import read_metrics
from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_examples import (
    ChatFormat,
    check_symbols,
    encode_source,
    ending_turns,
    train_chat_tokenizer,
    turn_end,
    with_bos,
)
from jaxlm.data.chat_template import CHATML, KORMO, TEMPLATE_FILE, ChatTemplate
from jaxlm.data.conversations import TuningDataConfig, open_conversations, read_conversation
from jaxlm.data.rows import SourceConfig
from jaxlm.data.thinking import THINK_TAGS, is_shown, split_thought, thinking_prompts
from jaxlm.data.tokenizer import ByteTokenizer, load_tokenizer, save_tokenizer
from jaxlm.generate.prompts import Prompt, Reader
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.train.pretrained import open_pretrained
from recipes import convert, generate, sft
from tests.tiny_chat import MODEL, json_tokenizer

TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIALS = ("<|BOS|>", "<|EOS|>", "<|PAD|>", "<think>", "</think>", "<|BOT|>", "<|EOT|>", *TOOL_TAGS)
TOKENIZER, TEMPLATE = json_tokenizer(SPECIALS), ChatTemplate(KORMO)
FORM = ChatFormat(TEMPLATE, TOKENIZER)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


def says(text, reasoning=None, **more):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning} | more


# What is written, piece by piece, and whether it is a target. A piece is one special token, or plain text.
Q, A = ["<|BOT|>", "user\n"], ["<|BOT|>", "assistant\n"]
END, NEXT = "<|EOT|>", "\n"
CASES = {
    "thinking": (
        [user("한 <think>"), says("A", " R\nr ")],
        [(Q, 0), ("한 <think>", 0), (END, 0), (NEXT, 0), (A, 0), ("<think>", 0), ("\n", 0),
         ("R\nr\n", 1), ("</think>", 1), ("\n\nA", 1), (END, 1), (NEXT, 0)]),
    "no thinking": (
        [user("Q"), says("\nA")],
        [(Q, 0), ("Q", 0), (END, 0), (NEXT, 0), (A, 0), ("<think>", 0), ("\n\n", 0), ("</think>", 0), ("\n", 0),
         ("A", 1), (END, 1), (NEXT, 0)]),
    "both": (
        [{"role": "system", "content": "S"}, user("Q"), says("A", "R"), user("W"), says("B"), user("V"),
         says("C", "T</think>")],
        [("<|BOT|>", 0), ("system\nS", 0), (END, 0), (NEXT, 0), (Q, 0), ("Q", 0), (END, 0), (NEXT, 0),
         (A, 0), ("A", 1), (END, 1), (NEXT, 0), (Q, 0), ("W", 0), (END, 0), (NEXT, 0),
         (A, 0), ("B", 1), (END, 1), (NEXT, 0), (Q, 0), ("V", 0), (END, 0), (NEXT, 0),
         (A, 0), ("<think>", 0), ("\n", 0), ("T</think>\n", 1), ("</think>", 1), ("\n\nC", 1), (END, 1), (NEXT, 0)]),
    "tools": (
        [user("Q"), says(None, "R", tool_calls=[{"name": "f", "arguments": {"x": 1}}]),
         {"role": "tool", "content": "3"}, says("A", "T")],
        [(Q, 0), ("Q", 0), (END, 0), (NEXT, 0), (A, 0), ("<think>", 0), ("\n", 0), ("R\n", 1), ("</think>", 1),
         ("\n\n", 1), ("<tool_call>", 1), ('\n{"name": "f", "arguments": {"x": 1}}\n', 1), ("</tool_call>", 1),
         (END, 1), (NEXT, 0), (Q, 0), ("<tool_response>", 0), ("\n3\n", 0), ("</tool_response>", 0), (END, 0),
         (NEXT, 0), (A, 0), ("<think>", 0), ("\n", 0), ("T\n", 1), ("</think>", 1), ("\n\nA", 1), (END, 1),
         (NEXT, 0)]),
}


def by_hand(pieces):
    """Text, ids and mask. Special tokens are numbered from 0; a tag within a text is spelled out."""
    text, ids, mask = "", [], []
    for piece, target in pieces:
        for one in piece if isinstance(piece, list) else [piece]:
            own = [SPECIALS.index(one)] if one in SPECIALS else TOKENIZER.encode(one)
            text, ids, mask = text + one, ids + own, mask + [target] * len(own)
    return text, ids, mask


@pytest.mark.parametrize("name", CASES)
def test_text_ids_and_targets(name):
    messages, pieces = CASES[name]
    text, ids, mask = by_hand(pieces)
    conversation = read_conversation(messages)
    assert TEMPLATE.render(conversation["messages"], add_generation_prompt=False) == text
    chat = FORM.encode(conversation)
    assert chat.ids.tolist() == ids and chat.loss.tolist() == mask
    # Own runs begin with BOS, which is no target; nothing else changes.
    ours = ChatFormat(with_bos(TEMPLATE, TOKENIZER), TOKENIZER).encode(conversation)
    assert ours.ids.tolist() == [0, *ids] and ours.loss.tolist() == [0, *mask]
    # A prompt is how its conversation begins, up to the first target of the last turn, with thinking and without.
    prompt = FORM.prompt(conversation)
    last = len(mask) - 1 - mask[:-1][::-1].index(0)
    assert prompt == ids[:last]
    assert FORM.text(ids[last:-1]) == messages[-1]["content"].strip()


def test_prompts():
    said = [user("Q"), says("A", "R"), user("W")]
    before = "<|BOT|>user\nQ<|EOT|>\n<|BOT|>assistant\nA<|EOT|>\n<|BOT|>user\nW<|EOT|>\n<|BOT|>assistant\n<think>\n"
    for on, text in ((True, before), (False, before + "\n</think>\n")):
        template = thinking_prompts(TEMPLATE, on)
        assert template.render(said, add_generation_prompt=True) == text
        reader = Reader(TOKENIZER, (), TEMPLATE, chat=True, thinking=on)
        assert TOKENIZER.decode(reader.ids(Prompt(messages=said))) == text
    assert TEMPLATE.render(said, add_generation_prompt=True) == before
    # What a chat hands back as one text is told apart: earlier reasoning is not shown again, and forges no tag.
    told = [user("Q"), {"role": "assistant", "content": "R\n</think>\n\nA"}, user("W")]
    assert reader.ids(Prompt(messages=told)) == reader.ids(Prompt(messages=said))
    assert reader.parts("R\n</think>\n\nA") == ("R", "A") and reader.parts("A") == (None, "A")
    assert split_thought("<think>\nR\n</think>\n\nA") == ("R", "A")
    assert Reader(TOKENIZER, (), ChatTemplate("x")).parts("R</think>A") == (None, "R</think>A")
    with pytest.raises(ValueError, match="does not read enable_thinking"):
        thinking_prompts(ChatTemplate(CHATML), True)
    assert reader.turn_end() == (SPECIALS.index("<|EOT|>"),)


def test_hybrid_data(caplog):
    """A share of the rows with reasoning shows it, the same rows for a seed; the others get the empty block."""
    rows = [{"messages": [user(f"{i}"), says("A", "R" if i % 4 else None)]} for i in range(80)]
    rows.append({"messages": [user("Q"), says("A", "R"), user("W"), says("B")]})  # an earlier turn's is never shown
    source = open_conversations(rows)
    encode = lambda **more: encode_source(source, FORM, seq_len=90, **more)
    with caplog.at_level("INFO"):
        kept, hybrid, again, other = (encode(), *(encode(thinking_share=0.3, seed=seed) for seed in (1, 1, 2)))
        dropped = encode_source(source, replace(FORM, reasoning=False), seq_len=90)
    shown = lambda chats: [len(chat.ids) - len(plain.ids) for chat, plain in zip(chats, dropped, strict=True)]
    # "R\n</think>\n\n" is longer by one R than "\n</think>\n": a newline less there, two more here.
    assert shown(kept) == [2 * bool(i % 4) for i in range(80)] + [0]
    count = sum(map(bool, shown(hybrid)))
    assert 10 < count < 27 and shown(hybrid) == shown(again) != shown(other)
    assert all(a <= b for a, b in zip(shown(hybrid), shown(kept), strict=True))
    for number in (60, count):
        assert f"60 with reasoning in the last turn, {number} show it" in caplog.text
    assert "reasoning" not in caplog.text.splitlines()[-1]
    assert [is_shown(share, seed=0, name="a", row=3) for share in (0.0, 1.0)] == [False, True]


def test_reasoning_is_not_lost_silently():
    rows = [{"messages": [user("Q"), says("A", "R")]}, {"messages": [user("Q"), says("A")]}]
    plain = ChatFormat(ChatTemplate(CHATML.replace("<|im_start|>", "<|BOT|>").replace("<|im_end|>", END)), TOKENIZER)
    with pytest.raises(ValueError, match=r"1 of 2 conversations are bad.*\n  memory:1: the chat template shows no "):
        encode_source(open_conversations(rows), plain, seq_len=90)
    assert len(encode_source(open_conversations(rows), plain, seq_len=90, max_bad_rows=1)) == 1
    assert len(encode_source(open_conversations(rows), replace(plain, reasoning=False), seq_len=90)) == 2
    # Shown in the last turn alone is shown: earlier turns are read without it, as in a chat.
    late = {"messages": [user("Q"), says("A", "R"), user("W")]}
    assert FORM.encode(read_conversation(late["messages"])).loss.any()


@pytest.mark.parametrize(("row", "error"), [
    ({"messages": [user("Q"), says("A", 3)]}, "message 1: reasoning_content is not a string but int"),
    ({"messages": [user("Q") | {"reasoning_content": "R"}]}, "message 0: reasoning_content of the role user"),
])
def test_bad_rows_name_file_and_line(tmp_path, row, error):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {error}"):
        open_conversations(SourceConfig(path=f"{tmp_path}/a.jsonl"))


def test_tokenizers_must_have_the_tags():
    check_symbols(TEMPLATE, TOKENIZER)
    with pytest.raises(ValueError, match=r"lacks special tokens that the chat template writes: <think>, </think>; it"):
        check_symbols(with_bos(TEMPLATE, TOKENIZER), json_tokenizer(("<s>", "</s>", "<pad>", "<|BOT|>", END)))
    with pytest.raises(ValueError, match=r"writes: <\|BOT\|>, <\|EOT\|>, <think>, </think>"):
        check_symbols(TEMPLATE, ByteTokenizer())
    ended = ending_turns(TEMPLATE, TOKENIZER)
    assert (ended.bos_id, ended.eos_id, ended.pad_id) == (0, SPECIALS.index(END), 2) and TOKENIZER.eos_id == 1
    assert ended.encode("한") == TOKENIZER.encode("한") and turn_end(TEMPLATE, ended) == END
    assert ending_turns(TEMPLATE, ended) is ended and turn_end(ChatTemplate("{{ messages[0].content }}"), ended) is None


def test_a_tokenizer_of_its_own():
    """Tags are special tokens, turns end with eos, and prompts are how conversations begin."""
    source = open_conversations(SourceConfig(path="sample_thinking:en"))
    rows = [json.loads(source[i].text) for i in range(60)]
    tokenizer = train_chat_tokenizer(rows, TEMPLATE, 340)
    check_symbols(TEMPLATE, tokenizer)
    assert {"<|BOT|>", *THINK_TAGS, *TOOL_TAGS} <= set(tokenizer.symbols) and "<|im_start|>" not in tokenizer.symbols
    assert tokenizer.eos_id == tokenizer.token_id(END) and ending_turns(TEMPLATE, tokenizer) is tokenizer
    form = ChatFormat(TEMPLATE, tokenizer)
    for row in rows:
        ids, prompt = form.encode(row).ids.tolist(), form.prompt(row)
        assert ids[:len(prompt)] == prompt and form.text(ids[len(prompt):-1]) == row["messages"][-1]["content"]


@pytest.mark.parametrize(("options", "error"), [
    ({"thinking": "hybrid", "thinking_share": 1.0}, "between 0 and 1"),
    ({"thinking": "drop", "thinking_share": 0.3}, "no effect with data.thinking drop"),
    ({"difficulty_field": "level"}, "no effect without data.balance"),
    ({"balance": ("easy",)}, "not 'easy'"),
])
def test_settings_without_effect(options, error):
    with pytest.raises(ValueError, match=error):
        TuningDataConfig(**options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model with KORMo's tokens, which has no template and whose eos is <|EOS|>."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    config = replace(MODEL, vocab_size=272)
    save_hf(folder, config, jax.jit(build(config).init)(jax.random.key(0)), architecture="llama")
    save_tokenizer(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Two steps of fine-tuning on the embedded rows with reasoning, hybrid and balanced, and the export."""
    folder = tmp_path_factory.mktemp("tuned")
    sft.main(["--folder", str(folder / "run"), "--init", str(base), "--template", "kormo", "--data.path",
              "sample_thinking:en/held_out", "--data.held-out", "sample_thinking:en/held_out", "--data.thinking",
              "hybrid", "--data.balance", "easy=1", "medium=2", "hard=1", "--pipeline.batch-size", "8",
              "--pipeline.seq-len", "240", "--loop.steps", "2", "--loop.log-every", "1", "--loop.eval-every", "100",
              "--checkpoint.every", "2", "--answers.count", "0", "--optim.schedule.decay",
              "0"])
    convert.main(["--source", str(folder / "run"), "--target", str(folder / "hf")])
    return folder


def test_the_export_is_the_same_in_transformers(tuned):
    """A plain Llama with the template, eos <|EOT|>, and the same text, ids and logits with thinking and without."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder, opened = tuned / "hf", open_pretrained(tuned / "run")
    assert opened.tokenizer.eos_id == SPECIALS.index(END)
    assert load_tokenizer(folder).eos_id == opened.tokenizer.eos_id
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is transformers.LlamaForCausalLM and theirs.eos_token == END
    assert model.generation_config.eos_token_id == model.config.eos_token_id == theirs.eos_token_id
    # The base had no template, so the run is our own and begins with BOS.
    assert (folder / TEMPLATE_FILE).read_text() == "{{ bos_token }}" + KORMO
    chats = [read_conversation(messages) for messages, _ in CASES.values()]
    for conversation in [*chats, chats[0] | {"tools": [TOOL]}]:
        messages, tools = conversation["messages"], conversation.get("tools")
        for template in (opened.chat, *(thinking_prompts(opened.chat, on) for on in (True, False))):
            given = messages[:-1] if template.variables else messages
            asked = {"tools": tools, "add_generation_prompt": bool(template.variables)}
            assert theirs.apply_chat_template(given, tokenize=False, **asked, **template.variables) == template.render(
                given, **asked, bos_token="<|BOS|>")
            ids = theirs.apply_chat_template(given, return_dict=True, **asked, **template.variables)["input_ids"]
            if "think>" not in str(given):  # theirs takes tags that messages spell out for special tokens
                assert ids == chat_ids(template, opened.tokenizer, given, **asked).ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = theirs.apply_chat_template(CASES["no thinking"][0], return_dict=True, return_assistant_tokens_mask=True)
    assert found["assistant_masks"] == [0, *by_hand(CASES["no thinking"][1])[2]]
    tokens = np.array([found["input_ids"]])
    config, params = load_hf(folder)
    ours = build(config).apply(params, tokens).logits
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(torch.from_numpy(tokens)).logits.numpy(), atol=1e-5)


def test_the_run_says_what_it_draws_and_writes(tuned, capfd):
    metrics = read_metrics(tuned / "run/metrics.jsonl")
    assert any("eval/loss_held_out" in record for record in metrics)
    drawn = {name for record in metrics for name in record if name.startswith("epoch/")}
    assert {name.rpartition("/")[2] for name in drawn} == {"easy", "medium", "hard"}
    out = tuned / "out.jsonl"
    ask = ["--source", str(tuned / "run"), "--chat", "--prompt", "What is 1 + 2?", "--sampling.max-new-tokens", "3"]
    for on in ("on", "off"):
        generate.main([*ask, "--thinking", on, "--output", str(out), "--overwrite"])
        assert {"prompt", "text"} <= json.loads(out.read_text().splitlines()[-1]).keys()
    capfd.readouterr()
    for arguments, error in (([*ask[:2], "--prompt", "a", "--thinking", "on"], "thinking has no effect without chat"),
                             ([*ask, "--thinking", "maybe"], "maybe")):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert error in re.sub(r"[│\s]+", " ", capfd.readouterr().err)
