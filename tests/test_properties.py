"""What the reference vectors do not cover: sizes of the full model, batches, growing contexts, sampling, types."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.bagel.autoencoder import Autoencoder
from helpers.bagel.config import RELEASED, read_config
from helpers.bagel.decoding import sampling_processors, write_text
from helpers.bagel.flow import TaylorForecast
from helpers.bagel.images import open_picture, patchify, unpatchify
from helpers.bagel.model import Bagel
from helpers.bagel.session import Plan, Session
from helpers.bagel.text import split_thought
from helpers.pipeline import NEXT_FRAME, load_bagel

FOLDER = Path(__file__).parent / "reference"
FAST = {"num_timesteps": 4, "posterior": "mean"}


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(FOLDER / "checkpoint", weights="fp32", device="cpu", attention="sdpa")


@pytest.fixture
def photo():
    return open_picture(FOLDER / "photo.png")


def test_full_model_has_the_official_tensors(tmp_path):
    """The published folder's JSON files, all 1,223 + 244 names and shapes."""
    llm = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    vit = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    (tmp_path / "llm_config.json").write_text(json.dumps(llm))
    (tmp_path / "vit_config.json").write_text(json.dumps({**vit, "patch_size": 14}))
    (tmp_path / "config.json").write_text(json.dumps({"max_latent_size": 32, "vae_config": {"z_channels": 16}}))
    ema, ae = (json.loads((FOLDER / f"manifest_{name}.json").read_text()) for name in ("ema", "ae"))
    config = read_config(tmp_path, {name: tuple(shape) for name, shape in ema.items()})
    with torch.device("meta"):
        modules = Bagel(config, (0, 1)), Autoencoder(config.autoencoder)
    for module, expected in zip(modules, (ema, ae), strict=True):
        assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected
    assert (len(ema), len(ae)) == (1223, 244)
    assert config == RELEASED
    assert config.native_side == 1024


def test_config_json_may_be_missing(tmp_path):
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text((FOLDER / "checkpoint" / name).read_text())
    ema = json.loads((FOLDER / "manifest_ema.json").read_text())
    config = read_config(tmp_path, {name: tuple(shape) for name, shape in ema.items()})
    assert (config.autoencoder.ch, config.vae_transform.max_size, config.vit_transform.stride) == (128, 1024, 14)


def assert_same_picture(one, other):
    torch.testing.assert_close(one.latent, other.latent, rtol=1e-3, atol=1e-4)


def test_batch_of_prompts_equals_single_runs(bagel):
    prompts = ["the red cat", "an owl on a green hill by the sea", "x"]
    settings = {"height": 64, "width": 96, "num_timesteps": 5, "cfg_img_scale": 1.5}
    for kind in ("global", "channel", "text_channel"):
        together = bagel.generate(prompts, seed=3, cfg_renorm_type=kind, **settings)
        for index, prompt in enumerate(prompts):
            alone = bagel.generate(prompt, seed=3 + index, cfg_renorm_type=kind, **settings)
            assert_same_picture(together[index], alone)
            assert together[index].seed == alone.seed == 3 + index


def test_batch_of_edits_takes_a_list_of_seeds(bagel, photo):
    turned = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    together = bagel.edit([photo, turned], ["make it rain", "one"], seed=[9, 4], **FAST)
    assert_same_picture(together[0], bagel.edit(photo, "make it rain", seed=9, **FAST))
    assert_same_picture(together[1], bagel.edit(turned, "one", seed=4, **FAST))


def test_batch_in_think_mode_appends_each_thought(bagel):
    prompts = ["an owl", "the red cat on a sand hill"]
    settings = {"height": 64, "width": 64, "num_timesteps": 3, "think": True, "max_think_tokens": 5}
    together = bagel.generate(prompts, seed=1, **settings)
    for index, prompt in enumerate(prompts):
        alone = bagel.generate(prompt, seed=1 + index, **settings)
        assert together[index].thought == alone.thought
        assert_same_picture(together[index], alone)


def test_batch_of_questions_ends_each_answer_by_itself(bagel):
    """`und_stops` of the reference ends after ten tokens, the others go on to the limit."""
    questions = ["stop 2814", "the answer is", "how many?"]
    together = bagel.understand(None, questions, max_new_tokens=14)
    alone = [bagel.understand(None, question, max_new_tokens=14) for question in questions]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len(together[0].token_ids) == 10 < len(together[1].token_ids)


def test_questions_take_one_shared_picture_or_one_each(bagel, photo):
    shared = bagel.understand(photo, ["what?", "how many?"], max_new_tokens=4)
    each = bagel.understand([photo, photo], ["what?", "how many?"], max_new_tokens=4)
    assert [r.token_ids for r in shared] == [r.token_ids for r in each]


def test_same_seed_same_picture_and_no_state_survives(bagel, photo):
    first = bagel.edit(photo, "make it rain", seed=5, num_timesteps=12, step_cache="taylorseer")
    plain = bagel.edit(photo, "make it rain", seed=5, num_timesteps=12)
    again = bagel.edit(photo, "make it rain", seed=5, num_timesteps=12, step_cache="taylorseer")
    torch.testing.assert_close(first.latent, again.latent, rtol=0, atol=0)
    assert not torch.equal(first.latent, plain.latent)
    torch.testing.assert_close(
        bagel.edit(photo, "make it rain", seed=5, num_timesteps=12).latent, plain.latent, rtol=0, atol=0
    )
    assert not torch.equal(bagel.edit(photo, "make it rain", seed=6, num_timesteps=12).latent, plain.latent)


def test_frames_grow_one_context_as_if_built_at_once(bagel, photo):
    """The second frame equals an image made from a context that lists everything before it."""
    clip = bagel.predict_frames([photo], count=2, seed=8, **FAST)
    settings = {**FAST, "make": ["image"]}
    first = bagel.interleave([photo, NEXT_FRAME], seed=8, **settings)[0]
    assert clip.frames[0].tobytes() == first.image.tobytes()
    # The second frame's noise is the generator's next draw.
    generator = torch.Generator().manual_seed(8)
    noise = [torch.randn(first.latent.shape, generator=generator) for _ in range(2)][1]
    parts = bagel.parts
    session = Session(parts, Plan(1, 600, 40, True, True, "mean", "both"), [_Fixed(noise)])
    for part in (photo, NEXT_FRAME, first.image, NEXT_FRAME):
        (session.append_text if isinstance(part, str) else session.append_pictures)([part])
    from helpers.bagel.flow import FlowSettings

    flow = FlowSettings(4.0, 2.0, (0.0, 1.0), 3.0, 4, 0.0, "text_channel", None)
    pictures, _ = session.draw(flow, (photo.height, photo.width))
    assert clip.frames[1].tobytes() == pictures[0].tobytes()


class _Fixed(torch.Generator):
    """A generator whose first draw is known."""

    def __new__(cls, noise):
        generator = super().__new__(cls)
        generator.manual_seed(8)
        torch.randn(noise.shape, generator=generator)
        return generator


def test_all_pictures_of_a_call_have_the_size_asked_for(bagel):
    """Also one that the resize rule enlarges (here: to at least 32) before it enters the context."""
    clip = bagel.predict_frames([], count=3, prompt="a ball", height=16, width=32, **FAST)
    assert [frame.size for frame in clip.frames] == [(32, 16)] * 3
    made = bagel.interleave(["a ball"], make=["image", "image"], height=16, width=16, **FAST)
    assert [one.image.size for one in made] == [(16, 16)] * 2


def test_one_picture_is_a_clip_of_one_frame(bagel, photo):
    alone, listed = (bagel.predict_frames(given, count=1, seed=2, **FAST) for given in (photo, [photo]))
    assert alone.frames[0].tobytes() == listed.frames[0].tobytes()


def test_a_batch_of_clips_without_frames_has_one_result_each(bagel):
    clips = bagel.predict_frames([[], []], count=1, prompt="a ball", seed=2, height=32, width=32, **FAST)
    assert [clip.seed for clip in clips] == [2, 3]


def test_tuples_are_lists(bagel, photo):
    asked = bagel.understand((photo, photo), ("what?", "how many?"), max_new_tokens=4)
    assert [r.token_ids for r in asked] == [
        r.token_ids for r in bagel.understand([photo, photo], ["what?", "how many?"], max_new_tokens=4)
    ]
    file = str(FOLDER / "photo.png")
    edited = bagel.edit((file, file), "make it rain", seed=1, **FAST)
    assert_same_picture(edited[0], bagel.edit(file, "make it rain", seed=1, **FAST))


def test_a_thought_before_a_picture_is_sampled_when_asked(bagel):
    settings = {**FAST, "height": 16, "width": 16, "think": True, "max_think_tokens": 8, "make": ["image"]}
    hot = {"do_sample": True, "temperature": 3.0}
    greedy = bagel.interleave(["the red cat"], **settings)[0].thought
    assert bagel.interleave(["the red cat"], seed=1, **hot, **settings)[0].thought != greedy


def test_texts_of_one_call_draw_from_one_stream(bagel, monkeypatch):
    """Random numbers that start again for every text would make a second draw repeat the first."""
    import helpers.bagel.session as session

    states, original = [], session.write_text

    def write(model, context, codec, limit, processors, generators):
        states.append(generators[0].get_state())
        return original(model, context, codec, limit, processors, generators)

    monkeypatch.setattr(session, "write_text", write)
    bagel.interleave(["the red cat"], make=["text", "text"], max_new_tokens=3, do_sample=True, seed=1)
    assert len(states) == 2 and not torch.equal(*states)


def test_interleaved_results_join_the_context(bagel, photo):
    """Text then image: the image sees the written text."""
    settings = {**FAST, "height": 64, "width": 64, "max_new_tokens": 3}
    text, image = bagel.interleave(["the red cat"], make=["text", "image"], **settings)
    bare = bagel.interleave(["the red cat"], make=["image"], **settings)[0]
    assert len(text.token_ids) == 3
    assert not torch.equal(image.latent, bare.latent)


def test_encoders_ablation_changes_the_picture(bagel, photo):
    made = {name: bagel.edit(photo, "make it rain", encoders=name, **FAST).latent for name in ("both", "vae", "vit")}
    assert not torch.equal(made["both"], made["vae"]) and not torch.equal(made["vae"], made["vit"])


def test_top_p_keeps_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = sampling_processors(temperature=1.0, top_p=0.7)(torch.zeros(1, 1, dtype=torch.long), logits)
    assert torch.isfinite(kept).tolist() == [[True, True, False, False]]


def test_low_temperature_is_greedy_and_seeds_repeat(bagel, photo):
    ask = lambda **options: bagel.understand(photo, "what is it?", max_new_tokens=6, **options).token_ids  # noqa: E731
    assert ask(do_sample=True, temperature=1e-4, seed=1) == ask()
    hot = {"do_sample": True, "temperature": 3.0, "top_p": 0.95}
    assert ask(**hot, seed=1) == ask(**hot, seed=1)
    assert len({tuple(ask(**hot, seed=seed)) for seed in range(6)}) > 1


def test_sampling_follows_the_distribution(bagel):
    """Frequencies of the first token against its softmax."""
    parts, count = bagel.parts, 400
    session = Session(parts, Plan(count, 30, 0, False, False, "mean", "both"), [])
    session.append_text(["the answer is"] * count)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = write_text(parts.model, session.conditional, parts.codec, 1, sampling_processors(0.5, 1.0), generators)
    mark = session.conditional.mark()
    with torch.inference_mode():
        logits = parts.model.append_token(session.conditional, torch.full((count,), parts.codec.start))[0]
    session.conditional.rewind(mark)
    chances = (logits / 0.5).softmax(-1)
    likeliest = chances.argmax().item()
    share = sum(row == [likeliest] for row in drawn) / count
    assert abs(share - chances[likeliest].item()) < 4 * (chances[likeliest].item() / count) ** 0.5 + 0.01


def test_bfloat16_stays_near_float32(bagel, photo):
    half = load_bagel(FOLDER / "checkpoint", weights="bf16", device="cpu", attention="sdpa")
    one, other = (b.edit(photo, "make it rain", num_timesteps=3, posterior="mean").latent for b in (bagel, half))
    assert ((one - other).norm() / one.norm()).item() < 0.05
    assert half.model.dtype == torch.bfloat16


def test_denoising_leaves_the_context_alone(bagel, photo):
    from helpers.bagel.flow import FlowSettings

    session = Session(bagel.parts, Plan(1, 300, 40, True, True, "mean", "both"), [torch.Generator().manual_seed(0)])
    session.append_pictures([photo])
    session.append_text(["make it rain"])
    context = session.conditional
    used = slice(context.start, context.start + context.length)
    before = context.keys[:, :, used].clone(), context.mark()
    session.draw(FlowSettings(4.0, 2.0, (0.0, 1.0), 3.0, 3, 0.0, "text_channel", None), (64, 96))
    torch.testing.assert_close(context.keys[:, :, used], before[0], rtol=0, atol=0)
    assert context.mark() == before[1]


def test_text_branch_shares_the_buffers(bagel, photo):
    session = Session(bagel.parts, Plan(1, 300, 40, False, True, "mean", "both"), [torch.Generator().manual_seed(0)])
    session.append_pictures([photo])
    session.append_text(["make it rain"])
    branch = session.conditional.at(session.before_last_text)
    assert branch.keys.data_ptr() == session.conditional.keys.data_ptr()
    assert branch.length < session.conditional.length


def test_taylor_forecast_is_exact_for_quadratics():
    """Three finite differences at distance three determine a quadratic; then forecasts equal it."""
    forecast, curve = TaylorForecast(), lambda t: torch.tensor([2.0 + 3 * t])  # noqa: E731
    computed = []
    for index in range(14):
        if forecast.due:
            forecast.take(curve(index))
            computed.append(index)
        torch.testing.assert_close(forecast.next(), curve(index), rtol=1e-4, atol=1e-3)
    assert computed == [0, 1, 2, 3, 4, 7, 10, 13]


def test_patchify_and_back():
    planes = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = patchify(planes, 2)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0].tolist() == [planes[0, c, r, k].item() for r in (0, 1) for k in (0, 1) for c in range(3)]
    torch.testing.assert_close(unpatchify(tokens, 2, 3, 2), planes)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 40)


def test_pictures_of_16_bits_keep_their_greys(tmp_path):
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "deep.png")
    assert open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (117, 117, 117)


def test_thoughts_are_split():
    assert split_thought("<think> two\nlines </think> blue") == ("two\nlines", "blue")
    assert split_thought("<think> never closed") == (None, "<think> never closed")


def test_no_room_is_kept_for_a_last_result(bagel, monkeypatch):
    """It is not appended: a picture from text needs its block and the text's tokens, an answer one slot a token."""
    asked, new_context = [], Bagel.new_context
    monkeypatch.setattr(Bagel, "new_context", lambda *inputs: asked.append(inputs[2:]) or new_context(*inputs))
    words = len(bagel.codec.encode("the red cat"))
    bagel.generate("the red cat", height=64, width=32, num_timesteps=2)
    bagel.understand(None, "the red cat", max_new_tokens=7)
    assert asked == [(words, 4 * 2 + 2), (words + 7, 0)]
