"""What attempts are made in: a corpus to search, templates without tools, tools that are only schemas, sets."""

import gzip
import json
import logging
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.data.chat_template import CHATML, HERMES, ChatTemplate
from jaxlm.retrieval.embed import embed_texts
from jaxlm.retrieval.folder import save_text_encoder
from jaxlm.reward.presets import PRESETS as REWARDS
from jaxlm.rl.env import EnvConfig
from jaxlm.rl.scene import TaskConfig, open_scene
from jaxlm.rl.search_tools import DENSE_SEARCH, KEYWORD_SEARCH, Passage, SearchConfig, read_passages
from jaxlm.rl.task_set import open_task_set
from tests.test_embed import WORDS as VOCABULARY
from tests.test_embed import encoder_of
from tests.test_tasks import bfcl_file
from tests.tiny_chat import json_tokenizer

WORDS = "words:train?count=4&num_tools=4&max_calls=1"
SEOUL = {"id": "seoul", "title": "Seoul", "text": "The capital of Korea lies on the Han river.", "url": "not read"}
BUSAN = {"id": "busan", "title": "", "text": "A port in the south."}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def scene(own=HERMES, tasks=None, env=None, *, max_prompt=10_000, tokenizer=None):
    opened = open_scene(tasks or TaskConfig(train=(WORDS,), held_out=()), env or EnvConfig(), REWARDS["mentor"],
                        own and ChatTemplate(own), tokenizer or json_tokenizer(), max_prompt=max_prompt, at_least=1)
    opened.scene.env.close()
    return opened


# ---- search

def test_every_task_can_search_in_a_corpus(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", SEOUL, "", BUSAN)
    assert read_passages(corpus) == [Passage("Seoul", SEOUL["text"]), Passage("", BUSAN["text"])]
    config = TaskConfig(train=(WORDS,), held_out=("words:unseen?count=2&num_tools=4&max_calls=1",),
                        search=SearchConfig(corpus=str(corpus)))
    opened, plain = scene(tasks=config), scene(tasks=replace(config, search=SearchConfig()))
    tokenizer = json_tokenizer()
    for task in (*opened.scene.tasks, *opened.sets["words:unseen"].tasks):
        assert task.tools.count(KEYWORD_SEARCH) == 1
    assert set(opened.scene.env.tools) == {*plain.scene.env.tools, KEYWORD_SEARCH}
    shown = tokenizer.decode(opened.scene.prompts[0])
    assert KEYWORD_SEARCH in shown and KEYWORD_SEARCH not in tokenizer.decode(plain.scene.prompts[0])
    env, task = opened.scene.env, opened.scene.tasks[0]
    state, observations, over = env.step(env.reset(task), '<tool_call>\n{"name": "keyword_search", "arguments": '
                                                          '{"query": "river in Korea"}}\n</tool_call>')
    assert observations[0].text == f"[1] Seoul\n{SEOUL['text']}\n\n[2] \nA port in the south."
    assert not over and state.failed == state.invalid == 0


def test_a_search_by_a_models_vectors_whatever_the_mesh(tmp_path):
    encoder, params = encoder_of(normalize=False, similarity="cosine")
    save_text_encoder(tmp_path / "model", encoder, params, architecture="bert")
    words = VOCABULARY[5:]
    texts = [" ".join(words[(3 * i + k * k) % len(words)] for k in range(6)) for i in range(len(words))]
    rows = [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
    config = SearchConfig(corpus=str(write(tmp_path / "corpus.jsonl", *rows)), model=str(tmp_path / "model"))
    opened = scene(tasks=TaskConfig(train=(WORDS,), held_out=(), search=config))
    assert opened.scene.tasks[0].tools[-2:] == (KEYWORD_SEARCH, DENSE_SEARCH)
    tool = opened.scene.env.tools[DENSE_SEARCH]
    vectors = embed_texts(encoder, params, texts, "passage")
    for query in (texts[4], " ".join(words[::3])):
        q = embed_texts(encoder, params, [query], "query")[0]
        best = int(np.argmax(vectors @ q / np.linalg.norm(vectors, axis=1)))
        with jax.set_mesh(make_mesh(MeshConfig())):
            assert tool.call(query=query, top_n=1) == f"[1] \n{texts[best]}"
    with pytest.raises(ValueError, match=r"search\.corpus names nothing to search in"):
        SearchConfig(model="x")


def test_a_task_that_names_the_search_needs_a_corpus(tmp_path):
    task = {"id": "a", "question": "Where is Seoul?", "tools": [KEYWORD_SEARCH], "answers": ["Korea"], "judge": "exact",
            "domain": "places"}
    tasks, corpus = write(tmp_path / "tasks.jsonl", task), write(tmp_path / "corpus.jsonl", SEOUL)
    with pytest.raises(ValueError, match="no corpus is named to search in"):
        open_task_set([str(tasks)])
    other = write(tmp_path / "dense.jsonl", {**task, "tools": [DENSE_SEARCH]})
    with pytest.raises(ValueError, match=r"no model is named to search with .--tasks.search.model"):
        open_task_set([str(other)], SearchConfig(corpus=str(corpus)))
    found = open_task_set([str(tasks)], SearchConfig(corpus=str(corpus)))
    assert found.tasks()[0].tools == (KEYWORD_SEARCH,) and [tool.name for tool in found.tools] == [KEYWORD_SEARCH]


@pytest.mark.parametrize(("rows", "message"), [
    ((), "holds no passage"),
    ((SEOUL, BUSAN, {"id": "x", "title": "X"}), "3: no field 'text'; fields: id, title"),
    ((SEOUL, {"id": 7, "title": "X", "text": "x"}), "2: field 'id' must be a text, got 7"),
    ((SEOUL, {"id": "x", "title": None, "text": "x"}), "2: field 'title' must be a text, got None"),
    ((SEOUL, {"id": "x", "title": "X", "text": " "}), "2: field 'text' is empty"),
    ((SEOUL, BUSAN, SEOUL), "3: the id 'seoul' is that of line 1"),
    ((SEOUL, "{"), "2: "),
    ((SEOUL, "[1]"), "2: a row must be an object"),
])
def test_a_corpus_that_is_none(tmp_path, rows, message):
    corpus = write(tmp_path / "corpus.jsonl", *rows)
    with pytest.raises(ValueError, match=f"corpus.jsonl:? ?{message}"):
        scene(tasks=TaskConfig(train=(WORDS,), held_out=(), search=SearchConfig(corpus=str(corpus))))


def test_a_corpus_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read: No such file"):
        open_task_set([WORDS], SearchConfig(corpus=str(tmp_path / "none.jsonl")))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(SEOUL).encode())[:-9])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: ends in the middle of the gzip stream"):
        open_task_set([WORDS], SearchConfig(corpus=str(path)))


# ---- templates, schemas

def test_a_template_without_tools_says_which_flag_helps(caplog):
    with pytest.raises(ValueError, match=r"shows no tools.*the model brings does not serve.*--env.template hermes$"):
        scene(own=CHATML)
    with pytest.raises(ValueError, match=r"chatml does not serve tools: give --env.template hermes$"):
        scene(env=EnvConfig(template="chatml"))
    with pytest.raises(ValueError, match=r"--env.template FILE, a Jinja file that does$"):
        scene(own="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
              tokenizer=json_tokenizer(("<s>", "</s>", "<pad>")))
    # The form of observations is another flag's fault.
    with pytest.raises(ValueError, match="observations in the form 'mentor' need the special token") as error:
        scene(own="{{ tools }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
              env=EnvConfig(observation="mentor"), tokenizer=json_tokenizer(("<s>", "</s>", "<pad>")))
    assert "--env.template" not in str(error.value)
    with caplog.at_level(logging.INFO):
        for own, name, words in ((HERMES, "", "the model's own"), (CHATML, "hermes", "hermes"),
                                 (None, "", "hermes, for the model brings none")):
            caplog.clear()
            scene(own=own, env=EnvConfig(template=name))
            assert f"chat template: {words}" in caplog.messages


def test_tools_that_are_only_schemas_end_an_episode(tmp_path):
    tasks = TaskConfig(train=(f"bfcl:{bfcl_file(tmp_path)}",), held_out=())
    with pytest.raises(ValueError, match=r"'geo.weather' has a schema and nothing.*turn: give --env.max-turns 1$"):
        scene(tasks=tasks)
    env, task = (opened := scene(tasks=tasks, env=EnvConfig(max_turns=1))).scene.env, opened.scene.tasks[0]
    call = '<tool_call>\n{"name": "geo.weather", "arguments": {"place": "Seoul"}}\n</tool_call>'
    assert env.step(env.reset(task), call)[2]


# ---- sets

def test_sets_have_short_names_where_they_differ_and_long_prompts_are_left_out(caplog):
    one, other = "words:unseen?count=2&domains=post", "words:unseen?count=2&domains=ocean"
    for pair, names in (((one, "words:held_out?count=2"), ["words:unseen", "words:held_out"]),
                        ((one, other), [one, other])):
        assert list(scene(tasks=TaskConfig(train=(WORDS,), held_out=pair)).sets) == names
    lengths = sorted(len(ids) for ids in scene().scene.prompts.values())
    assert len(set(lengths)) > 1
    opened = scene(max_prompt=lengths[-1] - 1)
    assert len(opened.scene.prompts) < 4 and "are left out: their prompts are longer" in caplog.text
    with pytest.raises(ValueError, match=r"0 tasks are fewer than batch.prompts 1"):
        scene(max_prompt=10)
