"""A classifier of good and bad text in the manner of fastText (Joulin et al. 2017, arXiv:1607.01759).

Hashed n-grams of words and characters into logistic regression, by scikit-learn. fastText itself was tried: its wheel
(fasttext-numpy2-wheel 0.9.2) ended with "Encountered NaN" on small sets, at one learning rate or another.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import hstack
from scipy.special import expit
from scipy.stats import rankdata

from jaxlm.core.files import replacing
from jaxlm.curate.config import QualityConfig
from jaxlm.curate.extras import extra
from jaxlm.data.rows import BadRow, decode_json
from jaxlm.data.text_files import numbered_lines

PARTS = ("features", "word_ngrams", "min_chars", "max_chars")  # of a configuration, kept in the model


class Evaluation(NamedTuple):
    """On held-out rows. `precision` is that of the `kept` share with the best scores."""

    rows: int
    positives: int
    auc: float
    kept: float
    precision: float


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """`(label, text)` of JSONL rows; ValueError names the line that has none."""
    rows = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = decode_json(line)
        except BadRow as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        label, text = (row.get("label"), row.get("text")) if isinstance(row, dict) else (None, None)
        labelled = isinstance(label, (str, int)) and not isinstance(label, bool)
        if not labelled or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}:{number}: a labelled row needs 'label' (a string or an integer) and 'text'")
        rows.append((str(label), text))
    return rows


def split_rows(rows: Sequence[tuple[str, str]], held_out: float) -> tuple[list, list]:
    """Training and held-out rows by a hash of the text, so that copies of one text are on one side."""
    parts: tuple[list, list] = ([], [])
    for row in rows:
        number = int.from_bytes(hashlib.blake2b(row[1].encode("utf-8"), digest_size=8).digest(), "big")
        parts[number < held_out * 2**64].append(row)
    return parts


def evaluate(scores: np.ndarray, positive: np.ndarray, kept: float) -> Evaluation:
    """AUC = P(score of a positive > score of a negative), ties count half; precision of the best `kept` share.

    Args:
      scores: [n] float.
      positive: [n] bool; both kinds must occur.
    """
    total, good = len(scores), int(positive.sum())
    assert 0 < good < total, "both labels must occur"
    ranks = rankdata(scores)
    auc = (ranks[positive].sum() - good * (good + 1) / 2) / (good * (total - good))
    best = np.argsort(-scores, kind="stable")[:max(1, round(kept * total))]
    return Evaluation(total, good, float(auc), kept, float(positive[best].mean()))


def train(config: QualityConfig) -> Evaluation:
    """Trains on `labelled`, evaluates on the held-out part, writes `model` and beside it NAME.json.

    The same rows give the same model. The precision is that of `keep_share`, else of the share of positives.
    """
    assert config.labelled is not None and config.model is not None
    learned, held = split_rows(read_labelled(config.labelled), config.held_out)
    for name, rows in (("training", learned), ("held-out", held)):
        if len({label == config.positive for label, _ in rows}) < 2:
            raise ValueError(f"{config.labelled}: the {name} rows ({len(rows)}) need both texts labelled "
                             f"{config.positive!r} (quality.positive) and others")
    vectors = _Vectors(*(getattr(config, name) for name in PARTS))
    fitted = extra("sklearn.linear_model").LogisticRegression(C=config.inverse_regularization, max_iter=1000)
    fitted.fit(vectors([text for _, text in learned]), [label == config.positive for label, _ in learned])
    model = Model(vectors, fitted.coef_[0].astype(np.float32), float(fitted.intercept_[0]))
    positive = np.array([label == config.positive for label, _ in held])
    found = evaluate(model.scores([text for _, text in held]), positive, config.keep_share or float(positive.mean()))
    config.model.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.model) as scratch:
        save_file({"weights": model.weights, "bias": np.array([model.bias], np.float32)}, scratch,
                  # One entry: safetensors writes several in no fixed order, and equal models should be equal files.
                  {"vectors": json.dumps({name: getattr(config, name) for name in PARTS})})
    with replacing(config.model.with_suffix(".json")) as scratch:
        scratch.write_text(json.dumps(found._asdict()) + "\n")
    return found


class _Vectors:
    """Texts to rows of hashed n-grams, [n, 2 * features]: of words, then of characters within words."""

    def __init__(self, features: int, word_ngrams: int, min_chars: int, max_chars: int) -> None:
        make = extra("sklearn.feature_extraction.text").HashingVectorizer
        self._words = make(n_features=features, ngram_range=(1, word_ngrams), token_pattern=r"\w+")
        self._chars = make(n_features=features, ngram_range=(min_chars, max_chars), analyzer="char_wb")

    def __call__(self, texts: Sequence[str]) -> Any:
        return hstack([self._words.transform(texts), self._chars.transform(texts)], format="csr")


class Model(NamedTuple):
    """Logistic regression: P(good) = 1 / (1 + exp(-(x w + b))) with x [2 * features]."""

    vectors: Callable[[Sequence[str]], Any]
    weights: np.ndarray
    bias: float

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """P(good) of each text, [n] float64."""
        return expit(self.vectors(texts) @ self.weights.astype(np.float64) + self.bias)


@functools.cache
def load_model(path: Path) -> Model:
    """A model that `train` wrote; ValueError for another file."""
    try:
        with safe_open(path, framework="numpy") as file:
            parts = json.loads((file.metadata() or {}).get("vectors", "{}"))
            weights, bias = file.get_tensor("weights"), file.get_tensor("bias")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no quality model ({error})") from None
    if {*parts} != {*PARTS}:
        raise ValueError(f"{path}: no quality model (its metadata must name {', '.join(PARTS)})")
    return Model(_Vectors(*(parts[name] for name in PARTS)), weights, float(bias[0]))


def score(path: Path, text: str) -> float:
    """P(good) of a text, 0 to 1."""
    return float(load_model(path).scores([text])[0])


def keep_threshold(scores: np.ndarray, share: float) -> float:
    """The score that `share` of the documents reach: the best `round(share * n)`, at least one, and all equal to it."""
    return float(np.sort(scores)[::-1][max(1, round(share * len(scores))) - 1])
