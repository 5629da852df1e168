"""Synthetic text: quotas, templates, servers that fail in every way, and runs that are killed and go on."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

import pytest

from jaxlm.data.conversations import open_conversations
from jaxlm.data.prompt_styles import (
    LANGUAGES,
    STYLES,
    Language,
    StyleName,
    assign,
    check_template,
    fill,
    load_styles,
    parse_quotas,
    parse_shares,
    quotas,
    read_turns,
)
from jaxlm.data.sources import open_source, parse_source
from jaxlm.generate.results import Results
from jaxlm.generate.served import Reply, ServedConfig, Server, ask, ask_all
from jaxlm.generate.settings import SamplingConfig
from recipes import synthesize
from tests.tiny_chat import tiny_folder

KEY = "sk-a-key-that-must-not-show"
PLAIN = "사과는 맛있는 과일이며 건강에도 좋습니다."
TURNS = "질문: 사과는 무엇입니까?\n답변: 맛있는 과일입니다."


class Stub(ThreadingHTTPServer):
    """Answers by what `reply(body, how often this prompt was asked)` returns: status, content and headers, or None for
    silence until `timeout` is over; all requests are remembered.
    """

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.lock = reply, [], threading.Lock()
        self.counts, self.released = Counter(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.counts[prompt] += 1
            self.server.asked.append((self.path, body, self.headers.get("Authorization")))
            count = self.server.counts[prompt]
        answer = self.server.reply(body, count)
        if answer is None:
            self.server.released.wait(5)
            return
        status, content, headers = answer
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        while "X-Drip" in headers and not self.server.released.wait(0.05):
            try:
                self.wfile.write(b" ")
            except OSError:  # the client has gone
                return

    def log_message(self, *_):
        pass


def said(text, finish="stop"):
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}],
                            "usage": {"completion_tokens": 7}}).encode(), {}


@contextmanager
def serving(reply):
    server = Stub(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def config(**changes):
    return ServedConfig(**{"timeout": 0.3, "attempts": 4, "backoff": 1.0} | changes)


FAULTS = {
    "silence": (None, "no whole answer in 0.3 seconds"),
    "500": ((500, b"", {}), "status 500"),
    "429": ((429, b"", {"Retry-After": "7"}), "status 429"),
    "malformed": ((200, b'{"choices": [', {}), "no JSON"),
    "html": ((200, b"<html>", {}), "no JSON"),
    "cut": ((200, b'{"choices"', {"Content-Length": 1000, "Connection": "close"}), "no"),
    "empty choices": ((200, b'{"choices": []}', {}), "no choices"),
    "list": ((200, b"[1]", {}), "no choices"),
    "null": ((200, b'{"choices": [{"message": {"content": null}}]}', {}), "empty text"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_and_then_reported(name):
    fault, reason = FAULTS[name]
    with serving(lambda body, count: fault if count < 3 or body["messages"][0]["content"] == "never" else
                 said("ok")) as stub:
        waits = []
        server = Server(stub.url, "M", config(attempts=3, timeout=0.3))
        assert ask(server, "a", SamplingConfig(), waits.append) == Reply("ok", "stop", 7, 3)
        never = ask(server, "never", SamplingConfig(), waits.append)
        assert never.text == "" and never.attempts == 3 and reason in never.error
        assert len(waits) == 4  # none behind the last attempt
        if name == "429":
            assert waits == [7] * 4
        else:
            assert all(0.5 <= wait <= 1 for wait in waits[::2]) and all(1 <= wait <= 2 for wait in waits[1::2])


def test_what_no_attempt_mends():
    with serving(lambda body, count: (400 if body["messages"][0]["content"] == "long" else 401, b"", {})) as stub:
        server = Server(stub.url, "M", config())
        reply = ask(server, "long", SamplingConfig(), time.sleep)
        assert reply.attempts == 1 and "status 400" in reply.error
        with pytest.raises(ValueError, match=r"answers 401 .*: check the address, the model and the key"):
            ask(server, "any", SamplingConfig())
    gone = Server(stub.url, "M", config(attempts=2, max_backoff=0.01))
    assert "no answer" in ask(gone, "a", SamplingConfig()).error
    with serving(lambda body, count: (302, b"", {"Location": "http://127.0.0.1:9/"})) as stub:
        assert "status 302" in ask(Server(stub.url, "M", config()), "a", SamplingConfig()).error


def test_an_answer_that_drips_ends_in_time():
    def drip(body, count):
        return 200, b"", {"Content-Length": "1000000", "X-Drip": "yes"}

    with serving(drip) as stub:
        begun = time.monotonic()
        assert "no whole answer" in ask(Server(stub.url, "M", config(attempts=1)), "a", SamplingConfig()).error
        assert time.monotonic() - begun < 3


def test_the_key_is_sent_and_not_shown(monkeypatch, caplog):
    monkeypatch.setenv("STUB_KEY", KEY)
    with serving(lambda body, count: said("ok")) as stub:
        server = Server(stub.url + "/", "M", config(key_variable="STUB_KEY"))
        sampling = SamplingConfig(temperature=0.5, top_p=0.9, max_new_tokens=9, stop_strings=("x",), seed=3)
        ask(server, "a", sampling)
        [(path, body, key)] = stub.asked
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "M", "messages": [{"role": "user", "content": "a"}], "temperature": 0.5, "top_p": 0.9,
                    "max_tokens": 9, "stop": ["x"], "seed": 3}
    assert KEY not in repr(server) + caplog.text
    for url, model in (("localhost/v1", "M"), ("ftp://a/v1", "M"), ("http://user:pw@a/v1", "M"), ("http://a/v1", "")):
        with pytest.raises(ValueError):
            Server(url, model)


def test_many_at_once_are_each_answered_once():
    with serving(lambda body, count: said(body["messages"][0]["content"] * 2)) as stub:
        prompts = [f"p{i}" for i in range(20)]
        found = dict(ask_all(Server(stub.url, "M", config(concurrency=4, timeout=5)), prompts, [SamplingConfig()] * 20))
        assert [found[i].text for i in range(20)] == [one * 2 for one in prompts] and len(stub.asked) == 20


def test_quotas_are_exact_and_seeds_are_spread():
    cells = quotas({"a": 1, "b": 2}, {"x": 0.5, "y": 0.3, "z": 0.2}, 101)
    assert sum(cells.values()) == 101 and cells["b", "x"] == 34 and cells["a", "y"] == 10
    assert quotas({"a": 1, "b": 1}, {"x": 1}, 3) == {("a", "x"): 2, ("b", "x"): 1}
    wanted = assign(cells, 40, 7)
    assert len(set(wanted)) == 101 and Counter((one.generator, one.style) for one in wanted) == cells
    uses = Counter(one.seed for one in wanted)
    assert set(uses.values()) == {2, 3} and len(uses) == 40
    assert wanted == assign(cells, 40, 7) and wanted != assign(cells, 40, 8)
    with pytest.raises(ValueError, match="each of another seed, but there are 33 seeds"):
        assign(cells, 33, 7)
    assert parse_shares(["a=2", "b"], {"a": 0, "b": 0}, "style") == {"a": 2, "b": 1}
    for given, message in ((["c"], "'c' is unknown"), (["a", "a"], "named twice"), (["a=x"], "a number"),
                           (["a=0"], "above 0"), (["a=nan"], "above 0")):
        with pytest.raises(ValueError, match=message):
            parse_shares(given, {"a": 0}, "style")
    assert parse_quotas(["a:x=3"], {"a": 0}, {"x": 0}) == {("a", "x"): 3}
    for given in ("a:x", "a:x=0", "b:x=1", "a:y=1", "a=1", "a:x=-1"):
        with pytest.raises(ValueError, match="quota"):
            parse_quotas([given], {"a": 0}, {"x": 0})


def test_templates(tmp_path):
    assert get_args(StyleName) == tuple(STYLES) and get_args(Language) == LANGUAGES
    for name, style in STYLES.items():
        assert set(style.templates) == set(LANGUAGES)
        for language, template in style.templates.items():
            check_template(template, name)
            assert r"{x} \boxed{3}" in fill(template, r"{x} \boxed{3}")
            assert ("한국어" in template) == (language == "ko")
    assert r"\boxed{} " in fill(STYLES["reasoning-translate"].templates["ko"], "a")
    for wrong, message in (("no place", "stands there 0 times"), ("{text} {text}", "stands there 2 times"),
                           ("{text} {other}", "not 'other'"), ("{text!r}", "not"), ("{text", "expected"),
                           ("{text} \\boxed{}", "not ''")):
        with pytest.raises(ValueError, match=message):
            check_template(wrong, "here")
    path = tmp_path / "styles.json"
    path.write_text(json.dumps({"poem": {"ko": "시로 쓰세요: {text}"}, "rewrite": {"ko": "고쳐 쓰세요: {text}"}}))
    styles = load_styles(path)
    assert styles["poem"].templates == {"ko": "시로 쓰세요: {text}"}
    assert styles["rewrite"].templates == STYLES["rewrite"].templates | {"ko": "고쳐 쓰세요: {text}"}
    for content in ("[", "[]", '{"a": "b"}', '{"a": {"fr": "{text}"}}', '{"a": {"ko": 1}}', '{"a": {"ko": "x"}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"styles\.json"):
            load_styles(path)
    assert read_turns(TURNS, "ko") == [{"role": "user", "content": "사과는 무엇입니까?"},
                                       {"role": "assistant", "content": "맛있는 과일입니다."}]
    for text in ("질문: a", "a 답변: b", "질문: 답변: b", "질문: a 답변: ", "x 질문: a 답변: b"):
        assert read_turns(text, "ko") is None


def write(tmp_path, *arguments):
    output = tmp_path / "out.jsonl"
    synthesize.main(["--output", str(output), *map(str, arguments)])
    return rows(output)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(tmp_path):
    return {(one.pop("generator"), one.pop("style")): one for one in json.loads(
        (tmp_path / "out.report.json").read_text())}


SMALL = ["--sampling.max-new-tokens", "8", "--seeds", "sample:en?documents=6"]


def test_local_models_write(tmp_path):
    """A random preset and a folder; pretraining and SFT read the rows; the same command adds nothing."""
    folder = tiny_folder(tmp_path / "model", template=None)
    arguments = ["--generators", "a=preset:tiny", f"b={folder}", "--styles", "rewrite=2", "textbook=1", "--count", 6,
                 *SMALL]
    found = write(tmp_path, *arguments)
    # The folder's model has 256 positions, which the prompts do not fit into: reported, and nothing else is lost.
    counts = report(tmp_path)
    assert {cell: one["wanted"] for cell, one in counts.items()} == {
        ("a", "rewrite"): 2, ("a", "textbook"): 1, ("b", "rewrite"): 2, ("b", "textbook"): 1}
    assert all(one == {"wanted": one["wanted"], "kept" if g == "a" else "failed": one["wanted"]}
               for (g, _), one in counts.items())
    attempts = rows(tmp_path / "out.attempts.jsonl")
    assert len(attempts) == 6 and sum("positions of the model" in one.get("reason", "") for one in attempts) == 3
    assert len(found) == 3 and len({one["sampling"]["seed"] for one in found}) == 3
    for row in found:
        assert row["seed_id"].startswith("sample_en:") and row["generator"] == "a" and row["model"] == "preset:tiny"
        assert "{text}" not in row["prompt"] and row["finish"] in ("stop", "length") and row["text"]
    again = write(tmp_path, *arguments)
    assert again == found


def scripted(body, count):
    """A server of which some prompts fail at first, and one style goes wrong."""
    prompt = body["messages"][0]["content"]
    if count == 1 and len(prompt) % 2:
        return 503, b"", {}
    return said(TURNS if "질문 하나" in prompt else PLAIN if "교과서" not in prompt else "An English text was written.")


def served(stub, *more):
    return ["--preset", "kormo", "--generators", f"s={stub.url}#M", "--served.backoff", "0",
            "--served.concurrency", "2", *SMALL, *more]


def test_a_server_writes_and_rules_count(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STUB_KEY", KEY)
    with serving(scripted) as stub:
        found = write(tmp_path, *served(stub, "--count", 9, "--served.key-variable", "STUB_KEY"))
    all_kept = {"wanted": 3, "kept": 3}
    assert report(tmp_path) == {("s", "rewrite"): all_kept, ("s", "instruction"): all_kept,
                                ("s", "textbook"): {"wanted": 3, "filtered:script": 3}}
    assert Counter(row["text"] for row in found) == {PLAIN: 3, TURNS: 3}
    refused = [one for one in rows(tmp_path / "out.attempts.jsonl") if one["outcome"] != "kept"]
    assert len(refused) == 3 and all(one["row"]["text"].startswith("An English") for one in refused)  # nothing is lost
    output = tmp_path / "out.jsonl"
    assert len(open_source(parse_source(str(output)))) == 6
    assert len(open_conversations(parse_source(f"{output}?include=style:instruction"))) == 3
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + "".join(path.read_text() for path in tmp_path.glob("out*"))


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Killed behind some rows, and in the middle of one: the output is that of a run that was not, no row twice."""
    with serving(scripted) as stub:
        whole = write(tmp_path, *served(stub, "--count", 9))
    done = len((tmp_path / "out.attempts.jsonl").read_text().splitlines())
    killed = tmp_path / "killed"
    killed.mkdir()
    append = Results.append

    def dies(self, record):
        append(self, record)
        dies.left -= 1
        if dies.left == 0:
            raise KeyboardInterrupt

    with serving(scripted) as other:
        other_whole = [row | {"attempts": 0} for row in whole]
        for left in (4, 2):
            dies.left = left
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(Results, "append", dies)
                write(killed, *served(other, "--count", 9))
            assert not (killed / "out.jsonl").exists()
        with (killed / "out.attempts.jsonl").open("a") as file:
            file.write('{"seed_id": "sample_en:0", "gener')
        found = write(killed, *served(other, "--count", 9))
    assert [row | {"attempts": 0} for row in found] == other_whole
    keys = [(one["seed_id"], one["style"]) for one in rows(killed / "out.attempts.jsonl")]
    assert len(keys) == len(set(keys)) == done == 9


def test_a_server_that_is_ill_then_well(tmp_path):
    """Rows that failed are reported, and asked for again by the same command; then each is there once."""
    ill = threading.Event()
    ill.set()
    with serving(lambda body, count: (500, b"", {}) if ill.is_set() and len(body["messages"][0]["content"]) % 2 else
                 said(PLAIN)) as stub:
        arguments = served(stub, "--styles", "rewrite", "--served.attempts", "2")
        some = write(tmp_path, *arguments)
        first = report(tmp_path)["s", "rewrite"]
        assert first["kept"] == len(some) and first["kept"] + first.get("failed", 0) == 6 and first.get("failed")
        ill.clear()
        assert len(write(tmp_path, *arguments)) == 6 and report(tmp_path)["s", "rewrite"] == {"wanted": 6, "kept": 6}
    assert max(stub.counts.values()) == 3


def test_a_dead_server_ends_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(synthesize, "GIVE_UP", 3)
    with serving(lambda body, count: (500, b"", {})) as stub, pytest.raises(SystemExit):
        write(tmp_path, *served(stub, "--styles", "rewrite", "--served.attempts", "1"))
    assert "generator s failed 3 times in a row, the last time: status 500" in capfd.readouterr().err


def test_translated_reasoning_is_filtered_in_two_stages(tmp_path):
    source = tmp_path / "proofs.jsonl"
    proofs = [rf"We add {i}0 and 41, so the result is \boxed{{{i}0 + 41}} as asked in the task." for i in range(1, 5)]
    proofs += ["There is no number in this short story of a fox and a crow.",
               "Another short story of an ant and a bee."]
    source.write_text("".join(json.dumps({"text": one}) + "\n" for one in proofs))

    def translate(body, count):
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Here are a text"):
            return said("NO, not all" if "fox" in prompt else "YES")
        for i in range(1, 5):
            if f"add {i}0" in prompt:
                box = "41 + 0" if i == 2 else f"{i}0 + 41"
                text = rf"우리는 {i}0 그리고 41 값을 더하므로, 문제에서 요구한 결과는 \boxed{{{box}}} 입니다."
                return said(text.replace("41", "14") if i == 3 else text, "length" if i == 4 else "stop")
        return said("여우와 까마귀가 나오는 짧은 이야기이며 숫자는 없습니다." if "fox" in prompt else
                    "개미와 벌이 나오는 또 다른 짧은 이야기입니다.")

    with serving(translate) as stub:
        found = write(tmp_path, *served(stub, "--styles", "reasoning-translate", "--judge", "s", "--seeds", source))
    assert report(tmp_path)["s", "reasoning-translate"] == {
        "wanted": 6, "kept": 2, "filtered:answer": 1, "filtered:numbers": 1, "filtered:unfinished": 1,
        "filtered:judge": 1}
    assert sorted(row["seed_id"] for row in found) == ["proofs:0", "proofs:5"]


def test_faults_are_one_sentence(tmp_path, capfd):
    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            write(tmp_path, *arguments)
        assert stopped.value.code == 2
        return capfd.readouterr().err

    tiny = ["--generators", "a=preset:tiny"]
    assert "name --generators" in fails("--preset", "kormo")
    assert "no preset 'tinny' (did you mean 'tiny'?)" in fails("--generators", "a=preset:tinny")
    assert "style 'rewite' is unknown (did you mean 'rewrite'?)" in fails("--styles", "rewite")
    assert "which model?" in fails("--generators", "a=http://127.0.0.1:1/v1")
    assert "the environment has no NOT_THERE" in fails("--generators", "a=http://h/v1#M", "--served.key-variable",
                                                       "NOT_THERE")
    assert "in this language already" in fails(*tiny, "--styles", "translate", "--seeds", "sample:ko?documents=12")
    assert "but there are 12 seeds" in fails(*tiny, "--quotas", "a:rewrite=13")
    assert "judge 'c' is none of the generators" in fails("--filters", "all", *tiny, "--judge", "c")
    assert "names tokens" in fails("--generators", "a=http://h/v1#M", "--sampling.stop-ids", "3")
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists; --overwrite replaces it" in fails(*tiny)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
