"""Multi-token prediction against a plain implementation of one document, and what must not notice it."""

import functools
import logging
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.batch import LMBatch
from jaxlm.core.mesh import MeshConfig, make_mesh, put_batch, tree_shardings
from jaxlm.core.tree import count_parameters, named_leaves
from jaxlm.data.packing import to_inputs
from jaxlm.model.cache import init_cache
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token, num_parameters
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf, save_hf
from jaxlm.model.partition import PARAM_RULES
from jaxlm.objective.lm import look_ahead
from jaxlm.train.run import make_loss
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_step
from tests.test_mix_ln import block, close, params_of, reference_head, reference_hidden, rms

NTP = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=24,
                  max_positions=64)
MTP = replace(NTP, mtp_depth=1)
TWO = replace(NTP, mtp_depth=2, post_norm_layers=1)
WEIGHT = 0.3


def row_of(*lengths, width):
    """A row of T+1 tokens with documents of these lengths, the rest padding; every token is drawn once or more."""
    rng = np.random.default_rng(sum(lengths))
    segments = np.repeat(np.arange(1, len(lengths) + 1), np.asarray(lengths, int))
    tokens = rng.integers(1, NTP.vocab_size, len(segments))
    pad = (0, width - len(segments))
    return {"tokens": np.pad(tokens, pad).astype(np.int32), "segments": np.pad(segments, pad).astype(np.int32),
            "loss": np.pad(np.ones(len(segments)), pad)}


def batch_of(*rows, **arguments):
    return to_inputs({name: np.stack([row[name] for row in rows]) for name in rows[0]}, **arguments)


def packed_batch():
    """Of 17 tokens a row: documents of 1 to 9 tokens, one that ends with its row, padding, and tokens without loss."""
    rows = [row_of(5, 1, 8, 3, width=17), row_of(9, 2, width=17), row_of(17, width=17), row_of(4, 7, 4, width=17)]
    rows[0]["loss"][[2, 9]] = 0
    rows[3]["loss"][:3] = 0
    return batch_of(*rows)


@functools.partial(jax.jit, static_argnames=("model", "chunks"))
def loss_and_grads(model, params, batch, chunks=1):
    """((sum, metrics), gradients)"""
    loss = make_loss(model, chunks=chunks, mtp_weight=WEIGHT)
    return jax.value_and_grad(loss, has_aux=True)(params, batch, None)


# The plain implementation: document by document, depth by depth.


def reference_depths(config, params, tokens):
    """log p of every token after t+1 by depth, of one document: entry k-1 has [T-k, V] for t = 0 to T-k-1."""
    h, found = reference_hidden(jnp, config, params, tokens), []
    for k in range(1, config.mtp_depth + 1):
        depth = jax.tree.map(lambda leaf, k=k: leaf[k - 1], params["mtp"])
        if len(tokens) <= k:
            break
        h = h[:-1]  # of the last position no token t+k is known
        next_token = params["embed"]["embedding"][tokens[k:]]
        both = jnp.concatenate((rms(jnp, h, depth["hidden_norm"]["scale"], config),
                                rms(jnp, next_token, depth["token_norm"]["scale"], config)), axis=-1)
        h = block(jnp, both @ depth["project"]["kernel"], depth["block"], config)
        h = rms(jnp, h, depth["final_norm"]["scale"], config)
        found.append(jax.nn.log_softmax(h @ reference_head(config, params)))
    return found


def documents_of(rows):
    """(tokens, loss) of every document of rows of T+1."""
    for row in rows:
        for number in range(1, row["segments"].max() + 1):
            inside = row["segments"] == number
            yield row["tokens"][inside], row["loss"][inside]


def reference_loss(config, params, documents):
    """(sum of the loss, (next-token sum and count, sum and count of the depths))"""
    sums = {"loss": [0.0, 0], "mtp_loss": [0.0, 0]}
    for tokens, counts in documents:
        first = jax.nn.log_softmax(reference_hidden(jnp, config, params, tokens) @ reference_head(config, params))
        for ahead, logp in enumerate([first, *reference_depths(config, params, tokens)], start=1):
            name = "loss" if ahead == 1 else "mtp_loss"
            targets = tokens[ahead:]
            sums[name][0] -= jnp.sum(logp[np.arange(len(targets)), targets] * counts[ahead:])
            sums[name][1] += np.sum(counts[ahead:])
    return sums["loss"][0] + WEIGHT / config.mtp_depth * sums["mtp_loss"][0], sums


def test_equals_the_plain_implementation():
    """Rows that hold several documents against the documents one by one: loss, metrics and every gradient."""
    config, rows = TWO, [row_of(5, 1, 3, width=9), row_of(4, 2, width=9)]
    rows[0]["loss"][[2, 7]] = 0
    params, batch = params_of(config), batch_of(*rows)
    reference = jax.jit(jax.value_and_grad(
        lambda params: reference_loss(config, params, list(documents_of(rows))), has_aux=True))
    (expected, sums), expected_grads = reference(params)
    (total, metrics), grads = loss_and_grads(build(config), params, batch)
    close((total, grads), (expected, expected_grads))
    close({name: tuple(metrics[name]) for name in sums}, {name: tuple(parts) for name, parts in sums.items()})
    assert metrics["mtp_accuracy"].weight == metrics["mtp_loss"].weight
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["mtp"]))


def test_the_worked_example():
    b, x, y, e = 1, 7, 8, 2
    row = {"tokens": np.asarray([[b, x, e, b, y, e, 0]]), "segments": np.asarray([[1, 1, 1, 2, 2, 2, 0]]),
           "loss": np.ones((1, 7))}
    one, two = look_ahead(to_inputs(row), 1), look_ahead(to_inputs(row), 2)
    np.testing.assert_array_equal(one.following, [[[x, e, b, y, e, 0]]])
    np.testing.assert_array_equal(one.targets, [[[e, b, y, e, 0, 0]]])
    np.testing.assert_array_equal(one.weights, [[[1, 0, 0, 1, 0, 0]]])
    np.testing.assert_array_equal(two.following, [one.following[0], [[e, b, y, e, 0, 0]]])
    np.testing.assert_array_equal(two.targets, [one.targets[0], [[b, y, e, 0, 0, 0]]])
    np.testing.assert_array_equal(two.weights, [one.weights[0], [[0, 0, 0, 0, 0, 0]]])
    # KORMo predicts the b of document 2 from the e before it, as the next token; nothing looks that far from elsewhere.
    kormo = to_inputs(row, boundary_targets=True)
    np.testing.assert_array_equal(kormo.loss_mask, [[1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(look_ahead(kormo, 2).weights, two.weights)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_targets_are_tokens_of_the_same_document(depth):
    """Against a search through the rows of T+1, which know the document of the last token too."""
    rng = np.random.default_rng(5)
    segments = np.sort(rng.integers(0, 4, (50, 12)), axis=1)
    segments = np.where(segments == 0, 4, segments) * (np.arange(12)[None] < rng.integers(4, 13, (50, 1)))
    segments = np.sort(segments, axis=1)[:, ::-1]  # padding at the end; the order of numbers is nothing
    row = {"tokens": rng.integers(0, 99, (50, 12)), "segments": segments, "loss": rng.integers(0, 2, (50, 12))}
    ahead = look_ahead(to_inputs(row), depth)
    for k in range(1, depth + 1):
        for t in range(11):
            for i in range(50):
                last = t + k + 1
                counts = last < 12 and segments[i, last] == segments[i, t] > 0 and row["loss"][i, last]
                assert ahead.weights[k - 1, i, t] == bool(counts)
                if counts:
                    assert ahead.targets[k - 1, i, t] == row["tokens"][i, last]
                    assert ahead.following[k - 1, i, t] == row["tokens"][i, t + k]


def test_later_tokens_are_not_seen():
    """Depth k at t reads tokens up to t+k, and predicts t+k+1."""
    model, params = build(TWO), params_of(TWO)
    row = np.arange(10)[None]  # every token once, so that a row of the table is a place in the text

    def prediction(table, k, t):
        batch = LMBatch(*(jnp.asarray(leaf) for leaf in to_inputs(
            {"tokens": row, "segments": np.ones_like(row), "loss": np.ones_like(row)})))
        changed = {**params, "embed": {"embedding": table}}
        hidden = model.apply(changed, batch.tokens, logits=False).hidden
        return jnp.sum(model.ahead(changed, hidden, look_ahead(batch, 2).following)[k - 1, 0, t])

    grad = jax.jit(jax.grad(prediction))
    for k, t in ((1, 0), (1, 4), (2, 0), (2, 5)):
        by_token = np.asarray(grad(params["embed"]["embedding"], k, t))
        assert not np.any(by_token[t + k + 1:]) and np.all(np.any(by_token[:t + k + 1], axis=-1))


def test_packed_rows_equal_separate_rows():
    rows, empty = [row_of(5, 8, width=17), row_of(9, 2, width=17)], row_of(width=17)
    alone = [{"tokens": np.pad(tokens, (0, 17 - len(tokens))), "loss": np.pad(counts, (0, 17 - len(counts))),
              "segments": np.pad(np.ones_like(tokens), (0, 17 - len(tokens)))} for tokens, counts in documents_of(rows)]
    params = params_of(MTP)
    close(loss_and_grads(build(MTP), params, batch_of(*rows, empty, empty)),
          loss_and_grads(build(MTP), params, batch_of(*alone)))


def test_remat_and_chunks_change_nothing():
    params, batch = params_of(MTP), packed_batch()
    close(loss_and_grads(build(MTP, ComputeConfig(remat="full")), params, batch, chunks=4),
          loss_and_grads(build(MTP), params, batch))


def test_a_scan_of_one_depth_is_recomputed():
    """XLA takes a loop of one turn apart; without a barrier it would merge the recomputation with the forward pass."""
    params, batch = params_of(MTP), packed_batch()
    program = str(jax.make_jaxpr(lambda: jax.grad(lambda hidden: jnp.sum(build(MTP, ComputeConfig(remat="full")).ahead(
        params, hidden, look_ahead(batch, 1).following)))(jnp.ones((4, 16, 16))))())
    assert "prevent_cse=True" in program and "prevent_cse=False" not in program


def step_once(sizes, accumulate=1):
    """Parameters after a step of plain gradient descent, and its metrics."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[:math.prod(sizes.values())])
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(lambda count: 1.0))  # the schedule counts updates
    params = jax.device_put(params_of(MTP), tree_shardings(params_of(MTP), PARAM_RULES, mesh))
    loss = make_loss(build(MTP), z_loss=1e-3, chunks=2, mtp_weight=WEIGHT)
    step = make_step(loss, tx, optax.constant_schedule(1.0), mesh=mesh, rules=PARAM_RULES, accumulate=accumulate)
    with jax.set_mesh(mesh):
        state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
        state, metrics = step(state, put_batch(packed_batch(), mesh))
    return jax.device_get((state.params, metrics))


@functools.cache
def plain_step():
    return step_once({"data": 1})


@pytest.mark.parametrize(("sizes", "accumulate"), [
    ({"data": 1}, 2), ({"data": 1}, 4), ({"fsdp": 2, "tensor": 2, "context": 2}, 2)], ids=str)
def test_micro_batches_and_devices_change_nothing(sizes, accumulate):
    """The rows differ in how many of their targets a depth has, so a mean of means would be another update."""
    ahead = look_ahead(packed_batch(), 1)
    ratios = np.sum(ahead.weights[0], axis=1) / np.sum(packed_batch().loss_mask, axis=1)
    assert np.ptp(ratios) > 0.1
    close(step_once(sizes, accumulate), plain_step())


def test_metrics_have_their_own_denominators():
    params, batch = params_of(MTP), packed_batch()
    (total, metrics), _ = loss_and_grads(build(MTP), params, batch)
    main = jax.jit(make_loss(build(NTP)))({name: params[name] for name in params if name != "mtp"}, batch, None)[1]
    close((tuple(metrics["loss"]), tuple(metrics["accuracy"])), (tuple(main["loss"]), tuple(main["accuracy"])))
    assert metrics["mtp_loss"].weight == look_ahead(batch, 1).weights.sum() != metrics["loss"].weight
    close(total, main["loss"].total + WEIGHT * metrics["mtp_loss"].total)
    even = {**params, "head": {"kernel": jnp.zeros_like(params["head"]["kernel"])}}  # a tie of all tokens is correct
    (_, metrics), _ = loss_and_grads(build(MTP), even, batch)
    close((metrics["mtp_loss"].value(), metrics["mtp_accuracy"].value()), (math.log(64), 1.0))


def test_the_decoder_does_not_notice():
    """The programs are the same to the letter, parameters that no one reads left aside."""
    params, tokens = params_of(MTP), jnp.zeros((2, 6), jnp.int32)
    plain = {name: part for name, part in params.items() if name != "mtp"}
    for cache in (None, init_cache(NTP, 2, 8)):
        ours, theirs = (jax.jit(build(config).apply).lower(tree, tokens, cache=cache).as_text()
                        for config, tree in ((MTP, params), (NTP, plain)))
        assert ours == theirs


def test_init_adds_parameters_and_leaves_the_others():
    plain, two = (jax.jit(build(replace(NTP, mtp_depth=depth)).init)(jax.random.key(0)) for depth in (0, 2))
    mtp = two.pop("mtp")
    jax.tree.map(np.testing.assert_array_equal, two, plain)
    leaves = named_leaves(mtp)
    assert leaves["project/kernel"].shape == (2, 32, 16)
    assert set(mtp["block"]) == set(plain["layers"]) and set(mtp) == {
        "hidden_norm", "token_norm", "project", "block", "final_norm"}
    for path, leaf in leaves.items():
        assert np.all(leaf == 1) if path.endswith("scale") else abs(np.std(leaf) / NTP.init_std - 1) < 0.15, path
        assert path.endswith("scale") or np.any(leaf[0] != leaf[1]), path  # every depth has its own key
    assert not np.any(leaves["block/mlp/up/kernel"][0] == plain["layers"]["mlp"]["up"]["kernel"][0])


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True, "qkv_bias": True, "qk_norm": True}], ids=str)
def test_counts_by_hand(change):
    config = replace(NTP, **change)
    deep = replace(config, mtp_depth=3)
    of = lambda config: count_parameters(jax.eval_shape(build(config).init, jax.random.key(0)))
    assert num_parameters(deep) == of(deep)
    layer = (of(config) - of(replace(config, num_layers=1)))
    depth = layer + 32 * 16 + 3 * 16  # the projection from 2D to D, and three norms
    assert of(deep) - of(config) == 3 * depth
    # Forward and backward: 6 a parameter, 6 a number of the head again; 4 heads of 6 see 5 of 10 keys, 12 a number.
    assert flops_per_token(deep, 10) - flops_per_token(config, 10) == 3 * (6 * (depth + 64 * 16) + 12 * 4 * 6 * 5)


def test_every_parameter_has_one_sharding_rule_and_big_ones_are_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = {"mtp": params_of(MTP)["mtp"]}
    for path, sharding in named_leaves(tree_shardings(params, PARAM_RULES, mesh)).items():
        assert sum(bool(re.search(pattern, path)) for pattern, _ in PARAM_RULES) == 1, path
        assert path.endswith("scale") or ({"fsdp", "tensor"} <= set(sharding.spec) and not sharding.spec[0]), path


def test_an_export_is_the_decoder_alone_and_says_so(tmp_path, caplog):
    params = params_of(MTP)
    with caplog.at_level(logging.WARNING):
        save_hf(tmp_path / "model", MTP, params, architecture="mistral")
    assert "multi-token prediction (mtp_depth 1) are not exported" in caplog.text
    config, loaded = load_hf(tmp_path / "model")
    assert config == NTP
    jax.tree.map(np.testing.assert_array_equal, loaded, {name: params[name] for name in params if name != "mtp"})
    with pytest.raises(ValueError, match="unknown: mtp/project/kernel"):
        save_hf(tmp_path / "other", NTP, params, architecture="mistral")


@pytest.mark.parametrize(("ask", "message"), [
    (lambda: make_loss(build(NTP), mtp_weight=0.3), "mtp_weight 0.3 needs a model with multi-token prediction"),
    (lambda: make_loss(build(MTP)), "nothing would train the multi-token prediction of model.mtp_depth 1"),
    (lambda: make_loss(build(MTP), mtp_weight=-1.0), "must be 0 or a positive number, got -1"),
    (lambda: make_loss(build(MTP), mtp_weight=math.nan), "must be 0 or a positive number, got nan"),
    (lambda: replace(NTP, mtp_depth=-1), "mtp_depth must not be negative, got -1"),
    (lambda: look_ahead(packed_batch(), 16), "mtp_depth 16 must be less than the 16 tokens of a row"),
    (lambda: build(NTP).ahead({}, jnp.zeros((1, 4, 16)), jnp.zeros((1, 1, 4), jnp.int32)), "mtp_depth is 0"),
    (lambda: build(MTP).ahead({}, jnp.zeros((1, 4, 16)), jnp.zeros((1, 4), jnp.int32)),
     r"following must be integers of shape \(1, 1, 4\), got int32 of shape \(1, 4\)"),
])
def test_settings_that_do_not_fit(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
