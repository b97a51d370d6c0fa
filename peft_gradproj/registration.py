"""Makes GRADPROJ known to PEFT as a PEFT type, from outside PEFT."""

from __future__ import annotations

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
    return peft_type
