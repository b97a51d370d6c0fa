"""The options of a LoRA config that train, or change, something that the projection does not reach.

The config refuses them before training and the verifier in what is published: one list, so that nothing is refused in
one place and let through in the other. And those that a stranger can give PEFT code to run by: regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["ESCAPING_OPTIONS", "NEUTRAL_INITS", "PLAIN_NAME", "regular_expressions"]

ESCAPING_OPTIONS = {
    "use_dora": "DoRA's magnitudes change the base weights' length",
    "lora_bias": "biases are trained",
    "modules_to_save": "whole modules are trained",
    "trainable_token_indices": "embeddings are trained",
    "target_parameters": "parameters outside of layers are adapted",
    "layer_replication": "layers are replicated",
    "alora_invocation_tokens": "the adapter is switched by tokens",
    "use_qalora": "inputs are pooled before A",
    "use_bdlora": "factors are block-diagonal",
    "arrow_config": "adapters are routed",
    "velora_config": "gradients are compressed",
    "monteclora_config": "A is sampled",
    "kasa_config": "the base weights are truncated",
    "megatron_config": "layers are parallel ones of Megatron",
    "ensure_weight_tying": "layers that the files do not name may share an adapter",
}
"""Why each escapes, by its name."""

NEUTRAL_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that are about A and B alone; other names of PEFT's subtract something from the base
weights, when an adapter is loaded as well."""

PLAIN_NAME = re.compile(r"\^?[\w.]+\$?")
"""A key of a pattern that is nothing but a name."""


def regular_expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions in a config, each with its option; PEFT runs them on the name of every layer."""
    for option, value in config.items():
        if option in ("rank_pattern", "alpha_pattern") and isinstance(value, Mapping):
            texts = list(value)
        elif option in ("target_modules", "exclude_modules", "layers_pattern") and isinstance(value, str):
            texts = [value]
        elif option == "layers_pattern" and isinstance(value, list):
            texts = [text for text in value if isinstance(text, str)]
        else:
            continue
        yield from ((option, text) for text in texts if not PLAIN_NAME.fullmatch(text))
