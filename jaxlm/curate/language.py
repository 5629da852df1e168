"""Language identification offline: py3langid, whose naive Bayes model over byte n-grams is part of the package."""

import functools
from typing import Any

from jaxlm.curate.config import LanguageConfig
from jaxlm.curate.extras import extra

MAX_CHARS = 10_000  # more text does not change the verdict, only the time


@functools.cache
def _identifier() -> Any:
    module = extra("py3langid.langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """The language (ISO 639-1) and its probability among the 97 that py3langid knows (Lui & Baldwin 2012)."""
    language, confidence = _identifier().classify(text[:MAX_CHARS])
    return str(language), float(confidence)


def judge(text: str, config: LanguageConfig) -> tuple[str, str | None]:
    """The language, and why the text is dropped (None: it stays)."""
    language, confidence = identify(text)
    if language not in config.keep:
        return language, f"language {language}"
    return language, None if confidence >= config.min_confidence else f"language {language} uncertain"
