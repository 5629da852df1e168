"""Test sets written, and made smaller."""

import pytest

from jaxlm.data.beir import BeirSet, read_beir
from jaxlm.data.beir_files import shorten, write_beir


def test_a_set_that_is_written_reads_as_it_was_and_a_shorter_one_keeps_its_answers(tmp_path):
    data = BeirSet({f"d{i}": f"text {i}" for i in range(50)}, {f"q{i}": f"question {i}" for i in range(20)},
                   {"u": "nobody judged this"},
                   {f"q{i}": {f"d{2 * i}": 1, f"d{2 * i + 1}": 0} for i in range(20)}, {"q3": {"type": "x"}}, 0)
    write_beir(tmp_path / "whole", data, "dev")
    found = read_beir(tmp_path / "whole", "dev")
    assert found._replace(fields={name: fields for name, fields in found.fields.items() if fields}) == data
    short = shorten(data, documents=12, queries=8, seed=1)
    assert (len(short.corpus), len(short.queries), short.unjudged) == (12, 8, {})
    for name in short.queries:
        relevant = {document for document, gain in data.qrels[name].items() if gain}
        assert {document for document, gain in short.qrels[name].items() if gain} == relevant <= set(short.corpus)
        assert set(short.qrels[name]) <= set(short.corpus)
    assert shorten(data, documents=12, queries=8, seed=1) == short != shorten(data, documents=12, queries=8, seed=2)
    assert shorten(data, documents=99)._replace(unjudged=data.unjudged) == data
    with pytest.raises(ValueError, match="20 queries have 20 relevant documents, more than the 12 to keep"):
        shorten(data, documents=12)
