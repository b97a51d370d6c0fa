"""Hooks see what a layer computes with, and leave the model as it was."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_gradproj.errors import ConceptBasisError, ConceptDataError
from peft_gradproj.observation import (
    TargetLayer,
    find_adapter,
    find_layers,
    observe_features,
    observe_gradients,
    undisturbed,
)

few = settings(deadline=None, max_examples=20)


class Net(nn.Module):
    """Two layers of one input, one that is written over in place, a convolution, and kinds without a basis."""

    def __init__(self, *, other_key_input: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(2, 6, 1, stride=2)
        self.to_q = nn.Linear(6, 4)
        self.to_k = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.other_key_input = other_key_input

    def forward(self, x: Tensor) -> Tensor:
        h = (self.conv(x) + self.shortcut(x)).flatten(2).mT
        q = self.to_q(self.dropout(h))
        k = self.to_k(h + 1 if self.other_key_input else h)
        return self.norm(q.mul_(2) + k)


def injected(**kwargs) -> nn.Module:
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "to_q", "to_k"], **kwargs))
    return model


def lora_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [parameter for key, parameter in model.named_parameters() if name in key]


# Layers


@few
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    channels_last=st.booleans(),
)
def test_a_convolution_is_its_flattened_weight_on_its_input_vectors(
    kernel, stride, padding, dilation, mode, channels_last
):
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
    layer = TargetLayer("conv", conv)
    x = torch.randn(2, 3, 7, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    vectors = layer.input_vectors(x)
    assert vectors.shape[1] == layer.d_in == 3 * kernel[0] * kernel[1]
    expected = layer.output_vectors(conv(x))
    assert expected.shape[1] == layer.d_out == 5
    assert torch.allclose(vectors @ conv.weight.reshape(5, -1).mT, expected, atol=1e-5)


def test_a_linear_layer_has_a_vector_per_token():
    layer = TargetLayer("linear", nn.Linear(4, 6))
    assert (layer.d_in, layer.d_out) == (4, 6)
    assert layer.input_vectors(torch.randn(2, 5, 4)).shape == (10, 4)
    assert layer.output_vectors(torch.randn(2, 5, 6)).shape == (10, 6)


def test_a_transposed_linear_layer_has_the_vectors_of_the_other():
    layer = TargetLayer("c_attn", Conv1D(6, 4))  # of transformers: outputs first, and a weight of 4 by 6
    x = torch.randn(2, 5, 4)
    assert (layer.d_in, layer.d_out, layer.geometry) == (4, 6, ())
    assert torch.equal(layer.input_vectors(x), x.flatten(0, 1))
    assert layer.output_vectors(layer.base(x)).shape == (10, 6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["to_q", "to_k"], ["to_q", "to_k"]),
        ("to_(q|k)", ["to_q", "to_k"]),
        (["conv", "to_q"], ["conv", "to_q"]),
        ("all-linear", ["to_q", "to_k"]),
    ],
)
@pytest.mark.parametrize("prepare", [Net, injected, lambda: injected().base_model, lambda: injected().get_base_model()])
def test_layers_are_found_by_pefts_rules_under_their_bare_names(targets, expected, prepare):
    layers = find_layers(prepare(), targets)
    assert [layer.name for layer in layers] == expected
    assert all(type(layer.base) in (nn.Linear, nn.Conv2d) for layer in layers)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_z"], r"to_z.*matches no module of Net"),
        (["norm"], "norm is a LayerNorm"),
        (["grouped"], "grouped is a convolution of 2 groups"),
    ],
)
def test_layers_that_have_no_basis_are_named(targets, message):
    with pytest.raises(ConceptBasisError, match=message):
        find_layers(Net(), targets)


def test_a_merged_adapter_is_refused():
    model = injected()
    model.merge_adapter()
    with pytest.raises(ConceptBasisError, match="merged into"):
        find_layers(model, ["to_q"])


# Features


def observed(
    model: nn.Module, x: Tensor, targets=("conv", "shortcut", "to_q", "to_k"), spaces=("input", "output"), choose=None
):
    layers = find_layers(model, list(targets))
    with undisturbed(model), observe_features(model, layers, spaces) as run:
        return run(lambda: model(x), choose)


def test_features_are_the_layers_inputs_and_outputs_before_anything_writes_into_them():
    model, x = Net().eval(), torch.randn(2, 2, 6, 6)
    features = observed(model, x)
    tokens = (model.conv(x) + model.shortcut(x)).flatten(2).mT
    layers = {layer.name: layer for layer in find_layers(model, ["conv", "to_q"])}
    assert torch.equal(features.inputs["conv"][0].chosen, layers["conv"].input_vectors(x))
    assert torch.allclose(features.inputs["to_q"][0].chosen, tokens.flatten(0, 1))
    # The model doubles to_q's output in place.
    assert torch.allclose(features.outputs["to_q"][0].chosen, model.to_q(tokens).flatten(0, 1))
    assert torch.allclose(features.outputs["conv"][0].chosen, layers["conv"].output_vectors(model.conv(x)))
    assert features.inputs["conv"][0].shape == x.shape


def test_only_the_positions_that_are_wanted_are_kept():
    model, x = Net().eval(), torch.randn(2, 2, 6, 6)
    whole, some = (
        observed(model, x, choose=choose) for choose in (None, lambda shape: torch.tensor([prod(shape) - 1, 4]))
    )
    for kind in ("inputs", "outputs"):
        for name, (vectors,) in getattr(whole, kind).items():
            (found,) = getattr(some, kind)[name]
            assert torch.equal(found.chosen, vectors.chosen[[-1, 4]])
            assert found.shape == vectors.shape
            assert found.chosen.untyped_storage().nbytes() == found.chosen.nbytes


def test_equal_inputs_are_kept_once_and_known_as_equal():
    x = torch.randn(2, 2, 6, 6)
    features = observed(Net().eval(), x)
    assert features.sources["to_q"] == features.sources["to_k"] == ("to_q",)
    assert features.inputs["to_q"][0] is features.inputs["to_k"][0]
    # One input, but patches of another size.
    assert features.sources["conv"] != features.sources["shortcut"]
    parted = observed(Net(other_key_input=True).eval(), x)
    assert parted.sources["to_q"] != parted.sources["to_k"]


def test_an_input_that_was_written_to_in_between_is_another():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    x = torch.randn(4, 3)
    features = observed(Writes(), x, ["a", "b"])
    assert torch.equal(features.inputs["a"][0].chosen, x + 1)
    assert torch.equal(features.inputs["b"][0].chosen, 2 * (x + 1))
    assert features.sources["a"] != features.sources["b"]


def test_only_the_spaces_asked_for_are_kept():
    features = observed(Net(), torch.randn(1, 2, 4, 4), spaces=("input",))
    assert features.inputs
    assert not features.outputs


def test_a_model_with_a_trained_adapter_shows_the_features_of_its_base():
    torch.manual_seed(0)
    bare = Net()
    torch.manual_seed(0)
    adapted = injected(init_lora_weights=False)
    x = torch.randn(2, 2, 6, 6)
    assert not torch.allclose(bare.eval()(x), adapted.eval()(x))
    check_features_of_base(bare, adapted, x)


def test_a_model_that_saves_a_trained_module_shows_the_features_of_its_base():
    """What PEFT trains in full and saves beside the adapter is no part of the base either."""
    torch.manual_seed(0)
    bare = Net()
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["to_q", "to_k"], modules_to_save=["shortcut"])
    adapted = get_peft_model(Net(), config)
    for parameter in lora_parameters(adapted, "modules_to_save"):
        nn.init.normal_(parameter)
    x, before = torch.randn(2, 2, 6, 6), state_of(adapted)
    check_features_of_base(bare, adapted, x)
    assert state_of(adapted) == before


def check_features_of_base(bare: nn.Module, adapted: nn.Module, x: Tensor) -> None:
    expected, features = (observed(model, x, ("conv", "to_q", "to_k")) for model in (bare, adapted))
    for name in ("conv", "to_q", "to_k"):
        for kind in ("inputs", "outputs"):
            found, wanted = (getattr(half, kind)[name][0].chosen for half in (features, expected))
            assert torch.allclose(found, wanted, atol=1e-6)


# Gradients


def gradients_of(model: nn.Module, x: Tensor, targets=("conv", "to_q", "to_k")):
    layers = find_layers(model, list(targets))
    with undisturbed(model), observe_gradients(model, layers, find_adapter(layers, None)) as run:
        return run(lambda: model(x).square().sum())


@pytest.mark.parametrize("name", ["conv", "to_q"])
def test_gradients_are_those_of_autograd_and_of_the_chain_rule(name):
    model, x = injected(init_lora_weights=False), torch.randn(2, 2, 6, 6)
    found = gradients_of(model, x)[name]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()(x).square().sum().backward()
    a, b = lora_parameters(model, f"{name}.lora_A")[0], lora_parameters(model, f"{name}.lora_B")[0]
    assert torch.allclose(found.flat, torch.cat([a.grad.flatten(), b.grad.flatten()]), atol=1e-4)
    # dL/dA = sum of (s B^T delta) x^T over positions, with z = A x.
    layer = find_layers(model, [name])[0]
    inputs = layer.input_vectors(observed_adapted_input(model, layer, x))
    down, up = layer.output_vectors(found.down[0]), layer.output_vectors(found.up[0])
    assert torch.allclose(down, inputs @ a.detach().flatten(1).mT, atol=1e-4)
    assert torch.allclose(up.mT @ inputs, a.grad.flatten(1), atol=1e-3)


def observed_adapted_input(model: nn.Module, layer: TargetLayer, x: Tensor) -> Tensor:
    seen = []
    hook = layer.base.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    hook.remove()
    return seen[0]


def test_a_zero_b_is_stood_in_for_and_is_zero_again():
    model, x = injected(), torch.randn(2, 2, 6, 6)
    found = gradients_of(model, x)
    assert all(layer.up[0].any() for layer in found.values())
    assert not any(parameter.any() for parameter in lora_parameters(model, "lora_B"))


def test_gradient_checkpointing_is_seen_once():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    plain = injected(init_lora_weights=False)
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "to_q", "to_k"], init_lora_weights=False)
    checkpointed = get_peft_model(Checkpointed(), config)
    x = torch.randn(2, 2, 6, 6)
    expected, found = gradients_of(plain, x)["to_q"], gradients_of(checkpointed, x)["to_q"]
    assert len(found.down) == 1
    assert torch.allclose(found.flat, expected.flat, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, x: model(x), "expected a scalar"),
        (lambda model, x: 1.0, "float"),
        (lambda model, x: model(x).detach().sum(), "does not depend on the adapter"),
        (lambda model, x: model(x).sum() * float("nan"), "nan"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_refused(loss, message):
    model, x = injected(), torch.randn(2, 2, 6, 6)
    layers = find_layers(model, ["to_q"])
    with (
        undisturbed(model),
        observe_gradients(model, layers, "default") as run,
        pytest.raises(ConceptDataError, match=message),
    ):
        run(lambda: loss(model, x))


def test_the_adapter_must_be_there_and_clear():
    with pytest.raises(ConceptBasisError, match="0 in these layers"):
        find_adapter(find_layers(Net(), ["to_q"]), None)
    model = injected()
    with pytest.raises(ConceptBasisError, match="'other' does not adapt to_q"):
        find_adapter(find_layers(model, ["to_q"]), "other")
    with pytest.raises(ConceptBasisError, match="'default' does not adapt shortcut"):
        find_adapter(find_layers(model, ["to_q", "shortcut"]), None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConceptBasisError, match=r"2 in these layers \(default, second\)"):
        find_adapter(find_layers(model, ["to_q"]), None)
    assert find_adapter(find_layers(model, ["to_q"]), "second") == "second"


# The model's state


def state_of(model: nn.Module) -> dict[str, object]:
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "active": [getattr(m, "active_adapters", None) for m in model.modules()],
        "disabled": [getattr(m, "disable_adapters", None) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "weights": {key: value.tolist() for key, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_model_is_left_as_it_was_found(fails, disabled):
    model = injected()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["to_q"]))
    model.set_adapter("second")
    model.train()
    model.base_model.model.norm.eval()
    model.base_model.model.shortcut.weight.requires_grad_(True)
    if disabled:
        model.base_model.disable_adapter_layers()
    before = state_of(model)

    def forward() -> Tensor:
        loss = model(torch.randn(1, 2, 4, 4)).sum()
        if fails:
            raise KeyboardInterrupt
        return loss

    layers = find_layers(model, ["to_q"])
    try:
        with (
            undisturbed(model),
            observe_features(model, layers, ("input", "output")) as run_features,
            observe_gradients(model, layers, "default") as run_gradients,
        ):
            assert not model.training
            run_gradients(lambda: model(torch.randn(1, 2, 4, 4)).sum())
            run_features(forward)
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before


def test_features_of_a_dropout_model_are_those_of_evaluation():
    model, x = Net().train(), torch.randn(2, 2, 6, 6)
    features = observed(model, x)
    assert torch.equal(features.inputs["to_q"][0].chosen, features.inputs["to_k"][0].chosen)
    assert model.training
    assert F.dropout(torch.ones(100)).min() == 0
