"""Planning for chips that are not here: the compiler's memory and counts, the nearest mesh, and bad requests.

libtpu takes some 15 s for any step of a decoder, so one test has one and the others a step of two products.
"""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.batch import LMBatch
from jaxlm.core.masked import aggregate
from jaxlm.core.mesh import BATCH, MeshConfig, make_mesh
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.objective.lm import chunked_cross_entropy
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.train.chips import CHIPS, parse_topology
from jaxlm.train.measure import PEAK_FLOPS
from jaxlm.train.plan import (
    TooLargeError,
    Work,
    _candidates,
    argument_bytes,
    chips_needed,
    plan_report,
    plan_step,
    refusal,
    render,
)
from jaxlm.train.plan_cost import Collective
from jaxlm.train.plan_network import network_seconds
from jaxlm.train.state import abstract_state
from jaxlm.train.step import check_batch, make_step

FSDP = MeshConfig(data=1, fsdp=-1)
RULES = [("up$", P("fsdp", "tensor")), ("down$", P("tensor", "fsdp"))]
WIDE, NARROW = 1024, 256


def build_step(loss, init, rules, mesh, accumulate):
    tx = make_optimizer(OptimConfig(), 10)
    step = make_step(loss, tx, lambda count: 1e-3, mesh=mesh, rules=rules, accumulate=accumulate)
    return step, abstract_state(init, tx, mesh, rules)


def program(mesh, accumulate, *, rows=64):
    """A step of two products with their gradients on `rows` vectors; x needs no gradient."""
    check_batch(rows, accumulate, mesh)

    def loss(params, batch, key):
        h = jax.nn.relu(batch["x"] @ params["up"])
        mean = aggregate(jnp.sum((h @ params["down"] - batch["x"]) ** 2, axis=-1), jnp.ones(batch["x"].shape[0]))
        return mean.total, {"loss": mean}

    init = lambda key: {"up": jnp.zeros((NARROW, WIDE)), "down": jnp.zeros((WIDE, NARROW))}
    step, state = build_step(loss, init, RULES, mesh, accumulate)
    x = jax.ShapeDtypeStruct((rows, NARROW), jnp.float32, sharding=NamedSharding(mesh, P(*BATCH[:1])))
    return step, (state, {"x": x})


def work(rows=64):
    return Work(tokens=rows, model_flops=rows * 2 * 5 * WIDE * NARROW)


def plan(text="v5e:2x2", config=FSDP, accumulate=1):
    return plan_step(program, parse_topology(text), config, accumulate, work())


@pytest.mark.parametrize("chip", CHIPS)
def test_peaks_are_those_of_the_one_table(chip):
    shape = "2x2" if len(CHIPS[chip].largest) == 2 else "2x2x1"
    topology = parse_topology(f"{chip}:{shape}")
    assert topology.devices[0].device_kind == CHIPS[chip].kind
    assert topology.chip.peak == PEAK_FLOPS[CHIPS[chip].kind]


def test_a_decoder_with_the_splash_kernel():
    model = ModelConfig(vocab_size=512, d_model=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128, d_ff=256,
                        max_positions=1024)
    shape = rows, length = 8, 1024
    decoder = build(model, ComputeConfig(dtype="bfloat16"))
    kept = []

    def decoder_program(mesh, accumulate):
        def loss(params, batch, key):
            hidden = decoder.apply(params, batch.tokens, positions=batch.positions, segments=batch.segments,
                                   logits=False).hidden
            nll = aggregate(chunked_cross_entropy(hidden, decoder.head(params), batch.targets).nll, batch.loss_mask)
            return nll.total, {"loss": nll}

        step, state = build_step(loss, decoder.init, PARAM_RULES, mesh, accumulate)
        leaf = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))
        batch = LMBatch(leaf(jnp.int32), leaf(jnp.int32), leaf(jnp.float32), leaf(jnp.int32), leaf(jnp.int32))
        kept.append((state, batch))
        return step, kept[-1]

    tokens = rows * length
    asked = Work(tokens=tokens, model_flops=tokens * flops_per_token(model, length))
    topology = parse_topology("v5e:2x2")
    found = plan_step(decoder_program, topology, FSDP, 1, asked)
    assert found.mesh == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    # Arguments may be padded to tiles, and never to less than they are.
    assert argument_bytes(kept[-1]) <= found.arguments < 1.1 * argument_bytes(kept[-1])
    assert found.arguments + found.temporaries < found.peak < topology.chip.hbm
    # 3 of 4 blocks of 512 x 512, in 9 products: 2 forward, 4 and 3 in the kernels of the backward pass;
    # `flops_per_token` counts half the square in 6.
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * length / 2 * tokens
    assert 4 * found.flops == pytest.approx(asked.model_flops + attention * (2 * 3 / 4 * 9 / 6 - 1), rel=0.01)
    assert {row.network for row in found.exchanges} == {"ICI"} and "fsdp" in {row.axes for row in found.exchanges}
    assert found.step_seconds == max(found.seconds.values()) and found.seconds["DCN"] == 0
    assert 0 < found.mfu < 1 and not found.uncounted
    text = render(found)
    assert "4 x TPU v5 lite; mesh fsdp 4; accumulate 1" in text and "MFU at most" in text


@pytest.mark.parametrize("accumulate", [1, 2])
def test_flops_of_a_step_by_hand(accumulate):
    assert 4 * plan(accumulate=accumulate).flops == work().model_flops


def test_several_slices_exchange_over_the_data_centre():
    found = plan("v5e:2x2*2", MeshConfig(data=2, fsdp=4))
    between = [row for row in found.exchanges if row.network == "DCN"]
    assert between and {row.axes for row in between} == {"data"} and found.seconds["DCN"] > 0
    # Each chip sends its quarter of the gradients, float32, once.
    assert sum(row.bytes for row in between) == pytest.approx(2 * WIDE * NARROW * 4 / 4, rel=0.05)
    assert "DCN" in render(found)


def refusing(program, least):
    """The compiler's refusal below `least` micro-batches."""
    class Refused:
        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
                                             "for HLO temporaries (60.00G) exceeds available HBM (15.75G).")

    def wrapped(mesh, accumulate):
        step, arguments = program(mesh, accumulate)
        return (step if accumulate >= least else Refused()), arguments

    return wrapped


@pytest.mark.parametrize(("topology", "sizes", "step", "seconds"), [
    ("v5e:16x16", {"data": 2, "fsdp": 128}, 128, 0.040),   # pairs 8 apart: 8 of them share each link of the ring
    ("v5e:16x16", {"fsdp": 256}, 1, 1e9 * 255 / 256 / 4 / 50e9),  # the whole torus: 4 links a chip
    ("v5e:8x8", {"fsdp": 64}, 1, 1e9 * 63 / 64 / 2 / 50e9),       # lines, which have no way back
])
def test_links_that_a_gather_needs(topology, sizes, step, seconds):
    """1 GB among the members of the first axis that has several: indices `step` apart."""
    topology = parse_topology(topology)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), topology.devices)
    count = mesh.size // step if step > 1 else mesh.size
    groups = ",".join("{" + ",".join(str(i + j * step) for j in range(count)) + "}" for i in range(step))
    found, between = network_seconds(Counter({Collective("all-gather", 10**9, "{" + groups + "}"): 1}), mesh, topology)
    assert found == pytest.approx(seconds) and between == 0


def test_accumulate_may_start_high():
    assert next(_candidates((1, 4, 1, 1), 2048, 1))


def test_what_does_not_fit_is_answered_with_the_nearest_mesh():
    topology, said = parse_topology("v5e:2x2"), []
    found = plan_report(refusing(program, 8), topology, FSDP, 1, work(), said.append)
    assert said[0] == ("v5e:2x2: the step needs 60.00 GiB a chip for temporaries, and a chip has 15.75 GiB. "
                       "Looking for the nearest mesh that fits.")
    assert said[1].startswith("tried mesh fsdp 4; accumulate 4: ")  # 2 would leave 30 GiB, which is not tried
    assert found.accumulate == 8 and said[-1] == render(found)


def test_a_model_that_no_mesh_holds():
    topology, said = parse_topology("v5e:2x2"), []
    small = replace(topology, chip=replace(topology.chip, hbm=2**20))
    with pytest.raises(ValueError, match=r"on v5e:2x2 fits; use more chips \(the arguments alone need 7 of"):
        plan_report(program, small, FSDP, 1, work(), said.append)
    assert len(said) == 1 and said[0].startswith("v5e:2x2: the arguments alone are ")  # nothing was compiled
    assert chips_needed(program, small) == 7  # parameters and two moments of 2 MiB each, and a batch


@pytest.mark.parametrize("message, needed", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (241.60G) exceeds "
     "available HBM (95.74G).", "needs 241.60 GiB a chip for temporaries"),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.25G of "
     "15.75G hbm. Exceeded hbm capacity by 1.50G.\n\nTotal hbm usage >= 17.50G:", "needs 17.25 GiB a chip in all"),
    ("RESOURCE_EXHAUSTED: something new\nmore", "the compiler refuses the step: RESOURCE_EXHAUSTED: something new"),
])
def test_refusals_in_one_sentence(message, needed):
    error = refusal(jax.errors.JaxRuntimeError(message), parse_topology("v5e:2x2"), 3 * 2**30)
    assert isinstance(error, TooLargeError) and needed in str(error) and "\n" not in str(error)
    if "in all" in needed:
        assert error.temporaries == 14.25 * 2**30  # the arguments are counted once


@pytest.mark.parametrize("text, message", [
    ("v5p", "must be CHIP:SHAPE"),
    ("v5p:4x4x8x", "must be CHIP:SHAPE"),
    ("v5:2x2", "unknown chip 'v5' \\(did you mean 'v5"),
    ("v5p:4x4", "the torus of v5p has 3 axes, so a shape is like v5p:4x4x4"),
    ("v5e:2x2x2", "the torus of v5e has 2 axes, so a shape is like v5e:4x4"),
    ("v5e:3x2", "the first two sides must be even"),
    ("v6e:32x16", r"a slice of v6e has at most 16x16 chips; join several with v6e:SHAPE\*SLICES"),
    ("v6e:2x2*0", "must be positive"),
])
def test_topologies_that_are_not(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_meshes_and_batches_that_do_not_divide():
    with pytest.raises(ValueError, match="need 3 devices, but 4 are here"):
        plan(config=MeshConfig(data=1, fsdp=3))
    with pytest.raises(ValueError, match="batch size 64 does not divide into 3 micro-batches"):
        plan(accumulate=3)
    with pytest.raises(ValueError, match=r"mesh\.data 1 does not divide over 2 slices"):
        plan("v5e:2x2*2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    def missing(*arguments, **options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[plan\]'"):
        parse_topology("v5e:2x2")
