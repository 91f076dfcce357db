"""Our side: the same works through the verbs, under the same names."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..bagel.flow import timesteps
from ..bagel.images import grid_rows, open_picture, resize, to_pixels
from ..bagel.session import Plan, Session, block_tokens
from ..bagel.text import THINK_TO_ANSWER
from ..memory import explained
from ..pipeline import BagelPipeline
from .exchange import Vectors
from .official import device_name, kind, plain, timed, versions
from .works import Works, noise_of


def run_ours(
    bagel: BagelPipeline,
    works: Works,
    weights: str,
    fed: dict[str, Tensor],
    say: Callable[[str], None] = print,
) -> Vectors:
    """What a loaded model finds. `fed`: the official tokens [n] of the cases that write, by name, which it is fed to
    give its logits for the same text.

    Errors: those of the verbs, MemoryError among them.
    """
    ours, device = Ours(bagel, works, fed), bagel.model.device
    tensors, seconds, peaks = {}, {}, {}
    for name, case in works.cases.items():
        work = partial(explained, partial(getattr(ours, kind(name)), name, case), device)
        made, seconds[name], peaks[name] = timed(work, device)
        made = made | explained(partial(ours.beside, name, case), device)
        tensors.update({f"{name}.{field}": plain(value) for field, value in made.items()})
        say(f"ours: {name}, {seconds[name]:.3f} s")
    facts = {
        "origin": "this code",
        "weights": weights,
        "device": device_name(device),
        "device_type": device.type,
        "versions": {"Python": platform.python_version(), **versions()},
        "sizes": sizes(bagel),
        "seconds": seconds,
        "peaks": peaks,
    }
    return Vectors(tensors, facts)


def sizes(bagel: BagelPipeline) -> dict[str, int]:
    """What the official side tells of its model, of ours."""
    config, codec = bagel.config, bagel.codec
    return {
        "hidden size": config.decoder.hidden_size,
        "decoder layers": config.decoder.num_hidden_layers,
        "ViT layers": config.vision.num_hidden_layers,
        "latent side": config.latent_side,
        "ViT side": config.vit_side,
        "latent channels": config.autoencoder.z_channels,
        "start of text": codec.start,
        "end of text": codec.end,
        "start of image": codec.image_markers[0],
        "end of image": codec.image_markers[1],
    }


class Ours:
    """The works by kind; each returns the fields of a case."""

    def __init__(self, bagel: BagelPipeline, works: Works, fed: dict[str, Tensor]):
        self.bagel, self.works, self.fed = bagel, works, fed
        self.model, self.config = bagel.model, bagel.config

    @torch.inference_mode()
    def beside(self, name: str, case: dict) -> dict[str, Tensor]:
        """Fields that no verb computes on its way; they are not timed."""
        if kind(name) != "und" or name not in self.fed:
            return {}
        session = self.read(case["inputs"], case["think"], room=len(self.fed[name]))
        ids = self.fed[name].to(self.model.device)
        return {"logits": torch.cat([self.model.append_token(session.conditional, one[None]) for one in ids])}

    @torch.inference_mode()
    def vit(self, _name: str, case: dict) -> dict[str, Tensor]:
        pixels = to_pixels(resize(open_picture(self.works.picture(case["image"])), self.config.vit_transform))
        there = pixels[None].to(self.model.device)
        patch = self.config.vision.patch_size
        rows, columns = (side // patch for side in pixels.shape[-2:])
        return {
            "pixels": pixels,
            "position_ids": grid_rows(rows, columns, self.config.vit_side, "cpu"),
            "features": self.model.vit_model(there)[0],
            "embeddings": self.model.embed_vit(there)[0],
        }

    @torch.inference_mode()
    def vae(self, _name: str, case: dict) -> dict[str, Tensor]:
        pixels = to_pixels(resize(open_picture(self.works.picture(case["image"])), self.config.vae_transform))
        mean = self.bagel.autoencoder.encode(pixels[None].to(self.model.device))
        return {"pixels": pixels, "latent_mean": mean, "decoded": self.bagel.autoencoder.decode(mean)}

    @torch.inference_mode()
    def prefill(self, _name: str, case: dict) -> dict[str, Tensor]:
        decoder, heard = self.model.language_model.model, []
        hook = decoder.register_forward_hook(lambda _module, _args, made: heard.append(made))
        try:
            context = self.read(case["inputs"], think=False).conditional
        finally:
            hook.remove()
        hidden = decoder.norm(heard[-1][0])
        end = context.start + context.length
        keys, values = (slots[-1][0, end - len(hidden) : end] for slots in (context.keys, context.values))
        return {"hidden": hidden, "keys": keys, "values": values}

    def read(self, inputs: list[str], think: bool, room: int = 0) -> Session:
        """A context of pictures (ViT blocks alone) and texts, with room for more tokens."""
        parts = [self.works.picture(part) if part.startswith("img:") else part for part in inputs]
        parts = [part if isinstance(part, str) else open_picture(part) for part in parts]
        texts = [THINK_TO_ANSWER] * think
        tokens = sum(len(self.bagel.codec.encode(one)) for one in [*texts, *(p for p in parts if isinstance(p, str))])
        tokens += sum(block_tokens(self.config, (p.height, p.width), False) for p in parts if not isinstance(p, str))
        plan = Plan(1, tokens + room, 0, image_branch=False, for_drawing=False, posterior="mean", encoders="both")
        session = Session(self.bagel.parts, plan, [])
        for text in texts:
            session.append_text([text], system=True)
        for part in parts:
            (session.append_text if isinstance(part, str) else session.append_pictures)([part])
        return session

    def und(self, _name: str, case: dict) -> dict[str, Tensor]:
        *pictures, question = self.works.inputs(case)
        made = self.bagel.understand(pictures or None, question, case["think"], max_new_tokens=case["max_length"] - 1)
        return {"tokens": torch.tensor([self.bagel.codec.start, *made.token_ids])}

    def draw(self, name: str, case: dict) -> dict[str, Tensor]:
        states = [noise_of(self.works, name, self.config)]
        options = our_options(case["options"])
        (made,) = self.bagel.interleave(
            self.works.inputs(case),
            make=["image"],
            seed=case["seed"],
            posterior=case.get("posterior", "mean"),
            on_step=lambda _step, _t, latent: states.append(latent[0].cpu()),
            **options,
        )
        times = timesteps(options["num_timesteps"], options["timestep_shift"])
        first, last = (
            (states[step] - states[step + 1]) / (times[step] - times[step + 1]) for step in (0, len(states) - 2)
        )
        return {
            "noise": states[0],
            "first_velocity": first,
            "last_velocity": last,
            "latents": torch.stack(states[1:]),
            "latent": made.latent,
            "image": torch.from_numpy(np.array(made.image)),
        }


def our_options(options: dict) -> dict:
    """Official options of a picture -> those of our verbs (the table of names in the README)."""
    ours = dict(options)
    if "image_shapes" in ours:
        ours["height"], ours["width"] = ours.pop("image_shapes")
    if ours.pop("enable_taylorseer", False):
        ours["step_cache"] = "taylorseer"
    if "max_think_token_n" in ours:
        ours["max_think_tokens"] = ours.pop("max_think_token_n") - 1
    return ours
