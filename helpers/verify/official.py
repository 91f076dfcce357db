"""The official side of `python -m helpers verify`: a script that runs inside the official code's own environment.

    python official.py FOLDER

It reads `request.json` and `request.safetensors` in FOLDER, imports the checkout that the request names, builds the
model as the checkout's `app.py` does, does the works, and writes `vectors.safetensors` and `facts.json`. It imports
nothing of this package and runs on Python 3.10, the official one. `accelerate` places the weights, as in `app.py`.

What it changes in the official code, all from outside and told in the facts:
- without flash-attn, or in float32, attention is PyTorch's own;
- in float32 every `torch.bfloat16` that the checkout's modules name means float32;
- the initial noise is the given one, and posteriors are their means unless a case asks for samples.
"""

import importlib.util
import json
import math
import os
import platform
import sys
import time
import types
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

REQUEST, INPUTS, VECTORS, FACTS = "request.json", "request.safetensors", "vectors.safetensors", "facts.json"
# What an official checkout holds, as far as it is used here.
FILES = (
    "inferencer.py",
    "data/data_utils.py",
    "data/transforms.py",
    "modeling/autoencoder.py",
    "modeling/bagel/__init__.py",
    "modeling/bagel/bagel.py",
    "modeling/bagel/qwen2_navit.py",
    "modeling/bagel/siglip_navit.py",
    "modeling/qwen2/__init__.py",
)
SDPA = "PyTorch's scaled_dot_product_attention in place of flash-attn"


def main(folder):
    """Does what the request in `folder` asks for."""
    with open(os.path.join(folder, REQUEST), encoding="utf8") as file:
        request = json.load(file)
    given = load_file(os.path.join(folder, INPUTS))
    sys.path[0] = request["checkout"]  # instead of this file's folder, whose names must not be found
    say("Python " + platform.python_version() + "".join(f", {name} {what}" for name, what in versions().items()))
    official = Official(request, given)
    tensors, seconds, peaks = official.run(request["cases"])
    save_file(tensors, os.path.join(folder, VECTORS))
    facts = {**official.facts(), "seconds": seconds, "peaks": peaks}
    with open(os.path.join(folder, FACTS), "w", encoding="utf8") as file:
        json.dump(facts, file)


def say(line):
    """A line for the person who waits; the rest of the output is shown only if the run dies."""
    print(f"official: {line}", flush=True)


def kind(name):
    """Which work a case is, by its name: vit, vae, prefill, und, or draw for all others."""
    head = name.split("_")[0]
    return head if head in ("vit", "vae", "prefill", "und") else "draw"


def timed(call, device):
    """(result, seconds, peak of memory in bytes) of the second of two calls: the first one warms up.

    The memory is what PyTorch held on a card during the second call; on a processor the process's peak so far, None
    where the system does not tell it.
    """
    call()
    _start(device)
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin, _peak(device)


def _start(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"processor, threads: {torch.get_num_threads()}"


def versions():
    """Versions of the packages that decide about numbers, those that are there."""
    found = {}
    for name in ("torch", "transformers", "accelerate", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Attention without flash-attn


def packed_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0, causal=False
):
    """What `flash_attn_varlen_func` computes: q [queries, heads, d], k and v [keys, kv_heads, d] of several sequences.

    `cu_seqlens_*`: where each sequence begins, and the end. A causal mask is aligned at the last query and key.
    """
    queries, keys = (_spans(lengths) for lengths in (cu_seqlens_q, cu_seqlens_k))
    pairs = zip(queries, keys, strict=True)
    return torch.cat([_attend(q[a:b], k[c:d], v[c:d], causal) for (a, b), (c, d) in pairs])


def _spans(starts):
    starts = starts.tolist()
    return list(zip(starts[:-1], starts[1:], strict=True))


def _attend(q, k, v, causal):
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    rows, columns = q.shape[2], k.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows) if causal else None
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def choose_attention(weights, device):
    """What attention the official modules will import: flash-attn where it is there and can, else the stand-in."""
    if weights == "bf16" and device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        return f"flash-attn {versions().get('flash-attn', '')}"
    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = ModuleSpec("flash_attn", None)  # transformers asks for it
    stand_in.flash_attn_varlen_func = packed_attention
    sys.modules["flash_attn"] = stand_in
    return SDPA


# Float32


class _InFloat32(types.ModuleType):
    """PyTorch, but what it calls bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def compute_in_float32(checkout):
    """Let the checkout's modules, once imported, see float32 where they name bfloat16."""
    root = os.path.realpath(checkout) + os.sep
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and os.path.realpath(file).startswith(root) and vars(module).get("torch") is torch:
            module.torch = _InFloat32("torch")


# The model


class Official:
    """The official model of a folder and what the works need beside it."""

    def __init__(self, request, given):
        self.given, self.weights = given, request["weights"]
        self.device = torch.device(request["device"])
        self.attention = choose_attention(self.weights, self.device)
        self.build(request["model"])
        if self.weights == "fp32":
            compute_in_float32(request["checkout"])

    def build(self, folder):
        """As `app.py` builds it; what that file writes down for the released model comes from a small one's JSON."""
        from data.data_utils import add_special_tokens
        from data.transforms import ImageTransform
        from inferencer import InterleaveInferencer
        from modeling.qwen2 import Qwen2Tokenizer

        own = _json(folder, "config.json") if os.path.exists(os.path.join(folder, "config.json")) else {}
        self.autoencoder, vae_config = _autoencoder(folder, own)
        self.model = _model(folder, own, vae_config, self.device, self.weights, self.attention)
        tokenizer, self.ids, _ = add_special_tokens(Qwen2Tokenizer.from_pretrained(folder))
        vae, vit = own.get("vae_transform"), own.get("vit_transform")
        self.vae_transform = ImageTransform(*(_limits(vae) if vae else (1024, 512, 16)))
        self.vit_transform = ImageTransform(*(_limits(vit) if vit else (980, 224, 14)))
        self.inferencer = InterleaveInferencer(
            model=self.model,
            vae_model=self.autoencoder,
            tokenizer=tokenizer,
            vae_transform=self.vae_transform,
            vit_transform=self.vit_transform,
            new_token_ids=self.ids,
        )

    def facts(self):
        return {
            "origin": "the official code",
            "weights": self.weights,
            "device": device_name(self.device),
            "device_type": self.device.type,
            "versions": {"Python": platform.python_version(), **versions()},
            "attention": self.attention,
            "sizes": self.sizes(),
        }

    def sizes(self):
        model = self.model
        return {
            "hidden size": model.hidden_size,
            "decoder layers": len(model.language_model.model.layers),
            "ViT layers": len(model.vit_model.vision_model.encoder.layers),
            "latent side": math.isqrt(model.latent_pos_embed.pos_embed.shape[0]),
            "ViT side": math.isqrt(model.vit_pos_embed.pos_embed.shape[0]),
            "latent channels": model.latent_channel,
            "start of text": self.ids["bos_token_id"],
            "end of text": self.ids["eos_token_id"],
            "start of image": self.ids["start_of_image"],
            "end of image": self.ids["end_of_image"],
        }

    @torch.no_grad()
    def run(self, cases):
        """(tensors named CASE.FIELD, seconds and peaks by case) of all cases."""
        tensors, seconds, peaks = {}, {}, {}
        for name, case in cases.items():
            work = getattr(self, kind(name))
            made, seconds[name], peaks[name] = timed(partial(work, name, case), self.device)
            tensors.update({f"{name}.{field}": plain(value) for field, value in made.items()})
            say(f"{name}, {seconds[name]:.3f} s")
        return tensors, seconds, peaks

    def picture(self, name):
        from data.data_utils import pil_img2rgb

        return pil_img2rgb(Image.fromarray(self.given[f"picture.{name}"].numpy()))

    def inputs(self, case):
        return [self.picture(part[4:]) if part.startswith("img:") else part for part in case["inputs"]]

    def autocast(self):
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.weights == "bf16")

    def new_cache(self):
        return self.inferencer.init_gen_context()["past_key_values"]

    # The works: each returns its fields

    def vit(self, _name, case):
        """A picture after the ViT's transform alone: pixels, rows of the position table, features, embeddings."""
        image = self.picture(case["image"])
        inputs, _, _ = self.model.prepare_vit_images([0], [0], [image], self.vit_transform, self.ids)
        vit, decoder = self.model.vit_model, self.model.language_model.model
        with heard(vit) as features, heard(decoder) as embedded, self.autocast():
            self.model.forward_cache_update_vit(self.new_cache(), **inputs)
        return {
            "pixels": self.vit_transform(image),
            "position_ids": inputs["packed_vit_position_ids"],
            "features": features[-1][1],
            "embeddings": embedded[-1][0]["packed_query_sequence"][1:-1],  # between the markers
        }

    def vae(self, _name, case):
        pixels = self.vae_transform(self.picture(case["image"]))
        self.autoencoder.reg.sample = False
        mean = self.autoencoder.encode(pixels[None])
        return {"pixels": pixels, "latent_mean": mean, "decoded": self.autoencoder.decode(mean)}

    def prefill(self, _name, case):
        """Inputs read into a context: hidden states, and the last layer's keys and values, of the last text."""
        context = self.inferencer.init_gen_context()
        with self.autocast():
            for part in self.inputs(case):
                if isinstance(part, str):
                    with heard(self.model.language_model.model) as decoder:
                        context = self.inferencer.update_context_text(part, context)
                else:
                    part = self.vae_transform.resize_transform(part)
                    context = self.inferencer.update_context_image(part, context, vae=False)
        hidden, cache = decoder[-1][1].packed_query_sequence, context["past_key_values"]
        last = cache.num_layers - 1
        keys, values = (each[last][-len(hidden) :] for each in (cache.key_cache, cache.value_cache))
        return {"hidden": hidden, "keys": keys, "values": values}

    def und(self, _name, case):
        """Greedy text: the tokens that were fed, the start token among them, and the logits after each."""
        kept = {}
        with heard(self.model.language_model.lm_head) as logits, noted(self.model, "generate_text", kept):
            self.inferencer.interleave_inference(
                self.inputs(case),
                think=case["think"],
                understanding_output=True,
                max_think_token_n=case["max_length"],
                do_sample=False,
            )
        return {"tokens": kept["generate_text"][:, 0], "logits": torch.cat([after for _, after in logits])}

    def draw(self, name, case):
        """A picture from the given noise: the noise, velocities, the latent after every step, the picture."""
        self.autoencoder.reg.sample = case.get("posterior") == "sample"
        torch.manual_seed(case["seed"])
        noise, kept, states, velocities = self.given[f"{name}.noise"], {}, [], []
        flow, prepare = self.model._forward_flow, self.model.prepare_vae_latent

        def watched(**inputs):
            states.append(inputs["x_t"])
            velocities.append(flow(**inputs))
            return velocities[-1]

        def with_noise(*positional, **named):
            made = prepare(*positional, **named)
            drawn = made["packed_init_noises"]
            if drawn.shape != noise.shape:
                raise ValueError(f"{name}: noise {list(noise.shape)} was given, official is {list(drawn.shape)}")
            return {**made, "packed_init_noises": noise.clone()}

        with (
            replaced(self.model, "_forward_flow", watched),
            replaced(self.model, "prepare_vae_latent", with_noise),
            noted(self.model, "generate_image", kept),
        ):
            *_, picture = self.inferencer.interleave_inference(self.inputs(case), **case["options"])
        latent = kept["generate_image"][0]
        return {
            "noise": states[0],
            "first_velocity": velocities[0],
            "last_velocity": velocities[-1],
            "latents": torch.stack([x.cpu() for x in [*states[1:], latent]]),
            "latent": latent,
            "image": torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3),
        }


def _autoencoder(folder, own):
    """On the processor and in float32, where `app.py` leaves it, and its parameters."""
    from modeling.autoencoder import AutoEncoder, AutoEncoderParams, load_ae

    file, sizes = os.path.join(folder, "ae.safetensors"), own.get("vae_config") or {}
    if "ch" not in sizes:
        return load_ae(local_path=file)
    parameters = AutoEncoderParams(**{"resolution": 256, **sizes})  # the weights do not depend on it
    autoencoder = AutoEncoder(parameters)
    autoencoder.load_state_dict(load_file(file))
    return autoencoder, parameters


def _model(folder, own, vae_config, device, weights, attention):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from modeling.bagel import (
        Bagel,
        BagelConfig,
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    file = os.path.join(folder, "ema.safetensors")
    llm_config = Qwen2Config.from_json_file(os.path.join(folder, "llm_config.json"))
    llm_config.qk_norm, llm_config.tie_word_embeddings = True, False
    llm_config.layer_module = "Qwen2MoTDecoderLayer"
    if attention == SDPA:
        # transformers would look for the installed package; the checkout's own layers do not read this.
        llm_config._attn_implementation = "eager"
    vit_config = SiglipVisionConfig.from_json_file(os.path.join(folder, "vit_config.json"))
    vit_config.rope = False
    vit_config.num_hidden_layers -= 1
    config = BagelConfig(
        visual_gen=True,
        visual_und=True,
        llm_config=llm_config,
        vit_config=vit_config,
        vae_config=vae_config,
        vit_max_num_patch_per_side=own.get("vit_max_num_patch_per_side", 70),
        connector_act="gelu_pytorch_tanh",
        latent_patch_size=2,
        max_latent_size=_side(file, "latent_pos_embed.pos_embed"),  # 64 in app.py; config.json is wrong about it
    )
    with init_empty_weights():
        model = Bagel(Qwen2ForCausalLM(llm_config), SiglipVisionModel(vit_config), config)
        model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit_config, meta=True)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    place = {"": str(device)}
    return load_checkpoint_and_dispatch(model, checkpoint=file, device_map=place, dtype=dtype, force_hooks=True).eval()


def _side(file, table):
    with safe_open(file, "pt") as tensors:
        return math.isqrt(tensors.get_slice(table).get_shape()[0])


def _json(folder, name):
    with open(os.path.join(folder, name), encoding="utf8") as file:
        return json.load(file)


def _limits(rule):
    return rule["max_size"], rule["min_size"], rule["stride"]


def plain(value):
    """A tensor as it is exchanged: on the processor, numbers with a point as float32."""
    value = value.detach().cpu().contiguous()
    return value.float() if value.is_floating_point() else value


# Listening


@contextmanager
def heard(module):
    """A list of (named inputs, output) that grows with every call of a module."""
    calls = []

    def hear(_module, _positional, named, made):
        calls.append((named, made))

    handle = module.register_forward_hook(hear, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def replaced(module, name, function):
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)  # the class's own comes back


@contextmanager
def noted(module, name, kept):
    """`kept[name]` becomes what the module's method of this name returns."""
    method = getattr(module, name)

    def noting(*positional, **named):
        kept[name] = method(*positional, **named)
        return kept[name]

    with replaced(module, name, noting):
        yield


if __name__ == "__main__":
    main(sys.argv[1])
