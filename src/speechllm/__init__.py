"""LLM-based speech recognition: Zipformer encoders, a projector each, and Qwen2 with LoRA."""
