"""White-box distillation: the loss against float64, what the teacher may not feel, and the recipe as users meet it."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.core.config import from_json, to_json
from jaxlm.core.log import read_metrics
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch, tree_shardings
from jaxlm.data.chat_examples import ChatFormat, Chats, chat_example, encode_source
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.data.conversations import open_conversations
from jaxlm.data.pipeline import whole_batches
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.objective.distill import DIVERGENCES, DistillConfig
from jaxlm.train.distill import (
    TEACHER,
    Pair,
    check_loss,
    make_agreement,
    make_distill_loss,
    make_distill_step,
    student_nll,
    student_part,
)
from jaxlm.train.pretrained import load_pretrained
from jaxlm.train.state import state_of
from recipes.distill import PRESETS, Config, check, main
from tests.test_distill import kl, reference, softmax
from tests.tiny_chat import MODEL, json_tokenizer, tiny_folder

TOKENS = 261  # of the tokenizer; the models have more rows
TEACHER_MODEL = replace(MODEL, d_model=24, num_layers=2, vocab_size=264, init_std=0.5)
STUDENT_MODEL = replace(MODEL, vocab_size=272)
PAIR = Pair(build(STUDENT_MODEL), build(TEACHER_MODEL), TOKENS, num_chunks=2)


@pytest.fixture(scope="module")
def params():
    """Of the student, with the teacher's."""
    init = lambda key: {**PAIR.student.init(key), TEACHER: PAIR.teacher.init(jax.random.fold_in(key, 1))}
    return jax.jit(init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """Packed rows of uneven masks."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TOKENS, (16, 9)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (16, 8)), axis=1).astype(np.int32)
    mask = (rng.random((16, 8)) < np.linspace(0.1, 1, 16)[:, None]).astype(np.float32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (16, 8)).copy()
    return LMBatch(tokens[:, :-1], tokens[:, 1:], mask, segments, positions)


def logits_of(params, batch):
    """Of teacher and student, float64 [B, T, TOKENS]."""
    out = [jax.jit(model.apply)(part, batch.tokens, positions=batch.positions, segments=batch.segments).logits
           for model, part in ((PAIR.teacher, params[TEACHER]), (PAIR.student, student_part(params)))]
    return [np.asarray(x, np.float64)[..., :TOKENS] for x in out]


LOSSES = {
    **{name: ({"divergence": name, "mix": None if name in ("forward_kl", "reverse_kl") else 0.3}, {})
       for name in DIVERGENCES},
    "hot": ({"temperature": 2.0, "scale_gradient": True}, {}),
    "top_k": ({"divergence": "reverse_kl", "temperature": 1.5}, {"top_k": 5}),
    "top_k_all_but_one": ({}, {"top_k": TOKENS - 1}),
    "mixed": ({"temperature": 2.0}, {"top_k": 5, "hard_weight": 0.3}),
}


def expected(teacher, student, targets, mask, *, divergence="forward_kl", mix=None, temperature=1.0,
             scale_gradient=False, top_k=0, hard_weight=0.0):
    """The summed loss, straight from its definition."""
    t, s = softmax(teacher / temperature), softmax(student / temperature)
    if top_k:
        best = np.argsort(-t, axis=-1)[..., :top_k]
        t, s = (np.concatenate((kept := np.take_along_axis(p, best, -1), 1 - kept.sum(-1, keepdims=True)), axis=-1)
                for p in (t, s))
    soft = reference(divergence, t, s, mix) * (temperature**2 if scale_gradient else 1)
    hard = -np.log(np.take_along_axis(softmax(student), targets[..., None], axis=-1)[..., 0])
    return np.sum(mask * ((1 - hard_weight) * soft + hard_weight * hard))


def test_every_loss_is_its_definition(params, batch):
    made = {name: make_distill_loss(PAIR, DistillConfig(**one), **more) for name, (one, more) in LOSSES.items()}
    found = jax.jit(lambda params: {name: loss(params, batch, None) for name, loss in made.items()})(params)
    teacher, student = logits_of(params, batch)
    for name, (one, more) in LOSSES.items():
        total, metrics = found[name]
        wanted = expected(teacher, student, batch.targets, batch.loss_mask, **one, **more)
        np.testing.assert_allclose(total, wanted, rtol=2e-5, err_msg=name)
        assert metrics["loss"] == (total, batch.loss_mask.sum()), name
    assert set(found["mixed"][1]) == {"loss", "divergence", "nll"}
    # All tokens but one and the rest are all tokens.
    np.testing.assert_allclose(found["top_k_all_but_one"][0], found["forward_kl"][0], rtol=1e-5)


def test_agreement(params, batch):
    teacher, student = logits_of(params, batch)
    found = make_agreement(PAIR)(student_part(params), params[TEACHER], batch)
    same = teacher.argmax(-1) == student.argmax(-1)
    np.testing.assert_allclose(found.kl.total, np.sum(batch.loss_mask * kl(softmax(teacher), softmax(student))),
                               rtol=1e-5)
    assert found.same == (np.sum(batch.loss_mask * same), batch.loss_mask.sum())
    itself = make_agreement(PAIR._replace(student=PAIR.teacher))(params[TEACHER], params[TEACHER], batch)
    assert itself.kl.total == 0 and itself.same.value() == 1


def test_what_belongs_to_no_token_counts_nowhere_and_the_teacher_feels_nothing(params, batch):
    """Padded rows of both vocabularies: any numbers there change nothing and get no gradient."""
    made = [make_distill_loss(PAIR, DistillConfig(), top_k=k, hard_weight=0.2) for k in (0, 5)]
    gradient = jax.jit(jax.value_and_grad(lambda params: sum(loss(params, batch, None)[0] for loss in made)))
    wild = jax.tree.map(lambda x: x, params)
    for part in (wild, wild[TEACHER]):
        part["head"]["kernel"] = part["head"]["kernel"].at[:, TOKENS:].set(50.0)
    (value, grads), (same, _) = gradient(params), gradient(wild)
    assert value == same
    assert not np.any(grads["head"]["kernel"][:, TOKENS:]) and np.all(np.any(grads["head"]["kernel"][:, :TOKENS], 0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[TEACHER]))
    nll = student_nll(PAIR)
    assert nll(student_part(params), batch) == nll(student_part(wild), batch)


def steps(params, batch, accumulate=1):
    """Losses of two steps, the second with a smaller teacher; the last state, and how often the loss was traced."""
    mesh, traced = make_mesh(MeshConfig(fsdp=2)), []
    loss = make_distill_loss(PAIR, DistillConfig())

    def counted(params, batch, key):
        traced.append(key)
        return loss(params, batch, key)

    tx = optax.adam(1e-3)
    step = make_distill_step(counted, tx, optax.constant_schedule(1e-3), mesh=mesh, rules=PARAM_RULES,
                             accumulate=accumulate)
    placed = lambda tree: jax.device_put(tree, tree_shardings(tree, PARAM_RULES, mesh))
    state = state_of(placed(jax.tree.map(jnp.copy, student_part(params))), tx, mesh, PARAM_RULES)
    losses, counts = [], []
    with jax.set_mesh(mesh):
        for scale in (1, 0.5):
            teacher = placed(jax.tree.map(lambda x, scale=scale: scale * x, params[TEACHER]))
            state, metrics = step(state, teacher, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            counts.append(len(traced))
    return losses, state, counts


def test_steps(params, batch):
    """The teacher is an argument that stays as it is, outside the state; micro-batches change nothing."""
    before = jax.device_get(params)
    losses, state, counts = steps(params, batch)
    assert counts[0] == counts[1] and losses[1] < 0.9 * losses[0]  # half a teacher is easier to learn
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(state.params) == shapes(student_part(params)) and TEACHER not in str(shapes(state))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, student_part(before))
    assert all(jax.tree.leaves(moved))
    again, other, _ = steps(params, batch, accumulate=2)
    np.testing.assert_allclose(losses, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, other.params)


def test_packing_changes_nothing(params):
    """Sums over the assistant's tokens of packed rows are those of each conversation alone."""
    form = ChatFormat(ChatTemplate(CHATML), json_tokenizer())
    chats = encode_source(open_conversations(chat_rows(7)), form, seq_len=200)
    loss = jax.jit(lambda batch: make_distill_loss(PAIR, DistillConfig(), hard_weight=0.5)(params, batch, None)[1])
    packed = whole_batches(chats, chat_example, batch_size=2, seq_len=200)
    alone = [batch for one in chats for batch in whole_batches(
        Chats("one", chats.config, [one]), chat_example, batch_size=2, seq_len=200)]
    a, b = (jax.tree.map(lambda *parts: np.sum(parts), *map(loss, part)) for part in (packed, alone))
    assert len(packed) < len(alone) and a["loss"].weight == chats.num_targets
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


# --- the recipe --------------------------------------------------------------------------------------------------


def chat_rows(count):
    return [{"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                          {"role": "assistant", "content": f"It is {2 * i}."}] * (1 + i % 3)} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, conversations, a teacher, and a model of another tokenizer."""
    folder = tmp_path_factory.mktemp("distill")
    texts = [{"text": f"{i} plus {i} is {2 * i}. " * (1 + i % 3)} for i in range(40)]
    for name, rows in (("texts", texts), ("held_texts", texts[:5]), ("chats", chat_rows(30)),
                       ("held_chats", chat_rows(4))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_folder(folder / "teacher")
    tiny_folder(folder / "other", specials=("<s>", "</s>", "<pad>"), template=None)
    return folder


def flags(folder, run, steps, *extra, kind="texts"):
    return ["--teacher", str(folder / "teacher"), "--folder", str(run), "--data.path", str(folder / f"{kind}.jsonl"),
            "--data.held-out", str(folder / f"held_{kind}.jsonl"), "--pipeline.batch-size", "8",
            "--pipeline.seq-len", "64", "--loop.log-every", "1", "--loop.eval-every", "100", "--checkpoint.every", "2",
            "--optim.schedule.decay", "0", "--loop.steps", str(steps), "--samples.tokens", "2",
            "--answers.count", "0", *extra]


STUDENT = ["--model.vocab-size", "272", "--model.d-model", "8", "--model.num-layers", "1", "--model.num-heads", "1",
           "--model.head-dim", "8", "--model.d-ff", "16", "--model.max-positions", "128"]


def losses(run):
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}


def refused(capfd, *arguments):
    """The error of a command that must fail before it trains."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "step 1/" not in out and "Traceback" not in err
    return re.sub(r"[│\s]+", " ", err)


def test_documents_and_resume(folder, tmp_path, capfd):
    """It learns, measures, keeps the student alone, and goes on as if it had not stopped; not with another teacher."""
    run = [*flags(folder, tmp_path / "run", 4, "--optim.lr", "1e-2"), *STUDENT]
    main(run)
    found = losses(tmp_path / "run")
    assert sorted(found) == [1, 2, 3, 4] and found[4] < found[1]
    measured = next(r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "eval/kl_held_texts" in r)
    assert measured["step"] == 4 and 0 < measured["eval/kl_held_texts"] < 6 and measured["eval/bpb_held_texts"] > 0
    assert 0 <= measured["eval/agreement_held_texts"] <= 1
    saved = load_pretrained(tmp_path / "run")
    assert saved.config.vocab_size == 272 and set(saved.params) == {"embed", "final_norm", "head", "layers"}
    cut = [*run[:2], "--folder", str(tmp_path / "cut"), *run[4:]]
    main([*cut, "--loop.steps", "2"])
    main([*cut, "--resume"])
    assert losses(tmp_path / "cut") == found
    tiny_folder(tmp_path / "changed", seed=1)
    assert "has not the weights that this run began with" in refused(
        capfd, *cut, "--resume", "--loop.steps", "5", "--teacher", str(tmp_path / "changed"))


def test_conversations_from_a_student_that_exists(folder, tmp_path):
    """A student with the teacher's weights has nothing to learn from it: the assistant's tokens only, K of them."""
    run = flags(folder, tmp_path / "run", 2, "--data.chats", "--pipeline.packing", "first_fit", "--pipeline.num-bins",
                "4", "--init", str(folder / "teacher"), "--top-k", "8", "--pipeline.seq-len", "200",
                "--optim.lr", "1e-9", kind="chats")
    main(run)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    measured = next(r for r in records if "eval/kl_held_chats" in r)
    assert losses(tmp_path / "run")[1] < 1e-6 and measured["eval/agreement_held_chats"] > 0.99
    assert measured["eval/loss_held_chats"] > 0 and records[0]["no_target"] > 0.5
    assert load_pretrained(tmp_path / "run").chat.source == CHATML


def test_wrong_flags(folder, tmp_path, capfd, monkeypatch):
    run = tmp_path / "new"
    bare = flags(folder, run, 2)
    ok = [*bare, *STUDENT]
    cases = {
        r"--init \S+other has another tokenizer than --teacher \S+teacher \(fingerprints": [
            *bare, "--init", str(folder / "other")],
        "wrong tokenizer: it has 261 tokens, the model's vocabulary 260": [*ok, "--model.vocab-size", "260"],
        "top_k 261 must be from 1 to 260": [*ok, "--top-k", "261"],
        "hard_weight must be at least 0 and below 1": [*ok, "--hard-weight", "1"],
        r"--teacher \S+teacher: pipeline.seq_len 512 exceeds model.max_positions 256": [
            *ok, "--pipeline.seq-len", "512", "--model.max-positions", "512"],
        "leave out the --model flags": [*ok, "--init", str(folder / "teacher")],
        "data.train_on has an effect on conversations only": [*ok, "--data.train-on", "last"],
        "concat would cut conversations": [*flags(folder, run, 2, "--data.chats", kind="chats"), *STUDENT],
        r"template hermse is neither .*\(did you mean 'hermes'\?\)": [
            *flags(folder, run, 2, "--data.chats", "--data.template", "hermse", kind="chats"), *STUDENT],
        "--teacher nowhere does not exist": [*ok, "--teacher", "nowhere"],
        "distill.mix has no effect on forward_kl": [*ok, "--distill.mix", "0.5"],
    }
    for message, arguments in cases.items():
        assert re.search(message, refused(capfd, *arguments)), message
        assert not run.exists()
    monkeypatch.chdir(tmp_path)
    assert "--teacher runs/demo does not exist; `make demo` makes it" in refused(capfd, "--folder", str(run))


def test_losses_that_cannot_be():
    check_loss(10, top_k=9, hard_weight=0.99)
    for top_k, hard_weight in ((10, 0.0), (-1, 0.0), (0, 1.0), (0, -0.1)):
        with pytest.raises(ValueError, match=r"top_k|hard_weight"):
            check_loss(10, top_k=top_k, hard_weight=hard_weight)


def test_presets_are_complete():
    for name, config in PRESETS.items():
        assert from_json(Config, to_json(config)) == config, name
        check(config, make_mesh(config.mesh))
