"""The import rules hold here, and the checker sees each kind of violation."""

from pathlib import Path

import pytest

from tools.check_layers import check


def test_this_repository():
    assert check(Path(__file__).parent.parent) == []


@pytest.mark.parametrize(("path", "text", "message"), [
    ("jaxlm/data/x.py", "import jax", "must not import jax"),
    ("jaxlm/model/x.py", "from jaxlm.train.loop import fit", "must not import jaxlm.train.loop"),
    ("jaxlm/model/x.py", "from jaxlm.data import rows", "must not import jaxlm.data"),
    ("jaxlm/model/x.py", "from jaxlm import core, train", "must not import jaxlm.train"),
    ("jaxlm/model/x.py", "from jaxlm import *", "must not import jaxlm.*"),
    ("jaxlm/train/x.py", "import flax", "flax lives in jaxlm/model only"),
    ("jaxlm/core/x.py", "from . import tree, rng", "relative import"),
    ("jaxlm/core/x.py", "def f():\n    import json", "inside a function"),
    ("jaxlm/core/x.py", "import typing\nif typing.TYPE_CHECKING:\n    import jax", "TYPE_CHECKING"),
    ("jaxlm/core/__init__.py", "x = 1", "must be empty"),
    ("jaxlm/odd/x.py", "import json", "has no rank"),
    ("jaxlm/eval/x.py", "import recipes.pretrain", "must not import recipes"),
    ("recipes/x.py", "from recipes.pretrain import main", "must not import another recipe"),
])
def test_violations(tmp_path, path, text, message):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (found,) = check(tmp_path)
    assert message in found and path in found


def test_the_peers_of_tools_may_wait(tmp_path):
    file = tmp_path / "jaxlm/model/x.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    import torch")
    assert check(tmp_path) == []
