"""Selective fine-tuning with LoRA: a PEFT plugin that keeps a concept out by gradient projection."""
