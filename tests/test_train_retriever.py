"""The recipe with every representation: it learns, is measured, goes on where it was, and exports what it learnt."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.log import read_metrics
from jaxlm.core.tree import named_leaves
from jaxlm.data.beir import read_beir
from jaxlm.eval.ranking import read_run
from jaxlm.model import lora
from jaxlm.model.config import ComputeConfig
from jaxlm.model.encoder import build_encoder
from jaxlm.retrieval.embed import embed_texts, to_batch, tokenize
from jaxlm.retrieval.folder import load_text_encoder, save_text_encoder
from jaxlm.retrieval.learn import GuidedConfig, open_data_sets
from jaxlm.retrieval.packed_texts import Texts
from jaxlm.retrieval.rank import rank_towers
from jaxlm.retrieval.representations import REPRESENTATIONS
from jaxlm.retrieval.retriever_loss import NestedConfig
from jaxlm.retrieval.towers import KINDS, TowersConfig, adapted, load_params, open_towers
from jaxlm.train.checkpoint import saved_params
from jaxlm.train.pretrained import open_pretrained
from recipes import evaluate_retrieval, train_retriever
from tests.test_embed import ENCODER, encoder_of, random_params
from tests.test_retrieval_recipes import DOCUMENTS, QUERIES

TEXTS = ["a b c", "h", "a b c d e f g h a b c d", "c b a"]
DENSE = ["--lora.rank", "4", "--lora.targets", "attention", "mlp/up", "--nested.dims", "16", "4", "--optim.lr", "2e-2",
         "--query-prompt", "e ", "--passage-prompt", "f g "]
RUNS = {
    "dense": ("dense", True, DENSE),
    "sparse": ("sparse", False, ["--loss.similarity", "dot", "--loss.temperature", "0.3", "--sparse.warmup", "10",
                                "--optim.lr", "2e-2"]),
    "late": ("late", False, ["--loss.temperature", "0.1"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of dense vectors, another one for queries, and one of sparse vectors."""
    folder, encoder = tmp_path_factory.mktemp("models"), encoder_of(pooling="mean", similarity="cosine")[0]
    for name, config in (("dense", ENCODER), ("query", ENCODER), ("sparse", replace(ENCODER, mlm_head=True))):
        one = replace(encoder, model=build_encoder(replace(config, num_layers=1)))
        params = jax.tree.map(lambda x, name=name: x * (0.8 if name == "query" else 1), random_params(one.model))
        save_text_encoder(folder / name, one, params, architecture="bert",
                          vectors="sparse" if name == "sparse" else "dense")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in DOCUMENTS.items()])
    write("queries.jsonl", [{"_id": name, "text": text} for name, (text, _) in QUERIES.items()])
    lines = "".join(f"{name}\t{answer}\t1\n" for name, (_, answer) in QUERIES.items())
    for split in ("train", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def flags(models, data, folder, *more):
    return ["--init", str(models / "dense"), "--data.train", str(data), "--data.dev", str(data),
            "--batch.batch-size", "8", "--batch.num-negatives", "0", "--loop.steps", "60", "--loop.log-every", "1",
            "--optim.lr", "1e-2", "--checkpoint.every", "30", "--no-dropout", "--folder", str(folder), *more]


def command(name, models, data, folder):
    vectors, two, more = RUNS[name]
    extra = ["--query-init", str(models / "query")] if two else []
    extra += ["--init", str(models / "sparse")] if vectors == "sparse" else []
    return flags(models, data, folder, "--vectors", vectors, *extra, *more)


@pytest.fixture(scope="module")
def trained(models, data, tmp_path_factory):
    """Each run, made once: its folder, losses, towers, the parameters before and after."""
    found = {}

    def run(name):
        if name in found:
            return found[name]
        folder = tmp_path_factory.mktemp("runs") / name
        train_retriever.main(command(name, models, data, folder))
        config = train_retriever.flags.load_config(train_retriever.Config, folder / "config.json")
        towers = open_towers(config.towers, ComputeConfig(), config.loss.similarity)
        before = load_params(config.towers, towers, lambda path, leaf: leaf)
        shapes = jax.eval_shape(lambda: adapted(towers, config.lora, jax.random.key(0), before))
        found[name] = folder, towers, before, jax.device_get(saved_params(folder, shapes))
        return found[name]

    return run


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls_and_the_ranking_gets_better(name, trained, data):
    folder, towers, before, _ = trained(name)
    with pytest.raises(ValueError, match="is no run of a language model"):
        open_pretrained(folder)
    assert losses(folder)[-1] < 0.6 * losses(folder)[0]
    nested = NestedConfig(dims=(4,)) if name == "dense" else NestedConfig()
    sets = {data.name: read_beir(data, "dev")}
    at_first, _ = train_retriever.make_evaluation(towers, sets, nested)(before, 0)
    [measured] = [row for row in read_metrics(folder / "metrics.jsonl") if f"eval/{data.name}/ndcg@10" in row]
    for part in (data.name, f"{data.name}/first_4") if name == "dense" else (data.name,):
        assert measured[f"eval/{part}/ndcg@10"] > at_first[f"eval/{part}/ndcg@10"] + 0.05, part


def encoded(towers, params, kind):
    """What stands for each text, by the run's own parameters."""
    encoder = towers.encoder(kind)
    ids = tokenize(encoder, TEXTS, kind).ids
    batch = to_batch(ids, len(ids), encoder.max_length)
    encode = lambda params, tokens, mask: towers.representation.encode(encoder, params, Texts(tokens, mask), None)
    return jax.jit(encode)(towers.part(params, kind), *batch)


@pytest.mark.parametrize("name", RUNS)
def test_the_export_gives_the_vectors_of_the_run(name, trained):
    folder, towers, _, params = trained(name)
    vectors = RUNS[name][0]
    for kind in KINDS:
        source = folder / "exported" / ("" if towers.shared else kind)
        config = TowersConfig(init=str(source), vectors=vectors)
        loaded = open_towers(config, ComputeConfig(), "dot")
        assert loaded.passage.max_length == towers.passage.max_length
        mine = encoded(loaded, load_params(config, loaded, lambda path, leaf: leaf), kind)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(encoded(towers, params, kind)), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("name", RUNS)
def test_an_exported_folder_has_the_measures_of_the_run(name, trained, data, tmp_path):
    folder, towers, _, params = trained(name)
    vectors = ["--vectors", "late"] if name == "late" else []
    evaluate_retrieval.main(["--data", f"{data}?split=dev", "--models", str(folder / "exported"), "--output",
                             str(tmp_path), "--measures", *train_retriever.MEASURES, *vectors])
    [measured] = [row for row in read_metrics(folder / "metrics.jsonl") if f"eval/{data.name}/ndcg@10" in row]
    [numbers] = json.loads((tmp_path / "measures.json").read_text()).values()
    assert numbers["mean"] == pytest.approx({name: measured[f"eval/{data.name}/{name}"]
                                             for name in train_retriever.MEASURES}, abs=1e-9)
    run, width = read_run(tmp_path / "0_exported.trec"), towers.passage.width
    expected = rank_towers(towers._replace(params=params), read_beir(data, "dev"))[width]
    assert run.keys() == expected.keys() and all(len(own) == len(DOCUMENTS) for own in run.values())
    for query, own in expected.items():
        np.testing.assert_allclose([run[query][one] for one in own], list(own.values()), rtol=0,
                                   atol=2e-5 * max(map(abs, own.values())))


def test_only_adapters_learn_and_a_resumed_run_is_bit_identical(trained, models, data, tmp_path):
    whole, _, before, after = trained("dense")
    base = {path: leaf for path, leaf in named_leaves(after).items() if path in named_leaves(before)}
    assert base.keys() == named_leaves(before).keys()
    for path, leaf in named_leaves(before).items():
        np.testing.assert_array_equal(base[path], leaf, err_msg=path)
    moved = [path for path, leaf in named_leaves(after).items() if path.endswith("lora_b") and np.abs(leaf).max() > 0]
    assert len(moved) == 2 * 5 and {path.split("/")[0] for path in moved} == {*KINDS}
    assert not any(map(lora.is_adapter, named_leaves(load_text_encoder(whole / "exported/query")[1])))
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/60")
    train_retriever.main([*command("dense", models, data, tmp_path / "run"), "--resume"])
    assert losses(tmp_path / "run")[-30:] == losses(whole)[-30:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sentence_transformers_gives_the_same_vectors_and_scores(trained, data):
    library = pytest.importorskip("sentence_transformers", reason="pip install jaxlm[parity]")
    folder, towers, _, params = trained("dense")
    for kind in KINDS:
        theirs = library.SentenceTransformer(str(folder / "exported" / kind), device="cpu")
        assert theirs.prompts == {"query": "e ", "document": "f g "}
        theirs = theirs.encode(TEXTS, prompt_name={"passage": "document"}.get(kind, kind))
        mine = embed_texts(towers.encoder(kind), towers.part(params, kind), TEXTS, kind)
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=2e-5 * np.abs(mine).max())
    folder, towers, _, params = trained("sparse")
    model, test = library.SparseEncoder(str(folder / "exported"), device="cpu"), read_beir(data, "dev")
    theirs = model.encode(TEXTS, convert_to_sparse_tensor=False)
    np.testing.assert_allclose(np.asarray(theirs), encoded(towers, params, "query").x, rtol=0, atol=2e-5)
    theirs = model.similarity(model.encode_query(list(test.queries.values())),
                              model.encode_document(list(test.corpus.values())))
    mine = rank_towers(towers._replace(params=params), test)[towers.passage.width]
    mine = [[mine[query][one] for one in test.corpus] for query in test.queries]
    np.testing.assert_allclose(np.asarray(theirs), mine, rtol=0, atol=2e-5 * np.max(mine))


def test_the_guide_of_a_run(models, data):
    """Encoded by the devices of this process, each text once, with the prompts that are asked for."""
    sources = open_data_sets([str(data)])
    guide = train_retriever.open_guide(GuidedConfig(model=str(models / "dense"), passage_prompt="h "), sources)
    encoder, params = load_text_encoder(models / "dense")
    expected = embed_texts(replace(encoder, passage_prompt="h "), params, ["a b c", "c d", "a b c"], "passage")
    np.testing.assert_allclose(guide.of("passage", ["a b c", "c d", "a b c"]),
                               expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=0, atol=1e-6)
    assert len(guide.vectors["passage"]) == len({row.positives[0].text for row in sources[0].rows})


def test_faults_are_one_sentence_before_anything_is_written(models, data, tmp_path, capsys):
    other = replace(encoder_of()[0], model=build_encoder(replace(ENCODER, d_model=8, num_layers=1)))
    save_text_encoder(tmp_path / "narrow", other, random_params(other.model), architecture="bert")
    for more, message in (
        (["--batch.num-negatives", "1", "--loss.kind", "kl"], "fewer than num_negatives"),
        (["--loss.kind", "kl"], "set batch.num_negatives to 1 or more"),
        (["--nested.dims", "17"], "17 is more than the 16 numbers"),
        (["--vectors", "sparse"], "missing"),
        (["--vectors", "late", "--pooling", "mean"], "pooling has no effect on late"),
        (["--sparse.query", "1"], "sparse vectors only"),
        (["--loss.kind", "kl", "--guide.model", "x"], "--guide.model has no effect on kl alone"),
        (["--query-init", str(tmp_path / "narrow")], "the width of its vectors is 8, not 16"),
        (["--lora.rank", "2", "--lora.targets", "gate"], "matches no kernel of this model"),
    ):
        with pytest.raises(SystemExit) as end:
            train_retriever.main(flags(models, data, tmp_path / "run", *more))
        assert end.value.code == 2 and message in capsys.readouterr().err, message
    assert not (tmp_path / "run").exists()


def test_the_representations_have_a_run():
    assert {vectors for vectors, _, _ in RUNS.values()} == set(REPRESENTATIONS)
