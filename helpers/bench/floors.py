"""The least that a work can take on this device: its arithmetic and its reading, counted, at the measured rates.

Counted are the decoder's linear layers, its attention (also that of a picture to its context), the ViT and the
autoencoder, and for text the bytes of weights and context that every token reads. Left out are norms, activations,
rotations and embeddings, starting the work, the linear layers that lead into and out of the decoder, and that a pass
over few tokens takes as long as reading the weights. The autoencoder counts at the model's rate, though it computes
in float32. So no program that computes the same can be faster, and one that is close has nothing left to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..bagel.autoencoder import Autoencoder
from ..bagel.config import AutoencoderConfig, BagelConfig, VisionConfig
from ..bagel.flow import FlowSettings, TaylorForecast, timesteps
from ..bagel.images import fitted_size
from ..bagel.packed import BYTES, Packed
from ..bagel.session import block_tokens, latent_block
from ..bagel.vision import VisionModel
from .rates import Limits

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations: `linear` of the decoder's linear layers, which FP8 weights speed up, and `other`."""

    linear: float = 0.0
    other: float = 0.0

    def __add__(self, more: Arithmetic) -> Arithmetic:
        return Arithmetic(self.linear + more.linear, self.other + more.other)

    def times(self, count: int) -> Arithmetic:
        return Arithmetic(count * self.linear, count * self.other)

    @property
    def flop(self) -> float:
        return self.linear + self.other

    def seconds(self, limit: Limits) -> float:
        """At the device's rates; one that measured an 8-bit product takes the linear layers at that rate."""
        return self.linear / (limit.fp8 or limit.matmul) + self.other / limit.matmul


def picture_from_text(config: BagelConfig, settings: dict[str, Any], words: int) -> Arithmetic:
    """A picture made from a text of `words` tokens, markers included; `settings` as an ImageResult holds them."""
    flow, size = FlowSettings.among(settings), (settings["height"], settings["width"])
    drawn = denoising(config, flow, size, {"conditional": words, "text": 0})
    return text_pass(config, words) + drawn + decoding(config.autoencoder, size)


def edited_picture(config: BagelConfig, settings: dict[str, Any], words: int) -> Arithmetic:
    """A picture of the same size read with both encoders, an instruction of `words` tokens, and the new picture."""
    flow, size = FlowSettings.among(settings), (settings["height"], settings["width"])
    latents, seen = latent_block(config, size), block_tokens(config, size, for_drawing=True)
    contexts = {"conditional": seen + words, "text": seen}
    read = encoding(config.autoencoder, size) + block_pass(config, latents)
    read += looking(config, size, latents) + text_pass(config, words, seen)
    if flow.cfg_text_scale > 1 and flow.cfg_img_scale > 1:  # a third branch, which has read the instruction alone
        contexts["image"] = words
        read += text_pass(config, words)
    return read + denoising(config, flow, size, contexts) + decoding(config.autoencoder, size)


def looking(config: BagelConfig, size: tuple[int, int], context: int = 0) -> Arithmetic:
    """A picture of this (height, width) through the ViT, and its tokens read behind a context of so many."""
    tokens = block_tokens(config, size, for_drawing=False)
    seen = fitted_size(*fitted_size(*size, config.vae_transform), config.vit_transform)
    return _vit(config.vision, seen) + block_pass(config, tokens, context)


def denoising(
    config: BagelConfig, flow: FlowSettings, size: tuple[int, int], contexts: Mapping[str, int]
) -> Arithmetic:
    """All steps of a picture of this (height, width); `contexts`: the tokens that each branch reads beside it."""
    total, tokens = Arithmetic(), latent_block(config, size)
    for branch, count in passes(flow, contexts).items():
        total += block_pass(config, tokens, contexts[branch]).times(count)
    return total


def passes(flow: FlowSettings, branches: Mapping[str, int]) -> dict[str, int]:
    """How often each branch goes through the decoder: "conditional" at every step, others where guidance is active.

    A step cache takes some of a branch's passes and extrapolates the others.
    """
    guided = flow.guided(timesteps(flow.num_timesteps, flow.timestep_shift))[:-1]
    counts = {branch: len(guided) if branch == "conditional" else sum(guided) for branch in branches}
    return {branch: _taken(count) for branch, count in counts.items()} if flow.step_cache else counts


def forwards(settings: dict[str, Any]) -> int:
    """Passes through the decoder for a picture made from text alone; `settings` as an ImageResult holds them."""
    return sum(passes(FlowSettings.among(settings), {"conditional": 0, "text": 0}).values())


def block_pass(config: BagelConfig, tokens: int, context: int = 0) -> Arithmetic:
    """One pass over an image block, markers included: each token sees the block and the context."""
    return _pass(config, tokens, tokens * (tokens + context))


def text_pass(config: BagelConfig, tokens: int, context: int = 0) -> Arithmetic:
    """One pass over a text: each token sees the context, those before it and itself."""
    return _pass(config, tokens, tokens * context + tokens * (tokens + 1) / 2)


def expert_parameters(config: BagelConfig) -> int:
    """Weights in the linear parts of all layers of one expert."""
    decoder = config.decoder
    hidden, kv = decoder.hidden_size, decoder.num_key_value_heads * decoder.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * decoder.intermediate_size
    return decoder.num_hidden_layers * layer


def decoding(config: AutoencoderConfig, size: tuple[int, int]) -> Arithmetic:
    """A picture of this (height, width) out of the autoencoder."""
    height, width = (side // config.downsample for side in size)
    return _counted(Autoencoder, config, "decoder", (1, config.z_channels, height, width))


def encoding(config: AutoencoderConfig, size: tuple[int, int]) -> Arithmetic:
    """A picture of this (height, width) into the autoencoder."""
    return _counted(Autoencoder, config, "encoder", (1, config.in_channels, *size))


def token_bytes(bagel: BagelPipeline, weights: str, context: int = 0) -> int:
    """Bytes that writing a text token reads: the understanding expert, the output layer, `context` tokens' cache.

    `weights` names the format, of the expert's linear layers alone.
    """
    decoder, size = bagel.config.decoder, bagel.model.dtype.itemsize
    expert = round(expert_parameters(bagel.config) * BYTES.get(weights, size))
    cached = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return expert + (decoder.vocab_size * decoder.hidden_size + context * cached) * size


def weight_bytes(bagel: BagelPipeline) -> int:
    """Bytes that the loaded weights take: the model in its format, the autoencoder in float32."""
    modules = [module for module in (bagel.model, bagel.autoencoder) if module is not None]
    whole = sum(weight.nbytes for module in modules for weight in module.parameters())
    joined = (layer.joined.weight for layer in bagel.model.modules() if hasattr(layer, "joined"))
    return whole + sum(weight.nbytes for weight in joined if isinstance(weight, Packed))


def _pass(config: BagelConfig, tokens: int, pairs: float) -> Arithmetic:
    """`pairs`: of a token and one that it sees; each costs a product of queries with keys and one with values."""
    decoder = config.decoder
    attention = 4.0 * decoder.num_hidden_layers * decoder.hidden_size * pairs
    return Arithmetic(2.0 * expert_parameters(config) * tokens, attention)


def _taken(count: int) -> int:
    """Of the first `count` passes of a branch, those that a step cache does not extrapolate."""
    forecast, taken = TaylorForecast(), 0
    for forecast.index in range(count):
        taken += forecast.due
    return taken


def _vit(config: VisionConfig, size: tuple[int, int]) -> Arithmetic:
    return _counted(VisionModel, config, "", (1, config.num_channels, *size))


@cache
def _counted(make: Callable[[Any], nn.Module], config: Any, part: str, shape: tuple[int, ...]) -> Arithmetic:
    """What PyTorch counts in `part` of a module ("": all of it) for an input of this shape; nothing is computed."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        make(config).get_submodule(part)(torch.empty(shape))
    return Arithmetic(other=counter.get_total_flops())
