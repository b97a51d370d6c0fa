"""A training script for a causal language model, with `get_peft_model` or, going on, `PeftModel.from_pretrained`."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

_, base, output, *resumed = sys.argv
model = AutoModelForCausalLM.from_pretrained(base)
if resumed:
    model = PeftModel.from_pretrained(model, resumed[0], is_trainable=True)
else:
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(1))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(5):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(output)
evaluated = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
Path(output, "types.txt").write_text(
    f"{type(model.peft_config['default']).__name__} {type(evaluated.peft_config['default']).__name__}"
)
