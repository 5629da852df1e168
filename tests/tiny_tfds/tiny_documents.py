"""A data set of the documents it is given, prepared offline. tfds wants a builder in a module of its own package."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

TEXTS = ("첫 문서", "second \"document\"", "셋째\n문서\t탭", "four")


class TinyDocuments(tfds.core.GeneratorBasedBuilder):
    """Rows with text, language and a number; one has no text."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: Sequence[tfds.core.BuilderConfig] = (tfds.core.BuilderConfig(name="small", description="tiny"),)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "language": tfds.features.Text(), "number": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples((*TEXTS, " ")), "test": self._generate_examples(TEXTS[:1])}

    def _generate_examples(self, texts: Sequence[str]) -> Iterator:
        for number, text in enumerate(texts):
            yield number, {"text": text, "language": "ko" if number % 2 == 0 else "en", "number": number}


def prepare(folder: Path, file_format: str = "array_record") -> None:
    """Writes the data set below `folder`."""
    builder = TinyDocuments(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()
