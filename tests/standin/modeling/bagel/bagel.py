"""Stand-in for the official file of this name: its signatures, and recorded answers."""

from types import SimpleNamespace

import torch
from recorded import recorded
from torch import nn


class BagelConfig(SimpleNamespace):
    pass


class Positions(nn.Module):
    def __init__(self, side, width):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(side**2, width), requires_grad=False)


class Bagel(nn.Module):
    def __init__(self, language_model, vit_model, config):
        super().__init__()
        self.config = config
        self.hidden_size = config.llm_config.hidden_size
        self.latent_channel = config.vae_config.z_channels
        self.latent_pos_embed = Positions(config.max_latent_size, self.hidden_size)
        self.vit_pos_embed = Positions(config.vit_max_num_patch_per_side, self.hidden_size)
        self.language_model, self.vit_model = language_model, vit_model

    def prepare_vit_images(self, curr_kvlens, curr_rope, images, transforms, new_token_ids):
        assert curr_kvlens == curr_rope == [0] and new_token_ids["end_of_image"] == 270
        rows = recorded("vit_scene.position_ids")
        return {"pixels": transforms(images[0]), "packed_vit_position_ids": rows}, [len(rows) + 2], [1]

    def forward_cache_update_vit(self, past_key_values, pixels, packed_vit_position_ids):
        self.vit_model(packed_pixel_values=pixels)
        tokens = recorded("vit_scene.embeddings")
        assert self.latent_pos_embed.pos_embed.abs().sum() > 0  # loaded from the checkpoint
        block = torch.cat([tokens[:1] * 0, tokens, tokens[:1] * 0])
        self.language_model.forward_inference(packed_query_sequence=block, past_key_values=past_key_values)
        return past_key_values

    def generate_text(self, max_length, end_token_id):
        tokens = recorded("und_scene.tokens")
        assert len(tokens) <= max_length
        for count in range(1, len(tokens) + 1):
            self.language_model.lm_head(torch.zeros(count, self.hidden_size))
        return tokens[:, None]

    def prepare_vae_latent(self, curr_kvlens, curr_rope, image_sizes, new_token_ids):
        (height, width) = image_sizes[0]
        return {"packed_init_noises": torch.zeros(height // 16 * (width // 16), 4 * self.latent_channel)}

    def generate_image(self, packed_init_noises, case, num_timesteps, timestep_shift):
        """Follows the recorded path, as long as it starts from the recorded noise."""
        t = torch.linspace(1, 0, num_timesteps)
        t = timestep_shift * t / (1 + (timestep_shift - 1) * t)
        x_t = packed_init_noises
        assert torch.equal(x_t, recorded(f"{case}.noise"))
        for step in range(num_timesteps - 1):
            v_t = self._forward_flow(x_t=x_t, case=case, step=step, dt=t[step] - t[step + 1])
            x_t = x_t - v_t * (t[step] - t[step + 1])
        return [x_t]

    def _forward_flow(self, x_t, case, step, dt):
        return (x_t - recorded(f"{case}.latents")[step]) / dt
