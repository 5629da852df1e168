"""Recipes that run others: what ends the one ends the other in order."""

import os
import signal
import sys
import threading
import time

import pytest

from jaxlm.core.command import run_recipe

CHILD = """
import pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def save(*_):
    time.sleep(0.3)
    (here / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(here / "ready").touch()
time.sleep(60)
"""


def test_sigterm_lets_the_other_recipe_save(tmp_path, monkeypatch):
    """A process that is killed at once would leave nothing saved."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/__init__.py").touch()
    (tmp_path / "recipes/child.py").write_text(CHILD.replace("parent", "parent.parent"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.chdir(tmp_path)

    def leave(*_):
        raise SystemExit(143)

    def end():
        for _ in range(200):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        threading.Thread(target=end).start()
        with pytest.raises(SystemExit):
            run_recipe("child", None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists()
