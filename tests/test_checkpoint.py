"""Checkpoints: whole or absent, exact, with data position, configuration and tokenizer beside the state."""

import gc
import json
import re
import resource
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.train.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    saved_params,
    saved_run,
    saved_steps,
)
from jaxlm.train.state import abstract_state, init_state

RULES = [("w$", P("fsdp", "tensor"))]
TX = optax.adamw(1e-2)


def init(key):
    return {"w": jax.random.normal(key, (8, 4))}


class Data:
    def __init__(self, position=0):
        self.position = position

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def new(step=0, mesh=None):
    state = init_state(init, TX, jax.random.key(step), mesh or make_mesh(MeshConfig()), RULES)
    return state._replace(step=jnp.asarray(step, jnp.int32))


def open_run(folder, **config):
    return Checkpointer(folder, CheckpointConfig(**config), {"seed": 7}, {"tokenizer.model": b"\x00\xff"})


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_everything_comes_back_bit_identical(tmp_path):
    checkpointer = open_run(tmp_path)
    state, mesh = new(5), make_mesh(MeshConfig())
    checkpointer.save(state, Data(11))
    checkpointer.wait()
    data = Data()
    restored = checkpointer.restore(abstract_state(init, TX, mesh, RULES), data)
    checkpointer.close()
    assert equal(state, restored) and data.position == 11
    assert equal(state.params, saved_params(tmp_path, jax.eval_shape(init, jax.random.key(0))))
    assert saved_run(tmp_path) == ({"seed": 7}, {"tokenizer.model": b"\x00\xff"})
    assert (tmp_path / "checkpoints/5/tokenizer/tokenizer.model").read_bytes() == b"\x00\xff"


def test_another_mesh_can_read_it(tmp_path):
    checkpointer = open_run(tmp_path)
    state = new(5, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    checkpointer.save(state, Data())
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    checkpointer.wait()
    restored = checkpointer.restore(abstract_state(init, TX, mesh, RULES), Data())
    checkpointer.close()
    assert equal(state, restored)
    assert restored.params["w"].sharding.mesh.shape == mesh.shape
    assert restored.opt_state[0].mu["w"].sharding.spec == P("fsdp", "tensor")


def test_keep_last_and_keep_every(tmp_path):
    checkpointer = open_run(tmp_path, every=1, keep_last=2, keep_every=4)
    for step in range(1, 8):
        checkpointer.save(new(step), Data())
    checkpointer.close()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [4, 6, 7]


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    checkpointer = open_run(tmp_path)
    checkpointer.save(new(1), Data(1))
    checkpointer.close()
    left = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "state").write_bytes(b"half")
    checkpointer = open_run(tmp_path)
    data = Data()
    restored = checkpointer.restore(abstract_state(init, TX, make_mesh(MeshConfig()), RULES), data)
    assert int(restored.step) == 1 and data.position == 1
    checkpointer.save(new(2), Data(2))
    checkpointer.close()
    assert saved_run(tmp_path)[0] == {"seed": 7}


@pytest.fixture
def no_big_files():
    """Every write past 20 kB fails as on a full disk (EFBIG for ENOSPC): a limit that the kernel enforces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax leaves coroutines behind when a write of its own fails; that they are reported is no fault of ours.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_full_disk(tmp_path, no_big_files):
    """One sentence that names what is left; the good checkpoint stays readable, and the next write succeeds."""
    checkpointer = open_run(tmp_path)
    checkpointer.save(new(1), Data(1))
    checkpointer.wait()
    big = new(2)._replace(params={"w": jax.random.normal(jax.random.key(0), (80, 400))})
    no_big_files(True)
    with pytest.raises(CheckpointError, match=r"could not be written.*File too large.*last complete one is step 1"):
        checkpointer.save(big, Data(2))
        checkpointer.wait()
    no_big_files(False)
    data = Data()
    restored = checkpointer.restore(abstract_state(init, TX, make_mesh(MeshConfig()), RULES), data)
    assert int(restored.step) == 1 and data.position == 1
    assert not (tmp_path / "checkpoints/2").exists()
    checkpointer.save(new(3), Data(3))
    checkpointer.close()
    assert (tmp_path / "checkpoints/3").is_dir()
    gc.collect()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoints; start again with --overwrite"):
        saved_steps(tmp_path / "checkpoints")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")  # as above
@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_damage_to_any_file_is_noticed_or_harmless(tmp_path, caplog, how):
    """Every file of the newest checkpoint in turn: what comes back is exactly the newest state or the one before."""
    abstract = abstract_state(init, TX, make_mesh(MeshConfig()), RULES)
    checkpointer = open_run(tmp_path / "good")
    states = {1: new(1), 2: new(2)}
    for step, state in states.items():
        checkpointer.save(state, Data(step))
    checkpointer.close()
    newest, used = tmp_path / "good/checkpoints/2", {1: [], 2: []}
    for path in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
        run = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", run)
        damage(run / "checkpoints/2" / path, how)
        caplog.clear()
        checkpointer, data = open_run(run), Data()
        restored = checkpointer.restore(abstract, data)
        step = int(restored.step)
        assert equal(restored, states[step]) and data.position == step, path
        assert (run / "checkpoints/2.unusable").exists() == (step == 1)
        if step == 1:
            assert "2 cannot be used" in caplog.text and "goes on from step 1" in caplog.text
            checkpointer.save(states[2], Data(2))  # the run comes to this step again
            checkpointer.wait()
            assert equal(checkpointer.restore(abstract, data), states[2])
        checkpointer.close()
        used[step].append(str(path))
        shutil.rmtree(run)
    # The arrays themselves, and the position; orbax has copies of some of its metadata and needs none of the rest.
    assert any("/d/" in path for path in used[1]) and "data/position.json" in used[1]
    gc.collect()


def test_damaged_parameters_are_not_exported(tmp_path):
    checkpointer = open_run(tmp_path)
    checkpointer.save(new(1), Data(1))
    checkpointer.close()
    folder = tmp_path / "checkpoints/1/digest"
    changed = re.sub(rb'"params/w": \d+', b'"params/w": 1', (folder / "digest.json").read_bytes())
    (folder / "digest.json").write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"digest\.json is damaged"):
        saved_params(tmp_path, jax.eval_shape(init, jax.random.key(0)))
    (folder / "crc32_0.json").write_text(json.dumps({"digest.json": zlib.crc32(changed)}))
    with pytest.raises(CheckpointError, match="1 of 1 arrays are damaged, the first is params/w"):
        saved_params(tmp_path, jax.eval_shape(init, jax.random.key(0)))


def test_config_errors():
    with pytest.raises(ValueError, match="not a multiple"):
        CheckpointConfig(every=4, keep_every=6)
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointConfig(every=0)
