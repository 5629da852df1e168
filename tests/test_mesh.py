"""Meshes: what fits, which rows a process loads, how batches are put."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core.mesh import AXES, DataShard, MeshConfig, data_shard, make_mesh, match_rule, put_batch, put_whole

RULES = [("w$", P("fsdp", "tensor")), ("both$", P(("data", "fsdp")))]


def test_the_rest_goes_to_the_free_axis():
    assert dict(make_mesh(MeshConfig(fsdp=2, context=2)).shape) == {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    assert make_mesh(MeshConfig(data=1, fsdp=-1)).shape["fsdp"] == 8
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(("sizes", "message"), [
    ({"data": 3}, "mesh axes data 3, fsdp 1, context 1, tensor 1 need 3 devices, but 8 are here; set one axis to -1"),
    ({"data": -1, "fsdp": -1}, "at most once"),
    ({"fsdp": 0}, "must be positive"),
    ({"fsdp": 3}, "fsdp 3, context 1, tensor 1 take 3 devices, which do not divide the 8 here; .* one of 1, 2, 4, 8"),
    ({"fsdp": 16}, "fsdp 16, context 1, tensor 1 take 16 devices, which do not divide the 8 here"),
])
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("a/b", (2,), r"no sharding rule matches parameter 'a/b' of shape \(2,\)"),
    ("a/w", (6, 2), r"dimension 0 of size 6 does not divide by 4 \(mesh axes fsdp\); 1, 2, 3 would"),
    ("a/both", (4,), r"dimension 0 of size 4 does not divide by 8 \(mesh axes data, fsdp\); 1, 2, 4 would"),
    ("a/w", (8,), "more dimensions than its shape"),
])
def test_parameters_that_do_not_fit(name, shape, message):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2) if name == "a/w" else MeshConfig(data=2, fsdp=4))
    with pytest.raises(ValueError, match=message):
        match_rule(name, shape, RULES, mesh)


def fake_slices(count: int, each: int):
    """Devices of a pod that is not here; `make_mesh` reads nothing else of them."""
    return [SimpleNamespace(id=i, slice_index=i // each, process_index=i // each, platform="tpu", device_kind="fake",
                            coords=(i % each, 0, 0), core_on_chip=0) for i in range(count * each)]


def test_slices_are_joined_along_data():
    devices = fake_slices(2, 4)
    with pytest.raises(ValueError, match=r"mesh\.data 1 does not divide over 2 slices.*use a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def spread(devices_per_process: int, **sizes: int):
    """A mesh over processes that are not here, in the order of the devices."""
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    devices = [SimpleNamespace(process_index=i // devices_per_process) for i in range(int(np.prod([*shape.values()])))]
    return SimpleNamespace(shape=shape, devices=np.array(devices, object).reshape(tuple(shape.values())))


@pytest.mark.parametrize(("each", "sizes", "expected"), [
    (4, {"data": 8}, [(0, 2), (1, 2)]),
    (4, {"data": 2, "fsdp": 4}, [(0, 2), (1, 2)]),
    (4, {"fsdp": 2, "tensor": 4}, [(0, 2), (1, 2)]),
    (4, {"tensor": 8}, [(0, 1), (0, 1)]),                                 # the same rows in both
    (4, {"fsdp": 2, "context": 8}, [(0, 2), (0, 2), (1, 2), (1, 2)]),     # two processes a row
    (1, {"data": 2, "context": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
])
def test_rows_of_a_process(each, sizes, expected):
    mesh = spread(each, **sizes)
    assert [data_shard(mesh, process) for process in range(len(expected))] == [DataShard(*e) for e in expected]


def test_rows_that_overlap_are_refused():
    with pytest.raises(ValueError, match=r"overlapping parts of a batch; make mesh\.tensor \* mesh\.context divide"):
        data_shard(spread(4, data=4, tensor=3), 0)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "context": 4}, {"data": 2, "context": 2, "tensor": 2}])
def test_batches_lie_where_the_mesh_says(sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    batch = {"tokens": np.arange(64).reshape(8, 8), "weight": np.arange(8.0)}
    for put in (put_batch, put_whole):  # alike in one process
        placed = put(batch, mesh)
        for name, leaf in batch.items():
            np.testing.assert_array_equal(placed[name], leaf)
        part = placed["tokens"].addressable_shards[0].data.shape
        assert part == (8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 8 // mesh.shape["context"])
