"""Projected weights: the constraint holds at every forward, whatever happened to the raw weight."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SmallNet
from helpers import WIDTHS, random_layer_basis, small_net_basis, train, trainable
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_gradproj import ConceptBasis, GradProjConfig, LayerBasis
from peft_gradproj.errors import ConceptBasisError
from peft_gradproj.layers import ProjectedConv2d, ProjectedLinear, projected_weights
from peft_gradproj.projection import coordinates


def adapted(spaces=("input", "output"), r: int = 4, **kwargs) -> tuple[nn.Module, ConceptBasis]:
    basis = small_net_basis(spaces, r=r)
    config = GradProjConfig(r=r, lora_alpha=8, target_modules=list(basis), concept_basis=basis, **kwargs)
    return get_peft_model(SmallNet(), config), basis


def corrupt(model: nn.Module) -> None:
    """What an engine does that writes parameters behind PyTorch's back."""
    with torch.no_grad():
        for _, module in projected_weights(model, "default"):
            module.weight.add_(torch.randn_like(module.weight))


@given(
    d_in=st.integers(3, 12),
    d_out=st.integers(3, 12),
    r=st.integers(1, 6),
    k=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
def test_the_adapter_has_no_effect_on_inputs_in_the_basis_and_writes_nothing_into_it(d_in, d_out, r, k, dtype, seed):
    layer_basis = random_layer_basis(d_in, d_out, r, ("input", "output"), k, seed)
    config = GradProjConfig(r=r, target_modules=["0"], concept_basis=ConceptBasis({"0": layer_basis}))
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), config)
    corrupt(model)
    model.to(dtype)
    # The weights are rounded to their dtype after the projection, which sets the floor.
    floor = 20 * torch.finfo(dtype).eps
    with torch.no_grad(), model.disable_adapter():
        base = model(torch.zeros(1, d_in, dtype=dtype)).float()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        effective_a, effective_b = a.project(a.weight).float(), b.project(b.weight).float()
        assert (effective_a @ layer_basis.input).norm() <= floor * effective_a.norm()
        assert (layer_basis.output.mT @ effective_b).norm() <= floor * effective_b.norm()
        concept = layer_basis.input[:, 0].to(dtype).unsqueeze(0)
        change = b(a(concept)).float()
    assert change.norm() <= 10 * floor * effective_a.norm() * effective_b.norm()
    assert base.shape == (1, d_out)


def test_forward_of_a_corrupted_weight_equals_forward_after_retraction():
    model, _ = adapted(("input", "output", "rank"))
    corrupt(model)
    pictures = torch.randn(4, 3, 8, 8)
    before = model(pictures)
    for _, module in projected_weights(model, "default"):
        module.retract()
    torch.testing.assert_close(model(pictures), before, atol=1e-4, rtol=1e-3)


def test_gradients_are_projected_by_autograd():
    model, basis = adapted()
    corrupt(model)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for name, module in projected_weights(model, "default"):
        layer = name.split(".")[-3]
        gradient = module.weight.grad.flatten(1)
        space = basis[layer].input if "lora_A" in name else basis[layer].output
        side = "right" if "lora_A" in name else "left"
        assert coordinates(gradient, space, side=side).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("space", ["rank", "gradient"])
def test_what_lies_along_a_rank_or_gradient_basis_keeps_its_start(space):
    model, basis = adapted((space,))
    layer = model.base_model.model.query
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    matrix = getattr(basis["query"], space)

    def along() -> torch.Tensor:
        if space == "gradient":
            flat = torch.cat([a.weight.flatten(), b.weight.flatten()]).detach()
            return matrix.mT @ flat
        return torch.cat([(matrix.mT @ a.weight).flatten(), (b.weight @ matrix).flatten()]).detach()

    start, weights = along(), a.weight.detach().clone()
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), steps=20)
    assert (a.weight - weights).norm() > 1e-2, "the layer was not trained"
    torch.testing.assert_close(along(), start, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", [0, 1], ids=["A", "B"])
def test_a_frozen_weight_is_not_moved_by_a_gradient_basis_and_the_other_keeps_its_start(part):
    model, basis = adapted(("gradient",))
    layer = model.base_model.model.query
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        weights[1].normal_()  # where B is zero, A is not trained
    for frozen in (True, False):
        weights[part].requires_grad_(not frozen)
        start = [p.detach().clone() for p in weights]
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), steps=10)
        moved = [(p.detach() - before).flatten() for p, before in zip(weights, start, strict=True)]
        assert moved[1 - part].norm() > 1e-2, "the layer was not trained"
        assert bool(moved[part].any()) is not frozen
        assert (basis["query"].gradient.mT @ torch.cat(moved)).norm() <= 1e-5


def test_what_rounding_leaves_does_not_add_up_where_a_and_b_are_trained_in_turn():
    model, basis = adapted(("gradient",))
    model.to(torch.bfloat16)
    layer = model.base_model.model.query
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def along() -> torch.Tensor:
        return basis["query"].gradient.mT @ torch.cat([w.detach().float().flatten() for w in weights])

    start = along()
    for number in range(400):
        for place, weight in enumerate(weights):
            weight.requires_grad_(number % 2 == place)
        train(model, torch.optim.SGD(trainable(model), lr=1e-2), steps=1, dtype=torch.bfloat16)
    rounding = torch.finfo(torch.bfloat16).eps * weights[0].float().norm()
    assert (along() - start).norm() <= 0.02 * rounding


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as those of accelerate and of schedules do."""

    def __init__(self, wrapped):
        super().__init__(wrapped.param_groups, {})
        self.wrapped, self.param_groups = wrapped, wrapped.param_groups

    def step(self, closure=None):
        self.wrapped.step(closure)


@pytest.mark.parametrize("space", ["input", "rank", "output", "gradient"])
def test_a_soft_strength_is_applied_once_where_an_optimizer_is_wrapped(space):
    ends = []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        torch.manual_seed(0)
        model, _ = adapted((space,), strength=0.5)
        train(model, wrap(torch.optim.SGD(trainable(model), lr=1e-1)), steps=3)
        ends.append([p.detach().clone() for p in trainable(model)])
    for alone, wrapped in zip(*ends, strict=True):
        torch.testing.assert_close(alone, wrapped)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 2.0), (torch.bfloat16, 0.02)])
def test_what_rounding_leaves_along_a_gradient_basis_does_not_add_up(dtype, floor):
    model, basis = adapted(("gradient",))
    model.to(dtype)
    layer = model.base_model.model.query

    def along() -> torch.Tensor:
        flat = torch.cat([getattr(layer, f"lora_{part}")["default"].weight.float().flatten() for part in "AB"])
        return basis["query"].gradient.mT @ flat.detach()

    start = along()
    # Steps so short that rounding loses most of what corrects one: it would be some 5 and .1 roundings.
    train(model, torch.optim.SGD(trainable(model), lr=1e-2), steps=200, dtype=dtype)
    rounding = torch.finfo(dtype).eps * layer.lora_A["default"].weight.float().norm()
    assert (along() - start).norm() <= floor * rounding


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.75])
def test_a_soft_strength_scales_the_component_of_a_step(strength):
    soft, basis = adapted(strength=strength)
    with torch.no_grad():
        for _, module in projected_weights(soft, "default"):
            module.weight.normal_()
    plain = get_peft_model(SmallNet(), LoraConfig(r=4, lora_alpha=8, target_modules=list(basis)))
    plain.load_state_dict(soft.state_dict())
    before = {n: p.detach().clone() for n, p in soft.named_parameters() if p.requires_grad}
    for model in (soft, plain):
        train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=1)
    after = dict(plain.named_parameters())
    for name, parameter in soft.named_parameters():
        if name in before and "lora_A" in name:
            u = basis[name.split(".")[2]].input
            step, full = ((w - before[name]).flatten(1) @ u for w in (parameter, after[name]))
            torch.testing.assert_close(step, (1 - strength) * full, atol=1e-6, rtol=1e-3)


def test_a_cast_model_keeps_its_basis_in_float32():
    model, basis = adapted()
    model.to(torch.bfloat16)
    module = model.base_model.model.query.lora_A["default"]
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.concept_right, basis["query"].input)


def test_bases_and_starts_stay_out_of_the_state_dict():
    model, _ = adapted(("input", "output", "rank"))
    plain = get_peft_model(SmallNet(), LoraConfig(r=4, target_modules=["conv", "query", "key", "head"]))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_deep_copy_is_retracted_on_its_own():
    model, basis = adapted()
    twin = copy.deepcopy(model)
    train(twin, torch.optim.AdamW(trainable(twin), lr=1e-2), steps=5)
    a = twin.base_model.model.query.lora_A["default"].weight
    assert not torch.equal(a, model.base_model.model.query.lora_A["default"].weight)
    assert (a @ basis["query"].input).norm() <= 1e-6 * a.norm()


def test_loading_foreign_weights_puts_them_on_the_constraint():
    model, basis = adapted()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(state, strict=False)
    a = model.base_model.model.query.lora_A["default"].weight
    assert (a @ basis["query"].input).norm() <= 1e-6 * a.norm()


def test_linear_and_conv_are_projected_and_keep_their_parameter():
    model, _ = adapted()
    kinds = {type(module) for _, module in projected_weights(model, "default")}
    assert kinds == {ProjectedLinear, ProjectedConv2d}


def test_a_channels_last_convolution_is_projected():
    model, basis = adapted()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, steps=3)
    a = model.base_model.model.conv.lora_A["default"].weight
    assert (a.flatten(1) @ basis["conv"].input).norm() <= 1e-6 * a.norm()


def test_autocast_does_not_round_the_projection():
    model, basis = adapted()
    module = model.base_model.model.query.lora_A["default"]
    corrupt(model)
    with torch.autocast("cpu", torch.bfloat16):
        effective = module.project(module.weight)
    assert (effective @ basis["query"].input).norm() <= 1e-6 * effective.norm()


@pytest.mark.parametrize("space", ["input", "rank", "output", "gradient"])
def test_a_basis_of_another_width_is_refused_by_layer_and_space(space):
    d_in, d_out = WIDTHS["query"]
    wrong = random_layer_basis(d_in + 1, d_out + 1, 5, (space,))
    config = GradProjConfig(r=4, target_modules=["query"], concept_basis=ConceptBasis({"query": wrong}))
    with pytest.raises(ConceptBasisError, match=f"'query'.*{space}"):
        get_peft_model(SmallNet(), config)


def test_an_empty_layer_basis_is_refused():
    with pytest.raises(ConceptBasisError):
        LayerBasis()
