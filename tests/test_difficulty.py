"""Difficulty: buckets of labels and numbers, and a stream with the shares that were asked for."""

import itertools
import json
import re
from collections import Counter
from fractions import Fraction

import jax
import numpy as np
import pytest

from jaxlm.data.balance import balance_chats, report_buckets
from jaxlm.data.chat_examples import ChatFormat, chat_batches, encode_source
from jaxlm.data.chat_template import CHATML, ChatTemplate
from jaxlm.data.conversations import TuningDataConfig, open_conversations, open_corpora
from jaxlm.data.difficulty import bucket_rows, parse_balance
from jaxlm.data.pipeline import PipelineConfig
from jaxlm.data.rows import SourceConfig
from jaxlm.data.sample_chats import DAYS, sample_thinking
from jaxlm.model.decoder import build
from jaxlm.model.hf import load_hf
from recipes import score_difficulty
from tests.tiny_chat import json_tokenizer, tiny_folder

PREFIX = 9  # tokens of a conversation that tell it from others: a header of 6 and a question of 3
SEQ_LEN = 110  # places for three conversations of 36 tokens
FORM = ChatFormat(ChatTemplate(CHATML), json_tokenizer())


def row(number, difficulty, field="difficulty"):
    return {"messages": [{"role": "user", "content": f"{number:03}"}, {"role": "assistant", "content": "a" * 12}],
            field: difficulty}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def opened(paths, balance=("equal",), **more):
    config = TuningDataConfig(path=tuple(paths), held_out=("sample:en?documents=2",), balance=balance, **more)
    sources, _ = open_corpora(config)
    return sources, [encode_source(source, FORM, seq_len=SEQ_LEN, max_bad_rows=config.max_bad_rows)
                     for source in sources]


def test_buckets_of_values():
    assert bucket_rows([3, 1, 2, 9, 5, 4], {"easy": 1.0, "hard": 3.0}) == (
        ["easy", "easy", "easy", "hard", "hard", "hard"], {"easy": 1.0, "hard": 3.0})
    found, weights = bucket_rows([f"{i / 7}" for i in range(99)], {})
    assert Counter(found) == {"easy": 33, "medium": 33, "hard": 33} and set(weights.values()) == {1.0}
    assert found == sorted(found, key=("easy", "medium", "hard").index)
    # Equal numbers stay together, whatever that does to the sizes.
    assert bucket_rows([1, 1, 1, 2], {"a": 1.0, "b": 1.0})[0] == ["a", "a", "a", "b"]
    # Numbers that are named are labels.
    assert bucket_rows([1, 2, 1, 3], {"1": 1.0, "2": 1.0, "3": 2.0})[0] == ["1", "2", "1", "3"]
    assert bucket_rows(["b", "a", "b"], {}) == (["b", "a", "b"], {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(("values", "balance", "error"), [
    (["easy", "hard"], ["easy=1", "hrad=2"], r"no row is 'hrad' \(did you mean 'hard'\?\); buckets: easy \(1 rows\)"),
    (["easy", "hard", "odd"], ["easy=1", "hard=2"], "gives no weight to odd; buckets"),
    (["easy", "easy"], ["equal"], "all rows are easy"),
    (["easy", 3], ["equal"], "a number in some rows and a label in others: easy, 3"),
    ([1, 1, 2], ["equal"], r"2 distinct numbers in 3 rows leave the \w+ of 3 quantiles empty"),
    ([1], ["a=1", "a=2"], "each bucket once"),
    ([1], ["a=0", "b=1"], "positive number, not 'a=0'"),
    ([1], ["equal", "a=1"], "not 'equal'"),
    ([1], ["a=1"], "names one bucket"),
])
def test_bad_values_and_weights(values, balance, error):
    with pytest.raises(ValueError, match=error):
        bucket_rows(values, parse_balance(balance))


def test_bad_rows_are_counted(tmp_path):
    lacking = [row(i, "easy" if i % 2 else "hard") for i in range(6)]
    del lacking[3]["difficulty"]
    lacking[4]["difficulty"] = True
    path = write(tmp_path / "a.jsonl", lacking)
    with pytest.raises(ValueError, match=r"2 of 6 rows read are bad.*\n.*a\.jsonl:4: no field 'difficulty'.*\n"
                                         r".*a\.jsonl:5: field 'difficulty' is a label or a number, not True"):
        opened([path])
    sources, encoded = opened([path], max_bad_rows=2)
    assert sources[0].dropped["bad"] == 2 and len(encoded[0]) == 4
    with pytest.raises(ValueError, match=r"no field 'level'.*\(so in all 6 rows read\)"):
        opened([path], difficulty_field="level")
    assert len(open_conversations(SourceConfig(path=path))) == 6  # which reads no difficulty
    for source, field, error in (("sample:ko", "difficulty", "its rows have no field 'difficulty'"),
                                 ("sample_thinking:ko", "level", "its rows have no field 'level'"),
                                 ("sample_thinking:ko?include=difficulty:hard", "difficulty", "only name and weight")):
        with pytest.raises(ValueError, match=error):
            opened([source], difficulty_field=field)


def drawn(batches, known, count):
    """The rows of batches: the bucket of each, and the conversations in order, as the numbers they were made of."""
    buckets, seen = [], {}
    for _ in range(count):
        batch = next(batches)
        for ids, segments in zip(batch.tokens, batch.segments, strict=True):
            found = [known[ids[at[0]:at[0] + PREFIX].tobytes()] for at in (
                np.flatnonzero(segments == i) for i in range(1, segments.max() + 1)) if len(at) >= PREFIX]
            assert len({bucket for bucket, _ in found}) == 1  # rows are packed of one bucket
            buckets.append(found[0][0])
            seen.setdefault(found[0][0], []).extend(number for _, number in found)
    return buckets, seen


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Two sources, the second of which has no hard rows."""
    folder = tmp_path_factory.mktemp("rows")
    levels = ["easy"] * 12 + ["medium"] * 30 + ["hard"] * 9
    first = write(folder / "a.jsonl", [row(i, level) for i, level in enumerate(levels)])
    second = write(folder / "b.jsonl", [row(100 + i, ("easy", "medium")[i % 2]) for i in range(20)])
    return first, second + "?weight=3"


def test_the_stream_has_the_shares_asked_for(two_files):
    sources, encoded = opened(two_files)
    buckets = balance_chats(sources, encoded, ("easy=1", "medium=2", "hard=1"))
    assert [one.name for one in buckets] == ["a/easy", "a/medium", "a/hard", "b/easy", "b/medium"]
    # Fourths by bucket; within a bucket 1 to 3 by source, and all of it from the one source that has rows.
    shares = [Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(3, 16), Fraction(3, 8)]
    assert [one.config.weight for one in buckets] == [float(share) for share in shares]
    assert sum(map(len, buckets)) == 71 and not set(buckets[0].rows) & set(buckets[1].rows)
    known = {chat.ids[:PREFIX].tobytes(): (one.name, int(row)) for one in buckets
             for chat, row in zip(one, one.rows, strict=True)}
    config = PipelineConfig(batch_size=4, seq_len=SEQ_LEN, packing="first_fit", num_bins=1)
    make = lambda: chat_batches(buckets, config, seed=1)
    batches = make()
    names, seen = drawn(batches, known, 60)
    for one, share in zip(buckets, shares, strict=True):
        assert abs(names.count(one.name) - share * len(names)) <= 2  # grain mixes evenly, not by chance
        once = seen[one.name][:len(one)]
        assert set(once) == set(one.rows.tolist())  # all of a bucket before any of it comes again
    stats = batches.stats()
    for one, share in zip(buckets, shares, strict=True):
        line = next(line for line in report_buckets(buckets, 60 * 4 * SEQ_LEN).splitlines() if one.name in line)
        said = re.fullmatch(rf"  {one.name}: {len(one)}, {one.num_tokens}, (.*)%, (.*)", line)
        assert float(said[1]) == pytest.approx(100 * share, abs=0.06)
        assert 0.8 * float(said[2]) - 1 < stats[f"epoch/{one.name}"] < float(said[2]) + 1
    # Resumed in the middle it goes on alike.
    first = make()
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = make()
    again.set_state(state)
    for _ in range(5):
        for a, b in zip(next(first), next(again), strict=True):
            np.testing.assert_array_equal(a, b)


def test_embedded_rows_are_true():
    """Derivations in both languages end in the answer, and no question of one split is in the other."""
    asked = {split: {} for split in ("", "/held_out")}
    for split, found in asked.items():
        for document in sample_thinking(f"sample_thinking:both{split}"):
            conversation = json.loads(document.text)
            assert conversation["difficulty"] in ("easy", "medium", "hard")
            for question, answer in zip(*(iter(conversation["messages"]),) * 2, strict=True):
                found[question["content"]] = (answer["content"], document.language)
                for step in answer.get("reasoning_content", "").replace("×", "*").split(". "):
                    if "=" in step:
                        left, _, right = step.rstrip(".").partition(" = ")
                        assert eval(left) == int(right)
                    elif step:
                        days = step.rstrip(".").split(" → ")
                        order = DAYS[document.language]
                        assert all((order.index(a) + 1) % 7 == order.index(b)
                                   for a, b in itertools.pairwise(days))
                        assert answer["content"].startswith(days[-1])
    assert not asked[""].keys() & asked["/held_out"].keys()
    for question, (answer, _) in asked[""].items():
        if term := re.search(r"\d+ [+×] \d+", question):
            assert int(re.match(r"\d+", answer)[0]) == eval(term[0].replace("×", "*"))
    with pytest.raises(ValueError, match=r"'kr' is unknown.*one of ko, en, both"):
        sample_thinking("sample_thinking:kr")


def test_scores_are_the_loss_of_each_alone(tmp_path, capfd):
    """The recipe's numbers against a plain computation, whatever the batches; and its output balances."""
    source = tiny_folder(tmp_path / "hf")
    rows = [row(i, "x") | {"messages": row(i, "x")["messages"] * (1 + i % 3)} for i in range(7)]
    path = write(tmp_path / "rows.jsonl", rows)
    score_difficulty.main(["--source", str(source), "--data", path, "--output", str(tmp_path / "out.jsonl"),
                           "--seq-len", "128", "--batch-size", "3", "--loss-chunks", "2"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"] for line in lines] == [one["messages"] for one in rows]
    config, params = load_hf(source)
    apply = jax.jit(build(config).apply)
    for line in lines:
        ids, loss = FORM.encode(line)
        logits = np.asarray(apply(params, np.pad(ids, (0, 128 - len(ids)))[None]).logits[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = [-logp[t - 1, ids[t]] for t in range(1, len(ids)) if loss[t]]
        assert line["difficulty"] == pytest.approx(np.mean(nll), rel=1e-4)
    sources, encoded = opened([str(tmp_path / "out.jsonl")], balance=("low=1", "high=1"))
    assert [len(one) for one in balance_chats(sources, encoded, ("low=1", "high=1"))] == [4, 3]
    with pytest.raises(SystemExit):
        score_difficulty.main(["--source", str(source), "--data", path, "--output", str(tmp_path / "out.jsonl")])
    assert "exists" in capfd.readouterr().err
    assert score_difficulty.widths(96, 4) == [12, 24, 48, 96]
