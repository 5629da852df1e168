"""Counting from HLO text: loops, products, collectives and bytes against numbers worked out by hand and by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import build
from jaxlm.train.chips import parse_topology, without_disk_cache
from jaxlm.train.hlo import Frame, parse_module, trip_count
from jaxlm.train.hlo_groups import groups
from jaxlm.train.plan_cost import KINDS, count_cost


@pytest.fixture(scope="module")
def chip():
    return parse_topology("v5e:1x1").devices[0]


def compiled(f, *arguments, device=None, **options):
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    with without_disk_cache():
        return jax.jit(f, **options).lower(*shapes).compile()


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def layers(unroll):
    """Three passes over five layers."""
    def f(x, w):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        again = lambda _, x: jax.lax.scan(layer, x, w, unroll=unroll)[0]
        return jax.lax.fori_loop(0, 3, again, x, unroll=unroll > 1)
    return f


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_nested_loops_run_as_often_as_their_counters_say(platform, chip):
    device = chip if platform == "tpu" else None
    x, w = array(256, 512), array(5, 512, 512)
    looped = compiled(layers(1), x, w, device=device)
    module = parse_module(looped.as_text())
    found = []

    def walk(frame):
        for i in frame.computation.instructions.values():
            if i.op == "while":
                found.append(trip_count(module, i, frame))
                walk(Frame(module.computations[i.attribute("body")], i, frame))

    walk(Frame(module.computations[module.entry]))
    assert found == [3, 5]
    expected = 3 * 5 * 2 * 256 * 512 * 512
    assert count_cost(looped.as_text()).flops == expected
    unrolled = compiled(layers(5), x, w, device=device)
    assert count_cost(unrolled.as_text()).flops == expected
    # XLA counts a body once, and everything only where there is no loop; beside the products it counts the tanh.
    assert looped.cost_analysis()["flops"] < 0.5 * expected
    assert unrolled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("spec, shapes", [
    ("ij,jk->ik", [(128, 256), (256, 512)]),
    ("bij,bjk->bik", [(8, 128, 256), (8, 256, 128)]),
    ("btd,dnh->btnh", [(4, 128, 256), (256, 4, 128)]),
    ("btnh,bsnh->bnts", [(2, 128, 4, 128), (2, 128, 4, 128)]),
    ("btd,btf->df", [(4, 128, 256), (4, 128, 512)]),
])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_product_costs_two_flops_per_multiplication(platform, spec, shapes, chip):
    text = compiled(lambda a, b: jnp.einsum(spec, a, b), *(array(*shape) for shape in shapes),
                    device=chip if platform == "tpu" else None).as_text()
    sizes = {axis: size for axes, shape in zip(spec.split("->")[0].split(","), shapes, strict=True)
             for axis, size in zip(axes, shape, strict=True)}
    assert count_cost(text).flops == 2 * np.prod(list(sizes.values()))


MODEL = ModelConfig(vocab_size=512, d_model=128, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=64, d_ff=256,
                    max_positions=256)


def gradient_flops(**compute):
    """Products of the gradient of a decoder's logits, counted and as XLA has them; two rows of 256 tokens."""
    model = build(MODEL, ComputeConfig(attention="xla", **compute))
    loss = lambda params, tokens: jnp.sum(model.apply(params, tokens).logits ** 2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    found = jax.jit(jax.grad(loss)).lower(params, array(2, 256, dtype=jnp.int32)).compile()
    return count_cost(found.as_text()).flops, found.cost_analysis()["flops"]


def test_a_decoder_costs_what_its_formula_says():
    tokens, c = 2 * 256, MODEL
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * 256 / 2
    # 4 blocks of queries see 5/8 of the square, where `flops_per_token` counts one half.
    expected = tokens * (flops_per_token(c, 256) + attention * (5 / 8 / (1 / 2) - 1))
    plain, _ = gradient_flops()
    unrolled, exact = gradient_flops(scan_unroll=3)
    assert plain == unrolled == pytest.approx(expected, rel=0.01)
    assert unrolled == pytest.approx(exact, rel=0.1)  # XLA counts the norms and the softmax too
    # Full remat: every layer's forward pass once more, but for its last product, which nothing asks for.
    full, _ = gradient_flops(remat="full")
    of_layers = plain - tokens * 6 * c.d_model * c.vocab_size
    assert full == plain + of_layers / 3 - tokens * c.num_layers * 2 * c.d_model * c.d_ff


def exchange(x):
    """Each kind of collective once, four times."""
    def body(_, x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        x = x + jax.lax.psum_scatter(whole, "fsdp", tiled=True)
        x = x + jax.lax.all_to_all(x, "fsdp", 1, 1, tiled=True)
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return x / jax.lax.psum(jnp.sum(x, axis=0, keepdims=True), "fsdp")
    return jax.lax.fori_loop(0, 4, body, x)


def test_collectives_by_kind_count_and_bytes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    f = jax.shard_map(exchange, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False, mesh=mesh)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    cost = count_cost(jax.jit(f).lower(x).compile().as_text())
    found = {c.kind: (count, c.bytes) for c, count in cost.collectives.items()}
    local, whole = 16 * 32 * 4, 64 * 32 * 4
    assert found == {"all-gather": (4, whole), "reduce-scatter": (4, whole), "all-to-all": (4, local),
                     "collective-permute": (4, local), "all-reduce": (4, 32 * 4)}
    assert set(found) == set(KINDS)
    of_groups = [groups(c.members) for c in cost.collectives if c.kind != "collective-permute"]
    assert all(sorted(found) == [(0, 1, 2, 3), (4, 5, 6, 7)] for found in of_groups)


@pytest.mark.parametrize("text, expected", [
    ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
])
def test_groups_of_devices_in_every_spelling(text, expected):
    assert groups(text) == expected


def test_bytes_are_those_that_cross_hbm(chip):
    x = array(1024, 4096, dtype=jnp.float32)
    size = 1024 * 4096 * 4
    assert count_cost(compiled(lambda x: x * 2 + 1, x, device=chip).as_text()).hbm_bytes == 2 * size

    def total(stacked):  # a loop reads each of its slices once; the sum of 64 KiB stays on the chip
        return jax.lax.scan(lambda total, part: (total + part, None), jnp.zeros((128, 128)), stacked)[0]

    stacked = array(256, 128, 128, dtype=jnp.float32)
    cost = count_cost(compiled(total, stacked, device=chip).as_text())
    assert cost.hbm_bytes == pytest.approx(256 * 128 * 128 * 4, rel=0.1)

    def write(stacked):  # and writes each slice once, in place
        return jax.lax.fori_loop(0, 256, lambda i, s: s.at[i].set(jnp.sin(s[i])), stacked)

    cost = count_cost(compiled(write, stacked, device=chip, donate_argnums=0).as_text())
    assert cost.hbm_bytes == pytest.approx(2 * 256 * 128 * 128 * 4, rel=0.1)


def test_only_the_dearer_branch_counts():
    f = lambda go, x: jax.lax.cond(go, lambda x: x @ x @ x, lambda x: x, x)
    text = compiled(f, array(dtype=jnp.bool_), array(128, 128)).as_text()
    assert count_cost(text).flops == 2 * 2 * 128**3


def test_a_loop_without_a_counter_is_named():
    f = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x, x)
    cost = count_cost(compiled(f, array(128, 128, dtype=jnp.float32)).as_text())
    assert cost.flops == 2 * 128**3
    assert any(name.startswith("loop ") for name in cost.uncounted)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule nothing\n")
