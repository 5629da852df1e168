"""A model of ours in mteb: its measures are those of our own evaluation, and each kind of text gets its prompt."""

import json
import sys
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.eval import mteb_model as adapter
from jaxlm.eval.mteb_model import MtebModel, mteb_model, mteb_scores, mteb_tasks
from jaxlm.eval.ranking import evaluate_run
from jaxlm.retrieval.embed import embed_texts
from jaxlm.retrieval.folder import save_text_encoder
from jaxlm.retrieval.index import as_run, search
from jaxlm.retrieval.towers import Towers, siamese
from recipes import evaluate_retrieval
from tests.test_embed import encoder_of

RNG = np.random.default_rng(3)
CORPUS = {f"d{i}": (["", "a b"][i % 2], " ".join(RNG.choice(list("abcdefgh"), 1 + i % 7))) for i in range(40)}
QUERIES = {f"q{i}": " ".join(RNG.choice(list("abcdefgh"), 1 + i % 3)) for i in range(12)}
QRELS = {query: {f"d{i}": int(RNG.integers(1, 4)) for i in RNG.choice(40, 3, replace=False)} for query in QUERIES}
PASSAGES = [f"{title} {text}".strip() for title, text in CORPUS.values()]


@pytest.fixture(scope="module")
def mteb():
    """Imported here: it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        return pytest.importorskip("mteb", reason="the extra mteb is not installed")


def retriever(similarity="dot", **prompts):
    encoder, params = encoder_of(pooling="mean", normalize=False, similarity=similarity)
    return siamese(replace(encoder, **prompts), params=params)


def two_towers(ours, query_params):
    return Towers(ours.query, ours.passage, shared=False, vectors="dense",
                  params={"query": query_params, "passage": ours.params})


def local_task(mteb):
    """A retrieval task with data in memory, which remembers the measures of each query."""
    from datasets import Dataset

    class Local(mteb.abstasks.AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="JaxlmLocal", description="letters", dataset={"path": "none", "revision": "1"}, type="Retrieval",
            category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10")
        measured = None

        def load_data(self, **_):
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list([{"id": name, "title": title, "text": text}
                                             for name, (title, text) in CORPUS.items()]),
                "queries": Dataset.from_list([{"id": name, "text": text} for name, text in QUERIES.items()]),
                "relevant_docs": QRELS, "top_ranked": None}}}
            self.data_loaded = True

        def task_specific_scores(self, scores, *args, **kwargs):
            self.measured = scores
            return {}

    return Local()


def measured(ours):
    """By our own evaluation."""
    queries, passages = (embed_texts(ours.passage, ours.params, texts, kind)
                         for texts, kind in ((list(QUERIES.values()), "query"), (PASSAGES, "passage")))
    hits = search(queries, [passages], 40, similarity=ours.similarity, ids=list(CORPUS))
    return evaluate_run(as_run(hits, list(QUERIES), list(CORPUS)), QRELS, ("ndcg@10", "recall@5"))


def test_measures_are_those_of_our_own_evaluation(mteb, tmp_path):
    ours, task = retriever("cosine", query_prompt="e f ", passage_prompt="g "), local_task(mteb)
    [score] = mteb_scores(mteb_model(ours, "tiny"), [task], tmp_path).values()
    expected = measured(ours)
    for name, theirs in (("ndcg@10", "ndcg_cut_10"), ("recall@5", "recall_5")):
        found = [task.measured[query][theirs] for query in expected.queries]
        np.testing.assert_allclose(found, expected.values[name], rtol=0, atol=1e-6)
    assert 0.05 < score < 0.95 and abs(score - expected.values["ndcg@10"].mean()) <= 5.1e-6  # mteb rounds to 5 digits
    assert list(tmp_path.rglob("JaxlmLocal.json"))
    task.measured = None
    assert mteb_scores(mteb_model(ours, "tiny"), [task], tmp_path) == {"JaxlmLocal": score}
    assert task.measured is None, "kept, not run again"


def test_the_protocol_and_the_similarities(mteb):
    for similarity in ("dot", "cosine"):
        model = mteb_model(retriever(similarity), "tiny")
        assert isinstance(model, mteb.models.EncoderProtocol)
        a, b = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)
        expected = a @ b.T
        if similarity == "cosine":
            expected /= np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(model.similarity(a, b), expected, rtol=1e-5)
        np.testing.assert_allclose(model.similarity_pairwise(a, b), np.diag(expected), rtol=1e-5)
        assert model.mteb_model_meta.similarity_fn_name == similarity
    meta = model.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.max_tokens, meta.use_instructions) == ("jaxlm/tiny", 16, 20, False)
    other = mteb_model(retriever("cosine", query_prompt="a "), "tiny").mteb_model_meta
    moved = jax.tree.map(lambda leaf: leaf + 1, retriever().params)
    third = mteb_model(two_towers(retriever("cosine"), moved), "tiny").mteb_model_meta
    assert len({meta.revision, other.revision, third.revision}) == 3 and third.n_parameters == 2 * meta.n_parameters


class Task:
    name = "some"


def encode(model, texts, prompt_type, **more):
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    return model.encode(batches, task_metadata=Task, hf_split="test", hf_subset="default", prompt_type=prompt_type,
                        **more)


def test_each_kind_of_text_gets_its_prompt_and_tower(mteb):
    ours = retriever(query_prompt="e f ", passage_prompt="g ")
    other = jax.tree.map(lambda leaf: 0.5 * leaf, ours.params)
    model = MtebModel(two_towers(ours, other), None)
    kinds, texts = mteb.types.PromptType, ["a", "b c", "d"]
    plain = replace(ours.passage, query_prompt="", passage_prompt="")
    for prompt_type, params, prefix in ((kinds.query, other, "e f "), (kinds.document, ours.params, "g "),
                                        (None, ours.params, "")):
        expected = embed_texts(plain, params, [prefix + text for text in texts], "passage")
        np.testing.assert_allclose(encode(model, texts, prompt_type, batch_size=7), expected, atol=1e-6)
    with pytest.raises(ValueError, match="encode_kwargs precision cannot be given"):
        encode(model, texts, None, precision="int8")
    with pytest.raises(ValueError, match="task some has inputs of image; only text"):
        model.encode([{"image": []}], task_metadata=Task, hf_split="test", hf_subset="default")


def test_the_recipe(mteb, tmp_path, monkeypatch, capsys):
    encoder, params = encoder_of(pooling="mean", normalize=False, similarity="dot")
    save_text_encoder(tmp_path / "tiny", encoder, params, architecture="bert")
    monkeypatch.setattr(mteb, "get_task", lambda name: local_task(mteb))
    flags = ["--mteb", "JaxlmLocal", "--models", str(tmp_path / "tiny")]
    evaluate_retrieval.main([*flags, "--output", str(tmp_path / "out")])
    [(name, scores)] = json.loads((tmp_path / "out/mteb.json").read_text()).items()
    assert name == str(tmp_path / "tiny") and scores.keys() == {"JaxlmLocal"}
    assert f"| {name} | {scores['JaxlmLocal']:.5f} |" in capsys.readouterr().out
    assert abs(scores["JaxlmLocal"] - measured(retriever("dot")).values["ndcg@10"].mean()) <= 5.1e-6
    for more, message in ((["--measures", "mrr@5"], "--measures has no effect on tasks of mteb"),
                          (["--data", "scifact"], "--data has no effect on tasks of mteb"),
                          (["--models", "bm25"], "folders of models only")):
        with pytest.raises(SystemExit):
            evaluate_retrieval.main([*flags, *more])
        assert message in capsys.readouterr().err


def test_errors(mteb, monkeypatch):
    with pytest.raises(ValueError, match=r"'SciFac' not found\. Did you mean: 'SciFact'"):
        mteb_tasks(["SciFac"])
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[mteb\]"):
        adapter.mteb_model(retriever(), "tiny")
