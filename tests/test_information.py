"Bits from squared errors: known answers, an independent enumeration, what must be paired, and bad input."
import base64, io, json, math, re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisora.bayes import index, posterior
from minisora.core import generator
from minisora.information import DENSE, LOGSNR, Rates, bits_per_logsnr, eps_loss, information, measure, shortest, time_of, times
from minisora.world import LEVELS, World

GRID = torch.arange(-11, 5.1, .5)


@pytest.fixture(scope="module")
def small():
    "Sixty-four pictures of the tiny world, and two levels of caption."
    scenes = World.tiny().enumerate()
    scenes = scenes[torch.arange(64) * (len(scenes) // 64)]
    pictures = scenes.world.render(scenes)
    return pictures, {level: index(scenes.world.caption(scenes, level)) for level in ("none", "short", "pixels")}


def entropy(numbers):
    "In bits, by hand: of a caption whose number is drawn uniformly over pictures."
    _, n = np.unique(numbers.numpy(), return_counts=True)
    p = n / n.sum()
    return float(-(p * np.log2(p)).sum())


def test_time_and_log_snr():
    for s in (-8., -1., 0., 2.5):
        t = time_of(s).item()
        assert math.log(((1 - t) / t)**2) == pytest.approx(s, abs=1e-4)
    assert time_of(-math.inf) == 1 and time_of(math.inf) == 0
    t = times(1000, generator(0))
    s = 2 * torch.log((1 - t) / t)
    assert LOGSNR[0] <= s.min() < LOGSNR[0] + .05 and LOGSNR[1] - .05 < s.max() <= LOGSNR[1] + 1e-4
    counts = torch.histc(s, 11, *LOGSNR)
    assert counts.min() >= 89 and counts.max() <= 92  # as even as one in each thousandth can be
    assert torch.equal(t, times(1000, generator(0)))


def test_dense_times():
    "A share lies where a network is far from the floor, as even as the rest."
    s = -2 * torch.logit(times(1100, generator(0), dense=.5))
    inside = ((s > DENSE[0]) & (s < DENSE[1])).float().mean().item()
    assert len(s) == 1100 and inside == pytest.approx(.5 + .5 * (DENSE[1] - DENSE[0]) / (LOGSNR[1] - LOGSNR[0]), abs=.005)
    counts = torch.histc(s, 12, *DENSE)
    assert counts.max() - counts.min() <= 6 and s.min() < LOGSNR[0] + .1 and s.max() > LOGSNR[1] - .1
    assert len(times(7, generator(0), dense=.5)) == 7 and len(times(1, generator(0), dense=1.)) == 1


def test_a_coin():
    "One number, -a or +a: the error has a closed form by quadrature, the information is one bit."
    z, w = np.polynomial.hermite_e.hermegauss(151)
    w, rate = torch.tensor(w / w.sum()), []
    for s in GRID.tolist():
        y = torch.tensor(z) + math.exp(s / 2) * 2.  # a = 2
        rate.append(bits_per_logsnr(((2. - 2. * torch.tanh(2. * math.exp(s / 2) * y))**2 @ w)[None].expand(2), s))
    I = information(rate, GRID)
    assert I.bits == pytest.approx(1, abs=2e-3) and I.half == pytest.approx(0, abs=1e-9) and I.grid < .01 and I.low < 1e-3


def test_gaussian_of_many_numbers():
    "d independent normal numbers: d/2·log2(1 + snr)."
    g, d, rate = generator(0), 8, []
    for s in GRID.tolist():
        snr, x = math.exp(s), torch.randn(4000, d, generator=g)
        z = math.sqrt(snr) * x + torch.randn(x.shape, generator=g)
        rate.append(bits_per_logsnr((x - math.sqrt(snr) / (1 + snr) * z).pow(2).sum(1), s))
    I = information(rate, GRID)
    assert abs(I.bits - d / 2 * math.log2(1 + math.exp(GRID[-1]))) < 2 * I.half + I.grid + I.low


def test_trapezoid_uneven_grid_and_tails():
    at = torch.tensor([0., 1., 3.])
    I = information([torch.full((5,), float(v)) for v in (1, 2, 4)], at, high=.5)
    assert I.bits == pytest.approx(1 + 1.5 + 6 + .5) and (I.low, I.high, I.half) == (1, .5, 0)
    assert I.grid == pytest.approx(0, abs=1e-12)  # it is a straight line: half the grid gives the same
    few, many = (information([torch.arange(n) % 2 * 1. for _ in at], at) for n in (100, 400))
    assert few.half == pytest.approx(2 * many.half, rel=.02)


def test_exact_bits_are_the_entropy(small):
    pictures, said = small
    rows = measure(pictures, said, GRID, 64, seed=0)
    for level in ("short", "pixels"):
        I = information([a.floor - b.floor for a, b in zip(rows["none"], rows[level])], GRID)
        assert abs(I.bits - entropy(said[level])) < 2 * I.half + .05
        J = information([a.loss - b.loss for a, b in zip(rows["none"], rows[level])], GRID)
        assert abs(J.bits - entropy(said[level])) < 2 * J.half + .05 and J.half > I.half
    assert rows["none"][0].open.mean() > 5.9 and rows["none"][-1].open.max() < .1 and all(r.excess.max() < 1e-3 for r in rows["pixels"])


def test_measure_agrees_with_a_loop(small):
    "Variance, excess and loss of one noise level, written out again for each picture in numpy."
    pictures, said = small
    P, seen = pictures.flatten(1).double().numpy(), {}
    def learned(xt, t, i, level):
        seen[level] = xt, i
        return torch.zeros_like(xt)  # a guess of x0 that is xt itself
    r = measure(pictures, said, [-2.], 6, seed=3, learned=learned)
    t = time_of(-2.).item()
    for level, c in said.items():
        xt, i = seen[level]
        for k in range(6):
            allowed = P[(c == c[i[k]]).numpy()]
            logit = -((xt[k].flatten().double().numpy() - (1 - t) * allowed)**2).sum(1) / (2 * t * t)
            w = np.exp(logit - logit.max())
            w /= w.sum()
            mean = w @ allowed
            bits = math.exp(-2.) / (2 * math.log(2))
            near = lambda x: pytest.approx(x, rel=2e-3, abs=2e-3)
            assert r[level][0].floor[k].item() == near(bits * (w @ ((allowed - mean)**2).sum(1)))
            assert r[level][0].excess[k].item() == near(bits * ((xt[k].flatten().numpy() - mean)**2).sum())
            assert r[level][0].loss[k].item() == near(bits * ((xt[k].flatten().numpy() - P[i[k]])**2).sum())
            assert r[level][0].open[k].item() == near(-(w * np.log2(np.maximum(w, 1e-300))).sum())
    assert all(torch.equal(seen["none"][0], xt) for xt, _ in seen.values())  # every level saw the same pictures and noise


def test_excess_is_loss_over_the_floor(small):
    "Orthogonality: on average a wrong guess costs its distance from the exact one, whatever it is."
    pictures, said = small
    shrunk = lambda xt, t, i, level: (xt - .7 * posterior(xt, t, pictures).mean) / t
    (r,) = measure(pictures, dict(none=said["none"]), [-3.], 6000, seed=1, learned=shrunk)["none"]
    off = r.loss - r.floor - r.excess
    assert off.mean().abs() < 3 * off.std() / len(off)**.5 and r.excess.mean() > .1
    assert isinstance(r, Rates) and len(r.loss) == 6000


def test_numbers_of_pictures_by_noise_level(small):
    pictures, said = small
    a, b = (measure(pictures, said, [-4., 0.], n, seed=2)["short"] for n in ([5, 9], [5, 9]))
    assert [len(r.floor) for r in a] == [5, 9] and all(torch.equal(x.loss, y.loss) for x, y in zip(a, b))


def test_loss_is_bits(small):
    pictures, _ = small
    x0, eps, t = pictures[:8], torch.randn(8, 1, 3, 16, 16, generator=generator(1)), times(8, generator(2))
    guess = torch.zeros_like(x0)
    velocity = lambda xt, t: (xt - guess) / t[:, None, None, None, None]
    want = torch.stack([bits_per_logsnr(x.pow(2).sum()[None], 2 * math.log((1 - s) / s))[0] for x, s in zip(x0, t.tolist())]).mean()
    torch.testing.assert_close(eps_loss(velocity, x0, t, eps) * 768 / (2 * math.log(2)), want, rtol=1e-3, atol=0)


def test_shortest():
    says = {level: World.tiny().entropy(level) for level in LEVELS}
    assert [shortest(b, says) for b in (0., .5, 4., 4.01, 7., 11., 13.2, 99.)] == ["none", "short", "short", "medium", "long", "full", "pixels", "pixels"]


def test_bad_input():
    three = [torch.ones(4)] * 3
    with pytest.raises(ValueError, match="rate has 3 noise levels, logsnr 2"): information(three, torch.tensor([0., 1.]))
    with pytest.raises(ValueError, match="three or more, rising"): information(three, torch.tensor([0., 2., 1.]))
    with pytest.raises(ValueError, match="three or more, rising"): information(three[:2], torch.tensor([0., 1.]))


def test_the_page():
    "Self-contained, with two labelled sliders, and numbers that add up."
    page = (Path(__file__).resolve().parent.parent / "nbs" / "noise_vs_caption.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 300_000 and not re.search(r"https?:|<link|src=[\"'](?!data:)|import\(|fetch\(", page)
    for name in ("noise", "words"): assert f'<label for="{name}">' in page and f'<input type="range" id="{name}"' in page
    assert 'aria-live="polite"' in page and '<html lang="en">' in page
    data = json.loads(re.search(r"const D = (\{.*?\}), LEVELS", page, re.S)[1])
    assert data["says"] == [round(World.tiny().entropy(level), 3) for level in LEVELS]
    assert len(data["open"]) == len(data["t"]) and data["t"] == sorted(data["t"], reverse=True) and (data["t"][0], data["t"][-1]) == (1, 0)
    assert data["open"][0] == pytest.approx([data["total"] - s for s in data["says"]], abs=2e-3) and not any(data["open"][-1])
    assert all(a >= b - .05 for row in data["open"] for a, b in zip(row, row[1:])) and all(a[0] >= b[0] - .3 for a, b in zip(data["open"], data["open"][1:]))
    for p in data["pictures"]:
        sheet = Image.open(io.BytesIO(base64.b64decode(p["sheet"].split(",")[1])))
        assert sheet.size == (16 * 7, 16 * len(data["t"])) and len(p["captions"]) == 6
