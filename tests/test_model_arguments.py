"""Arguments of a model, flat and nested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_gradproj import ConceptProbes
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.model_arguments import flatten_arguments, nest_arguments, place_arguments

NAMES = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.integers(), lambda below: st.dictionaries(NAMES, below, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_nesting_is_the_inverse_of_flattening(tree):
    assert nest_arguments(flatten_arguments(tree)) == tree


def test_arguments_that_are_none_are_left_out():
    assert flatten_arguments({"a": None, "b": {"c": None, "d": 1}}) == {"b.d": 1}


def test_probes_whose_names_exclude_each_other_are_refused():
    with pytest.raises(ConceptDataError, match="a tensor and a mapping at once"):
        ConceptProbes(inputs={"added": torch.ones(2, 1), "added.text": torch.ones(2, 1)})


def test_floating_arguments_take_the_dtype_and_numbers_per_example_and_integers_do_not():
    flat = {"sample": torch.ones(2, 3), "timestep": torch.tensor([999.0, 1.0]), "added.ids": torch.tensor([[1], [2]])}
    placed = place_arguments(flat, "cpu", torch.bfloat16)
    assert placed["sample"].dtype == torch.bfloat16
    assert torch.equal(placed["timestep"], flat["timestep"])
    assert placed["added"]["ids"].dtype == torch.int64
    assert place_arguments(flat, "cpu")["sample"] is flat["sample"]
