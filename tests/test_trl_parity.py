"""Policy objectives against TRL's `GRPOTrainer`: from rewards to the loss and the gradient of every parameter, float32.

Three models differ: the one that sampled, the one that learns, and the reference. The trainer gets the attempts from a
`rollout_func` and their rewards from a table; masks, padding, shuffling, micro-batches, log-probabilities and
advantages are its own. Where TRL means something else by design, the comparison avoids it, at one tolerance:

- It adds 1e-4 to a deviation of rewards, we 1e-6: rewards in thousands, where neither shows.
- Its `bnpo` divides by the tokens of a micro-batch, and its entropy bonus is a mean of micro-batches beside any other
  aggregation; ours are of the whole batch and aggregate as one: both as token means and in one micro-batch.
- Its KL is by default that of the ratio (DeepSeek-V3.2), r k3, which the gradient of ours is with `kl.gradient` score
  where r is 1: compared there; elsewhere its `use_bias_correction_kl` is off.
- Its means over sequences count those without a token that counts (unscorable, or cut off and masked), ours do not:
  every attempt here has one, and rewards that are missing are compared as advantages only.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from jaxlm.core.tree import named_leaves
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf
from jaxlm.objective.algorithm import ALGORITHMS, PolicyConfig
from jaxlm.objective.kl import KLConfig
from jaxlm.objective.policy import ClipConfig
from jaxlm.rl.pack import pack_rows
from jaxlm.rl.update import Policy, group_advantages, learn_batch, make_policy_loss, score_rows
from tests.reference import build_reference, torch, transformers

trl = pytest.importorskip("trl", reason="the objectives are compared with TRL: pip install jaxlm[parity]")
datasets = pytest.importorskip("datasets")

NAME, VOCAB, TEMPERATURE, BUDGET = "llama_mqa_head_dim", 61, 0.7, 10
PROMPTS, SAMPLES = 2, 4
RTOL = 1e-5
# TRL says that its own interface may change, and calls one that transformers has renamed.
pytestmark = [pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
              pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

PLAIN_KL = {"use_bias_correction_kl": False}
# name -> (settings of GRPOConfig, micro-batches, ours)
CASES = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04, **PLAIN_KL}, 2, ALGORITHMS["grpo"]),
    "on policy": ({"loss_type": "grpo", "beta": 0.5, "num_iterations": 1}, 2,
                  replace(ALGORITHMS["grpo"], kl=KLConfig(coefficient=0.5, gradient="score"))),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, 2,
                replace(ALGORITHMS["dr_grpo"], constant_length=BUDGET)),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, 2, ALGORITHMS["dapo"]),
    "bnpo": ({"loss_type": "bnpo"}, 1, PolicyConfig()),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, 2,
             ALGORITHMS["gspo"]),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1, **PLAIN_KL}, 2,
              replace(ALGORITHMS["cispo"], clip=ClipConfig(low=None, high=1.1, convention="absolute"),
                      kl=KLConfig(coefficient=0.1))),
    "mentor": ({"loss_type": "dapo", "delta": 1.3, "beta": 0.5, "entropy_coef": 0.3, **PLAIN_KL}, 1,
               replace(ALGORITHMS["mentor"], clip=ClipConfig(dual=1.3), kl=KLConfig(coefficient=0.5), entropy=0.3)),
}


def attempts():
    """Prompts, completions and which of their tokens the policy wrote, all of uneven lengths, groups in order."""
    rng = np.random.default_rng(3)
    prompts, completions, sampled = [], [], []
    for size in (3, 6):
        prompt = rng.integers(2, VOCAB, size).tolist()
        for _ in range(SAMPLES):
            length = int(rng.integers(1, BUDGET + 1))
            prompts.append(prompt)
            completions.append(rng.integers(2, VOCAB, length).tolist())
            sampled.append([1, *(rng.random(length - 1) < 0.7).astype(int).tolist()])
    return prompts, completions, sampled


ATTEMPTS = attempts()
GROUPS = np.repeat(np.arange(PROMPTS), SAMPLES).astype(np.int32)
REWARDS = 1000 * np.random.default_rng(4).normal(size=len(GROUPS)).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three models that are near each other, and our parameters of each."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    model, generator = build_reference(NAME), torch.Generator().manual_seed(5)
    for name, spread in (("sampler", 0), ("learner", 0.03), ("reference", 0.05)):
        with torch.no_grad():
            for weight in model.parameters():
                weight += spread * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(folder / name)
        found[name] = folder / name, load_hf(folder / name)
    return found


def make_trainer(models, folder, tables, micro_batches, **settings):
    """TRL's trainer, whose model is the sampler; `tables`: rewards of the attempts, a list for each function."""
    def rollout(prompts, trainer):
        assert len(prompts) == len(GROUPS)
        given, completions, sampled = ATTEMPTS
        return {"prompt_ids": given, "completion_ids": completions, "env_mask": sampled, "logprobs": None}

    model = transformers.AutoModelForCausalLM.from_pretrained(models["reference"][0], attn_implementation="eager")
    model.load_state_dict(weights(models["sampler"][0]))  # the trainer reads its reference from the model's folder
    vocabulary = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    return trl.GRPOTrainer(
        model=model, reward_funcs=[lambda table=table, **_: table for table in tables], rollout_func=rollout,
        train_dataset=datasets.Dataset.from_dict({"prompt": [""] * PROMPTS}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="0", eos_token="1"),
        args=trl.GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=len(GROUPS) // micro_batches,
            gradient_accumulation_steps=micro_batches, num_generations=SAMPLES, max_completion_length=BUDGET,
            temperature=TEMPERATURE, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=None,
            **{"num_iterations": 2, **settings}))  # of 2, the second is off policy


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def their_loss(models, folder, learner, micro_batches, settings):
    """The loss of one update, and its gradients under our names."""
    trainer = make_trainer(models, folder, [REWARDS.tolist()], micro_batches, **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches  # as `Trainer.train` sets it for an update
    batches = []
    for trainer._step in range(micro_batches):
        batches.append(trainer._prepare_inputs([{"prompt": ""}] * len(GROUPS)))
    assert len(batches[0]["advantages"]) == len(GROUPS) // micro_batches
    trainer.model.load_state_dict(weights(models[learner][0]))
    loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches)
    loss.backward()
    with torch.no_grad():  # the import is linear: gradients travel as weights do
        for weight in trainer.model.parameters():
            weight.copy_(weight.grad)
    trainer.model.save_pretrained(folder / "gradient")
    return loss.item(), named_leaves(load_hf(folder / "gradient")[1])


@partial(jax.jit, static_argnums=(0, 1))
def our_loss(policy, config, params, rows, old_params, ref_params):
    """((loss, metrics), gradients) of one update."""
    old, ref = (score_rows(policy, params, rows, len(rows.tokens))[0] for params in (old_params, ref_params))
    rewards = jnp.asarray(REWARDS)
    advantage = group_advantages(config, rewards, jnp.ones(1), rewards[:, None], jnp.asarray(GROUPS), PROMPTS).value
    batch = learn_batch(config, rows, rewards, advantage, old, ref if config.kl.coefficient else None, None, None)

    def mean(params):
        total, metrics = make_policy_loss(policy, config)(params, batch, jax.random.key(0))
        return total / metrics["loss"].weight, {name: mean.value() for name, mean in metrics.items()}

    return jax.value_and_grad(mean, has_aux=True)(params)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name, models, tmp_path):
    settings, micro_batches, config = CASES[name]
    learner = "sampler" if name == "on policy" else "learner"
    episodes = [SimpleNamespace(task="", ids=prompt + completion, sampled=[0] * len(prompt) + sampled,
                                logprobs=np.zeros(length), kept=np.ones(length))
                for prompt, completion, sampled in zip(*ATTEMPTS, strict=True)
                for length in [len(prompt) + len(completion)]]
    rows = pack_rows(episodes, 24)
    assert len(rows.tokens) < len(episodes), "several attempts in a row"
    trees = {name: loaded[1] for name, (_, loaded) in models.items()}
    policy = Policy(build(models["learner"][1][0]), TEMPERATURE)
    (ours, metrics), gradients = our_loss(policy, config, trees[learner], rows, trees["sampler"], trees["reference"])
    assert 0.05 < metrics["clip_fraction"] < 0.95 or name == "on policy", "every limit must show"
    assert metrics["clip_fraction_dual"] > 0 or name != "mentor"

    theirs, expected = their_loss(models, tmp_path, learner, micro_batches, settings)
    found = named_leaves(gradients)
    errors = {path: float(np.abs(found[path] - leaf).max() / np.abs(leaf).max()) for path, leaf in expected.items()}
    print(f"{name}: loss {theirs:.6f}, relative error {abs(ours / theirs - 1):.1e}, of gradients "
          f"{max(errors.values()):.1e}")
    assert found.keys() == expected.keys()
    # Terms of about 1 and of both signs cancel in the loss: rounding is relative to them.
    assert float(ours) == pytest.approx(theirs, rel=RTOL, abs=RTOL / 10)
    assert max(errors.values()) < RTOL, errors


# name of ours -> settings of GRPOConfig
ADVANTAGE_SETTINGS = {
    "grpo": {"scale_rewards": "group"},
    "dr_grpo": {"scale_rewards": "none"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
}


@pytest.mark.parametrize("name", ADVANTAGE_SETTINGS)
@pytest.mark.parametrize("case", ["apart", "equal", "missing"])
def test_advantages_are_those_of_trl(name, case, models, tmp_path):
    """Two terms and their weights; a group of equal rewards; attempts that no term, or one term only, can judge."""
    terms = 1000 * np.random.default_rng(6).normal(size=(2, len(GROUPS))).astype(np.float32)
    scale = np.array([2e5, 0.5e5] if name == "gdpo" else [2.0, 0.5], np.float32)  # its sum gets an epsilon too
    if case == "equal":
        terms[:, :SAMPLES] = [[300.0], [700.0]]
    if case == "missing":
        terms[:, 1] = terms[1, 6] = np.nan
    tables = [[None if np.isnan(x) else float(x) for x in term] for term in terms]
    trainer = make_trainer(models, tmp_path, tables, 1, reward_weights=scale.tolist(), **ADVANTAGE_SETTINGS[name])
    trainer.model.train()
    theirs = trainer._generate_and_score_completions([{"prompt": ""}] * len(GROUPS))["advantages"].numpy()

    rewards = np.where(np.isnan(terms).all(0), np.nan, np.nansum(terms * scale[:, None], 0))
    config = PolicyConfig(advantage=name)
    ours = group_advantages(config, jnp.asarray(rewards), jnp.asarray(scale), jnp.asarray(terms.T),
                            jnp.asarray(GROUPS), PROMPTS)
    np.testing.assert_allclose(ours.value, theirs, rtol=RTOL, atol=RTOL * np.abs(theirs).max())
    assert ours.excluded.tolist() == [case == "missing" and i == 1 for i in range(len(GROUPS))]
    assert np.abs(theirs[SAMPLES:]).min() > 0.1 and (np.abs(theirs[:SAMPLES]) < 1e-6).all() == (case == "equal")
