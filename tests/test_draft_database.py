"""Databases from the command line: built by hand the same, resumed after a kill, each fault one sentence."""

import json

import numpy as np
import pytest

from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.generate.databases import build_corpus, build_model_table, database_facts, load_database
from recipes import draft_database
from tests.tiny_chat import json_tokenizer, tiny_folder

MARK = json_tokenizer().fingerprint()
QUESTIONS = [f"question {i}?" for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in [*QUESTIONS, QUESTIONS[0], "x" * 300]))
    return path


def make(model, data, target, *more):
    draft_database.main(["--source", str(model), "--data", str(data), "--target", str(target), *more])


ASK = ["--chat", "--max-new-tokens", "16", "--batch-size", "4"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_model_database_counts_the_answers(model, questions, tmp_path, capfd):
    target = tmp_path / "m.safetensors"
    make(model, questions, target, *ASK, "--max-prompt-tokens", "100")
    out, err = capfd.readouterr()
    assert "12 texts" in out and "1 of more than 100 tokens, 1 that came before" in err
    records = lines(tmp_path / "m.texts.jsonl")
    assert sorted(record["prompt"] for record in records) == sorted(QUESTIONS)
    assert all(1 <= len(record["tokens"]) <= 16 for record in records)
    table = build_model_table([record["tokens"] for record in records], json_tokenizer().vocab_size)
    for a, b in zip(load_database(target, MARK, "model_table"), table, strict=True):
        np.testing.assert_array_equal(a, b)
    assert database_facts(target)["ngrams"] == (table.lengths > 0).sum() > 0


def test_what_is_asked(model, tmp_path):
    """Strings, prompts and messages; the ids are those of the template."""
    path = tmp_path / "mixed.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in ("one", {"prompt": "two"}, {"messages": messages})))
    config = draft_database.Config(source=model, data=(str(path),), chat=True, max_new_tokens=8)
    chosen = draft_database.chosen_prompts(config, draft_database.open_pretrained(model))
    ask = lambda text: chat_ids(ChatTemplate(CHATML), json_tokenizer(), [{"role": "user", "content": text}],
                                add_generation_prompt=True).ids
    assert [ids for _, ids in chosen.values()] == [ask("one"), ask("two"), ask("hello")]


def test_a_cut_run_goes_on(model, questions, tmp_path, capfd):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    make(model, questions, whole, *ASK, "--max-prompt-tokens", "100")
    make(model, questions, cut, *ASK, "--max-prompt-tokens", "100", "--max-prompts", "5")
    texts = tmp_path / "cut.texts.jsonl"
    content = texts.read_bytes()
    texts.write_bytes(content[:-10])
    capfd.readouterr()
    make(model, questions, cut, *ASK, "--max-prompt-tokens", "100", "--overwrite")
    assert "4 of 12 answers are in" in capfd.readouterr().err
    assert cut.read_bytes() == whole.read_bytes()
    by_key = lambda path: sorted(path.read_text().splitlines())
    assert by_key(texts) == by_key(tmp_path / "whole.texts.jsonl")
    written = texts.stat().st_mtime_ns
    cut.unlink()
    make(model, questions, cut, *ASK, "--max-prompt-tokens", "100")
    assert cut.read_bytes() == whole.read_bytes() and texts.stat().st_mtime_ns == written


def test_corpus_database(model, questions, tmp_path, capfd):
    encode = json_tokenizer().encode
    texts = [encode(one) for one in [*QUESTIONS, QUESTIONS[0], "x" * 300]]
    for more, expected, count in (([], texts, 14), (["--max-tokens", "30"], [*texts[:2], texts[2][:8]], 3)):
        target = tmp_path / f"{count}.safetensors"
        make(model, questions, target, "--kind", "corpus", *more)
        for a, b in zip(load_database(target, MARK, "corpus"), build_corpus(expected, json_tokenizer().vocab_size),
                        strict=True):
            np.testing.assert_array_equal(a, b)
        assert f"{count} texts, {sum(map(len, expected))} text tokens" in capfd.readouterr().out
        assert database_facts(target)["texts"] == count


@pytest.mark.parametrize(("arguments", "message"), [
    (["--kind", "corpus", "--chat"], "chat has no effect on a database of kind corpus"),
    (["--max-tokens", "5"], "max_tokens has no effect on a database of kind model"),
    (["--max-prompts", "0"], "max_prompts must be positive"),
    (["--target", "x.bin"], "a database is a .safetensors file"),
    (["--source", "nowhere"], "neither a .gguf file nor a run folder"),
    (["--max-new-tokens", "9", "--data", "nowhere.tsv"], "no such file"),
    (["--max-new-tokens", "9", "--data", "nowhere.jsonl"], "no such file"),
    (["--max-new-tokens", "256"], "leave no room for a prompt within the model's 256 positions"),
    (["--max-new-tokens", "9", "--max-prompt-tokens", "2"], "no prompt of at most 2 tokens"),
])
def test_errors(model, questions, tmp_path, arguments, message, capfd, monkeypatch):
    monkeypatch.setattr(draft_database, "load_weights", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(SystemExit) as stopped:
        make(model, questions, tmp_path / "m.safetensors", *arguments)
    assert stopped.value.code == 2 and message in " ".join(capfd.readouterr().err.replace("│", "").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.jsonl"]


def test_answers_of_other_settings(model, questions, tmp_path, capfd):
    target = tmp_path / "m.safetensors"
    make(model, questions, target, *ASK, "--max-prompts", "2")
    with pytest.raises(SystemExit):
        make(model, questions, target, *ASK)
    assert "exists; --overwrite replaces it" in capfd.readouterr().err
    target.unlink()
    with pytest.raises(SystemExit):
        make(model, questions, target, "--chat", "--max-new-tokens", "9")
    assert "max_new_tokens was 16, now 9" in capfd.readouterr().err
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        make(other, questions, target, *ASK)
    assert "weights was" in capfd.readouterr().err
    make(other, questions, target, *ASK, "--max-prompts", "2", "--overwrite")
    assert len(lines(tmp_path / "m.texts.jsonl")) == 2
