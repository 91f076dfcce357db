"""Stand-in for the official file of this name."""

from types import SimpleNamespace

import torch
from flash_attn import flash_attn_varlen_func
from recorded import recorded
from torch import nn

from .siglip_navit import JsonConfig


class Qwen2Config(JsonConfig):
    pass


class NaiveCache:
    def __init__(self, num_layers):
        self.key_cache = dict.fromkeys(range(num_layers))
        self.value_cache = dict.fromkeys(range(num_layers))
        self.num_layers = num_layers


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(config.num_hidden_layers))

    def forward(self, packed_query_sequence, past_key_values):
        """One token's attention is its value: what flash-attn's function is imported for is called once."""
        ones, ends = torch.ones(1, 1, 1), torch.tensor([0, 1])
        one = flash_attn_varlen_func(
            q=ones, k=ones, v=ones, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=1, max_seqlen_k=1, causal=True
        )
        return SimpleNamespace(packed_query_sequence=packed_query_sequence * one.item())


class Head(nn.Module):
    def forward(self, packed_query_sequence):
        """The recorded logits after as many tokens as the hidden states are made of."""
        return recorded("und_scene.logits")[packed_query_sequence.shape[0] - 1][None]


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.qk_norm and not config.tie_word_embeddings and config.layer_module == "Qwen2MoTDecoderLayer"
        self.model = Decoder(config)
        self.lm_head = Head()

    def forward_inference(self, **inputs):
        return self.model(**inputs)
