"""Many tensors as few vectors: nothing is lost, and what is computed on vectors is what the tensors would give."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_gradproj import blocks as module
from peft_gradproj.blocks import Blocks

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=8)


def tensors(found: list[list[int]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"layer{i // 2}.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(found)}


@given(found=shapes, limit=st.sampled_from([1, 8, 1000]), narrow=st.sets(st.integers(0, 7)))
def test_what_was_joined_splits_into_the_same_tensors(found, limit, narrow):
    given_ = tensors(found)
    for i, name in enumerate(given_):
        if i in narrow:
            given_[name] = given_[name].double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_LIMIT", limit)
        blocks = Blocks(given_)
    vectors = blocks.join(given_)
    split = blocks.split(vectors)
    assert split.keys() == given_.keys()
    for name, tensor in given_.items():
        assert split[name].dtype == tensor.dtype
        assert torch.equal(split[name], tensor)
    for vector in vectors:
        assert vector.ndim == 1
        assert len(vector) <= limit or any(vector.numel() == tensor.numel() for tensor in given_.values())
    sums = dict(zip(blocks.names, blocks.sums([v.double() for v in vectors]).tolist(), strict=True))
    assert sums == pytest.approx({name: float(t.double().sum()) for name, t in given_.items()}, abs=1e-9)


@pytest.mark.parametrize("small", [20, 21])
def test_vectors_that_are_made_when_asked_for_are_the_same_and_are_not_kept_unless_small(small):
    given_ = tensors([[3, 4], [5], [2, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_LIMIT", 13)
        patch.setattr(module, "_SMALL", small)
        blocks = Blocks(given_)
        joined = blocks.joined(given_)
    assert len(joined) == len(blocks) == 2
    assert all(torch.equal(x, y) for x, y in zip(joined, blocks.join(given_), strict=True))
    assert torch.equal(joined[-1], joined[1])
    assert [len(x) for x in joined[:1]] == [12]
    given_["layer0.0"].zero_()
    given_["layer0.1"].zero_()
    assert bool(joined[0].any()) == (small == 21)


def test_a_layout_does_not_keep_the_tensors():
    given_ = tensors([[3, 4]])
    reference = weakref.ref(given_["layer0.0"])
    blocks = Blocks(given_)
    del given_
    assert reference() is None
    assert blocks.names == ["layer0.0"]


def test_layouts_are_equal_where_vectors_of_the_one_are_those_of_the_other():
    like = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    assert Blocks(like) == Blocks({name: torch.zeros_like(tensor) for name, tensor in like.items()})
    for other in (
        {"b": like["b"], "a": like["a"]},
        {"a": like["a"]},
        {**like, "b": torch.ones(2, 2)},
        {**like, "b": like["b"].double()},
        {**like, "b": like["b"].to("meta")},
    ):
        assert Blocks(like) != Blocks(other)
    assert Blocks(like) != like


def test_few_vectors_are_made_of_many_tensors():
    assert len(Blocks(tensors([[16, 320]] * 20)).join({})) == 1


def test_a_missing_tensor_is_zero_and_a_number_stands_for_all_elements():
    blocks = Blocks({"a": torch.ones(2, 3), "b": torch.ones(4)})
    (vector,) = blocks.join({"b": torch.tensor(5.0)})
    assert vector.tolist() == [0.0] * 6 + [5.0] * 4


def test_tensors_that_are_not_contiguous_keep_the_order_of_their_elements():
    strided = torch.arange(12.0).reshape(3, 4).mT
    blocks = Blocks({"a": strided})
    assert torch.equal(blocks.split(blocks.join({"a": strided}))["a"], strided)
