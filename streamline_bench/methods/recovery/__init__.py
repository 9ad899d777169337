"""Fine-tuning after compression: LoRA, partial, full."""
