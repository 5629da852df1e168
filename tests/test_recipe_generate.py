"""The command line of generation: streamed, in batches, resumed, as a conversation; each fault is one sentence."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm.data.chat import chat_ids
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.generate import console
from jaxlm.generate.console import show
from jaxlm.generate.databases import build_corpus, build_model_table, save_database
from jaxlm.generate.methods import METHODS
from jaxlm.generate.prompts import Prompt, Reader, make_asks
from jaxlm.generate.requests import Report
from jaxlm.generate.settings import SamplingConfig
from jaxlm.model.quantize import Quantized
from recipes import generate
from tests.tiny_chat import SPECIALS, json_tokenizer, tiny_folder

TOKENIZER = json_tokenizer()
MARK = TOKENIZER.fingerprint()
SHORT = ["--sampling.max-new-tokens", "8"]
DRAWN = ["--sampling.temperature", "1", "--sampling.max-new-tokens", "12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("databases"), np.random.default_rng(0)
    texts = [rng.integers(5, TOKENIZER.vocab_size, 200).tolist() for _ in range(4)]
    for name, build in (("model", build_model_table), ("corpus", build_corpus)):
        save_database(folder / f"{name}.safetensors", build(texts, TOKENIZER.vocab_size), MARK, {})
    return folder


def run(model, *arguments):
    generate.main(["--source", str(model), *map(str, arguments)])


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_set(path):
    return sorted(path.read_text().splitlines())


def prompt_file(folder, rows):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_streamed_is_the_text_of_a_batch(model, tmp_path, capfd):
    for number, arguments in enumerate((["--prompt", "The sky", *DRAWN], ["--prompt", "하늘", *SHORT, "--chat"])):
        run(model, *arguments)
        shown = capfd.readouterr()
        run(model, *arguments, "--output", tmp_path / f"{number}.jsonl")
        line, = written(tmp_path / f"{number}.jsonl")
        assert shown.out == line["text"] + "\n" and line["num_tokens"] > 0
        assert capfd.readouterr().out.startswith("text 1/1")
        assert "tokens/s" in shown.err and "a forward pass" in shown.err


def test_pieces_are_the_completion(model):
    opened = generate.open_pretrained(model)
    engine = generate.make_engine(generate.Config(source=model), opened, generate.Databases(), None, 1)
    ask, = make_asks(Reader(TOKENIZER), [Prompt("a")], SamplingConfig(temperature=1.0, max_new_tokens=40))
    events = list(generate.serve(engine, [ask.ids], ask.sampling, pieces=True))
    assert "".join(event.text for event in events[:-1]) == events[-1].text and len(events) > 2


def test_files_of_prompts(model, tmp_path, capfd, monkeypatch):
    """A line each, JSONL and standard input are the same prompts; settings of a row count."""
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    run(model, "--file", tmp_path / "p.txt", *SHORT)
    text = capfd.readouterr().out
    assert text.startswith("[0] one\n") and "\n[1] two\n" in text
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    run(model, *SHORT)
    assert capfd.readouterr().out == text
    rows = [{"prompt": "one", "id": "a"}, {"prompt": "two", "id": 7, "max_new_tokens": 3, "ignore_eos": True},
            {"messages": [{"role": "user", "content": "two"}]}]
    run(model, "--file", prompt_file(tmp_path, rows), *SHORT, "--output", tmp_path / "out.jsonl", "--logprobs")
    found = {one["prompt"]: one for one in written(tmp_path / "out.jsonl")}
    assert (found[0]["id"], found[1]["id"], "id" in found[2]) == ("a", 7, False)
    assert found[1]["num_tokens"] == 3 == len(found[1]["tokens"]) == len(found[1]["logprobs"]) == len(found[1]["kept"])
    assert text == f"[0] one\n{found[0]['text']}\n\n[1] two\n" + text.rpartition("two\n")[2]


def test_samples_differ_and_do_not_depend_on_the_batch(model, tmp_path):
    path = prompt_file(tmp_path, ["same", "same", {"prompt": "same", "seed": 1}])
    for size in (1, 4):
        run(model, "--file", path, *DRAWN, "--num-samples", "2", "--batch-size", size, "--output",
            tmp_path / f"{size}.jsonl")
    assert as_set(tmp_path / "1.jsonl") == as_set(tmp_path / "4.jsonl")
    texts = {(one["prompt"], one["sample"]): one["text"] for one in written(tmp_path / "1.jsonl")}
    assert len({texts[place] for place in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert texts[2, 0] == texts[0, 1] and texts[2, 1] == texts[1, 0]  # seeds 1 and 2


def test_a_killed_run_goes_on(model, tmp_path, capfd):
    path = prompt_file(tmp_path, [f"prompt {i}" for i in range(300)])
    arguments = ["--file", str(path), *DRAWN, "--batch-size", "4"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(model, *arguments, "--output", whole)
    process = subprocess.Popen([sys.executable, "-m", "recipes.generate", "--source", str(model), *arguments,
                                "--output", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ)
    while not killed.exists() or killed.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = killed.read_bytes().count(b"\n")
    assert 5 <= there < 300
    with killed.open("ab") as file:
        file.write(b'{"prompt": 299, "sam')
    capfd.readouterr()
    run(model, *arguments, "--output", killed)
    assert f"{there} of 300 texts are in" in capfd.readouterr().err
    assert as_set(killed) == as_set(whole)
    run(model, *arguments, "--output", killed)
    assert as_set(killed) == as_set(whole)


@pytest.mark.parametrize("method", ["hierarchy", "lookahead"])  # every source: tests/test_engine.py
def test_drafting_changes_no_text(model, databases, tmp_path, method, capfd):
    guessing = METHODS[method]
    given = [word for name in ("model", "corpus") if name in guessing.draft.order
             for word in (f"--{name}-database", databases / f"{name}.safetensors")]
    arguments = ["--prompt", "abcabcabc", *SHORT]
    run(model, *arguments)
    plain = capfd.readouterr().out
    run(model, *arguments, "--drafting", method, "--fixed-width", *given)
    shown = capfd.readouterr()
    assert shown.out == plain and "guessed right: " + guessing.source_names()[0] in shown.err


def test_measured_widths_and_a_draft_model(model, capfd, monkeypatch):
    monkeypatch.setattr(generate, "WIDTHS", (0,))
    run(model, "--prompt", "abcabc", *SHORT)
    plain = capfd.readouterr().out
    run(model, "--prompt", "abcabc", *SHORT, "--drafting", "pld")
    shown = capfd.readouterr()
    assert shown.out == plain and "1.00 with 0 guesses" in shown.err and "with 10 guesses" in shown.err
    run(model, "--prompt", "abcabc", *SHORT, "--draft-source", model)
    shown = capfd.readouterr()
    assert shown.out == plain and "draft_model" in shown.err


def test_other_numbers(model, capfd, monkeypatch):
    made = []
    monkeypatch.setattr(generate, "show", lambda engine, *rest: (made.append(engine), show(engine, *rest)))
    run(model, "--prompt", "abc", *SHORT, "--quantize", "--cache-dtype", "int8", "--dtype", "bfloat16", "--unstack")
    assert "8 tokens" in capfd.readouterr().err
    [engine] = made
    assert engine.config.cache_dtype == "int8" and engine.model.compute.dtype == "bfloat16"
    assert isinstance(engine.params["layers"][0]["mlp"]["up"]["kernel"], Quantized)


def test_a_conversation_is_remembered(monkeypatch, caplog):
    """What does not fit and what is interrupted is forgotten; the rest is asked with all that was said before."""
    reader, asked = Reader(TOKENIZER, (), ChatTemplate(CHATML), True, "Be."), []
    answers = ["Hé", ValueError("too long"), KeyboardInterrupt(), "Yes"]

    def say(engine, ask, report):
        asked.append(ask.ids)
        answer = answers[len(asked) - 1]
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr(console, "say", say)
    console.converse(None, reader, SamplingConfig(), ["hello", "x", "y", "again"], Report())
    ids = lambda *said: chat_ids(ChatTemplate(CHATML), TOKENIZER, [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), said,
                                                              strict=False)], add_generation_prompt=True).ids
    assert asked == [ids("Be.", "hello"), ids("Be.", "hello", "Hé", "x"), ids("Be.", "hello", "Hé", "y"),
                     ids("Be.", "hello", "Hé", "again")]
    assert "too long" in caplog.text


def test_the_end_of_a_turn_ends_a_text(tmp_path):
    """Where eos is another token, as in a base model with ChatML."""
    reader = Reader(TOKENIZER, template=ChatTemplate(CHATML), chat=True)
    end = TOKENIZER.token_id("<|im_end|>")
    assert TOKENIZER.eos_id != end and reader.turn_end() == (end,)
    ask = lambda prompt, **settings: make_asks(reader, [prompt], SamplingConfig(**settings))[0].sampling.stop_ids
    assert ask(Prompt("a"), stop_ids=(9, end)) == (9, end) and ask(Prompt("a")) == (end,)
    assert ask(Prompt("a"), ignore_eos=True) == ()
    assert make_asks(reader._replace(chat=False), [Prompt("a")], SamplingConfig())[0].sampling.stop_ids == ()


def fails(capfd, model, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(model, *arguments)
    assert stopped.value.code == 2
    return " ".join(capfd.readouterr().err.replace("│", "").split())


@pytest.fixture
def untouched(monkeypatch):
    monkeypatch.setattr(generate, "make_engine", lambda *_: pytest.fail("began with device work"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompt", " "], "prompt is empty"),
    (["--prompt", "a", "--file", "b.txt"], "prompt and file both say what to continue"),
    (["--prompt", "a" * 250], "prompt 0 has 250 tokens: with max_new_tokens 8 that is more than the 256 positions"),
    (["--prompt", "a", "--sampling.stop-ids", "999"], "stop_ids names id 999, but the vocabulary ends at 260"),
    (["--prompt", "a", "--sampling.top-k", "5"], "top_k has no effect on greedy decoding"),
    (["--prompt", "a", "--num-samples", "2"], "2 samples of a greedy text would be equal"),
    (["--prompt", "a", "--drafting", "hierarhy"], "(did you mean 'hierarchy'?)"),
    (["--prompt", "a", "--drafting", "rest"], "--drafting rest needs --corpus-database"),
    (["--prompt", "a", "--model-database", "x.safetensors"], "--model-database has no effect on --drafting none"),
    (["--prompt", "a", "--fixed-width"], "fixed_width has no effect without drafting"),
    (["--prompt", "a", "--system", "b"], "system has no effect without chat"),
    (["--prompt", "a", "--logprobs"], "logprobs has no effect without output"),
    (["--prompt", "a", "--output", "x.txt"], "must end in .jsonl"),
    (["--file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    (["--prompt", "a", "--source", "nowhere"], "neither a .gguf file nor a run folder"),
])
def test_flags_that_do_not_fit(model, untouched, arguments, message, capfd):
    assert message in fails(capfd, model, *SHORT, *arguments)


@pytest.mark.parametrize(("row", "message"), [
    ('{"prompt": "a"', ":2: not JSON"),
    ('{"prompt": ""}', ":2: it is empty"),
    ("7", ":2: a prompt is a string or an object"),
    ('{"prompts": "a"}', ":2: give one of prompt, text, messages"),
    ('{"prompt": "a", "messages": []}', ":2: give one of prompt, text, messages, not prompt and messages"),
    ('{"prompt": "a", "temprature": 1}', ":2: unknown field 'temprature' (did you mean 'temperature'?)"),
    ('{"prompt": "a", "temperature": "hot"}', ":2: field 'temperature' must be float, got 'hot'"),
    ('{"prompt": "a", "top_k": 3}', ":2: top_k has no effect on greedy decoding"),
    ('{"messages": [{"role": "boss", "content": "a"}]}', ":2: the chat template does not take these messages"),
    ('{"messages": []}', ":2: a conversation is a list of at least one message"),
])
def test_bad_lines_are_named(model, untouched, tmp_path, row, message, capfd):
    path = tmp_path / "p.jsonl"
    path.write_text('"fine"\n' + row + "\n")
    assert f"{path}{message}" in fails(capfd, model, "--file", path).replace(" :2", ":2")
    path.write_text("\n")
    assert "holds no prompt" in fails(capfd, model, "--file", path)


def test_databases_are_checked_first(model, databases, untouched, tmp_path, capfd):
    other = tmp_path / "other.safetensors"
    save_database(other, build_corpus([[1, 2]], 5), "another", {})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((databases / "corpus.safetensors").read_bytes()[:-9])
    for path, message in ((other, "was made with another tokenizer"), (damaged, "is not a whole safetensors file"),
                          (databases / "model.safetensors", "of kind model_table, not corpus")):
        said = fails(capfd, model, "--prompt", "a", "--drafting", "rest", "--corpus-database", path)
        assert message in said and str(path) in said


def test_a_terminal_takes_neither_files_nor_samples(model, untouched, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for arguments in (["--output", "x.jsonl"], [*DRAWN, "--num-samples", "2"]):
        assert "no effect on what is typed" in fails(capfd, model, *arguments)


def test_chatml_is_taken_and_said_where_a_model_has_no_template(tmp_path, capfd):
    bare = tiny_folder(tmp_path / "bare", template=None)
    run(bare, "--prompt", "하늘", *SHORT, "--chat")
    text = capfd.readouterr()
    assert "brings no chat template: ChatML is used" in text.err
    run(tiny_folder(tmp_path / "m"), "--prompt", "하늘", *SHORT, "--chat")
    assert capfd.readouterr().out == text.out


def test_models_that_do_not_fit(model, untouched, tmp_path, capfd):
    bare = tiny_folder(tmp_path / "bare", specials=SPECIALS[:3], template=None)
    assert "brings no chat template" in fails(capfd, bare, "--prompt", "a", "--chat")
    assert "has another tokenizer" in fails(capfd, model, "--prompt", "a", "--draft-source", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "has no tokenizer" in fails(capfd, bare, "--prompt", "a")


def test_an_output_of_other_settings(model, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    run(model, "--prompt", "a", *SHORT, "--output", out)
    before = out.read_bytes()
    for arguments, message in ((["--prompt", "b"], "prompts was"),
                               (["--prompt", "a", "--logprobs"], "logprobs was false, now true"),
                               (["--prompt", "a", "--sampling.stop-ids", "9"], "sampling.stop_ids was [], now [9]")):
        said = fails(capfd, model, *SHORT, *arguments, "--output", out)
        assert "was written with other settings: " + message in said and out.read_bytes() == before
    assert "weights was" in fails(capfd, tiny_folder(tmp_path / "m", seed=1), "--prompt", "a", *SHORT, "--output", out)
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert "is not beside it" in fails(capfd, model, "--prompt", "a", *SHORT, "--output", out)
    run(model, "--prompt", "b", *SHORT, "--output", out, "--overwrite")
    assert len(written(out)) == 1 and out.read_bytes() != before
    out.write_bytes(b"{\n" + before)
    assert ":1 is damaged" in fails(capfd, model, "--prompt", "b", *SHORT, "--output", out)
