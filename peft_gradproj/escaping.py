"""The options of a LoRA config that train, or change, something that the projection does not reach.

The config refuses them before training and the verifier in what is published: one list, so that nothing is refused in
one place and let through in the other.
"""

from __future__ import annotations

__all__ = ["ESCAPING_OPTIONS"]

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
