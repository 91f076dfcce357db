"""The autoencoder in strips: the same picture in less memory, where memory is short."""

import copy
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.bagel import autoencoder as code
from helpers.bagel.autoencoder import Autoencoder, whole_bytes
from helpers.bagel.config import RELEASED, AutoencoderConfig

# Widths that grow, shrink and stay from level to level, so that residual blocks of every kind take part.
CONFIG = AutoencoderConfig(3, 3, 32, (3, 1, 2, 2), 2, 8, 0.5, 0.1)
CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
# (most bytes, batch, height, width); the first makes strips of two rows, others end in a rest of any size
CUTS = [(1, 1, 16, 8), (50_000, 2, 40, 48), (150_000, 1, 88, 56)]


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(CONFIG).requires_grad_(False)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def limits(monkeypatch):
    """The limits that passes run with, each with its number of pictures."""
    noted = []
    for part in (code.Encoder, code.Decoder):
        forward = part.forward
        monkeypatch.setattr(
            part,
            "forward",
            lambda self, x, most=math.inf, forward=forward: noted.append((len(x), most)) or forward(self, x, most),
        )
    return noted


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("most", "batch", "height", "width"), CUTS)
def test_strips_make_the_same_picture(autoencoder, most, batch, height, width):
    latents, pixels = random(batch, 8, height // 8, width // 8), random(batch, 3, height, width)
    for part, x in ((autoencoder.decoder, latents), (autoencoder.encoder, pixels)):
        given = x.clone()
        assert_same(part(x, most), part(x))
        assert torch.equal(x, given)  # what is overwritten is the part's own


@pytest.mark.parametrize("height", [9, 10, 13])
def test_strips_of_a_picture_that_does_not_halve(autoencoder, height):
    """Down-sampling leaves out the last odd row, also where it stands alone in a strip."""
    half = autoencoder.encoder.down[0].downsample
    x = random(1, 96, height, 6)
    for most in (1, x[:, :, :4].nbytes, x[:, :, :8].nbytes):
        assert_same(half(x, most), half(x))


def test_strips_are_as_small_as_asked(autoencoder):
    seen = []
    x = random(2, 96, 50, 10)
    for rows, values in code._strips(lambda part: seen.append(part.shape[2]) or part, x, x[:, :, :7].nbytes):
        assert torch.equal(values, x[:, :, rows])
    assert seen == [7, *[8] * 7, 3]  # six rows each, one more at every edge inside the picture
    seen.clear()
    for rows, values in code._strips(
        lambda part: seen.append(part.shape[2]) or part.repeat_interleave(2, 2), x, x[:, :, :16].nbytes, scale=2.0
    ):
        assert torch.equal(values, x.repeat_interleave(2, 2)[:, :, rows])
    assert seen == [5, *[6] * 11, 3]


def test_the_norm_counts_all_pixels(autoencoder):
    """A picture with one bright corner, far from zero: statistics of a strip alone would show."""
    x = random(1, 96, 32, 16) + 100
    x[:, :, :3, :5] += 300
    block = autoencoder.decoder.up[0].block[1]
    expected = block(x)
    torch.testing.assert_close(block(x.clone(), x[:, :, :5].nbytes), expected, rtol=1e-4, atol=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still in use; `peak`: the most at once."""

    def __init__(self):
        super().__init__()
        self.peak, self.held = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.held |= {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages}
        self.held = {place: one for place, one in self.held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return made


def live_bytes(part, x, most=math.inf):
    with LiveBytes() as counter:
        part(x, most)
    return counter.peak


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 96)])
@pytest.mark.parametrize("ch_mult", [(3, 1, 2, 2), (1, 2, 4, 4)])
def test_the_estimate_is_what_is_used(height, width, ch_mult):
    built = Autoencoder(AutoencoderConfig(3, 3, 32, ch_mult, 1, 8, 1.0, 0.0))
    latents, pixels = random(1, 8, height // 8, width // 8), random(1, 3, height, width)
    used = live_bytes(built.decoder, latents), live_bytes(built.encoder, pixels)
    expected = (whole_bytes(levels, height, width) for levels in (built.decoder.up, built.encoder.down))
    assert used == pytest.approx(tuple(expected), rel=0.1)


@pytest.fixture
def released(monkeypatch):
    """Sizes without values. There is no attention for such tensors that holds no scores, as a card's does."""
    monkeypatch.setattr(code.F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        yield Autoencoder(RELEASED.autoencoder).requires_grad_(False)


def test_memory_of_the_released_sizes(released):
    """1024 x 1024: 3.2 GB to decode and 2.1 GB to encode as a whole; in strips two large tensors and a few strips."""
    latents, pixels = torch.empty(1, 16, 128, 128), torch.empty(1, 3, 1024, 1024)
    decoder, encoder = released.decoder, released.encoder
    assert live_bytes(decoder, latents) == pytest.approx(whole_bytes(decoder.up, 1024, 1024), rel=0.01)
    assert live_bytes(encoder, pixels) == pytest.approx(whole_bytes(encoder.down, 1024, 1024), rel=0.01)
    assert whole_bytes(decoder.up, 1024, 1024) == 3 * 256 * 4 * 2**20
    most = 64 * 2**20
    assert live_bytes(decoder, latents, most) < (256 + 128) * 4 * 2**20 + 3.5 * most
    assert live_bytes(encoder, pixels, most) < (128 + 128) * 4 * 2**20 + 3.5 * most


def test_whole_where_there_is_room(autoencoder, limits):
    """As always on the CPU."""
    autoencoder.decode(random(3, 8, 8, 8))
    autoencoder.encode(random(3, 3, 64, 64))
    assert limits == [(3, math.inf)] * 2


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [(7, [(7, math.inf)]), (6.9, [(6, math.inf), (1, math.inf)]), (2.5, [(2, math.inf)] * 3 + [(1, math.inf)])],
)
def test_as_many_at_once_as_there_is_room_for(autoencoder, limits, monkeypatch, pictures, expected):
    latents, pixels = random(7, 8, 4, 6), random(7, 3, 32, 48)
    decoded, encoded = autoencoder.decode(latents), autoencoder.encode(pixels)
    for verb, x, levels, whole in (
        (autoencoder.decode, latents, autoencoder.decoder.up, decoded),
        (autoencoder.encode, pixels, autoencoder.encoder.down, encoded),
    ):
        limits.clear()
        monkeypatch.setattr(code, "_room", lambda _device, levels=levels: pictures * whole_bytes(levels, 32, 48))
        assert_same(verb(x), whole)
        assert limits == expected


def test_strips_where_memory_is_short(autoencoder, limits, monkeypatch):
    latents, pixels = random(2, 8, 8, 6), random(2, 3, 64, 48)
    decoded, encoded = autoencoder.decode(latents), autoencoder.encode(pixels)
    monkeypatch.setattr(code, "_room", lambda _device: 10_000)
    monkeypatch.setattr(code, "STRIP", 10_000)
    limits.clear()
    assert_same(autoencoder.decode(latents), decoded)
    assert_same(autoencoder.encode(pixels), encoded)
    assert limits == [(1, 10_000)] * 4


def test_training_is_never_in_strips(limits, monkeypatch):
    """They overwrite what gradients are made of."""
    monkeypatch.setattr(code, "_room", lambda _device: 0)
    with torch.inference_mode(False):
        trained = Autoencoder(CONFIG)
        trained.decode(trained.encode(random(2, 3, 16, 16))).sum().backward()
    assert limits == [(2, math.inf)] * 2
    assert trained.encoder.conv_in.weight.grad.count_nonzero()


def test_room_of_a_card(monkeypatch):
    """What is free, and what PyTorch has reserved and does not use; but never more than is wanted for a whole."""
    sizes = {"mem_get_info": (10**9, 16 * 10**9), "memory_reserved": 5 * 10**9, "memory_allocated": 45 * 10**8}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, size=size: size)
    assert code._room(torch.device("cuda")) == pytest.approx(0.8 * 1.5e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10**12, 10**12))
    assert code._room(torch.device("cuda")) == code.WHOLE_AT_MOST
    assert code._room(torch.device("cpu")) == math.inf


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_gets_pixels_whose_channels_lie_together(autoencoder, monkeypatch, memory_format):
    """A card's kernel without a matrix of scores takes nothing else."""
    seen, attend = [], code.F.scaled_dot_product_attention
    monkeypatch.setattr(code.F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or attend(*qkv))
    autoencoder.decoder.mid(random(2, 64, 4, 6).contiguous(memory_format=memory_format))
    assert len(seen) == 3 and all(part.is_contiguous() for part in seen)


@CARD
def test_strips_on_a_card_with_a_random_autoencoder(autoencoder, monkeypatch):
    """In full float32, so that both ways may choose their convolutions freely."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_card = Autoencoder(CONFIG).requires_grad_(False)
    on_card.load_state_dict(autoencoder.state_dict())
    on_card.to("cuda")
    latents = random(2, 8, 32, 24).cuda()
    expected = on_card.decoder(latents)
    torch.testing.assert_close(on_card.decoder(latents, 10**6), expected, rtol=1e-3, atol=1e-4)
    pixels = random(2, 3, 256, 192).cuda()
    torch.testing.assert_close(on_card.encoder(pixels, 10**6), on_card.encoder(pixels), rtol=1e-3, atol=1e-4)


def test_flat_pictures_keep_their_digits_with_the_channels_last(autoencoder):
    """Of a picture that varies little the variance is small beside the mean, which a careless sum drowns it in."""
    picture = 0.3 + 1e-3 * random(2, 3, 32, 48)
    exact = copy.deepcopy(autoencoder).double()
    last = copy.deepcopy(autoencoder).to(memory_format=torch.channels_last)
    expected = exact.encode(picture.double(), None)
    assert (last.encode(picture, None) - expected).norm() < 1e-5 * expected.norm()
