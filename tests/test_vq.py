"Quantizers against independent ones: codes, loss, one step of the averages; grids, causality, bad input."
import math, warnings

import numpy as np
import pytest
import torch

from minisora import core
from minisora.core import generator, num_params
from minisora.vq import FSQ, VQVAE, GumbelQuantizer, VectorQuantizer, VQConfig, anneal, kmeans, logit_laplace, nearest, straight_through


def vectors(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize("beta", [.25, 1.])
def test_codes_loss_and_gradients_agree_with_diffusers(beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vq_model = pytest.importorskip("diffusers.models.autoencoders.vq_model")
    theirs = vq_model.VectorQuantizer(32, 6, beta, legacy=False)
    ours = VectorQuantizer(32, 6, commitment=beta, decay=None)
    theirs.embedding.weight.data.copy_(vectors(32, 6, seed=1)); ours.codebook.data.copy_(theirs.embedding.weight)
    x = vectors(2, 4, 5, 6).requires_grad_()
    y = x.detach().clone().requires_grad_()
    q, indices, loss = ours(x)
    q2, loss2, (_, _, indices2) = theirs(y.permute(0, 3, 1, 2))
    q2 = q2.permute(0, 2, 3, 1)
    assert q.shape == x.shape and indices.shape == x.shape[:-1]
    assert torch.equal(indices.flatten(), indices2) and torch.allclose(q, q2, atol=1e-6) and torch.allclose(loss, loss2)
    weights = vectors(2, 4, 5, 6, seed=2)
    ((q*weights).sum() + loss).backward(); ((q2*weights).sum() + loss2).backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6) and torch.allclose(ours.codebook.grad, theirs.embedding.weight.grad, atol=1e-6)


def test_one_step_of_the_averages_is_the_papers():
    "van den Oord 2017, appendix A.1, with Laplace smoothing, in numpy."
    vq, decay, eps = VectorQuantizer(5, 3, decay=.9, revive=0, eps=1e-2).train(), .9, 1e-2
    vq.codebook.copy_(vectors(5, 3, seed=1)); vq.codebook[4] = 50.                     # nobody will choose the last
    vq.usage.copy_(torch.tensor([1., 2., 3., 4., .5])); vq.sums.copy_(vq.codebook*vq.usage[:, None])
    e, N, m, x = (t.double().numpy().copy() for t in (vq.codebook, vq.usage, vq.sums, vectors(40, 3)))
    chosen = np.array([np.argmin([((v - c)**2).sum() for c in e]) for v in x])
    quantized = e[chosen]
    for k in range(5):
        N[k] = decay*N[k] + (1 - decay)*(chosen == k).sum()
        m[k] = decay*m[k] + (1 - decay)*x[chosen == k].sum(0)
    n = N.sum()
    after = m/((N + eps)/(n + 5*eps)*n)[:, None]
    q, indices, loss = vq(vectors(40, 3))
    assert np.array_equal(indices.numpy(), chosen) and 4 not in chosen
    assert np.allclose(q, quantized, atol=1e-5) and math.isclose(loss.item(), .25*((x - quantized)**2).mean(), rel_tol=1e-5)
    assert np.allclose(vq.usage, N, rtol=1e-5) and np.allclose(vq.sums, m, atol=1e-5) and np.allclose(vq.codebook, after, rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq.eval()(vectors(40, 3))
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())           # nothing moves outside training


def test_dead_codes_come_back_only_if_asked():
    for revive, alive in ((0, 1), (.5, 8)):
        torch.manual_seed(0)
        vq = VectorQuantizer(8, 2, decay=.5, revive=revive).train()
        vq.codebook.fill_(100.); vq.codebook[0] = 0.; vq.sums.copy_(vq.codebook)
        for _ in range(20): vq(vectors(200, 2))
        assert len(vq.eval()(vectors(200, 2))[1].unique()) == alive


def test_kmeans_start_finds_clusters_that_a_random_start_misses():
    centres = vectors(16, 4, seed=3)*20
    x = centres.repeat_interleave(30, 0) + .1*vectors(480, 4)
    vq = VectorQuantizer(16, 4)
    assert len(vq(x)[1].unique()) < 16
    vq.start(x, generator(0))
    assert len(vq.eval()(x)[1].unique()) == 16 and (vq(x)[0] - x).pow(2).mean() < .05
    assert torch.cdist(kmeans(x, 16, generator=generator(1)), centres).amin(0).max() < .2


def test_straight_through_and_nearest():
    x, q = vectors(4, 3).requires_grad_(), vectors(4, 3, seed=1)
    out = straight_through(x, q)
    out.sum().backward()
    assert torch.allclose(out, q, atol=1e-6) and torch.equal(x.grad, torch.ones_like(x))
    v, book = vectors(300, 5), vectors(40, 5, seed=1)
    assert torch.equal(nearest(v, book), torch.cdist(v, book, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))


@pytest.mark.parametrize("levels", [(8, 8, 4), (5, 4), (3,), (7, 6, 5)])
def test_fsq_is_a_bijection_onto_its_grid(levels):
    fsq = FSQ(levels)
    every = torch.arange(fsq.codes)
    grid = fsq.lookup(every)
    assert fsq.codes == math.prod(levels) and len(grid.unique(dim=0)) == fsq.codes and grid.abs().max() <= 1
    x = (torch.rand(50_000, len(levels), generator=generator(0))*8 - 4).requires_grad_()
    q, indices, loss = fsq(x)
    assert torch.allclose(q, fsq.lookup(indices), atol=1e-6) and len(indices.unique()) == fsq.codes and loss == 0
    q.sum().backward()
    assert (x.grad > 0).all()


def test_gumbel_is_soft_in_training_and_hard_outside():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(16, 4)
    x = vectors(2, 3, 4)
    soft, indices, loss = quantizer.train()(x)
    hard, same, _ = quantizer.eval()(x)
    q = quantizer.logits(x).softmax(-1)
    assert torch.equal(indices, same) and torch.equal(hard, quantizer.codebook[indices]) and not torch.allclose(soft, hard)
    assert torch.allclose(loss, (q*(q*16).log()).sum(-1).mean(), atol=1e-6) and loss >= 0
    assert (anneal(0, 1, 1/16), anneal(1, 1, 1/16), anneal(7, 1, 1/16)) == (1, 1/16, 1/16) and anneal(.5, 1., 0.) == pytest.approx(.5)
    quantizer.train().tau = 1e-4                                                         # cold: a draw of one code
    assert torch.cdist(quantizer(x)[0].flatten(0, 1), quantizer.codebook).amin(1).max() < 1e-3


def test_logit_laplace_is_a_density():
    y = torch.linspace(1e-5, 1 - 1e-5, 100_001)
    for loc, log_scale in ((0., 0.), (2., -1.)):
        p = (-logit_laplace((y - .1)/.8*2 - 1, torch.tensor(loc), torch.tensor(log_scale))).exp()
        assert torch.trapezoid(p, y).item() == pytest.approx(1, abs=.01)


@pytest.mark.parametrize("laplace", [False, True])
@torch.no_grad()
def test_one_module_for_images_and_clips(laplace):
    torch.manual_seed(0)
    model = VQVAE(VQConfig(codes=32, width=32, frames=4, laplace=laplace)).eval()
    clips = torch.rand(2, 9, 3, 16, 8)*2 - 1
    tokens = model.encode(clips)
    assert tokens.shape == (2, *model.grid(9, 16, 8)) == (2, 3, 4, 2) and model.decode(tokens).shape == clips.shape
    assert torch.equal(model.encode(clips[:, :5]), tokens[:, :2])                         # no token sees a later one
    assert torch.allclose(model.decode(tokens[:, :2]), model.decode(tokens)[:, :5], atol=1e-5)
    quantized, indices, _ = model.quantizer(model.features(clips))
    assert torch.allclose(model.pixels(model.paint(quantized)), model.decode(indices), atol=1e-5)


def test_gradients_reach_every_parameter():
    for quantizer, laplace in ((None, False), (FSQ((8, 8, 4)), False), (GumbelQuantizer(16, 8), True)):
        model = VQVAE(VQConfig(codes=16, width=32, laplace=laplace), quantizer).train()
        loss, error, cost = model.loss(torch.rand(2, 1, 3, 8, 8)*2 - 1)
        loss.backward()
        assert torch.allclose(loss, error + cost) and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size, names", [((2, 16, 16), "frames is 2"), ((0, 16, 16), "frames is 0"), ((5, 15, 16), "height is 15"), ((5, 16, 2), "width is 2")])
def test_sizes_that_do_not_divide(size, names):
    with pytest.raises(ValueError, match=names): VQVAE(VQConfig(frames=4)).grid(*size)


def test_the_nearest_code_is_found_far_from_the_origin():
    x, codes = (torch.randn(n, 6, generator=generator(n)) + 1000 for n in (2000, 50))
    assert torch.equal(nearest(x, codes), torch.cdist(x.double(), codes.double()).argmin(1))


def test_bad_arguments_and_counts():
    with pytest.raises(ValueError, match="codes is 0"): VectorQuantizer(0, 4)
    for levels in ((1, 3), (1003,), (), (2.5,)):
        with pytest.raises(ValueError, match="levels is"): FSQ(levels)
    _, at, _ = FSQ((1000,))(torch.tensor([[-99.], [99.]]))
    assert at.tolist() == [0, 999]
    with pytest.raises(ValueError, match="7 numbers a vector: expected 4"): VectorQuantizer(8, 4)(torch.zeros(2, 7))
    assert num_params(VQVAE()) == 158_528


def test_a_tokenizer_by_name_whose_encode_moves_nothing(tmp_path):
    vq = VQVAE.from_pretrained("dalle-vq")
    assert not vq.training and vq.config.codes == vq.quantizer.codes
    fresh, x = VQVAE(VQConfig(codes=8, channels=4, width=8)), torch.rand(4, 1, 3, 8, 8)*2 - 1      # in training mode
    book = fresh.quantizer.codebook.clone()
    assert torch.equal(fresh.encode(x), fresh.encode(x)) and torch.equal(fresh.quantizer.codebook, book) and fresh.quantizer.training
    with pytest.raises(core.UserError, match="expected the weights of a VQ"): VQVAE.from_pretrained("clip")
    tensors, card = core.load(core.find_weights("dalle-vq"))
    core.save(tmp_path/"small.safetensors", tensors, card | dict(vq=card["vq"] | dict(codes=7)))
    with pytest.raises(core.UserError, match="small.safetensors does not fit its card"): VQVAE.from_pretrained(tmp_path/"small.safetensors")
