"""Trains the tiny BAGEL from scratch: first the autoencoder, then everything else jointly.

    python -m helpers.tiny.train --out outputs/tiny                        # all of it, on a CUDA card
    python -m helpers.tiny.train --out outputs/tiny --minutes 9            # as far as 9 minutes go; call again to go on
    torchrun --nproc-per-node 2 -m helpers.tiny.train --out outputs/tiny   # each step shared by two cards

A call continues from the state in `--out`. When the last step is done, `--out`/checkpoint holds the finished folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from transformers import Qwen2Tokenizer

from ..bagel.autoencoder import Autoencoder
from ..bagel.config import AutoencoderConfig, BagelConfig, DecoderConfig, ResizeRule, VisionConfig
from ..bagel.images import fitted_size, patchify
from ..bagel.layers import sine_cosine_table
from ..bagel.model import Bagel
from ..bagel.text import THINK_TO_ANSWER, THINK_TO_DRAW, TextCodec
from .batches import GIVEN_FRAMES, MIXTURE, PREDICTED_FRAMES, StepBatches, Task, TaskBatch, segments_of, text_widths
from .clips import SIDE as CLIP_SIDE
from .clips import draw_clip_table
from .export import write_checkpoint
from .muon import Muon
from .packing import Layout
from .team import Team
from .tokenizer import make_tokenizer
from .world import SIDE, draw_table


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside the code and the versions."""

    seed: int = 0
    autoencoder_steps: int = 7000
    autoencoder_batch: int = 128
    autoencoder_lr: float = 1e-3
    autoencoder_muon_lr: float = 3e-3
    kl_weight: float = 5e-4
    steps: int = 7800
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 300
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999
    timestep_shift: float = 2.0
    batch_scale: float = 1.0

    def mixture(self, processes: int = 1) -> tuple[Task, ...]:
        """What one of the processes that share a step takes of it."""
        scale = self.batch_scale / processes
        return tuple(replace(task, batch=max(1, round(task.batch * scale))) for task in MIXTURE)


def tiny_config(vocabulary: int) -> BagelConfig:
    """Sizes of the tiny model: about 6.8 M parameters, and 1.5 M in the autoencoder."""
    return BagelConfig(
        decoder=DecoderConfig(192, 432, 8, 6, 2, vocabulary, 1e6, 1e-6, 8192),
        vision=VisionConfig(128, 384, 4, 4, 3, 14, 1e-6, 81),
        autoencoder=AutoencoderConfig(3, 3, 32, (3, 1, 2, 2), 1, 8, 1.0, 0.0),
        latent_patch_size=2,
        latent_side=8,
        vit_side=9,
        vae_transform=ResizeRule(128, 64, 16),
        vit_transform=ResizeRule(126, 56, 14),
    )


# Stage one: the autoencoder


def train_autoencoder(
    recipe: Recipe, config: BagelConfig, data: DataLoader, log: Log, team: Team, compiled: bool
) -> Autoencoder:
    """Reconstruction in mean absolute difference, with a light pull of the posterior towards a normal distribution.

    Returns the moving average, with shift and scale that give its latents mean 0 and deviation 1.
    """
    torch.manual_seed(recipe.seed)
    autoencoder = Autoencoder(config.autoencoder).to(team.device, memory_format=torch.channels_last)
    torch.manual_seed(team.seed(recipe.seed))
    weights = dict(autoencoder.named_parameters())
    optimizers = _optimizers(weights, recipe.autoencoder_lr, recipe.autoencoder_muon_lr, recipe.betas)
    average = AveragedModel(autoencoder, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    if compiled:
        for part in (autoencoder.encoder, autoencoder.decoder):
            part.forward = torch.compile(part.forward, dynamic=False)
    pools = {size: Pictures.collect(data, size, team.device) for size in (SIDE, CLIP_SIDE)}
    for step in range(recipe.autoencoder_steps):
        size = CLIP_SIDE if step % 5 == 4 else SIDE
        pixels = pools[size].draw(recipe.autoencoder_batch // team.size * SIDE // size)
        with torch.autocast(team.device.type, torch.bfloat16):
            mean, logvar = autoencoder.posterior(pixels.contiguous(memory_format=torch.channels_last))
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            restored = autoencoder.decoder(mean + torch.exp(logvar / 2) * torch.randn_like(mean)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = (restored - pixels).abs().mean() + (restored - pixels).square().mean()
        (error + recipe.kl_weight * kl).backward()
        team.average([weight.grad for weight in weights.values()])
        nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
        _step(optimizers, _share_of_peak(step, recipe.autoencoder_steps, warmup=100))
        autoencoder.zero_grad(set_to_none=True)
        average.update_parameters(autoencoder)
        if step % 100 == 99 or step + 1 == recipe.autoencoder_steps:
            psnr = -10 * torch.log10((restored - pixels).square().mean() / 4)
            log.write(stage="autoencoder", step=step + 1, error=error, kl=kl, psnr=psnr)
    return _normalised(average.module.eval(), pools[SIDE].draw(4 * recipe.autoencoder_batch))


def _normalised(autoencoder: Autoencoder, pixels: Tensor) -> Autoencoder:
    with torch.inference_mode():
        mean, logvar = autoencoder.posterior(pixels)
        latents = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
    scale, shift = round(1 / latents.std().item(), 5), round(latents.mean().item(), 5)
    autoencoder.config = replace(autoencoder.config, scale_factor=scale, shift_factor=shift)
    return autoencoder


@dataclass
class Pictures:
    """Tables of many scenes or clips on the device, from which random pictures are drawn."""

    tables: Tensor
    size: int

    @classmethod
    def collect(cls, data: DataLoader, size: int, device: torch.device, steps: int = 8) -> Pictures:
        """The tables of a few training steps."""
        tables = []
        for _, step in zip(range(steps), data, strict=False):
            for batch in step:
                if (batch.tables.ndim == 3) == (size == CLIP_SIDE):
                    tables.append(batch.tables.flatten(0, batch.tables.ndim - 3))
        return cls(torch.cat(tables).to(device), size)

    def draw(self, count: int) -> Tensor:
        """[count, 3, size, size] in [-1, 1]"""
        rows = self.tables[torch.randint(len(self.tables), (count,), device=self.tables.device)]
        if self.size == SIDE:
            return draw_table(rows)
        frames = draw_clip_table(rows, GIVEN_FRAMES + PREDICTED_FRAMES)
        return frames[torch.arange(count), torch.randint(frames.shape[1], (count,))]


# Stage two: everything else


class Joint(nn.Module):
    """The loss of one step: all tasks packed into one sequence."""

    def __init__(self, model: Bagel, autoencoder: Autoencoder, recipe: Recipe, widths: dict, mixture: tuple[Task, ...]):
        super().__init__()
        self.model, self.recipe, self.mixture = model, recipe, mixture
        self.autoencoder = [autoencoder]  # in a list: frozen, no submodule
        self.device = model.device
        self.layouts = [Layout(self._segments(task, widths[task.name]), self.device) for task in self.mixture]
        vit = {size: fitted_size(size, size, model.config.vit_transform)[0] for size in (SIDE, CLIP_SIDE)}
        self.resizers = {size: resize_matrix(size, side).to(self.device) for size, side in vit.items()}

    def _segments(self, task: Task, widths: list[int]):
        config, size = self.model.config, CLIP_SIDE if task.is_clip else SIDE
        latents = (size // config.latent_stride) ** 2
        patches = (fitted_size(size, size, config.vit_transform)[0] // config.vision.patch_size) ** 2
        return segments_of(task, widths, latents, patches)

    def forward(self, step: list[TaskBatch], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(cross-entropy, squared error averaged over noised tokens)

        A target text weighs as the root of its length, so that one-word answers count beside long descriptions.
        """
        latents, vit = self._encode(step, generator)
        self.markers = self.model.embed_markers(1)
        tasks = [_PackedTask(self, *parts, generator) for parts in zip(self.layouts, step, latents, vit, strict=True)]
        und = [task.und.flatten(0, 1) for task in tasks]
        gen = [task.gen.flatten(0, 1) for task in tasks]
        positions = [part.flatten() for i in (0, 1) for task in tasks for part in [task.positions[i]]]
        x = torch.cat(und + gen)[None]
        und_tokens = sum(len(part) for part in und)
        hidden = self.model.language_model.model(x, und_tokens, torch.cat(positions)[None], PackedAttention(tasks))[0]
        for task, part in zip(tasks, hidden[:und_tokens].split([len(p) for p in und]), strict=True):
            task.und = part.unflatten(0, task.und.shape[:2])
        for task, part in zip(tasks, hidden[und_tokens:].split([len(p) for p in gen]), strict=True):
            task.gen = part.unflatten(0, task.gen.shape[:2])
        return self._text_loss(tasks), self._flow_loss(tasks)

    @torch.no_grad()
    def _encode(self, step: list[TaskBatch], generator: torch.Generator) -> tuple[list[dict], list[dict]]:
        """For each task: picture number -> latent tokens, and -> pixels for the ViT. Each picture is encoded once."""
        latents, vit = [{} for _ in step], [{} for _ in step]
        for size in (SIDE, CLIP_SIDE):
            blocks = self._draw(step, clips=size == CLIP_SIDE)
            for kinds, encode, found in (
                (("vae", "noised"), lambda p: self._latents(p, generator), latents),
                (("vit",), lambda p, s=size: resize_pixels(p, self.resizers[s]), vit),
            ):
                wanted = [b for b in blocks if self._uses(b[0], b[1], kinds)]
                if wanted:
                    parts = encode(torch.cat([b[2] for b in wanted])).split([len(b[2]) for b in wanted])
                    for (index, number, _), part in zip(wanted, parts, strict=True):
                        found[index][number] = part
        return latents, self._embed_vit(vit)

    def _draw(self, step: list[TaskBatch], clips: bool) -> list[tuple[int, int, Tensor]]:
        """(task number, picture number, pixels [batch, 3, size, size]) of all scenes, or of all frames of clips."""
        chosen = [(i, batch.tables) for i, batch in enumerate(step) if self.mixture[i].is_clip == clips]
        if not clips:
            keys = [(i, number, tables[:, number]) for i, tables in chosen for number in range(tables.shape[1])]
            drawn = draw_table(torch.cat([table for _, _, table in keys])).split([len(table) for _, _, table in keys])
            return [(i, number, pixels) for (i, number, _), pixels in zip(keys, drawn, strict=True)]
        return [
            (i, number, pixels)
            for i, tables in chosen
            for number, pixels in enumerate(draw_clip_table(tables, self.mixture[i].frames).unbind(1))
        ]

    def _uses(self, task: int, number: int, kinds: tuple[str, ...]) -> bool:
        return any(s.kind in kinds and s.source == number for s in self.layouts[task].segments)

    def _latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A posterior sample of each picture as latent tokens [pictures, tokens, 4 * channels], float32."""
        (autoencoder,) = self.autoencoder
        dtype = autoencoder.encoder.conv_in.weight.dtype
        mean, logvar = autoencoder.posterior(pixels.to(dtype, memory_format=torch.channels_last))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        config = autoencoder.config
        z = config.scale_factor * (mean.float() + torch.exp(logvar.float() / 2) * noise - config.shift_factor)
        return patchify(z, self.model.config.latent_patch_size)

    def _embed_vit(self, pixels: list[dict]) -> list[dict]:
        """ViT tokens of all pictures, one call a size."""
        out = [{} for _ in pixels]
        with torch.enable_grad():
            for side in {part.shape[-1] for task in pixels for part in task.values()}:
                keys = [(i, n) for i, task in enumerate(pixels) for n, p in task.items() if p.shape[-1] == side]
                parts = [pixels[i][n] for i, n in keys]
                tokens = self.model.embed_vit(torch.cat(parts)).split([len(p) for p in parts])
                for (i, n), part in zip(keys, tokens, strict=True):
                    out[i][n] = part
        return out

    def _text_loss(self, tasks: list[_PackedTask]) -> Tensor:
        targets = [found for task in tasks for found in task.text_targets()]
        hidden, ids, weights = (torch.cat(columns) for columns in zip(*targets, strict=True))
        logits = self.model.language_model.lm_head(self.model.language_model.model.norm(hidden)).float()
        losses = F.cross_entropy(logits, ids, ignore_index=-1, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def _flow_loss(self, tasks: list[_PackedTask]) -> Tensor:
        targets = [found for task in tasks for found in task.flow_targets()]
        velocity = self.model.velocity(torch.cat([hidden for hidden, _ in targets]))
        return F.mse_loss(velocity, torch.cat([target for _, target in targets]))


class _PackedTask:
    """One task's share of a step: its tokens before the decoder, and after it where the losses are."""

    def __init__(self, joint: Joint, layout: Layout, batch: TaskBatch, latents: dict, vit: dict, generator):
        self.layout, self.batch, self.latents, self.vit = layout, batch, latents, vit
        model, size = joint.model, len(batch.counts)
        self.dropped = layout.draw_dropped(size, generator)
        counts = self._counts(size)
        positions = layout.positions(counts, self.dropped)
        self.positions = positions.split([layout.und_tokens, layout.gen_tokens], dim=1)
        bias = layout.bias(counts, self.dropped, model.dtype)
        # Rows of whole eights, which the attention kernels want.
        length = bias.shape[-1]
        self.bias = F.pad(bias, (0, -length % 8))[..., :length]
        self.noise: dict[int, Tensor] = {}
        self.times: dict[int, Tensor] = {}
        self.und = torch.cat([self._und(joint, segment) for segment in layout.segments], dim=1)
        gen = [self._gen(joint, segment, generator) for segment in layout.segments if segment.gen_tokens]
        self.gen = torch.cat(gen, dim=1) if gen else self.und[:, :0]

    def _counts(self, size: int) -> Tensor:
        device = self.dropped.device
        columns = [
            self.batch.counts[:, s.source] if s.kind == "text" else torch.full((size,), s.tokens, device=device)
            for s in self.layout.segments
        ]
        return torch.stack(columns, dim=1)

    def _und(self, joint: Joint, segment) -> Tensor:
        if segment.kind == "text":
            return joint.model.embed_ids(self.batch.ids[segment.source])
        markers = joint.markers.expand(len(self.batch.counts), -1, -1)
        return torch.cat([markers, self.vit[segment.source]], dim=1) if segment.kind == "vit" else markers

    def _gen(self, joint: Joint, segment, generator: torch.Generator) -> Tensor:
        model, x = joint.model, self.latents[segment.source]
        side = math.isqrt(segment.tokens)
        t = torch.zeros(len(x), device=x.device)
        if segment.kind == "noised":
            t = self.times[segment.source] = _flow_times(len(x), joint.recipe.timestep_shift, generator)
            noise = self.noise[segment.source] = torch.randn(x.shape, generator=generator, device=x.device)
            x = torch.lerp(x, noise, t[:, None, None])
        return model.embed_latents(x, t, model.latent_places(side, side))

    def text_targets(self):
        """(hidden states [n, hidden], ids [n], -1 where there is no loss, weights [n]) of each text to be learned."""
        starts = self.layout.starts("und_tokens")
        for index, (segment, start) in enumerate(zip(self.layout.segments, starts, strict=True)):
            if segment.kind == "text" and segment.target:
                ids, counts = self.batch.ids[segment.source], self.batch.counts[:, segment.source]
                real = torch.arange(1, segment.tokens, device=ids.device) < counts[:, None]
                wanted = real & ~self.dropped[:, index, None]
                weights = wanted / (counts[:, None] - 1).sqrt()
                hidden = self.und[:, start : start + segment.tokens - 1]
                yield hidden.flatten(0, 1), torch.where(wanted, ids[:, 1:], -1).flatten(), weights.flatten()

    def flow_targets(self):
        """(hidden states [n, hidden], noise - data [n, 4 * channels]) of each picture to be made."""
        for segment, start in zip(self.layout.segments, self.layout.starts("gen_tokens"), strict=True):
            if segment.kind == "noised":
                target = self.noise[segment.source] - self.latents[segment.source]
                yield self.gen[:, start : start + segment.tokens].flatten(0, 1), target.flatten(0, 1)


def _flow_times(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """One flow time for each picture: logit-normal, shifted towards noise."""
    t = torch.sigmoid(torch.randn(count, generator=generator, device=generator.device))
    return shift * t / (1 + (shift - 1) * t)


class PackedAttention:
    """Attention of a packed step: every task on its own, with its bias."""

    def __init__(self, tasks: list[_PackedTask]):
        self.biases = [task.bias for task in tasks]
        self.und = [task.und.shape[:2] for task in tasks]
        self.gen = [task.gen.shape[:2] for task in tasks]
        self.split = [b * n for b, n in self.und] + [b * n for b, n in self.gen]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        pieces = [x[0].split(self.split) for x in (q, k, v)]
        und, gen = [], []
        for i, bias in enumerate(self.biases):
            attended = self._attend(bias, *(self._sample(parts, i) for parts in pieces))
            und.append(attended[:, : self.und[i][1]].flatten(0, 1))
            gen.append(attended[:, self.und[i][1] :].flatten(0, 1))
        return torch.cat(und + gen)[None]

    def _sample(self, parts: tuple[Tensor, ...], i: int) -> Tensor:
        """Task i's tokens [batch, heads, und + gen, head_dim]."""
        und = parts[i].unflatten(0, self.und[i])
        gen = parts[len(self.und) + i].unflatten(0, self.gen[i]) if self.gen[i][1] else None
        return (und if gen is None else torch.cat([und, gen], dim=1)).transpose(1, 2)

    def _attend(self, bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # cuDNN is the faster one where sequences are long.
        backend = SDPBackend.CUDNN_ATTENTION if q.shape[2] > 230 else SDPBackend.EFFICIENT_ATTENTION
        with sdpa_kernel(backend) if q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def resize_matrix(before: int, after: int) -> Tensor:
    """[after, before]: what bicubic resizing with antialiasing does to one line of pixels."""
    lines = torch.eye(before)[None, None]  # one line of pixels a row
    return F.interpolate(lines, (before, after), mode="bicubic", antialias=True)[0, 0].T.contiguous()


def resize_pixels(pixels: Tensor, matrix: Tensor) -> Tensor:
    """[..., before, before] in [-1, 1] -> [..., after, after]; clamped after each direction, as Pillow does."""
    lines = (pixels @ matrix.T).clamp(-1, 1)
    return (matrix @ lines).clamp(-1, 1)


def new_model(config: BagelConfig, codec: TextCodec, seed: int, device: torch.device) -> Bagel:
    """Random weights as training starts: generation expert equal to the understanding one, llm2vae zero."""
    torch.manual_seed(seed)
    model = Bagel(config, codec.image_markers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "pos_embed" not in name:
            # Layers that add to the residual stream start smaller, so that its size does not grow with depth.
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "mlp.fc2.weight"))
            depth = 2 * config.decoder.num_hidden_layers if residual else 1
            nn.init.trunc_normal_(parameter, std=0.05 / math.sqrt(depth))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    state = model.state_dict()
    for name in [name for name in state if "_moe_gen" in name]:
        state[name].copy_(state[name.replace("_moe_gen", "")])
    nn.init.zeros_(model.llm2vae.weight)
    for table, side in ((model.latent_pos_embed, config.latent_side), (model.vit_pos_embed, config.vit_side)):
        table.pos_embed.copy_(sine_cosine_table(side, config.decoder.hidden_size))
    return model.to(device)


class Trainer:
    """Float32 weights and their moving average beside the bfloat16 model that computes."""

    def __init__(self, recipe: Recipe, model: Bagel, team: Team):
        self.recipe, self.team, self.step = recipe, team, 0
        self.masters = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.average = {name: weight.clone() for name, weight in self.masters.items()}
        self.model = model.to(torch.bfloat16 if model.device.type == "cuda" else torch.float32)
        self.optimizers = _optimizers(self.masters, recipe.lr, recipe.muon_lr, recipe.betas)
        self.parameters = [dict(model.named_parameters())[name] for name in self.masters]
        self.resumed_at = 0

    def update(self) -> None:
        """One step with the gradients that the model's parameters hold."""
        for master, parameter in zip(self.masters.values(), self.parameters, strict=True):
            master.grad = parameter.grad.float()
        self.team.average([master.grad for master in self.masters.values()])
        nn.utils.clip_grad_norm_(self.masters.values(), self.recipe.clip)
        _step(self.optimizers, _share_of_peak(self.step, self.recipe.steps, self.recipe.warmup, self.resumed_at))
        self.step += 1
        # Early on the average follows faster, so that it forgets the start.
        decay = min(self.recipe.ema, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - decay)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Float32 weights -> the model."""
        torch._foreach_copy_(self.parameters, list(self.masters.values()))

    def averaged(self) -> dict[str, Tensor]:
        """All tensors of the model, the trained ones averaged."""
        return {**self.model.state_dict(), **self.average}

    def save(self, folder: Path) -> None:
        """State in files of at most 16 MiB. The optimizers' moments are left out: they forget within tens of steps."""
        names = list(self.masters)
        for number, half in enumerate((names[::2], names[1::2])):
            save_file({name: self.masters[name] for name in half}, folder / f"weights_{number}.safetensors")
        gap = {name: (self.average[name] - self.masters[name]).bfloat16() for name in names}
        save_file(gap, folder / "average.safetensors")
        (folder / "progress.json").write_text(json.dumps({"step": self.step, "recipe": asdict(self.recipe)}))

    def load(self, folder: Path) -> None:
        for number in (0, 1):
            for name, weight in load_file(folder / f"weights_{number}.safetensors").items():
                self.masters[name].copy_(weight)
        for name, gap in load_file(folder / "average.safetensors").items():
            self.average[name].copy_(self.masters[name] + gap.to(self.masters[name].device, torch.float32))
        self.step = self.resumed_at = json.loads((folder / "progress.json").read_text())["step"]
        self.write_back()


def _optimizers(
    weights: dict[str, Tensor], lr: float, muon_lr: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions of all layers, AdamW for the rest, inputs and outputs among it.

    At one rate both move a weight about equally far. In the first hundred joint steps Muon needed about three quarters
    of AdamW's for a loss.
    """
    inner = [
        name
        for name, weight in weights.items()
        if (weight.ndim == 2 and ".layers." in name)
        or (weight.ndim == 4 and "conv_in" not in name and "conv_out" not in name)
    ]
    rest = [weight for name, weight in weights.items() if name not in inner]
    return [
        torch.optim.AdamW(rest, lr, betas, weight_decay=0.0),
        Muon([weights[name] for name in inner], muon_lr),
    ]


def _share_of_peak(step: int, steps: int, warmup: int, resumed_at: int = 0) -> float:
    """The learning rate in shares of its peak: linear warm-up, then a cosine to zero.

    After a resumption a second, short warm-up lets the moments settle.
    """
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) * min(1.0, (step + 1) / warmup)
    return share * min(1.0, (step - resumed_at + 1) / 50) if resumed_at else share


def _step(optimizers: list[torch.optim.Optimizer], share_of_peak: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share_of_peak
        optimizer.step()


class Log:
    """Losses as JSON lines, printed as well; only the team's first process writes them."""

    def __init__(self, file: Path, team: Team):
        self.file, self.team, self.started = file, team, time.perf_counter()

    def write(self, **values) -> None:
        if not self.team.leads:
            return
        row = {k: float(f"{v.item():.5g}") if isinstance(v, Tensor) else v for k, v in values.items()}
        row["seconds"] = round(time.perf_counter() - self.started, 1)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def run(out: Path, recipe: Recipe, team: Team, minutes: float, workers: int, compiled: bool) -> bool:
    """Train until done (True) or until the minutes are over (False); the state stays in `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl", team)
    if team.leads and not (out / "vocab.json").exists():
        make_tokenizer(out, (THINK_TO_ANSWER, THINK_TO_DRAW))
    team.wait()
    codec = TextCodec(Qwen2Tokenizer.from_pretrained(out))
    config, mixture = tiny_config(len(codec.tokenizer)), recipe.mixture(team.size)
    widths = text_widths(codec, mixture)
    batches = StepBatches(codec, mixture, widths, recipe.steps, team.seed(recipe.seed))
    autoencoder = _autoencoder(out, recipe, config, _loader(batches, 0, workers, team.device), log, team, compiled)
    config = replace(config, autoencoder=autoencoder.config)
    trainer = Trainer(recipe, new_model(config, codec, recipe.seed, team.device), team)
    if (out / "progress.json").exists():
        trainer.load(out)
    joint = Joint(trainer.model, autoencoder.to(trainer.model.dtype), recipe, widths, mixture)
    if compiled:
        _compile(trainer.model, autoencoder)
    _steps(trainer, joint, _loader(batches, trainer.step, workers, team.device), log, started + 60 * minutes)
    if team.leads:
        trainer.save(out)
    if trainer.step < recipe.steps:
        return False
    if team.leads:
        write_checkpoint(out / "checkpoint", trainer.averaged(), load_file(out / "ae.safetensors"), config, out)
    return True


class LossStep:
    """Losses and gradients of one step; on a GPU recorded once as a CUDA graph and replayed, as all shapes are fixed.

    The thousands of small kernels of a step take the GPU less time than Python takes to launch them.
    """

    def __init__(self, joint: Joint, seed: int):
        self.joint, self.seed = joint, seed
        self.generator = torch.Generator(joint.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: list[TaskBatch], number: int) -> tuple[Tensor, Tensor]:
        """(text loss, flow loss); the gradients are left at the parameters."""
        if self.joint.device.type == "cuda" and self.graph is None:
            self._record([batch.to(self.joint.device) for batch in step])
        self.generator.manual_seed(self.seed * 10**9 + number)
        if self.graph is None:
            return self._run([batch.to(self.joint.device) for batch in step])
        for place, batch in zip(self.inputs, step, strict=True):
            place.copy_(batch)
        self.graph.replay()
        return self.losses

    def _run(self, step: list[TaskBatch]) -> tuple[Tensor, Tensor]:
        self.joint.model.zero_grad(set_to_none=True)
        text, flow = self.joint(step, self.generator)
        (text + flow).backward()
        return text.detach(), flow.detach()

    def _record(self, inputs: list[TaskBatch]) -> None:
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilation and allocation happen outside the recording
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        # Other threads, of the loader and of the team, may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.losses = self._run(inputs)


def _steps(trainer: Trainer, joint: Joint, data: DataLoader, log: Log, deadline: float) -> None:
    loss = LossStep(joint, trainer.team.seed(trainer.recipe.seed))
    for step in data:
        # All stop at the same step; asking one another costs a wait for the card, so not at each.
        if trainer.step % 10 == 0 and trainer.team.any(time.perf_counter() > deadline):
            return
        text, flow = loss(step, trainer.step)
        trainer.update()
        if trainer.step % 50 == 0 or trainer.step in (1, 10) or trainer.step == trainer.recipe.steps:
            log.write(stage="joint", step=trainer.step, text=text, flow=flow)


def _autoencoder(
    out: Path, recipe: Recipe, config: BagelConfig, data: DataLoader, log: Log, team: Team, compiled: bool
) -> Autoencoder:
    """The trained autoencoder of `out`, trained now where there is none."""
    file = out / "ae.safetensors"
    if not file.exists():
        autoencoder = train_autoencoder(recipe, config, data, log, team, compiled)
        factors = {"scale_factor": autoencoder.config.scale_factor, "shift_factor": autoencoder.config.shift_factor}
        if team.leads:
            (out / "ae.json").write_text(json.dumps(factors))
            save_file({k: v.contiguous() for k, v in autoencoder.state_dict().items()}, file)
        team.wait()
    autoencoder = Autoencoder(replace(config.autoencoder, **json.loads((out / "ae.json").read_text())))
    # The shipped weights are bfloat16: train on what they will make.
    autoencoder.load_state_dict({name: weight.bfloat16().float() for name, weight in load_file(file).items()})
    return autoencoder.to(team.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _loader(batches: StepBatches, first: int, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        Subset(batches, range(first, len(batches))), batch_size=None, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
    )  # fmt: skip


def _compile(model: Bagel, autoencoder: Autoencoder) -> None:
    """Compile what is called often: the two halves of a decoder layer, a ViT layer, the encoder."""
    for layer in model.language_model.model.layers:
        layer.project = torch.compile(layer.project, dynamic=False)
        layer.finish = torch.compile(layer.finish, dynamic=False)
    for layer in model.vit_model.vision_model.encoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    autoencoder.encoder.forward = torch.compile(autoencoder.encoder.forward, dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of state, log and finished checkpoint")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, keeping the state")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches, for each card")
    parser.add_argument("--no-compile", action="store_true", help="run every operation on its own")
    names = ("steps", "autoencoder_steps", "autoencoder_batch", "batch_scale", "seed")
    for name in names:
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    a = parser.parse_args()
    recipe = Recipe(**{name: getattr(a, name) for name in names})
    with Team(a.device) as team:
        done = run(a.out, recipe, team, a.minutes, a.workers, not a.no_compile)
        if team.leads:
            print("finished" if done else f"stopped after {a.minutes} minutes; the same command goes on")


if __name__ == "__main__":
    main()
