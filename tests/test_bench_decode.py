"""The decoding benchmark measures every method on every prompt, and says when a text differs."""

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.generate.costs import step_costs
from jaxlm.generate.draft_sources import Databases
from jaxlm.generate.methods import METHODS, adapted
from jaxlm.model.config import ModelConfig
from jaxlm.model.decoder import build
from jaxlm.train.pretrained import Pretrained
from tools.bench_decode import Bench, Config, chosen_methods, compare, main, show

MODEL = build(ModelConfig(vocab_size=264, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
                          max_positions=256, init_std=0.3))
PARAMS = MODEL.init(jax.random.key(0))


def test_measures_and_compares(capsys):
    config = Config(max_new_tokens=12, slots=128)
    bench = Bench(config, Pretrained(MODEL.config, PARAMS, ByteTokenizer()), Databases())
    prompts = [("qa", [5, 6, 7, 5, 6]), ("rag", [9, 8, 9, 8, 9, 8, 9])]
    methods = {"none": None, "pld": adapted(METHODS["pld"], (0, 4, 8, 16), (1.0, 1.1, 1.2, 1.3))}
    assert methods["pld"].widths == (0, 4, 8)
    measured = compare(bench, prompts, methods)
    assert measured["pld"].exact == [True, True] and measured["pld"].tokens == measured["none"].tokens == [12, 12]
    assert measured["none"].steps == [12, 12] and all(s > 0 for s in measured["pld"].seconds)
    for steps, accepted in zip(measured["pld"].steps, measured["pld"].accepted, strict=True):
        assert steps + accepted["prompt"] == 12
    draft = bench.draft_seconds(bench.start([5, 6, 5]), methods["pld"])
    show(measured, [group for group, _ in prompts], {"pld": draft})
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[0][:4] == ["| method", "qa", "rag", "all"] and table[1][1:5] == ["1.00"] * 4
    assert table[2][7] == "2/2"


def test_a_different_text_is_reported(capsys, monkeypatch):
    bench = Bench(Config(max_new_tokens=8, slots=64), Pretrained(MODEL.config, PARAMS, ByteTokenizer()), Databases())
    run = bench.run

    def wrong(state, guessing):
        state, seconds = run(state, guessing)
        place = int(state.start[0]) + 3
        return state._replace(tokens=state.tokens.at[0, place].add(1)) if guessing else state, seconds

    monkeypatch.setattr(bench, "run", wrong)
    measured = compare(bench, [("qa", [5, 6, 7])], {"none": None, "pld": METHODS["pld"]})
    assert measured["pld"].exact == [False] and "pld: prompt 0 differs, margin" in capsys.readouterr().out


def test_costs_rise_and_are_checked():
    costs = step_costs(MODEL, PARAMS, (0, 2, 6), batch=2, slots=64, rounds=2)
    assert len(costs) == 3 and 0 < costs[0] <= costs[1] <= costs[2]
    assert len(step_costs(MODEL, PARAMS, (0, 80), slots=8 * 81, rounds=1)) == 2  # Token Recycling in recipes.generate
    with pytest.raises(ValueError, match=r"widths \(0, 40\) must be at least 0 and 4 steps of them fit 32 slots"):
        step_costs(MODEL, PARAMS, (0, 40), slots=64)


def test_methods_by_name_and_order():
    table = Databases(model=np.zeros(1), corpus=np.zeros(1))
    chosen = chosen_methods(Config(methods="pld", orders="sm,c"), table)
    assert list(chosen) == ["none", "pld", "SM", "C"] and chosen["SM"].draft.order == ("corpus", "model")
    for flags, databases, message in [
        ({"methods": "pdl"}, table, "'pdl' is unknown .did you mean 'pld'"),
        ({"methods": "", "orders": "cx"}, table, "'cx' has unknown letters"),
        ({"methods": "hierarchy"}, Databases(), "hierarchy reads a model database: give --model-database"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen_methods(Config(**flags), databases)


def test_bad_flags_end_with_a_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--random", "bse"])
    assert "--random bse is unknown (did you mean 'base'?)" in capsys.readouterr().err
