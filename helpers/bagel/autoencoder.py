"""FLUX's autoencoder: pictures <-> latents, 8 times smaller along each side.

Of a large picture most steps are done in strips of rows. The result is the same, since a norm takes its mean and
variance from the whole picture, and a strip has the rows around it that its convolution sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AutoencoderConfig

# Bytes that a pass over whole tensors may take on a card; above, they are worked through in strips even if it has them.
WHOLE_AT_MOST = 2 * 10**9
STRIP = 64 * 2**20  # bytes of a strip

Step = Callable[[Tensor], Tensor]


def _strips(step: Step, x: Tensor, most: float, halo: int = 1, scale: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """What a step makes of x [batch, channels, height, width]: in strips, each as (rows of the result, their values).

    A row of the result may depend on x's rows up to `halo` away; there are `scale` times as many rows. A strip and its
    values have about `most` bytes.
    """
    row = x[:, :, :1].nbytes * max(1, scale) ** 2
    count = max(2, int(most / row) // 2 * 2)  # even, for halves of it are rows too
    for top in range(0, x.shape[2], count):
        bottom, start = min(top + count, x.shape[2]), max(top - halo, 0)
        rows, before = slice(int(top * scale), int(bottom * scale)), int((top - start) * scale)
        # What the step's padding has touched, other than at the picture's border, is in the rows that fall away.
        yield rows, step(x[:, :, start : bottom + halo])[:, :, before : before + rows.stop - rows.start]


def _in_strips(step: Step, x: Tensor, most: float, halo: int = 1, scale: float = 1.0) -> Tensor:
    """step(x), in strips where x or the result has more than `most` bytes; see `_strips`."""
    if x.nbytes * max(1, scale) ** 2 <= most:
        return step(x)
    whole = None
    for rows, values in _strips(step, x, most, halo, scale):
        if whole is None:
            whole = values.new_empty(*values.shape[:2], int(x.shape[2] * scale), values.shape[3])
        whole[:, :, rows] = values
    return whole


class _Norm(nn.GroupNorm):
    """PyTorch's, but exact and faster on a processor with the channels last.

    There PyTorch takes the variance as the difference of two large numbers: a flat picture loses two digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [batch, height * width, channels]
        mean = self._of_groups(pixels.mean(1))
        variance = self._of_groups((pixels - mean[:, None]).square_().mean(1))
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None])

    def _of_groups(self, values: Tensor) -> Tensor:
        """The mean of each group's channels in the place of theirs, [batch, channels]."""
        groups = values.unflatten(1, (self.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1)


def _norm(channels: int) -> nn.GroupNorm:
    return _Norm(32, channels, eps=1e-6)


def _with_norm_of(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Step:
    """conv(silu(norm(strip))) of a strip of x, with the mean and variance of all of x."""
    groups = x.unflatten(1, (norm.num_groups, -1))  # [batch, groups, channels of a group, height, width]
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    scale = norm.weight.view(norm.num_groups, -1) * (variance + norm.eps).rsqrt()[..., None]
    shift = norm.bias.view(norm.num_groups, -1) - mean[..., None] * scale
    scale, shift = (part.flatten(1)[..., None, None] for part in (scale, shift))  # [batch, channels, 1, 1]
    return lambda strip: conv(F.silu(torch.addcmul(shift, strip, scale), inplace=True))


def _norm_and_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, most: float) -> Tensor:
    if x.nbytes <= most:
        return conv(F.silu(norm(x)))
    return _in_strips(_with_norm_of(x, norm, conv), x, most)


# `most` of the modules below: bytes of the largest tensor that they work on as a whole. In strips, they may write their
# result over their input.


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, most: float = math.inf) -> Tensor:
        h = _norm_and_conv(x, self.norm1, self.conv1, most)
        if max(x.nbytes, h.nbytes) > most:
            return self._finish_in_strips(x, h, most)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self._shortcut(x)

    def _finish_in_strips(self, x: Tensor, h: Tensor, most: float) -> Tensor:
        """The second half. The result takes the place of x, whose rows are not needed again, if it is no wider."""
        out = x[:, : h.shape[1]] if h.shape[1] <= x.shape[1] else torch.empty_like(h)
        for rows, values in _strips(_with_norm_of(h, self.norm2, self.conv2), h, most):
            out[:, :, rows] = values.add_(self._shortcut(x[:, :, rows]))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x


class _Attention(nn.Module):
    """One head over all latent pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # Contiguous: else cards would use the kernel that holds all scores, 1 GB twice for a picture of 1024 x 1024.
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None].contiguous() for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # [batch, pixels, channels]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, most: float = math.inf) -> Tensor:
        return _in_strips(self._halve, x, most, halo=2, scale=0.5)

    def _halve(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom alone, as FLUX was trained


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, most: float = math.inf) -> Tensor:
        return _in_strips(self._double, x, most, scale=2.0)

    def _double(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = _ResBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResBlock(channels, channels)

    def forward(self, x: Tensor, most: float = math.inf) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, most)), most)


class _Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (if any)."""

    def __init__(self, before: int, after: int, blocks: int):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(before if i == 0 else after, after) for i in range(blocks))

    def steps(self) -> list[nn.Module]:
        """In order; run by the caller, for a `forward` here would keep the level's input alive to the end."""
        return [*self.block, *(getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name))]


class Encoder(nn.Module):
    """[batch, 3, height, width] -> mean and log-variance, [batch, 2 * z_channels, height / 8, width / 8]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            _Level(before, after, config.num_res_blocks)
            for before, after in zip([config.ch, *widths], widths, strict=False)
        )
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = _Downsample(width)
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor, most: float = math.inf) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for step in level.steps():
                x = step(x, most)
        return _norm_and_conv(self.mid(x, most), self.norm_out, self.conv_out, most)


class Decoder(nn.Module):
    """[batch, z_channels, h, w] -> [batch, 3, 8 * h, 8 * w]; one block a level more than the encoder."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        # Stored from fine to coarse, run from coarse to fine.
        self.up = nn.ModuleList(
            _Level(before, after, config.num_res_blocks + 1)
            for before, after in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = _Upsample(width)
        self.norm_out = _norm(config.ch * config.ch_mult[0])
        self.conv_out = nn.Conv2d(config.ch * config.ch_mult[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor, most: float = math.inf) -> Tensor:
        x = self.mid(self.conv_in(z), most)
        for level in reversed(self.up):
            for step in level.steps():
                x = step(x, most)
        return _norm_and_conv(x, self.norm_out, self.conv_out, most)


def whole_bytes(levels: nn.ModuleList, height: int, width: int) -> int:
    """Bytes of tensors alive at the peak of a pass over one whole picture (height, width), weights left out.

    `levels` from fine to coarse: an encoder's `down`, a decoder's `up`. At the peak a residual block holds either its
    input, normed and activated, or its input and what its first half made, plain, normed and activated.
    """
    return max(
        4 * (height >> halvings) * (width >> halvings) * max(3 * before, before + 3 * after)
        for halvings, level in enumerate(levels)
        for before, after in ((block.conv1.in_channels, block.conv1.out_channels) for block in level.block)
    )


def _room(device: torch.device) -> float:
    """Bytes that a pass over whole tensors may take. Cards alone are short of memory."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # A part is left to cuDNN's work space, and some of what is unused lies in pieces too small to use.
    return min(WHOLE_AT_MOST, 0.8 * (torch.cuda.mem_get_info(device)[0] + unused))


def _run(part: Encoder | Decoder, levels: nn.ModuleList, x: Tensor, size: tuple[int, int]) -> Tensor:
    """part(x), x [batch, ...]: as many pictures of `size` (height, width) at once as there is room for, or in strips.

    Strips overwrite their input, which only inference mode is sure to allow; else all is done at once.
    """
    if not torch.is_inference_mode_enabled():
        return part(x)
    one, room = whole_bytes(levels, *size), _room(x.device)
    if len(x) * one <= room:
        return part(x)
    most = math.inf if one <= room else STRIP
    return torch.cat([part(some, most) for some in x.split(max(1, int(room / one)))])


class Autoencoder(nn.Module):
    """The tensors of `ae.safetensors`; runs in float32."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [batch, 3, height, width] in [-1, 1] -> mean and log-variance, [batch, z, height / 8, width / 8].

        Both before shift and scale; the log-variance is not clamped.
        """
        height, width = pixels.shape[-2:]
        mean, logvar = _run(self.encoder, self.encoder.down, pixels, (height, width)).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents, shifted and scaled: the posterior's mean, or a sample where `noise` (shaped like it) is given."""
        mean, logvar = self.posterior(pixels)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [batch, z, h, w] -> pixels [batch, 3, 8 * h, 8 * w], nominally in [-1, 1]."""
        height, width = (side * self.config.downsample for side in latents.shape[-2:])
        # A picture made of tokens comes with other strides, which every step after it would take over.
        z = (latents / self.config.scale_factor + self.config.shift_factor).contiguous()
        return _run(self.decoder, self.decoder.up, z, (height, width))
