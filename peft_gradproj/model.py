"""`GradProjModel`: the LoRA tuner that puts the constraints of a config on the adapters that it injects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .base_models import identify, names_conflict, unwrapped, widths_of
from .basis import ConceptBasis, LayerBasis
from .config import GradProjConfig
from .errors import ConceptBasisError, ConceptDataError, GradProjConfigError, GradProjError
from .layers import check_supported, check_widths, constrain_adapter, is_sharded, projected_weights
from .online import attach_online_projection, detach_online_projection
from .probes import check_probes_fit

__all__ = ["GradProjModel", "refresh_concept_basis"]


class GradProjModel(LoraModel):
    """Injects LoRA layers whose weights are kept off the concept basis, and corrects steps by the concept probes.

    Everything else is [`~peft.LoraModel`]'s. What it adds to a model are LoRA layers with LoRA's parameters.
    """

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Called before anything is injected: an error here leaves the model as it was.
        super()._prepare_model(peft_config, model)
        if unwrapped(model) is not model:
            raise GradProjConfigError(
                f"the model is wrapped ({type(model).__name__}), and what is saved of an adapter that is injected into "
                "it has the wrapper's names, under which nobody can load it. Inject the adapter into the model itself, "
                "and compile or wrap it then."
            )
        peft_config.check()
        targeted = self._targeted_names(peft_config, model)
        for name in targeted:
            check_supported(model.get_submodule(name), name)
        basis = peft_config.concept_basis
        if basis is not None:
            if targeted and not any(name in basis for name in targeted):
                raise ConceptBasisError(
                    f"the concept basis covers none of the adapted layers ({targeted[0]}, ...); it is for "
                    f"{next(iter(basis))}, ... . Was it fitted on another model? Fit it on this one."
                )
            for name in targeted:
                if name in basis:
                    _check_widths(name, basis[name], model.get_submodule(name), peft_config)
            _check_name("concept basis", basis.base_model, model, peft_config, ConceptBasisError)
            peft_config.report_uncovered([f"layer '{name}'" for name in targeted if name not in basis])
        probes = peft_config.concept_probes
        if probes is not None:
            check_probes_fit(probes, model, targeted)
            _check_name("concept probes", probes.base_model, model, peft_config, ConceptDataError)

    def _targeted_names(self, peft_config: GradProjConfig, model: nn.Module) -> list[str]:
        config = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        names = [name for name, _ in model.named_modules() if name and not name.startswith(adapted)]
        matches = ((name, self._check_target_module_exists(config, name)) for name in names)
        return [name for name, match in matches if match and not isinstance(match, _ExcludedModule)]

    def _create_and_replace(  # type: ignore[override]  # LoraModel's own signature
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        basis = (lora_config.concept_basis or {}).get(current_key)
        if basis is not None:
            layer = getattr(parent, target_name)
            constrain_adapter(layer, adapter_name, current_key, basis, strength=lora_config.strength)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter, then let its concept probes watch the optimizer; see [`~peft.LoraModel`]."""
        config: Any = self.peft_config[adapter_name]
        _target_as_lora(config, model)
        config.base_model = identify(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # In inference mode too: a saved config says so, and add_adapter makes its adapter trainable all the same.
        if config.concept_probes is None:
            detach_online_projection(model, adapter_name)  # of an adapter that had the name before
        else:
            attach_online_projection(
                model,
                adapter_name,
                config.concept_probes,
                seed=config.probe_seed,
                config=config,
                **config.online_options(),
            )

    def _check_merge_allowed(self) -> None:
        # Merging reads the raw weights. They are on the constraint after every step that PyTorch knows of; an engine
        # that writes parameters behind its back (DeepSpeed) is caught up with here.
        super()._check_merge_allowed()
        for name in self.peft_config:
            for _, module in projected_weights(self.model, name):
                module.retract()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: the adapter's tensors, put on the constraint whatever was done to the raw weights."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        with torch.no_grad():
            for name, module in projected_weights(model, adapter_name):
                key = f"{name}.weight"
                # Shards are on the constraint since their last step; to gather them, all processes would have to save.
                if key in selected and not selected[key].is_meta and not is_sharded(selected[key]):
                    selected[key] = module.project(_precise(selected[key])).to(selected[key])
        return selected

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Combine adapters, as [`~peft.LoraModel.add_weighted_adapter`] does.

        The input and output invariants are closed under sums, so a combination of adapters with one basis keeps them.

        Raises:
            GradProjConfigError: If the adapters have different concept bases: their sum would keep neither.
        """
        configs: dict[str, Any] = {name: self.peft_config[name] for name in adapters}
        bases = [config.concept_basis for config in configs.values()]
        if any(basis != bases[0] for basis in bases):
            raise GradProjConfigError(
                f"adapters {', '.join(adapters)} have different concept bases; a combination of them would lie in the "
                "complement of none. Load them as plain LoRA to combine them without the guarantee."
            )
        try:
            # PEFT copies the first adapter's config for the combination, which has no probes: it is not trained.
            self.peft_config[adapters[0]] = replace(
                configs[adapters[0]],
                concept_basis=_closed_under_sums(bases[0]),
                concept_probes=None,
                uncovered="ignore",
            )
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config.update(configs)
        for _, module in projected_weights(self.model, adapter_name):
            module.restart(initial=False)


def _target_as_lora(config: GradProjConfig, model: Any) -> None:
    """Rename targets to what they are in this model, as PEFT does for the type LORA alone.

    The experts of some models are parameters since transformers 5. Names of the former modules match nothing any more,
    so that the experts would be left out without a word.

    Raises:
        GradProjConfigError: If parameters become targets and `uncovered="error"`.
    """
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    former, own_type = set(config.target_parameters or ()), config.peft_type
    config.peft_type = PeftType.LORA
    try:
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    finally:
        config.peft_type = own_type
    made = sorted(set(config.target_parameters or ()) - former)
    if made:
        config.report_uncovered(
            [f"{', '.join(made)}, parameters of {type(model).__name__} that PEFT adapts for its `target_modules`"]
        )


def _check_widths(name: str, basis: LayerBasis, module: nn.Module, config: GradProjConfig) -> None:
    """The widths of a layer's basis, before anything is injected."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    widths = widths_of(base)
    assert widths is not None  # `check_supported` has refused others
    ranks = config.rank_pattern or {}
    check_widths(name, basis, *widths, rank=ranks.get(get_pattern_key(list(ranks), name), config.r))


def _check_name(
    what: str, name: str | None, model: nn.Module, config: GradProjConfig, error: type[GradProjError]
) -> None:
    """Refuse, warn of, or note a basis or probes that are of another repository than the model."""
    other = names_conflict(name, model)
    if other is None:
        return
    if config.uncovered == "error":
        raise error(
            f"the {what} is of the base model {name}, and this one is {other}. Fit it on this one; if both hold the "
            "same weights, give it this name with base_model=, or let it through with uncovered='warn', which is "
            "recorded in what is published."
        )
    config.report_uncovered([f"the whole adapter (the {what} is of {name}, the base model is {other})"])


def _precise(weight: Tensor) -> Tensor:
    """`weight` in float64 on the CPU: GPUs may round float32 products to TF32, and after saving nothing corrects it."""
    return weight.to("cpu", torch.float64)


def refresh_concept_basis(model: nn.Module, basis: ConceptBasis, adapter_name: str = "default") -> None:
    """Exchange the rank and gradient bases of an adapter for newly fitted ones; the rest of its basis stays.

    Both spaces depend on A and B, so that a basis of theirs ages while the adapter is trained: fit it anew every so
    many steps with `fit_concept_basis(model, ..., spaces=("rank",), adapter_name=...)`. From here on, what A and B
    are along the new basis is kept. Where B is no longer zero there, no verifier can tell that it was kept: the adapter
    does not verify, which is recorded in what is published, with a warning.

    Args:
        model: The model with the adapter: a `PeftModel`, or one that an adapter was added to.
        basis: The new basis; layers that it lacks keep theirs.
        adapter_name: Which adapter.

    Raises:
        ConceptBasisError: If the basis names a layer that the adapter does not have, has input or output spaces, or
            a width does not fit.
    """
    layers: dict[str, Any] = {_bare_name(n): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer_basis in basis.items():
        if name not in layers or adapter_name not in layers[name].lora_A:
            raise ConceptBasisError(f"layer '{name}' of the new basis has no adapter '{adapter_name}'.")
        if layer_basis.input is not None or layer_basis.output is not None:
            raise ConceptBasisError(
                f"layer '{name}': the new basis has input or output spaces, which do not age; fit it with "
                "spaces=('rank',), ('gradient',) or both."
            )
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    for name, layer_basis in basis.items():
        constrain_adapter(layers[name], adapter_name, name, layer_basis, strength=config.strength, initial=False)
    config.concept_basis = _refreshed(config.concept_basis, basis)
    _record_refreshed_rank_spaces(config, {name: layers[name].lora_B[adapter_name] for name in basis})


def _record_refreshed_rank_spaces(config: GradProjConfig, factors: Mapping[str, Any]) -> None:
    """Note that B, by layer, is not zero along a new rank basis, if it is not: the user's own doing, and no error."""
    started = [name for name, b in factors.items() if b.keeps_something("right")]
    part = "the rank space (its basis was refreshed in training, when B was not zero along the new one)"
    if started and part not in config.uncovered_parts:
        config.uncovered_parts.append(part)
        warnings.warn(
            f"B is not zero along the new rank basis of layer '{started[0]}' and {len(started) - 1} more, so that "
            "this adapter will not verify, which is recorded in what is published. Refresh before B is trained, or "
            "train with the input and output spaces alone, to have it verified.",
            stacklevel=3,
        )


def _refreshed(old: ConceptBasis | None, new: ConceptBasis) -> ConceptBasis:
    if old is None:
        return new
    layers = dict(old)
    for name, layer in new.items():
        former = layers.get(name, layer)
        layers[name] = LayerBasis(
            input=former.input,
            output=former.output,
            rank=former.rank if layer.rank is None else layer.rank,
            gradient=former.gradient if layer.gradient is None else layer.gradient,
        )
    return old.with_layers(layers)


def _closed_under_sums(basis: ConceptBasis | None) -> ConceptBasis | None:
    """The input and output spaces; rank and gradient bases belong to one A and B and mean nothing for a sum."""
    if basis is None:
        return None
    layers = {
        name: LayerBasis(input=layer.input, output=layer.output)
        for name, layer in basis.items()
        if layer.input is not None or layer.output is not None
    }
    return basis.with_layers(layers) if layers else None


def _bare_name(name: str) -> str:
    return name.removeprefix("base_model.model.")
