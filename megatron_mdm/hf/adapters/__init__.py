"""Low-rank adapters (LoRA) of exported models, through peft."""
