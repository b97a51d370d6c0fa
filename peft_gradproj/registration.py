"""Makes GRADPROJ known to PEFT as a PEFT type, from outside PEFT."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

__all__ = ["PEFT_TYPE_NAME", "gradproj_peft_type", "register"]

PEFT_TYPE_NAME = "GRADPROJ"


def gradproj_peft_type() -> PeftType:
    """The member `PeftType.GRADPROJ`, added on first use.

    `register_peft_method` only takes names that are members of the enumeration, and PEFT has no hook to add one, so
    the member is entered the way `enum` itself does it.
    """
    if PEFT_TYPE_NAME not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE_NAME)
        member._name_ = PEFT_TYPE_NAME
        member._value_ = PEFT_TYPE_NAME
        member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
        PeftType._member_names_.append(PEFT_TYPE_NAME)
        PeftType._member_map_[PEFT_TYPE_NAME] = member
        PeftType._value2member_map_[PEFT_TYPE_NAME] = member
    return PeftType(PEFT_TYPE_NAME)


def register() -> PeftType:
    """Register GRADPROJ, its config and its tuner with PEFT, once; returns the PEFT type."""
    peft_type = gradproj_peft_type()
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        from .config import GradProjConfig
        from .model import GradProjModel

        # The prefix is LoRA's, since the adapter's parameters are LoRA's: stock PEFT loads what is saved.
        register_peft_method(name="gradproj", config_cls=GradProjConfig, model_cls=GradProjModel, prefix="lora_")
        _complete_saves_of_transformers()
        _complete_uploads_of_transformers()
        _complete_loads_of_transformers()
    return peft_type


def _complete_saves_of_transformers() -> None:
    """Let `PreTrainedModel.save_pretrained` write the sidecars of an adapter that was added with `add_adapter`.

    It saves the adapter's config before the weights, which the manifest is about, and calls nothing of ours afterwards.
    """
    from transformers import PreTrainedModel

    from .saving import complete_sidecars

    original: Any = PreTrainedModel.save_pretrained

    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "_hf_peft_config_loaded", False):
            return original(self, save_directory, is_main_process, *args, **kwargs)
        # Pushed from a folder that has the sidecars, and not from within the original, which would leave them out.
        push = kwargs.pop("push_to_hub", False)
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "create_pr") if name in kwargs
        }
        result = original(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            complete_sidecars(self, save_directory)
            if push:
                hub.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
                self.push_to_hub(**hub, token=kwargs.get("token"))
        return result

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _complete_uploads_of_transformers() -> None:
    """Let `push_to_hub`, of PEFT and of transformers, upload a model card that tells of the checks.

    It saves the model and then writes the card anew: the one that is on the Hub, or an empty template.
    """
    from transformers.utils import PushToHubMixin

    from .saving import complete_card

    original: Any = PushToHubMixin._upload_modified_files

    @wraps(original)
    def upload(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        complete_card(working_dir, repo_id=repo_id)
        return original(self, working_dir, repo_id, *args, **kwargs)

    PushToHubMixin._upload_modified_files = upload  # type: ignore[method-assign]


def _complete_loads_of_transformers() -> None:
    """Let what `load_adapter` of transformers reads be what a rank space keeps.

    It injects the adapter, and then puts other parameters in place of those, past `load_state_dict`.
    """
    from transformers.integrations.peft import PeftAdapterMixin

    from .layers import projected_weights

    original: Any = PeftAdapterMixin.load_adapter

    @wraps(original)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, peft_model_id, adapter_name, *args, **kwargs)
        for _, module in projected_weights(self, "default" if adapter_name is None else adapter_name):
            module.restart(initial=False)
        return result

    PeftAdapterMixin.load_adapter = load_adapter  # type: ignore[method-assign]
