from transformers import Qwen2Tokenizer

__all__ = ["Qwen2Tokenizer"]
