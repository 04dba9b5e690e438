"The diffusion classifier: an exact denoiser must give exact log-odds, shared noise must cancel, pruning must spend less and change nothing else."
import math

import pytest
import torch

from minisora import classifier as c
from minisora.core import generator
from minisora.dit import DiT
from minisora.flow import add_noise, over
from minisora.sora import Sora
from minisora.text import Tokenizer
from minisora.vae import PatchVAE, VAEConfig

SHAPE = (1, 1, 2, 2)


class Gaussian:
    "Prompt k: data are normal with mean k everywhere and this variance; the best velocity is known by hand."
    def __init__(self, variance=.25): self.variance, self.calls = variance, 0
    def latents(self, clips): return clips
    def ids(self, prompts): return torch.tensor([[int(p)] for p in prompts])
    def dit(self, xt, t, text):
        self.calls += len(xt)
        t, mean = over(t, xt), over(text[:, 0].float(), xt)
        x0 = mean + (1 - t)*self.variance/((1 - t)**2*self.variance + t**2)*(xt - (1 - t)*mean)
        return (xt - x0)/t


def toy(b=3, seed=0): return torch.randn(b, *SHAPE, generator=generator(seed))


def log_density(x, mean, variance): return -(x - mean).square().flatten(1).sum(1)/(2*variance) - x[0].numel()/2*math.log(2*math.pi*variance)


@pytest.mark.parametrize("low", [.05, .3, .7])
def test_scores_are_the_log_odds_of_noisy_data(low):
    x, prompts, model = toy(), ["0", "1", "3"], Gaussian()
    v = c.classify(model, x, prompts, draws=2000, rounds=1, low=low, generator=generator(1))
    # E over noise of log N(xt; (1-t) k, (1-t)² variance + t²), by hand: the noise adds t² a number to the square, alike for all prompts
    s = (1 - low)**2*model.variance + low**2
    exact = torch.stack([-(1 - low)**2*(x - k).square().flatten(1).sum(1)/(2*s) for k in (0, 1, 3)], 1)
    torch.testing.assert_close(v.scores - v.scores[:, :1], exact - exact[:, :1], rtol=.05, atol=.3)
    assert torch.equal(v.prediction, exact.argmax(1))


def test_to_the_clean_end_it_is_the_density():
    x, model = toy(), Gaussian(1.)
    v = c.classify(model, x, ["0", "1"], draws=3000, rounds=1, low=.003, generator=generator(2))
    exact = log_density(x, 0., 1.) - log_density(x, 1., 1.)
    torch.testing.assert_close(v.scores[:, 0] - v.scores[:, 1], exact, rtol=.05, atol=.3)


def test_weights():
    t = torch.tensor([.2, .5, 1.])
    assert torch.equal(c.elbo(t), torch.tensor([4., 1., 0.])) and torch.equal(c.uniform(t), torch.ones(3))
    e, times = torch.rand(3, 2, 4, generator=generator(0)), torch.tensor([.2, .5, 1.])
    torch.testing.assert_close(c.score(e, times, span=.5), -.5*(4*e[0] + e[1])/3)
    e[2, 0, 1] = torch.nan
    assert c.score(e, times)[0, 1] == -torch.inf and c.score(e, times).isfinite().sum() == 7


def test_errors_are_what_the_formula_says():
    x, model, g = toy(), Gaussian(), generator(3)
    v = c.classify(model, x, ["0", "2"], draws=4, rounds=2, generator=generator(3))
    times = torch.cat([.25 + .75*c.sample_times(2, generator=g) for _ in range(2)])
    assert torch.equal(v.times, times) and v.times.min() >= .25
    for n, t in enumerate(times):
        eps = torch.randn(3, 1, *SHAPE, generator=g)[:, 0]
        for k, prompt in enumerate((0, 2)):
            got = model.dit(add_noise(x, eps, t), t.expand(3), torch.full((3, 1), prompt))
            torch.testing.assert_close(v.errors[n, :, k], (got - (eps - x)).square().flatten(1).sum(1))
    assert v.scores.shape == (3, 2) and v.spent.tolist() == [8, 8, 8]


def test_shared_noise_cancels():
    x, model = toy(16), Gaussian()
    spread = {}
    for paired in (True, False):
        v = c.classify(model, x, ["0", "1"], draws=64, rounds=1, paired=paired, generator=generator(4))
        spread[paired] = (v.errors[..., 0] - v.errors[..., 1]).var(0).mean()
        same = c.classify(model, x[:2], ["1", "1"], draws=4, paired=paired, generator=generator(4)).errors
        assert torch.equal(same[..., 0], same[..., 1]) == paired
    assert spread[True] < .5*spread[False]


def test_one_clip_does_not_depend_on_chunks_or_the_order_of_prompts():
    x, ask = toy(5), ["0", "1", "2"]
    a = c.classify(Gaussian(), x, ask, generator=generator(5))
    b = c.classify(Gaussian(), x, ask[::-1], chunk=2, generator=generator(5))
    torch.testing.assert_close(a.scores, b.scores.flip(1)); torch.testing.assert_close(a.errors, b.errors.flip(2))
    rows = c.classify(Gaussian(), x, [ask if i % 2 else ask[::-1] for i in range(5)], generator=generator(5))
    torch.testing.assert_close(rows.scores[0], a.scores[0].flip(0)); torch.testing.assert_close(rows.scores[1], a.scores[1])


def test_pruning_spends_less_and_changes_nothing_else():
    x, ask = torch.zeros(4, *SHAPE), [str(k) for k in range(8)]
    full, model = c.classify(Gaussian(), x, ask, draws=16, rounds=4, generator=generator(6)), Gaussian()
    few = c.classify(model, x, ask, draws=16, rounds=4, prune=2., generator=generator(6))
    there = few.errors.isfinite()
    torch.testing.assert_close(few.errors[there], full.errors[there])
    assert torch.equal(few.prediction, full.prediction) and (few.spent < full.spent).all() and int(few.spent.sum()) == model.calls == int(there.sum())
    assert there[:4].all() and (there[1:] <= there[:-1]).all()                       # a first round for all; who is dropped stays dropped
    assert (few.scores.isfinite().sum(1) >= 1).all() and (few.scores[:, 7] == -torch.inf).all()
    torch.testing.assert_close(few.scores[few.scores.isfinite()], full.scores[few.scores.isfinite()])
    wide = c.classify(Gaussian(), x, ask, draws=16, rounds=4, prune=1e9, generator=generator(6))
    assert torch.equal(wide.spent, full.spent) and torch.equal(wide.scores, full.scores)


def test_hopeful():
    times = torch.full((4,), .5)
    e = torch.tensor([[1., 1.1, 5.], [2., 1.8, 6.], [3., 3.2, 7.], [4., 3.9, 9.]])[:, None]     # (4 1 3)
    assert c.hopeful(e, times, 2.).tolist() == [[True, True, False]]
    d = e[:, 0, 2] - e[:, 0, 0]                                                      # each 4, but one of 5
    edge = (d.mean()/(d.std()/2)).item()
    assert not c.hopeful(e, times, edge - .01)[0, 2] and c.hopeful(e, times, edge + .01)[0, 2]
    e[3, 0, 0] = torch.nan                                                           # dropped before: never again, and not the best
    assert c.hopeful(e, times, 2.).tolist() == [[False, True, False]]


@pytest.mark.parametrize("wrong, says", [(dict(prompts=[]), "expected k texts"), (dict(prompts="ab"), "prompts is 'ab'"), (dict(chunk=0), "chunk is 0"), (dict(prompts=[["0"]]), "expected k texts"), (dict(prompts=[["0"], ["0"], ["0", "1"]]), "expected k texts"),
    (dict(draws=6, rounds=4), "multiple of rounds"), (dict(draws=0), "multiple of rounds"), (dict(draws=4, rounds=4, prune=1.), "two draws"), (dict(low=0.), "low is 0"), (dict(low=.5, high=.5), "high 0.5"), (dict(high=1.1), "high 1.1")])
def test_errors_name_the_argument(wrong, says):
    with pytest.raises(ValueError, match=says): c.classify(Gaussian(), toy(), **{"prompts": ["0", "1"], **wrong})


def test_any_sora():
    words = Tokenizer.from_texts(["a red circle", "a blue square"])
    torch.manual_seed(0)
    model = Sora(DiT(4, vocab=words.vocab_size, width=16, depth=1, heads=2, text_width=16), PatchVAE(VAEConfig(channels=4, width=16, encoder=1, decoder=1, heads=2)), words)
    for p in (model.dit.trunk.out.weight, model.dit.trunk.mod.weight): torch.nn.init.normal_(p, std=.2)
    v = c.classify(model, torch.rand(2, 17, 3, 32, 32, generator=generator(7))*2 - 1, ["a red circle", "a blue square", "red"], draws=4, generator=generator(8))
    assert v.scores.shape == (2, 3) and v.scores.isfinite().all() and v.errors.shape == (4, 2, 3) and not v.scores.requires_grad
    assert (v.scores.diff(dim=1) != 0).all()


def test_pairs_that_ship():
    from minisora.core import num_params
    from minisora.world import VERSION, World, twins
    model = Sora.from_pretrained("pairs")
    card, W = model.card, World(**model.card["scenes"])
    assert (W.sprites, W.frames, card["world"], card["command"]) == (2, 1, VERSION, "minisora train --preset pairs --data world --seed 0 --bf16")
    assert {"steps", "flops", "minutes", "compiled", "device"} <= set(card)
    assert 1.4e6 < num_params(model.dit) < 1.7e6 and num_params(model.vae) == 1_494_112                # as the preset says
    scenes = W.sample(24, generator(9), "swap")
    either = [list(two) for two in zip(W.caption(scenes, "long"), W.caption(twins(scenes), "long"))]
    v = c.classify(model, W.render(scenes), either, draws=4, rounds=1, generator=generator(10))
    assert (v.prediction == 0).float().mean() > .7                                                     # chance is a half
