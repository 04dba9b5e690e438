"The decoder-only transformer: cache = no cache, samplers against transformers', guidance, bad input."
import math

import pytest
import torch

from minisora.core import generator, num_params
from minisora.gpt import GPT, choose


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT(vocab=23, width=32, depth=3, heads=4, length=40).eval()
    for p in model.parameters(): p.data += .1*torch.randn_like(p)                        # surer than at birth
    return model


def prompt(b=3, m=5): return torch.randint(23, (b, m), generator=generator(1))


@pytest.mark.parametrize("how", [dict(temperature=0.), dict(), dict(top_k=5), dict(top_p=.8, temperature=1.3), dict(cfg_scale=2.5, null=prompt()*0)])
def test_cache_token_for_token(gpt, how):
    a, b = (gpt.generate(prompt(), 30, cache=cache, generator=generator(2), **how) for cache in (True, False))
    assert torch.equal(a, b) and a.shape == (3, 35) and torch.equal(a[:, :5], prompt())
    assert torch.equal(a, gpt.generate(prompt(), 30, generator=generator(2), **how)) and len(a.unique()) > 3


@torch.no_grad()
def test_no_token_sees_a_later_one(gpt):
    x = prompt(2, 20)
    y = x.clone(); y[:, 12:] = (y[:, 12:] + 1) % 23
    a, b = gpt(x), gpt(y)
    assert a.shape == (2, 20, 23) and torch.allclose(a[:, :12], b[:, :12], atol=1e-5) and not torch.allclose(a[:, 12], b[:, 12], atol=1e-3)


@torch.no_grad()
def test_greedy_is_the_argmax_and_loss_the_cross_entropy(gpt):
    x = gpt.generate(prompt(), 10, temperature=0.)
    logits = gpt(x)
    assert torch.equal(logits[:, 4:-1].argmax(-1), x[:, 5:])
    logp = logits.log_softmax(-1)[:, :-1].gather(2, x[:, 1:, None])[..., 0]
    assert torch.allclose(gpt.loss(x), -logp.mean()) and torch.allclose(gpt.loss(x, "none"), -logp, atol=1e-5)
    states = gpt.states(x)
    assert len(states) == 4 and torch.allclose(gpt.head(gpt.norm(states[-1])), logits)


@pytest.mark.parametrize("how", [dict(top_k=1), dict(top_k=4), dict(top_p=.3), dict(top_p=.9), dict(top_k=6, top_p=.7, temperature=.5)])
def test_what_may_be_drawn_is_what_transformers_allows(how):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(4, 23, generator=generator(0))*2
    steps = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(how.get("temperature", 1.))])
    if "top_k" in how: steps.append(transformers.TopKLogitsWarper(how["top_k"]))
    if "top_p" in how: steps.append(transformers.TopPLogitsWarper(how["top_p"]))
    p = steps(None, logits.clone()).softmax(-1)
    n = 20_000
    drawn = choose(logits.repeat_interleave(n, 0), generator=generator(1), **how).view(4, n)
    seen = torch.stack([d.bincount(minlength=23) for d in drawn])/n
    assert not seen[p == 0].any() and (seen - p).abs().max() < .02


@torch.no_grad()
def test_guidance_in_logits(gpt):
    text, null = prompt(), prompt()*0
    draw = lambda **kw: gpt.generate(text, 12, generator=generator(3), **kw)
    assert torch.equal(draw(null=null, cfg_scale=1.), draw())
    assert torch.equal(draw(null=null, cfg_scale=0.)[:, 5:], gpt.generate(null, 12, generator=generator(3))[:, 5:])
    first = gpt.generate(text, 1, temperature=0., null=null, cfg_scale=3.)[:, -1]
    a, b = gpt(text)[:, -1], gpt(null)[:, -1]
    assert torch.equal(first, (b + 3*(a - b)).argmax(-1))
    assert set(draw(allowed=torch.arange(23) < 4)[:, 5:].unique().tolist()) <= {0, 1, 2, 3}


def test_a_generator_a_row_makes_rows_independent(gpt):
    text, steps = prompt(3), []
    draw = lambda rows, **kw: gpt.generate(text[rows], 12, generator=[generator(7 + k) for k in rows], **kw)
    together = draw([0, 1, 2], progress=lambda grid: [steps.append(k) or k for k in grid])
    assert steps == [*range(12)] and all(torch.equal(together[k:k + 1], draw([k])) for k in range(3))
    assert torch.equal(draw([1]), gpt.generate(text[1:2], 12, generator=generator(8)))                  # one row: a list is nothing new
    with pytest.raises(ValueError, match="generator lists 2 for 3 rows"): choose(torch.zeros(3, 4), generator=[generator(0)]*2)


def test_loss_by_token_is_the_mean_s_parts(gpt):
    tokens = prompt(3)
    each, logp = gpt.loss(tokens, "none"), gpt(tokens[:, :-1]).log_softmax(-1)
    assert each.shape == (3, tokens.shape[1] - 1) and torch.allclose(each.mean(), gpt.loss(tokens))
    assert torch.allclose(each, -logp.gather(2, tokens[:, 1:, None])[..., 0], atol=1e-6)


def test_birth_and_counts():
    torch.manual_seed(0)
    model = GPT(64, 64, 2, 4, 32)
    assert abs(model.loss(torch.randint(64, (8, 32))).item() - math.log(64)) < .1
    assert num_params(GPT(512, 256, 5, 8, 257)) >= 4_000_000                              # the size at which the cache is timed


@pytest.mark.parametrize("call, names", [
    (lambda g: GPT(0, 8, 1, 1, 4), "vocab is 0"), (lambda g: GPT(4, 8, 1, 3, 4), "width 8"),
    (lambda g: g.generate(prompt(), 36), "at most 40"), (lambda g: g(prompt(1, 41)), "at most 40"),
    (lambda g: g.generate(prompt(2, 0), 3), "expected \\(b, m\\)"), (lambda g: g.generate(prompt(), 3, cfg_scale=2.), "without null"),
    (lambda g: g.generate(prompt(), 3, null=prompt(1)), "null is"), (lambda g: g.generate(prompt(), 3, temperature=-1.), "temperature is -1"),
    (lambda g: g.generate(prompt(), -1), "n is -1"), (lambda g: g.generate(prompt(), 3, temperature=math.nan), "temperature is nan"), (lambda g: g.generate(prompt(), 3, temperature=1e-39), "temperature is 1e-39"),
    (lambda g: g.generate(prompt(), 3, allowed=torch.zeros(64, dtype=torch.bool)), "allowed"),
    (lambda g: g.generate(prompt(), 3, top_k=0), "top_k is 0"), (lambda g: g.generate(prompt(), 3, top_p=1.5), "top_p is 1.5")])
def test_mistakes_are_named(gpt, call, names):
    with pytest.raises(ValueError, match=names): call(gpt)
