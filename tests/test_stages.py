"""Stages of pretraining: a run goes on from another one's weights and moments, and data that are used up end it."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.log import read_metrics
from jaxlm.core.mesh import put_batch
from jaxlm.core.tree import named_leaves
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.optim.optimizer import make_optimizer
from jaxlm.train.checkpoint import CheckpointError, saved_arrays, saved_run, saved_steps
from jaxlm.train.pretrained import open_pretrained
from jaxlm.train.run import start
from jaxlm.train.state import TrainState, abstract_state
from recipes.pretrain import PRESETS, Config, main, prepare, step_of
from tests.tiny_chat import tiny_folder

MODEL = ["--model.vocab-size", "308", "--model.d-model", "16", "--model.num-layers", "2", "--model.num-heads", "2",
         "--model.num-kv-heads", "1", "--model.head-dim", "8", "--model.d-ff", "24", "--model.max-positions", "64"]
CONSTANT = ["--optim.schedule.kind", "constant", "--optim.schedule.warmup", "0", "--optim.schedule.decay", "0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    plain = [f"document {i} says {i * i} " * (1 + i % 4) for i in range(150)]
    thought = [f"What is {i} plus 1? <think> one more than {i} </think> {i + 1}" for i in range(60)]
    for name, texts in (("plain", plain), ("thought", thought)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def options(files, folder, steps, *extra, data="plain.jsonl?language=en"):
    return ["--folder", str(folder), "--data.path", f"{files}/{data}", "--data.never-predict", "<think>",
            "--data.held-out", f"{files}/plain.jsonl?language=en", "--pipeline.batch-size", "8",
            "--pipeline.seq-len", "64", "--samples.tokens", "2", "--loop.log-every", "1", "--loop.eval-every", "100",
            "--loop.steps", str(steps), "--checkpoint.every", "2", *CONSTANT, *extra]


def series(folder, name="loss"):
    return {r["step"]: r[name] for r in read_metrics(folder / "metrics.jsonl") if name in r}


def refused(capfd, arguments):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert "step 1/" not in out and "Traceback" not in err
    return re.sub(r"[│\s]+", " ", err)


def opened(arguments):
    """The configuration of a command, and the run that it prepares."""
    config = flags.parse(PRESETS, arguments, prog="test", description="")
    return config, prepare(config)


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    main([*MODEL, *options(files, folder, 4, "--optim.lr", "1e-2")])
    return folder


@pytest.fixture(scope="module")
def second(files, first):
    """Stage 2, and the same stopped in the middle."""
    for name, steps in (("second", 4), ("cut", 2)):
        main(options(files, first.parent / name, steps, "--init", str(first), "--stage.keep-optimizer"))
    return first.parent / "second"


def test_moments_go_on_and_the_schedule_begins_again(files, first, tmp_path):
    """Bit-equal weights and moments on a sharded mesh; the next update is the one that the first run would do."""
    more = ["--optim.lr", "1e-2", "--mesh.fsdp", "4", "--mesh.data", "2"]
    _, run = opened(options(files, tmp_path / "next", 5, "--init", str(first), "--stage.keep-optimizer", *more))
    tx = make_optimizer(run.config.optim, 5)
    abstract = abstract_state(run.learning.init, tx, run.mesh, PARAM_RULES)
    saved = saved_arrays(first, {"params": abstract.params, "opt_state": abstract.opt_state}).tree
    before = jax.tree.map(np.array, named_leaves(saved))
    state = start(run, None)
    after = named_leaves({"params": state.params, "opt_state": state.opt_state})
    assert {name: leaf.sharding for name, leaf in after.items()} == {
        name: leaf.sharding for name, leaf in named_leaves(abstract._asdict()).items() if name != "step"}
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    counts = [name for name in before if name.endswith("count")]
    assert len(counts) == 2 and changed == counts[-1:] and int(state.step) == 0
    assert [int(after[name]) for name in counts] == [4, 0] and [int(before[name]) for name in counts] == [4, 4]
    # The same batch, the same constant rate: what the first run would have done with the whole of its state.
    batch = put_batch(next(run.batches), run.mesh)
    with jax.set_mesh(run.mesh):
        ours, _ = run.learning.step(state, batch)
        own = flags.from_json(Config, saved_run(first)[0])
        theirs = TrainState(np.int32(4), **saved)
        theirs, _ = step_of(own, *_model_and_optimizer(own), run.mesh)(theirs, batch)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    # Fresh moments would have gone elsewhere.
    _, plain = opened(options(files, tmp_path / "next", 5, "--init", str(first), *more))
    fresh = start(plain, None)
    with jax.set_mesh(plain.mesh):
        fresh, _ = plain.learning.step(fresh, batch)
    assert not np.allclose(fresh.params["head"]["kernel"], ours.params["head"]["kernel"], atol=1e-4)


def _model_and_optimizer(config):
    return build(config.model, config.compute), make_optimizer(config.optim, config.loop.steps)


def test_a_ladder_of_four_stages(files, first, second):
    """Weights, tokenizer and moments travel; lengths and positions change; a stopped stage goes on bit-identically."""
    runs = first.parent
    assert series(second)[1] < series(first)[4] + 0.3 < series(first)[1]
    main(options(files, runs / "cut", 4, "--init", str(first), "--stage.keep-optimizer", "--resume"))
    assert series(runs / "cut") == series(second)
    shape = ["--pipeline.batch-size", "8", "--pipeline.seq-len", "128", "--stage.max-positions", "128"]
    main(options(files, runs / "long", 2, "--init", str(second), "--stage.keep-optimizer", *shape,
                 "--stage.rope-theta", "5e5"))
    found = open_pretrained(runs / "long")
    assert (found.config.max_positions, found.config.rope_theta) == (128, 5e5)
    assert found.tokenizer.fingerprint() == open_pretrained(first).tokenizer.fingerprint()
    decaying = ["--optim.schedule.kind", "linear", "--optim.schedule.min-ratio", "0.1"]
    last = options(files, runs / "reasoning", 2, "--init", str(runs / "long"), "--stage.keep-optimizer",
                   *shape[:4], *decaying, data="thought.jsonl?epochs=4")
    _, run = opened(last)
    batch, think = next(run.batches), found.tokenizer.token_id("<think>")
    assert (batch.targets == think).any() and not batch.loss_mask[batch.targets == think].any()
    main(last)
    rates = series(runs / "reasoning", "lr")
    assert rates[2] < rates[1] == pytest.approx(3e-3)  # this stage's own, though Adam has counted ten updates


def test_used_up_data_end_a_run_with_a_checkpoint(files, first, tmp_path, capfd):
    run = options(files, tmp_path / "run", 900, "--init", str(first), "--data.path", f"{files}/plain.jsonl?epochs=1.5",
                  f"{files}/thought.jsonl?cap=1024&weight=3")
    with pytest.raises(SystemExit) as stopped:
        main(run)
    out, err = capfd.readouterr()
    steps = int(re.search(r"every source is used up after (\d+) of 900 steps", err)[1])
    guess = int(re.search(r"the data will end after about (\d+) of 900 steps", err)[1])
    assert stopped.value.code == 2 and saved_steps(tmp_path / "run/checkpoints")[0] == steps and "Traceback" not in err
    assert abs(guess - steps) <= 0.2 * steps
    assert re.search(r"source thought is used up at step \d, after 1024 tokens: its weight goes to the other", err)
    assert "tokens/thought 1.02e+03" in err and re.search(r"epoch/plain 1\.[45]", err)
    assert f"held out at step {steps}" in out
    assert series(tmp_path / "run", "used_up/thought")[steps - 1] == 1
    main([*run, "--loop.steps", str(steps), "--resume"])  # such a run may be declared complete


def test_wrong_stages(files, first, tmp_path, capfd):
    new = options(files, tmp_path / "new", 2)
    init = [*new, "--init", str(first)]
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    source = tiny_folder(tmp_path / "hf")
    data = f"{files}/plain.jsonl"
    cases = {
        "no complete checkpoint in .*empty": [*new, "--init", str(tmp_path / "empty")],
        "neither a .gguf file nor a run folder": [*new, "--init", str(tmp_path / "nothing")],
        "leave out the --model flags": [*init, "--model.vocab-size", "400"],
        "leave out the --tokenizer flags": [*init, "--tokenizer.path", "bytes"],
        "have an effect with --init only": [*MODEL, *new, "--stage.keep-optimizer"],
        "keep_optimizer goes on with the optimizer of a run folder, .* weights only": [
            *new, "--init", str(source), "--stage.keep-optimizer", "--data.never-predict"],
        "stage.max_positions must be positive": [*init, "--stage.max-positions", "0"],
        "seq_len 128 exceeds model.max_positions 64": [*init, "--pipeline.seq-len", "128"],
        "are the same folder": ["--init", str(tmp_path / "new"), *new],
        "epochs must be a positive number, got 0": [*init, "--data.path", data + "?epochs=0"],
        "weight must be a positive number, got -1": [*init, "--data.path", data + "?weight=-1"],
        "cap 63 is less than a row of 64 tokens in each of 1 parts": [*init, "--data.path", data + "?cap=63"],
        "the data end after 1 steps at most, .* loop.steps is 2": [*init, "--data.path", data + "?cap=1023"],
        "epochs has an effect on mixtures of training data only": [*init, "--data.held-out", data + "?epochs=1"],
        "mask_documents False lets documents .* --pipeline.no-reset-positions": [*init, "--pipeline.no-mask-documents"],
    }
    for message, arguments in cases.items():
        assert re.search(message, refused(capfd, arguments)), message
        assert not (tmp_path / "new").exists()


def test_another_optimizer_structure_is_refused(first):
    shape = jax.ShapeDtypeStruct((), np.int32)
    with pytest.raises(CheckpointError, match=r"optimizer's state has another structure .* such as opt_state/"):
        saved_arrays(first, {"opt_state": {"momentum": shape}})
    with pytest.raises(CheckpointError, match="it lacks 1 arrays of this model, such as params/value"):
        saved_arrays(first, {"params": {"value": shape}})


def test_documents_that_see_each_other(files, first, tmp_path):
    """One segment a row, the same targets."""
    take = lambda *extra: next(opened(options(files, tmp_path / "x", 2, "--init", str(first),
                                              "--pipeline.no-reset-positions", *extra))[1].batches)
    apart, joined = take(), take("--pipeline.no-mask-documents")
    assert isinstance(joined, LMBatch) and apart.segments.max() > 1 and (joined.segments == 1).all()
    for name in ("tokens", "targets", "loss_mask", "positions"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(joined, name))


def test_ladders_chain():
    """Every stage starts where the one before ends, and has the tokens of the paper."""
    for name, tokens in (("kormo_10b", (1e12, 1.8e12, 10.27e9 / 3, 10.27e9 / 3, 10.27e9 / 3, 157.76e9)),):
        stages = [PRESETS[key] for key in PRESETS if key.startswith(name)]
        for before, after in itertools.pairwise(stages):
            assert after.init == str(before.folder) and after.stage.keep_optimizer
        for stage, wanted in zip(stages, tokens, strict=True):
            found = stage.loop.steps * stage.pipeline.batch_size * stage.pipeline.seq_len
            assert found == pytest.approx(wanted, rel=2e-3)
            assert stage.data.never_predict == ("<think>",)
