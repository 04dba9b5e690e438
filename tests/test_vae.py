"The patch VAE: shapes, causality, the price of its bits, bad sizes, and the one that ships."
import math
from pathlib import Path

import pytest
import torch

import minisora
from minisora.core import generator, load, num_params
from minisora.vae import PatchVAE, VAEConfig
from minisora.world import World, grade

SHIPPED = Path(minisora.__file__).parent/"weights"/"t2v-vae.safetensors"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return PatchVAE(VAEConfig(channels=8, width=48, encoder=2, decoder=2)).eval()


@pytest.mark.parametrize("frames, height, width", [(1, 32, 32), (9, 16, 40), (17, 32, 32), (33, 8, 8)])
def test_shapes_round_trip(vae, frames, height, width):
    x = torch.rand(2, frames, 3, height, width)*2 - 1
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, *vae.latent_shape(frames, height, width)) and vae.decode(mean).shape == x.shape


@torch.no_grad()
def test_no_cell_sees_a_later_one(vae):
    x = torch.rand(1, 25, 3, 16, 16)*2 - 1
    whole = vae.encode(x)[0]
    for k in (1, 9, 17):
        assert torch.allclose(vae.encode(x[:, :k])[0], whole[:, :1 + (k - 1)//8], atol=1e-5)
        assert torch.allclose(vae.decode(whole[:, :1 + (k - 1)//8]), vae.decode(whole)[:, :k], atol=1e-5)


def test_rate_is_the_kl_of_gaussians(vae):
    x = torch.rand(3, 9, 3, 16, 16)*2 - 1
    mean, logvar = vae.encode(x)
    latent, prior = torch.distributions.Normal(mean, (logvar/2).exp()), torch.distributions.Normal(0., 1.)
    expected = torch.distributions.kl_divergence(latent, prior).flatten(1).sum(1).mean()
    loss, error, nats = vae.loss(x, torch.zeros_like(mean), rate=.5)
    assert torch.allclose(nats, expected, rtol=1e-4)
    assert torch.allclose(error, (vae.decode(mean) - x).pow(2).mean()) and torch.allclose(loss, error + .5*nats/x[0].numel())


@pytest.mark.parametrize("size, names", [((16, 32, 32), "frames is 16"), ((0, 32, 32), "frames is 0"), ((17, 30, 32), "height is 30"), ((17, 32, 4), "width is 4")])
def test_sizes_that_do_not_divide(vae, size, names):
    with pytest.raises(ValueError, match=names): vae.latent_shape(*size)


def test_counts():
    assert num_params(PatchVAE()) == 3_790_592


@torch.no_grad()
def test_the_one_that_ships_keeps_attributes_readable():
    tensors, card = load(SHIPPED)
    vae = PatchVAE(VAEConfig(**card["vae"]))
    vae.load_state_dict({k: v.float() for k, v in tensors.items()})
    scenes = World().sample(64, generator(3), "all")
    x = World().render(scenes)
    drawn = vae.decode(vae.encode(x)[0])
    assert grade(drawn, scenes).right.float().mean() >= .93      # 97% and more over many clips; the margin is for 64
    assert (drawn - x).pow(2).mean() < .012 and SHIPPED.stat().st_size <= 8e6
