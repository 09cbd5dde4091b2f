"""A base model with adapters merged into its weights: a full model that needs no PEFT."""
