"""Our models in lm-evaluation-harness: request by request what its own `hf` backend says of the same weights."""

import contextlib
import importlib
import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlm.data.chat_template import CHATML, TEMPLATE_FILE
from jaxlm.data.tokenizer import JsonTokenizer, save_tokenizer
from jaxlm.eval.harness import LENGTHS, clip, fill, harness_scores, open_tasks, rolling_windows
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.model.hf import save_hf
from recipes import evaluate
from tests.tiny_chat import SPECIALS

POSITIONS = 48
WORDS = ["the", "sky", "is", "blue", "and", "하늘은", "파랗다", "grass", "green", "snow", "white", "눈은", "희다",
         "night"]
RNG = np.random.default_rng(0)
ROWS = [{"question": " ".join(RNG.choice(WORDS, 1 + i % 12)) + " " * (i % 2), "gold": i % 3,
         "choices": [" ".join(RNG.choice(WORDS, 1 + (i + j) % 3)) for j in range(3)]} for i in range(8)]
CHOICE = """task: jaxlm_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
num_fewshot: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """task: jaxlm_write
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["k", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def tokenizer():
    """Byte-level BPE that joins across a word's edge and puts bos before every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([" ".join(WORDS)] * 4, trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return JsonTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama in Hugging Face form, of few positions so that texts are cut."""
    path, made = tmp_path_factory.mktemp("harness") / "model", tokenizer()
    config = ModelConfig(vocab_size=made.vocab_size + 3, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2,
                         head_dim=4, d_ff=32, max_positions=POSITIONS, init_std=0.4)
    save_hf(path, config, jax.jit(build(config).init)(jax.random.key(1)), architecture="llama",
            token_ids={"bos_token_id": made.bos_id, "eos_token_id": made.eos_id, "pad_token_id": made.pad_id})
    save_tokenizer(made, path)
    (path / TEMPLATE_FILE).write_text(CHATML)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    data = path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (path / f"{name}.yaml").write_text(text % data)
    return path


@contextlib.contextmanager
def quiet():
    """Their warnings are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    """Imported here: it takes seconds. Its data sets go to a folder of this test, and no host is asked."""
    pytest.importorskip("torch", reason="the extra parity is not installed")
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = pytest.importorskip("lm_eval", reason="the extra eval is not installed")
        datasets = importlib.import_module("datasets")
        importlib.import_module("lm_eval.models.huggingface")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield found


def ours(folder, **changes):
    config = evaluate.Config(model=folder, tasks=("any",), **changes)
    opened = evaluate.open_pretrained(folder)
    params = evaluate.load_weights(folder, opened).params
    return evaluate.make_harness_model(config, opened).with_params(jax.tree.map(jax.numpy.asarray, params))


@pytest.fixture(scope="module")
def model(folder):
    return ours(folder, batch_size=3)


@pytest.fixture(scope="module")
def theirs(lm_eval, folder):
    with quiet():
        return lm_eval.models.huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2,
                                               max_length=POSITIONS)


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_log_likelihoods_are_those_of_the_hf_backend(model, theirs):
    asked = requests(*((row["question"], " " * (i % 2) + choice) for i, row in enumerate(ROWS) for choice in
                       row["choices"]), ("", "the sky"), ("", "<s>blue"), ("<s>snow", " white"), ("a</s>b", "c"),
                     ("the sky is " * 30, "blue and green"), ("  ", "blue"))
    # What greedy decoding writes is greedy.
    asked += requests(("snow", model.generate_until(requests(("snow", {"max_gen_toks": 1})))[0] or "x"))
    with quiet():
        expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = model.loglikelihood(asked)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(one, 3) for one, _ in found}) > 20 and any(greedy for _, greedy in found)


def test_rolling_log_likelihoods_are_those_of_the_hf_backend(model, theirs):
    asked = requests(("sky",), (" ".join(WORDS * 3),), (" ".join(WORDS * 9)[:POSITIONS],))
    with quiet():
        expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(model.loglikelihood_rolling(asked), expected, rtol=1e-6, atol=1e-4)


def test_texts_are_those_of_the_hf_backend(model, theirs):
    settings = [{"until": ["e", " "], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 20, "do_sample": False}]
    asked = requests(*((row["question"] * (1 + 9 * (i == 3)), settings[i % 2]) for i, row in enumerate(ROWS)))
    with quiet():
        expected = theirs.generate_until(asked, disable_tqdm=True)
    assert model.generate_until(asked) == expected and len(set(expected)) > 2


def test_tasks_are_those_of_the_hf_backend(lm_eval, folder, tasks, theirs, tmp_path, capsys):
    """Through the recipe: measures, and each document's log-likelihoods."""
    names = ["jaxlm_choice", "jaxlm_write"]
    output = tmp_path / "out.json"
    with quiet():
        evaluate.main(["--model", str(folder), "--tasks", *names, "--tasks-path", str(tasks), "--output", str(output),
                       "--samples", "--bootstraps", "0"])
        manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
        expected = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0)
    found = json.loads(output.read_text())
    assert "jaxlm_choice" in capsys.readouterr().out
    for name, measures in (("jaxlm_choice", ("acc,none", "acc_norm,none")), ("jaxlm_write", ("exact_match,none",))):
        for measure in measures:
            assert found["results"][name][measure] == pytest.approx(expected["results"][name][measure], abs=1e-4)
    pairs = [(a, b) for a, b in zip(found["samples"]["jaxlm_choice"], expected["samples"]["jaxlm_choice"], strict=True)]
    scores = [[[float(one[0][0]) for one in side["resps"]] for side in pair] for pair in pairs]
    assert len(scores) == len(ROWS)
    np.testing.assert_allclose([a for a, _ in scores], [b for _, b in scores], atol=1e-4)
    assert [a["resps"] for a in found["samples"]["jaxlm_write"]] == \
        [b["resps"] for b in expected["samples"]["jaxlm_write"]]


def test_batches_do_not_matter(folder, model):
    asked = requests(*((row["question"], row["choices"][0]) for row in ROWS))
    alone = ours(folder, batch_size=1)
    np.testing.assert_allclose([one for one, _ in alone.loglikelihood(asked)],
                               [one for one, _ in model.loglikelihood(asked)], atol=1e-5)


def test_worked_examples():
    assert rolling_windows(range(10), 99, 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert rolling_windows([], 99, 4) == [] and rolling_windows([7], 99, 4) == [([99], [7])]
    assert clip([1, 2, 3], [4, 5], 3) == ([2, 3, 4, 5], 2)
    tokens, targets, mask = fill([([2, 3, 4, 5], 2)], 2, 4)
    assert tokens[0].tolist() == [2, 3, 4, 0] and targets[0].tolist() == [3, 4, 5, 0]
    assert mask.tolist() == [[False, True, True, False], [False] * 4]
    with pytest.raises(ValueError, match="a continuation has 4 tokens, more than max_length 3"):
        clip([1], [1, 2, 3, 4], 3)


def test_settings_of_a_task(model):
    sampled = model.sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "x"}, 3)
    assert (sampled.temperature, sampled.top_p, sampled.seed, sampled.stop_strings) == (0.7, 0.9, 3, ("x",))
    greedy = model.sampling({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "until": ["", "y"]})
    assert (greedy.temperature, greedy.top_p, greedy.stop_strings, greedy.max_new_tokens) == (0.0, None, ("y",), 256)
    assert model.sampling({"do_sample": True}).temperature == 1 and model.sampling({}).temperature == 0
    assert all(model.sampling({name: 5}).max_new_tokens == 5 for name in LENGTHS)
    with pytest.raises(ValueError, match=r"generation_kwargs 'top_q' cannot be followed \(did you mean 'top_p'\?\)"):
        model.sampling({"top_q": 1})
    settings = {"max_gen_toks": 9, "do_sample": True}
    texts = model.generate_until(requests(("snow", settings), ("snow", settings)))
    assert texts[0] != texts[1] and texts == model.generate_until(requests(("snow", settings), ("snow", settings)))


def test_conversations(model, folder):
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    begun = model.apply_chat_template(history[:1])
    assert begun == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("assistant\nb")
    ids = model.encode(begun)
    assert ids[:2] == [0, SPECIALS.index("<|im_start|>")] and ids.count(SPECIALS.index("<|im_end|>")) == 1
    assert ours(folder, chat=True).stop_ids == (SPECIALS.index("<|im_end|>"),) and model.stop_ids == ()
    with pytest.raises(ValueError, match="brings no chat template"):
        replace(model, chat=None).apply_chat_template(history)


def test_faults_are_one_sentence(lm_eval, folder, tasks, tmp_path, capsys, model, monkeypatch):
    # The thousands of tasks of the package take many seconds to list.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))

    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped, quiet():
            evaluate.main(["--model", str(folder), *map(str, arguments)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "unknown tasks: jaxlm_choise (did you mean 'jaxlm_choice'?)" in fails(
        "--tasks", "jaxlm_choise", "--tasks-path", tasks)
    assert "name tasks" in fails("--tasks")
    assert "unknown tasks: facts_kr (did you mean 'facts_ko" in fails("--tasks", "facts_kr", "facts_ko")
    assert "is no folder" in fails("--tasks", "a", "--tasks-path", tmp_path / "none")
    (tmp_path / "there.json").write_text("{}")
    assert "exists; --overwrite" in fails("--tasks", "a", "--output", tmp_path / "there.json")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate.Config(tasks=("a",), limit=0)
    with pytest.raises(ValueError, match="max_length must be from 2 to the 48 positions"):
        replace(model, max_length=POSITIONS + 1)
    with pytest.raises(ValueError, match="has no token of its own behind the context"):
        model.loglikelihood(requests(("a", "")))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        model.generate_until(requests(("a", {"max_gen_toks": POSITIONS})))


def test_embedded_facts_need_no_network(lm_eval, folder, tmp_path, capsys):
    with quiet():
        evaluate.main(["--model", str(folder), "--tasks", "facts_ko", "facts_en_unseen", "--limit", "4",
                       "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["results"].keys() == {"facts_ko", "facts_en_unseen"} and "facts_ko" in capsys.readouterr().out
    assert {count["effective"] for count in scores["n-samples"].values()} == {4}


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[eval\]"):
        open_tasks(["a"])
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[eval\]"):
        harness_scores(None, ["a"], None)
