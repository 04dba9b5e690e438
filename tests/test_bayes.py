"The exact denoiser: parity with brute force, limits, invariances, errors; the tiny worlds as the figure needs them."
import math

import pytest
import torch

from minisora import bayes
from minisora.core import generator
from minisora.world import LEVELS, World


def brute(xt, t, pictures, prior=None):
    "Posterior over scenes of one picture, in double precision, by differences."
    off = (xt.double() - (1 - t) * pictures.double()).flatten(1)
    return (-(off * off).sum(1) / (2 * t * t) + (0 if prior is None else prior.double().log())).softmax(0)


def toy(k=40, shape=(2, 3, 4, 4), seed=0):
    return torch.rand(k, *shape, generator=generator(seed)) * 2 - 1


@pytest.mark.parametrize("t", [1e-6, 1e-4, 1e-3, .02, .1, .4, .7, .9, .99, .9999, 1.])
@pytest.mark.parametrize("near", [1., .03])
def test_parity_with_brute_force(t, near):
    p = toy() * near
    which = torch.arange(5)
    xt = (1 - t) * p[which] + t * torch.randn(5, *p.shape[1:], generator=generator(1))
    groups = torch.arange(40) % 3
    for said in (None, groups[which]):
        got = bayes.posterior(xt, t, p, said, None if said is None else groups, chunk=7)
        for b in range(5):
            allowed = p if said is None else p[groups == said[b]]
            r = brute(xt[b], t, allowed)
            mean = torch.einsum("k,k...->...", r, allowed.double())
            variance = (r * (allowed.double() - mean).flatten(1).square().sum(1)).sum()
            entropy = -torch.special.xlogy(r, r).sum() / math.log(2)
            torch.testing.assert_close(got.mean[b].double(), mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.variance[b], variance, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got.bits[b], entropy, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.told[b], math.log2(len(allowed)) - entropy, atol=1e-4, rtol=0)


def test_tiny_world_parity_at_every_noise_level():
    W = World.tiny()
    p = W.render(W.enumerate()[::5])
    which = torch.randint(len(p), (3,), generator=generator(2))
    for t in torch.cat([torch.logspace(-5, -1, 9), torch.linspace(.2, 1, 9)]).tolist():
        xt = (1 - t) * p[which] + t * torch.randn(p[which].shape, generator=generator(3))
        got = bayes.denoise(xt, t, p)
        for b in range(3): assert (got[b] - torch.einsum("k,k...->...", brute(xt[b], t, p), p.double())).abs().max() < 1e-3


def test_ends():
    p = toy()
    torch.testing.assert_close(bayes.denoise(p[:4], 0., p), p[:4])
    left, told = bayes.bits(p[:4], 0., p)
    assert left.abs().max() < 1e-9 and (told - math.log2(40)).abs().max() < 1e-9
    left, told = bayes.bits(p[:4], 1., p)
    assert told.abs().max() < 1e-9 and (left - math.log2(40)).abs().max() < 1e-9
    torch.testing.assert_close(bayes.denoise(p[:4] * 9, 1., p), p.mean(0).expand(4, *p.shape[1:]), atol=1e-6, rtol=0)


def test_chunks_rows_times_and_scenes_make_no_difference():
    W = World.tiny(frames=5)
    s = W.enumerate()[::60]
    p, t = W.render(s), torch.tensor([.3, .8, .95])
    xt = (1 - t[:, None, None, None, None]) * p[:3] + t[:, None, None, None, None] * torch.randn(p[:3].shape, generator=generator(0))
    whole = bayes.posterior(xt, t, p)
    for other in (bayes.posterior(xt, t, s, chunk=11), bayes.posterior(xt, t, p, chunk=1)):
        for a, b in zip(whole, other): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    one = bayes.posterior(xt[1:2], .8, p)
    for a, b in zip(whole, one): torch.testing.assert_close(a[1:2], b, atol=1e-6, rtol=0)
    assert (bayes.denoise(xt, t, p, dtype=torch.float32) - whole.mean).abs().max() < 1e-3


def test_memory_is_bounded():
    "The largest tensor that any operation returns does not grow with the number of scenes."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): self.most = max(self.most, out.numel())
            return out

    seen = []
    for k in (500, 4000):
        p = toy(k, (1, 3, 8, 8))
        with Largest() as count: bayes.denoise(p[:4], .5, p, chunk=100)
        seen.append(count.most)
    assert seen[0] == seen[1] == 100 * 192


def test_equal_pictures_share_their_weight():
    p = torch.cat([toy(3), toy(3)])
    left, _ = bayes.bits(p[:3], .01, p)
    torch.testing.assert_close(left, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_classify():
    p, groups = toy(), torch.arange(40) % 4
    xt = .4 * p[:6] + .6 * torch.randn(p[:6].shape, generator=generator(4))
    logp = bayes.classify(xt, .6, p, groups)
    for b in range(6): torch.testing.assert_close(logp[b].exp(), torch.zeros(4).double().index_add(0, groups, brute(xt[b], .6, p)), atol=1e-9, rtol=0)
    far = bayes.classify(p[:6], .001, p, groups)
    assert torch.isfinite(far).all() and (far.argmax(1) == groups[:6]).all() and far.min() < -1e5       # in the log domain
    unequal = torch.tensor([0] * 30 + [1] * 10)
    torch.testing.assert_close(bayes.classify(xt, 1., p, unequal).exp(), torch.tensor([[.75, .25]]).double().expand(6, 2))


def test_more_words_leave_less():
    W = World.tiny()
    s = W.enumerate()
    p, g = W.render(s[::3]), generator(5)
    i = torch.randint(len(p), (20,), generator=g)
    for t in (.5, .8, .95):
        xt = (1 - t) * p[i] + t * torch.randn(p[i].shape, generator=g)
        left = []
        for level in LEVELS:
            c = bayes.index(W.caption(s[::3], level))
            left.append(bayes.posterior(xt, t, p, c[i], c).variance.mean())
        assert all(a >= b - 1e-6 for a, b in zip(left, left[1:])) and left[-1] < 1e-6


def test_the_tiny_world_is_as_the_figure_needs_it():
    W = World.tiny()
    s = W.enumerate()
    assert 7000 <= len(s) <= 16000 and W.size == 16 and W.uniform and not W.reserve and not W.smooth
    seen = set()
    colors = set()
    for i in range(0, len(s), 1000):
        x = ((W.render(s[i:i + 1000]) + 1) * 120).round().byte()
        seen |= set(map(bytes, x.flatten(1).numpy()))
        colors |= set(map(tuple, x.permute(0, 1, 3, 4, 2).reshape(-1, 3).unique(dim=0).tolist()))
    assert len(seen) == len(s) and len(colors) <= 64                    # injective, few colors
    for level in LEVELS:
        n = bayes.index(W.caption(s, level)).bincount().double()
        assert abs(math.log2(len(s)) - (n * n.log2()).sum().item() / len(s) - W.entropy(level)) < 1e-4
    assert W.entropy("pixels") == pytest.approx(math.log2(len(s)), abs=1e-5)


@pytest.mark.parametrize("kw, culprit", [
    (dict(t=-.1), "t has"), (dict(t=torch.zeros(3)), "t has"), (dict(scenes=torch.zeros(0, 2, 3, 4, 4)), "scenes is empty"),
    (dict(xt=torch.zeros(2, 1, 3, 4, 4)), "xt has"), (dict(said=torch.zeros(2).long()), "said has"),
    (dict(said=torch.tensor([7, 7]), captions=torch.zeros(40).long()), "said holds 7"), (dict(said=torch.zeros(2).long(), captions=torch.zeros(3).long()), "said has")])
def test_errors(kw, culprit):
    p = toy()
    with pytest.raises(ValueError, match=culprit): bayes.posterior(**{**dict(xt=p[:2], t=.5, scenes=p), **kw})


def test_classify_error():
    p = toy()
    with pytest.raises(ValueError, match="captions has 3"): bayes.classify(p[:2], .5, p, torch.zeros(3).long())
    for wrong, says in ((dict(t=1.5), "t has"), (dict(t=math.nan), "t has"), (dict(t=torch.zeros(3)), "t has"), (dict(xt=torch.zeros(2, 1, 3, 4, 4)), "xt has"), (dict(scenes=p[:0], captions=torch.zeros(0).long()), "scenes is empty")):
        with pytest.raises(ValueError, match=says): bayes.classify(**{**dict(xt=p[:2], t=.5, scenes=p, captions=torch.zeros(len(p)).long()), **wrong})
