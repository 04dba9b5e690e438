"flow against diffusers' schedulers, which share no line with it, and what its samplers promise."
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from minisora import flow


def model(xt, t, offset=0.):
    "A smooth nonlinear velocity of any shape."
    return (xt + offset).sin() * (1 + flow.over(t, xt)) - 0.5 * xt


@pytest.fixture
def noise(): return torch.randn(3, 4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [1., 3.])
def test_euler_is_diffusers(noise, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    x = noise
    for t in scheduler.timesteps: x = scheduler.step(model(x, t / 1000), t, x, return_dict=False)[0]
    torch.testing.assert_close(flow.sample_euler(model, noise, 10, shift), x, atol=1e-5, rtol=0)


def test_heun_is_diffusers(noise):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=2.)
    scheduler.set_timesteps(8)
    x, calls = noise, 0
    for t in scheduler.timesteps:
        x, calls = scheduler.step(model(x, t / 1000), t, x, return_dict=False)[0], calls + 1
    times = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])       # each but the first and last comes twice
    assert calls == 2 * 8 - 1 and len(times) == 9
    torch.testing.assert_close(flow.sample_heun(model, noise, times=times), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ours, theirs", [(flow.linear_alpha_bar, "linear"), (flow.cosine_alpha_bar, "squaredcos_cap_v2")])
def test_schedules_are_diffusers(ours, theirs):
    alpha_bar = DDPMScheduler(beta_schedule=theirs).alphas_cumprod.double()
    torch.testing.assert_close(ours(), alpha_bar, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("eta", [0., 1.])
def test_ddim_is_diffusers(noise, eta):
    "A network trained by DDPM, through flow time, makes what DDIM makes of it in DDPM's own variables."
    eps_model = lambda z, step: (z * 0.7).sin() + 0.3 * flow.over(step / 1000, z)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    z, fresh = noise.double(), torch.Generator().manual_seed(1)
    for k in scheduler.timesteps:
        step = torch.full((3,), float(k))
        z = scheduler.step(eps_model(z, step), k, z, eta=eta, variance_noise=torch.randn(z.shape, generator=fresh).double())[0]
    alpha_bar = scheduler.alphas_cumprod.double()
    t, scale = flow.ddpm_to_flow(alpha_bar)
    ks = scheduler.timesteps
    x = flow.sample_ddim(flow.flow_from_ddpm(eps_model, alpha_bar), noise.double() / scale[ks[0]], times=[*t[ks], 0.], eta=eta,
                         generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x, z, atol=1e-4, rtol=1e-4)


def test_ddpm_wrapper_asks_for_whole_steps_on_its_own_times_and_stays_finite():
    asked = []
    eps_model = lambda z, step: asked.append(step) or z
    alpha_bar = flow.linear_alpha_bar()
    wrapped = flow.flow_from_ddpm(eps_model, alpha_bar)
    wrapped(torch.zeros(1000, 2), flow.ddpm_to_flow(alpha_bar)[0].float())
    assert torch.equal(asked[-1], torch.arange(1000.))
    ends = wrapped(torch.ones(2, 2), torch.tensor([0., 1.]))
    assert ends.isfinite().all() and torch.equal(asked[-1], torch.tensor([0., 999.]))


SAMPLERS = [flow.sample_euler, flow.sample_heun, flow.sample_ddim]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_pure_and_a_clip_depends_on_its_own_noise_only(sampler, noise):
    before = noise.clone()
    together = sampler(model, noise, 6)
    assert torch.equal(noise, before) and together.shape == noise.shape and not together.requires_grad
    for k in range(3): torch.testing.assert_close(sampler(model, noise[k:k + 1], 6), together[k:k + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler, calls", list(zip(SAMPLERS, (7, 13, 7))))
def test_calls_conditions_and_progress(sampler, calls, noise):
    count, seen = [], []
    def counting(xt, t, offset):
        assert t.shape == (3,)
        count.append(1)
        return model(xt, t, offset)
    out = sampler(counting, noise, 7, progress=lambda steps: seen.append(len(steps)) or steps, offset=0.3)
    assert len(count) == calls and seen == [7] and out.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=1.5), dict(shift=0.), dict(times=[0., 1.]), dict(times=[1.]), dict(times=[2., 0.])])
def test_mistakes_are_named(sampler, bad, noise):
    with pytest.raises(ValueError, match=next(iter(bad))): sampler(model, noise, **bad)


def test_grid_and_shift():
    assert flow.time_grid(4) == [1., .75, .5, .25, 0.]
    for shift in (.1, .3, 1., 2.5, 7.):
        grid = flow.time_grid(50, shift)
        assert grid[0] == 1 and grid[-1] == 0 and len(grid) == 51


def test_loss_of_the_right_answer_is_zero_and_golden():
    x0, eps = torch.randn(2, 5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.rand(5, 2, generator=torch.Generator().manual_seed(4))        # a time per frame
    assert flow.flow_loss(lambda xt, t: eps - x0, x0, t, eps) == 0
    assert flow.flow_loss(model, x0, t, eps, per_sample=True).shape == (5,)
    clean = flow.flow_loss(lambda xt, t: 0 * xt, x0, (t > .5) * t, eps, weight=lambda t: (t > 0).float())
    by_hand = ((eps - x0)**2 * (t > .5)[..., None, None, None]).mean()      # clean frames weigh nothing
    torch.testing.assert_close(clean, by_hand)
    seeded = lambda: flow.flow_loss(model, x0, generator=torch.Generator().manual_seed(5), shift=2.5)
    assert seeded() == seeded()
    a = flow.sample_times(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(a.sort()[0].mul(8).floor(), torch.arange(8.))


def test_gradients_reach_the_network():
    x0, scale = torch.randn(4, 3), torch.ones(1, requires_grad=True)
    flow.flow_loss(lambda xt, t: scale * xt, x0, generator=torch.Generator().manual_seed(0)).backward()
    assert scale.grad.abs() > 0


def test_guidance(noise):
    told = lambda xt, t, at: xt * flow.over(at, xt)
    at, t, null = torch.tensor([1., 2., 3.]), torch.rand(3), dict(at=torch.tensor([0.5]))
    for s in (0., 1., 2.5):
        torch.testing.assert_close(flow.guide(told, s, null)(noise, t, at=at), noise * flow.over(.5 + s * (at - .5), noise))
    scales = torch.tensor([0., 1., 4.])
    torch.testing.assert_close(flow.guide(told, scales, null)(noise, t, at=at), noise * flow.over(.5 + scales * (at - .5), noise))
    assert flow.guide(told, 1, null) is told
    with pytest.raises(ValueError, match="null"): flow.guide(told, 2., dict(other=None))(noise, t, at=at)
    with pytest.raises(ValueError): flow.guide(told, torch.ones(2), null)(noise, t, at=at)


def test_compiles_to_the_same_loss():
    "Nothing in the loss breaks the graph (traced, not compiled: no compiler is needed)."
    x0, eps, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    traced = torch.compile(lambda: flow.flow_loss(model, x0, t, eps), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(), flow.flow_loss(model, x0, t, eps))
