"""Stand-in for the official file of this name."""

import json
from types import SimpleNamespace

import torch
from recorded import recorded
from torch import nn


class JsonConfig(SimpleNamespace):
    @classmethod
    def from_json_file(cls, file):
        with open(file, encoding="utf8") as opened:
            return cls(**json.load(opened))


class SiglipVisionConfig(JsonConfig):
    pass


class SiglipVisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.rope is False
        self.vision_model = nn.Module()
        self.vision_model.embeddings = nn.Module()
        self.vision_model.embeddings.convert_conv2d_to_linear = lambda config, meta: None
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(nn.Identity() for _ in range(config.num_hidden_layers))

    def forward(self, packed_pixel_values):
        assert torch.equal(packed_pixel_values, recorded("vit_scene.pixels"))
        return recorded("vit_scene.features").to(torch.bfloat16)  # as the official attention does it
