"""Stand-in for the official file of this name."""

from modeling.bagel.qwen2_navit import NaiveCache
from PIL import Image
from recorded import recorded


class InterleaveInferencer:
    def __init__(self, model, vae_model, tokenizer, vae_transform, vit_transform, new_token_ids):
        self.model, self.vae_model, self.new_token_ids = model, vae_model, new_token_ids
        self.vit_transform = vit_transform

    def init_gen_context(self):
        layers = self.model.config.llm_config.num_hidden_layers
        return {"kv_lens": [0], "ropes": [0], "past_key_values": NaiveCache(layers)}

    def update_context_text(self, text, gen_context):
        assert text == "Describe the picture in detail." and gen_context["kv_lens"] == [17]
        cache, hidden = gen_context["past_key_values"], recorded("prefill_scene.hidden")
        last = cache.num_layers - 1
        before = recorded("vit_scene.embeddings")[:, :32].view(-1, 2, 16)  # some tokens of the picture
        for each, name in ((cache.key_cache, "keys"), (cache.value_cache, "values")):
            each[last] = before.new_zeros(len(before) + len(hidden), 2, 16)
            each[last][-len(hidden) :] = recorded(f"prefill_scene.{name}")
        self.model.language_model.forward_inference(packed_query_sequence=hidden, past_key_values=cache)
        return gen_context

    def update_context_image(self, image, gen_context, vae=True, vit=True):
        assert vit and not vae
        inputs, lengths, ropes = self.model.prepare_vit_images(
            curr_kvlens=gen_context["kv_lens"],
            curr_rope=gen_context["ropes"],
            images=[image],
            transforms=self.vit_transform,
            new_token_ids=self.new_token_ids,
        )
        cache = self.model.forward_cache_update_vit(gen_context["past_key_values"], **inputs)
        return {"kv_lens": lengths, "ropes": ropes, "past_key_values": cache}

    def interleave_inference(
        self,
        input_lists,
        think=False,
        understanding_output=False,
        max_think_token_n=1000,
        do_sample=False,
        cfg_text_scale=3.0,
        cfg_img_scale=1.5,
        cfg_interval=(0.4, 1.0),
        timestep_shift=3.0,
        num_timesteps=50,
        cfg_renorm_min=0.0,
        cfg_renorm_type="global",
        image_shapes=(1024, 1024),
    ):
        if understanding_output:
            assert not think and not do_sample
            self.model.generate_text(max_length=max_think_token_n, end_token_id=self.new_token_ids["eos_token_id"])
            return ["an answer"]
        pictures = [part for part in input_lists if isinstance(part, Image.Image)]
        case = "edit" if pictures else "draw"
        assert self.vae_model.reg.sample is False and cfg_img_scale == {"edit": 2.0, "draw": 1.0}[case]
        size = pictures[-1].size[::-1] if pictures else image_shapes
        inputs = self.model.prepare_vae_latent(
            curr_kvlens=[0], curr_rope=[0], image_sizes=[size], new_token_ids=self.new_token_ids
        )
        self.model.generate_image(case=case, num_timesteps=num_timesteps, timestep_shift=timestep_shift, **inputs)
        return [Image.fromarray(recorded(f"{case}.image").numpy())]
