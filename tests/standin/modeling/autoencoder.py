"""Stand-in for the official file of this name: the recorded latents of the recorded pixels."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from recorded import recorded


@dataclass
class AutoEncoderParams:
    resolution: int
    in_channels: int
    downsample: int
    ch: int
    out_ch: int
    ch_mult: list
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float


class AutoEncoder:
    def __init__(self, params):
        self.reg = SimpleNamespace(sample=True)
        self.loaded = {}

    def load_state_dict(self, tensors):
        self.loaded = tensors

    def encode(self, x):
        assert "encoder.conv_in.weight" in self.loaded and torch.equal(x[0], recorded("vae_scene.pixels"))
        mean = recorded("vae_scene.latent_mean")
        return mean + torch.randn_like(mean) if self.reg.sample else mean

    def decode(self, z):
        assert torch.equal(z, recorded("vae_scene.latent_mean"))
        return recorded("vae_scene.decoded")


def load_ae(local_path):
    raise AssertionError("a checkpoint with sizes of its own is not loaded with the released ones")
