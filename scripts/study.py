"""Run a study: a sweep too large for a chapter, point by point.

    python scripts/study.py latents             goes on where it stopped; in the background: nohup … >study.log 2>&1 &
    python scripts/study.py latents --list      what is done and what is left
    python scripts/study.py latents --only seed=0 what=raw

The table is minisora/results/NAME.json, written anew after each point; the chapter plots it, and calls the study's function
for one point of it, which must come out within the spread of the seeds (`sys.path.append("../scripts"); from study import latents`).
A study is a function from a point (seed among its arguments) to a dict of numbers, `flops` among them, and a list of points.
"""
import argparse, ast, json, math, os, sys, tempfile, time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import nn

from minisora import bayes, cli, core
from minisora.bench import middle, race
from minisora.clip import CLIP
from minisora.dalle import Dalle, DalleConfig, complete, start_from_patches
from minisora.data import WorldClips
from minisora.dit import DiT
from minisora.flow import add_noise, flow_loss, guide, sample_euler, sample_times, x0_from_v
from minisora.information import LOGSNR, information, measure, times
from minisora.sora import Pixels, Sora
from minisora.text import Tokenizer
from minisora.train import Recipe, fit, optimizers
from minisora.vae import VAEConfig
from minisora.vq import VQConfig, VQVAE
from minisora.world import COLORS, LEVELS, SHAPES, VERSION, World, grade, read

ROOT = Path(__file__).resolve().parent.parent


def _bf16(): return core.device().type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # in hardware; elsewhere float32


# --- latents (claim 17, chapter 40): the same DiT on a VAE's latents and on raw patches, at equal training FLOPs; and trials, one change each (LOG)

class Raw(Pixels):
    "In place of a VAE: boxes of 8 frames of 8x8 pixels as they are, each the numbers of one latent cell; frame 0 is repeated, to fill a box of its own."
    config, cut, size = VAEConfig(channels=1536), ("b (f pf) c (h ph) (w pw)", "b f (pf c ph pw) h w"), dict(c=3, pf=8, ph=8, pw=8)
    def latent_shape(self, frames, height, width): return 1 + (frames - 1)//8, 1536, height//8, width//8
    def encode(self, clips):
        z = rearrange(torch.cat([clips[:, :1].repeat(1, 7, 1, 1, 1), clips], 1), " -> ".join(self.cut), **self.size)
        return z, torch.zeros_like(z)
    def decode(self, z): return rearrange(z, " -> ".join(self.cut[::-1]), **self.size)[:, 7:]


SIX = "shape", "color", "size", "texture", "motion", "background"
TRIALS = {"as it ships": {}, "velocity": dict(predict="v"), "wide": dict(width=256, depth=3), "deep": dict(width=128, depth=10), "batches of 32": dict(batch=32), "AdamW": dict(muon=0.), "times shifted by 8": dict(shift=8.), "rotary, gated": dict(rope=True, gated=True)}


@lru_cache
def _clips_told():
    "What every point shares: t2v, clips as bytes, their captions in all the ways that t2v learned from."
    world, sora, g = World(), Sora.from_pretrained("t2v", core.device()), core.generator(0)
    pool, source = core.at_scale(test=32, cpu=20_000, gpu=100_000), WorldClips(world, cli.LEVELS)
    parts = [source.batch(g, min(200, pool), captions=4) for _ in range(0, pool, 200)]
    clips = torch.cat([(part["clips"]*127.5 + 127.5).round().byte() for part in parts])
    return SimpleNamespace(world=world, sora=sora, clips=clips, ids=sora.ids([c for part in parts for row in part["captions"] for c in row]).cpu().view(len(clips), 4, -1), bf16=_bf16())


@lru_cache
def _cells(what):  # `latents` or `raw`: numbers of a cell, and what makes cells of the clips of these numbers
    d = _clips_told()
    floats = lambda i: d.clips[i].float()/127.5 - 1
    if what == "raw": return lambda i: Raw().encode(floats(i))[0]
    z = torch.cat([d.sora.latents(floats(i).to(d.sora.device)).half().cpu() for i in torch.arange(len(d.clips)).split(200)])
    return lambda i: z[i].float()


def latents(
    what,  # `latents` or `raw`
    tflop,  # of training, the optimizer's products included, the VAE's not
    seed,  # of weights and batches
    trial="as it ships",  # of TRIALS: what differs from preset t2v
    keep=None,  # a list that gets the drawn clips and their scenes
):
    "Train t2v's DiT for so many FLOPs from nothing, draw unseen prompts of level long, told in full, and grade."
    d, fields = _clips_told(), dict(TRIALS[trial])
    n, batch, muon = core.at_scale(test=4, cpu=512, gpu=512), fields.pop("batch", core.at_scale(test=4, cpu=128, gpu=128)), fields.pop("muon", 4.)
    shift = fields.pop("shift", 2.5)
    vae, config, cells = d.sora.vae if what == "latents" else Raw(), replace(d.sora.dit.config, **core.at_scale(test=dict(depth=1), cpu={}, gpu={})), _cells(what)

    def train(steps):
        torch.manual_seed(seed)
        model = Sora(DiT(replace(config, channels=vae.config.channels, **fields)), vae, d.sora.tokenizer, dict(sampling=dict(d.sora.card["sampling"], steps=16, best_of=1))).to(d.sora.device)
        if what == "latents": model.mean.copy_(d.sora.mean); model.std.copy_(d.sora.std)
        def draw(g):
            i, k = torch.randint(len(d.clips), (batch,), generator=g), torch.randint(4, (batch,), generator=g)
            return dict(latents=(x := cells(i)), eps=torch.randn(x.shape, generator=g), t=sample_times(batch, shift, g), text=d.ids[i, k])
        recipe = Recipe(steps=steps, warmup=min(100, steps//3 + 1), muon=muon, ema=.99, seed=seed, bf16=d.bf16, compile=core.at_scale(test=False, cpu=steps > 1, gpu=True))
        return model, fit(model.dit, model.loss, draw, recipe, name=f"{what}, {trial}, {tflop} TFLOP, seed {seed}")

    steps = max(2, round(tflop*1e12/train(1)[1]["flops"]))
    model, run = train(steps)
    test, model.detail = d.world.sample(n, core.generator(10_000 + seed)), d.world.detail
    prompts = d.world.caption(test, "long")
    drawn = torch.cat([model.generate(prompts[i:i + 64], seed=1000*seed + i).cpu() for i in range(0, n, 64)])
    if keep is not None: keep += drawn, test
    right = {k: round(100*v.rate, 3) for k, v in grade(drawn, test).rates.items()}
    return dict(steps=steps, batch=batch, flops=run["flops"], parameters=core.num_params(model.dit), loss=sum(run["losses"][-50:])/len(run["losses"][-50:]), n=n,
                right=right, six=round(sum(right[k] for k in SIX)/6, 3), vae=d.sora.card["vae_sha256"][:12], bf16=d.bf16, compiled=run["compiled"])


# --- levels (claims 12 and 13, chapter 33): every length of caption against compute, for two sizes of model

SIZES = dict(small=dict(width=64, depth=3, heads=4, text_width=48), large=dict(depth=4))  # large: as the preset `figure`, before its blocks were six


@lru_cache
def _tiny():
    "The tiny world, its scenes, their pictures, and the number of each one's caption, by level."
    world = World.tiny()
    scenes = world.enumerate()
    return world, scenes, world.render(scenes), {level: bayes.index(world.caption(scenes, level)) for level in LEVELS}


def right_pictures(
    model,  # Sora in pixels
    n,  # prompts of each level
    seed,  # of prompts and noise
):
    "Level of caption -> percent of drawn pictures that show all it asks for, by the oracle; for `none`, percent that are a picture of the world."
    world, scenes, pictures, _ = _tiny()
    i, out = torch.randint(len(scenes), (n,), generator=core.generator(seed)), {}
    for level in LEVELS:
        drawn = model.generate(world.caption(scenes[i], level), seed=seed).cpu()
        near = torch.cdist(drawn.flatten(1), pictures.flatten(1)).min(1).values < 1.3  # half of the least distance between two scenes
        out[level] = 100*(near if level == "none" else near & grade(drawn, scenes[i], level).right).float().mean().item()
    return out


@lru_cache
def _told(): return {level: _tiny()[0].caption(_tiny()[1], level) for level in LEVELS}


def _excess(dit, ids, n, seed):
    "Level of caption -> excess over the floor, in bits; `ids`: level -> (k l) of all scenes."
    grid, here = torch.arange(LOGSNR[0], LOGSNR[1] + .1, core.at_scale(test=2.75, cpu=1., gpu=.5)), next(dit.parameters()).device
    seen = measure(*_tiny()[2:], grid, n, seed, lambda xt, t, i, level: dit(xt.to(here), t.expand(len(xt)).to(here), ids[level][i].to(here)).cpu())
    return {level: round(information([r.excess for r in seen[level]], grid).bits, 4) for level in LEVELS}


def levels(
    size,  # `small` or `large`
    tflop,  # of training, the optimizer's products included
    seed,  # of weights and batches
):
    "Train on every level of caption at once for so many FLOPs; excess over the floor in bits, and pictures right, by level."
    p, n = cli.preset("figure"), core.at_scale(test=8, cpu=128, gpu=512)
    p.dit = p.dit | SIZES[size]
    bf16 = _bf16()
    def train(steps):
        p.dit_recipe = replace(p.dit_recipe, steps=steps, warmup=min(100, steps//4), compile=core.at_scale(test=False, cpu=steps >= 2000, gpu=True), bf16=bf16, save_every=steps)
        with tempfile.TemporaryDirectory() as out: return cli.train_sora(p, WorldClips(World(**p.world), dict.fromkeys(p.captions, 1)), out, seed)
    steps = max(2, round(tflop*1e12/train(1).card["flops"]))
    model = train(steps)
    return dict(steps=steps, batch=p.dit_batch, flops=model.card["flops"], parameters=core.num_params(model.dit), n=n, bf16=bf16, compiled=model.card["compiled"],
                excess=_excess(model.dit, {level: model.ids(captions) for level, captions in _told().items()}, n, seed),
                right={k: round(v, 2) for k, v in right_pictures(model, n, seed).items()})


# --- limits (claim 12, chapter 33): what keeps the trained denoiser above the floor

ARMS = {"plain": {}, "more heads": dict(heads=6), "rotary places": dict(heads=6, rope=True), "gated": dict(heads=6, gated=True), "both": dict(heads=6, rope=True, gated=True),
        "both, exact targets": dict(heads=6, rope=True, gated=True)}  # the exact denoiser's guess in place of the picture: no noise in what is learned


def limits(
    what,  # of ARMS
    seed,  # of weights and batches
):
    "Equal steps of a narrow figure network, one thing changed at a time; excess over the floor in bits, by level of caption."
    p, (world, scenes, pictures, said), here = cli.preset("figure"), _tiny(), core.device()
    steps, batch, n = core.at_scale(test=2, cpu=1000, gpu=10_000), core.at_scale(test=8, cpu=64, gpu=64), core.at_scale(test=8, cpu=128, gpu=512)
    words = Tokenizer.from_texts([c for row in _told().values() for c in row])
    ids = words.encode([c for level in LEVELS for c in _told()[level]])[0].view(len(LEVELS), len(scenes), -1)
    torch.manual_seed(seed)
    net = DiT(3, vocab=words.vocab_size, **{**p.dit, **dict(width=96, depth=4, heads=2, rope=False, gated=False), **ARMS[what]}).to(here)
    kinds, exact = torch.tensor([0]*6 + [*range(1, len(LEVELS))]), what.endswith("exact targets")   # half of the draws say nothing
    def draw(g):
        i, k, t, eps = torch.randint(len(scenes), (batch,), generator=g), kinds[torch.randint(len(kinds), (batch,), generator=g)], times(batch, g), torch.randn(batch, *pictures.shape[1:], generator=g)
        xt, target = add_noise(pictures[i], eps, t), pictures[i].clone()
        for j, level in enumerate(LEVELS if exact else ()):
            if len(mine := (k == j).nonzero()[:, 0]): target[mine] = bayes.posterior(xt[mine], t[mine], pictures, said=said[level][i[mine]], captions=said[level]).mean
        return dict(xt=xt, t=t, target=target, text=ids[k, i])
    def loss(xt, t, target, text): return ((x0_from_v(xt, net(xt, t, text), t) - target).flatten(1).pow(2).mean(1)*((1 - t)/t)**2).mean()   # the error of the noise
    bf16 = _bf16()
    run = fit(net, loss, draw, Recipe(steps=steps, warmup=min(100, steps//4), muon=4., bf16=bf16, compile=core.at_scale(test=False, cpu=True, gpu=True), seed=seed), name=what)
    return dict(steps=steps, batch=batch, flops=run["flops"], parameters=core.num_params(net), n=n, bf16=bf16, compiled=run["compiled"], excess=_excess(net, dict(zip(LEVELS, ids)), n, seed))


# --- drawing (claims 1 and 3, chapter 12): what the DALL·E that ships draws, chooses and completes; each point within a minute

@lru_cache
def _dalle(): return Dalle.from_pretrained("dalle", core.device()), World(frames=1)


def _draw(model, prompts, seed=0, chunk=128, **how):
    return torch.cat([model.generate(prompts[i:i + chunk], seed=seed + i, **how).cpu() for i in range(0, len(prompts), chunk)])


def _counts(grades):
    "Attribute → right, of how many asked."
    return {k: [int(v[grades.asked[k]].sum()), int(grades.asked[k].sum())] for k, v in grades.by.items()} | {"all": [int(grades.right.sum()), len(grades.right)]}


def crossing(n, seed, **choices):
    "Scenes whose sprite lies across the middle of the frame."
    s = World(frames=1, **choices).sample(40*n, core.generator(seed))
    return s[((s.start[:, 0, 1] - 16).abs() <= 2).nonzero()[:n, 0]]


def lower(pictures):
    "Of lower halves: the nearest color of what is not background (-1: nothing there), and where that is (b h w)."
    table = torch.tensor(list(COLORS.values()))*2 - 1
    x, ground = pictures[:, 0, :, 16:], pictures[:, 0, :, :4].flatten(2).median(-1).values[:, :, None, None]   # the top rows show it
    mask = (x - ground).abs().amax(1) > .5
    color = (x*mask[:, None]).sum((2, 3))/mask.sum((1, 2)).clamp(min=1)[:, None]
    return torch.cdist(color, table).argmin(1).masked_fill(mask.sum((1, 2)) < 6, -1), mask


def drawing(
    what,  # see `DRAWING`
    seed,  # of prompts and samples, or of a training
):
    "One question to DALL·E; counts, so that points can be added up."
    model, world = _dalle()
    n, some = core.at_scale(test=4, cpu=512, gpu=1024), core.at_scale(test=4, cpu=128, gpu=512)
    if what in ("unseen", "held-out"):  # grades of pictures for long prompts, and by chance: the same pictures against another prompt
        s = world.sample(n, core.generator(2**40 + seed), "train" if what == "unseen" else "heldout")
        drawn = _draw(model, world.caption(s), seed*n)
        reading = read(drawn, world=world)
        return dict(n=n, flops=0, right=_counts(grade(drawn, s, "long", reading)), chance=int(grade(drawn, s[torch.arange(n).roll(1)], "long", reading).right.sum()))
    if what == "choosing":  # many plain pictures a prompt: which are right, how well the model and CLIP find they fit, and how likely they are
        many, s = core.at_scale(test=4, cpu=64, gpu=64), world.sample(core.at_scale(test=2, cpu=8, gpu=32), core.generator(2**40 + 100 + seed), "heldout")
        asks = [p for p in world.caption(s) for _ in range(many)]
        drawn = _draw(model, asks, 1000*seed, cfg_scale=1., temperature=1.)
        right = grade(drawn, s[torch.arange(len(s)).repeat_interleave(many)]).right.long().view(-1, many)
        both = [torch.cat([-model.surprise(model.ids(asks[i:i + 128] if given else [""]*len(asks[i:i + 128])), model.tokens(drawn[i:i + 128].to(model.device)))[1].sum(1).detach().cpu() for i in range(0, len(asks), 128)]).view(-1, many) for given in (True, False)]
        order = lambda by: ["".join(map(str, row)) for row in right.gather(1, by.argsort(1, descending=True)).tolist()]   # best first
        clip = CLIP.from_pretrained("clip", model.device)
        fits = torch.stack([clip.scores(x, [asks[i*many]])[:, 0] for i, x in enumerate(drawn.to(model.device).split(many))]).cpu()
        return dict(n=len(s), flops=0, by_agreement=order(both[0] - both[1]), by_likelihood=order(both[0]), by_clip=order(fits), clip=clip.card["sha256"][:12])
    if what.startswith("weight"):  # a small model, few codes, long captions: bits of unseen captions and images by the text's weight in the loss
        steps, batch = core.at_scale(test=2, cpu=120, gpu=4000), core.at_scale(test=4, cpu=32, gpu=128)
        pool = WorldClips(world, dict(long=.9, none=.1)).batch(core.generator(3), core.at_scale(test=40, cpu=4000, gpu=40_000))
        torch.manual_seed(0)
        vq = VQVAE(VQConfig(codes=core.at_scale(test=16, cpu=64, gpu=64), channels=48, width=48, encoder=0, decoder=0))
        start_from_patches(vq, pool["clips"][:500], core.generator(1))
        torch.manual_seed(seed)
        small = Dalle(replace(model.config, codes=vq.quantizer.codes, width=64, depth=3, heads=2, text_weight=float(what.split()[1])), vq.eval(), model.tokenizer)
        ids, codes = small.ids(pool["captions"]), small.tokens(pool["clips"])
        def draw(g):
            i = torch.randint(len(codes), (batch,), generator=g)
            return dict(text=ids[i], tokens=codes[i])
        run = fit(small.gpt, small.loss, draw, Recipe(steps=steps, warmup=min(20, steps), muon=4., ema=.95, compile=False, seed=seed), name=f"{what}, seed {seed}")
        s = world.sample(some*2, core.generator(2))
        with torch.no_grad(): parts = small.surprise(small.ids(world.caption(s)), small.tokens(world.render(s)))
        return dict(steps=steps, batch=batch, flops=run["flops"], n=len(s), **{k: round(p.sum(1).mean().item()/math.log(2), 3) for k, p in zip(("caption", "image"), parts)})
    if what == "bits":  # of unseen images' codes given their captions
        s = world.sample(some*2, core.generator(2))
        def bits(level):
            with torch.no_grad(): each = torch.cat([model.surprise(model.ids(world.caption(s[i:i + 64], level)), model.tokens(world.render(s[i:i + 64]).to(model.device)))[1].sum(1).cpu() for i in range(0, len(s), 64)])/math.log(2)
            return [round(each.mean().item(), 3), round(1.96*each.std().item()/len(each)**.5, 3)]
        return dict(n=len(s), flops=0, bits={level: bits(level) for level in LEVELS})
    if what.startswith("dial"):  # guidance, temperature
        s = world.sample(some, core.generator(12))
        return dict(n=some, flops=0, right=_counts(grade(_draw(model, world.caption(s), 5, **dict(zip(("cfg_scale", "temperature"), map(float, what.split()[1:])))), s)))
    if what == "completion":  # the top half given, with captions from none to all
        s = crossing(some, 31)
        whole, ways = world.render(s), {"no caption": [""]*some, "short": world.caption(s, "short"), "long": world.caption(s), "pixels": world.caption(s, "pixels")}
        done = {k: complete(model, whole.to(model.device), p, seed=0, cfg_scale=1. if k == "no caption" else None).cpu() for k, p in ways.items()}
        psnr = {k: round(10*math.log10(4/(d - whole)[..., 16:, :].pow(2).mean().item()), 3) for k, d in done.items()}
        done["no picture, long"] = _draw(model, ways["long"], 77)
        return dict(n=some, flops=0, psnr=psnr, right={k: _counts(grade(d, s, "full")) for k, d in done.items()}, long={k: _counts(grade(d, s))["all"][0] for k, d in done.items()},
                    chance=int(grade(done["no caption"], s[torch.arange(some).roll(1)]).right.sum()))
    if what == "change":  # another color asked of the lower half, all named or "a blue shape"
        s, names = crossing(some, 32, textures=("plain",)), list(COLORS)
        pictures, target = world.render(s), (s.color[:, 0] + 3) % len(names)
        other = s.map(torch.clone); other.color[:, 0] = target
        asks = {"nothing asked": [""]*some, "a change asked": world.caption(other), "'the same, in blue'": [f"a {names[k]} shape" for k in target]}
        (_, outline), out = lower(pictures), {}
        overlap = lambda a: round(100*((a & outline).sum((1, 2))/(a | outline).sum((1, 2)).clamp(min=1))[outline.sum((1, 2)) >= 6].mean().item(), 2)
        for k, p in asks.items():
            got, mask = lower(complete(model, pictures.to(model.device), p, seed=0, cfg_scale=1. if k == "nothing asked" else None).cpu())
            out[k] = dict(new=int((got == target).sum()), old=int((got == s.color[:, 0]).sum()), nothing=int((got < 0).sum()), outline=overlap(mask))
        return dict(n=some, flops=0, answers=out, sure=int((lower(pictures)[0] == s.color[:, 0]).sum()), apart=overlap(outline.roll(1, 0)))
    raise ValueError(f"what is {what!r}: expected one of {', '.join(DRAWING)}")


DRAWING = {"unseen": (0, 1, 2), "held-out": (0, 1, 2), "choosing": (0, 1, 2, 3), "completion": (0,), "change": (0,), "bits": (0,),   # question: its seeds
           **{f"weight {w}": (0, 1, 2) for w in (0., .125, .5, .875)}, **{f"dial {g} {t}": (0,) for g, t in ((1., 1.), (1., .5), (1., .25), (2., 1.), (2., .5), (2., .25), (4., .25))}}


# --- abilities (claim 2, chapter 12): DALL·E over two sprites, by size: what it can bind

WIDTHS = {16: 1, 32: 2, 64: 3, 128: 4}  # width: depth


@lru_cache
def _pairs():
    "What every point shares: a world of two plain sprites, a codebook of its patches, codes and captions of many scenes."
    world = World(frames=1, sprites=2, textures=("plain",))
    source = WorldClips(world, dict(long=.5, paraphrase=.2, short=.2, none=.1))
    pool = source.batch(core.generator(0), core.at_scale(test=40, cpu=16_000, gpu=64_000), captions=2)
    torch.manual_seed(0)
    vq = VQVAE(VQConfig(codes=core.at_scale(test=16, cpu=768, gpu=768), channels=48, width=48, encoder=0, decoder=0))
    start_from_patches(vq, pool["clips"][:2000], core.generator(0))
    words = Tokenizer.from_texts(texts := source.texts())
    config = DalleConfig(len(words.words), vq.quantizer.codes, int(words.encode(texts)[1].sum(1).max()) + 2)
    dalle = Dalle(config, vq.requires_grad_(False).eval(), words)
    codes = torch.cat([dalle.tokens(x) for x in pool["clips"].split(200)])
    return SimpleNamespace(world=world, dalle=dalle, codes=codes, ids=dalle.ids([c for row in pool["captions"] for c in row]).view(len(codes), 2, -1))


def abilities(
    width,  # of the GPT, depth as in WIDTHS
    seed,  # of weights, batches and prompts
):
    "Train for the same steps at every size; percent of drawn pictures with each skill, from one attribute to all of two sprites, and to pictures that no training picture is like."
    d, n, batch, steps = _pairs(), core.at_scale(test=8, cpu=256, gpu=512), core.at_scale(test=4, cpu=64, gpu=128), core.at_scale(test=2, cpu=2400, gpu=4000)
    torch.manual_seed(seed)
    model = Dalle(replace(d.dalle.config, width=width, depth=WIDTHS[width], heads=max(1, width//32)), d.dalle.vq, d.dalle.tokenizer).to(core.device())
    def draw(g):
        i, k = torch.randint(len(d.codes), (batch,), generator=g), torch.randint(2, (batch,), generator=g)
        return dict(text=d.ids[i, k], tokens=d.codes[i])
    bf16 = _bf16()
    recipe = Recipe(steps=steps, warmup=min(50, steps), muon=4., ema=.99, seed=seed, bf16=bf16, compile=core.at_scale(test=False, cpu=True, gpu=True))
    run = fit(model.gpt, model.loss, draw, recipe, name=f"width {width}, seed {seed}")

    def drawn(prompts, seed): return torch.cat([model.generate(prompts[i:i + 64], seed=seed + i) for i in range(0, len(prompts), 64)]).cpu()
    test, held = (d.world.sample(n, core.generator(2**40 + seed), split) for split in ("train", "heldout"))
    by = grade(drawn(d.world.caption(test), 10_000*seed), test).by
    skills = {"background": by["background"], "two colors": by["color"], "colors of shapes": by["color"] & by["shape"], "colors of shapes, in their places": by["color"] & by["shape"] & by["relation"],
              "all of two sprites": torch.stack(list(by.values())).all(0), "all of two sprites, held-out": grade(drawn(d.world.caption(held), 10_000*seed + 5000), held).right}
    # the cat on top as a sketch below: the upper sprite is given, the lower is to be the same in another color, though no training picture shows one shape twice
    above = d.world.sample(12*n, core.generator(2**40 + 7 + seed))
    above = above[(above.layout == 2).nonzero()[:n//2, 0]]
    shape, color = SHAPES, list(COLORS)
    a = above
    prompts = [[f"a {color[c0]} {shape[s0]} above a {color[c1]} {what}" for c0, c1, s0 in zip(a.color[:, 0].tolist(), a.color[:, 1].tolist(), a.shape[:, 0].tolist()) for what in [shape[s0] if named else "shape"]] for named in (True, False)]
    for name, texts in zip(("(the same shape below, named)", "(the same shape below, unnamed)"), prompts):
        pictures = torch.cat([complete(model, d.world.render(a[i:i + 64]).to(model.device), texts[i:i + 64], seed=seed) for i in range(0, len(a), 64)]).cpu()
        r = read(pictures, world=d.world)
        low = r["track"][:, :2, :, 1].mean(2).argmax(1)[:, None]
        ok = r["color"][:, :2].gather(1, low)[:, 0] == a.color[:, 1]
        skills |= {name: ok & (r["shape"][:, :2].gather(1, low)[:, 0] == a.shape[:, 0])}
        if name.endswith("unnamed)"): skills["(its color, shape unnamed)"] = ok
    return dict(steps=steps, batch=batch, flops=run["flops"], parameters=core.num_params(model.gpt), loss=sum(run["losses"][-50:])/len(run["losses"][-50:]), n=n, pairs=len(a), bf16=bf16, compiled=run["compiled"],
                skills={k: round(100*v.float().mean().item(), 2) for k, v in skills.items()})


# --- peer (claim 0, chapter 50): our DiT and a video U-Net on the same latents and captions, for the same time on one core

class UNet(nn.Module):
    "The video U-Net of diffusers ([Ronneberger 2015](https://arxiv.org/abs/1505.04597), with attention over space, time and text) in a DiT's place; captions are read by the same blocks as a DiT's."
    def __init__(self, channels, vocab, text_width, widths):
        super().__init__()
        from diffusers import UNet3DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        n, self.config = len(widths) - 1, SimpleNamespace(channels=channels)
        self.reader = DiT(channels, vocab=vocab, width=8, depth=0, text_width=text_width)  # of whose trunk nothing is used
        self.net = UNet3DConditionModel(in_channels=channels, out_channels=channels, block_out_channels=widths, layers_per_block=1, norm_num_groups=16, cross_attention_dim=text_width, attention_head_dim=4,
                                        down_block_types=("CrossAttnDownBlock3D",)*n + ("DownBlock3D",), up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",)*n)
        self.net.set_attn_processor(AttnProcessor())  # attention written out: for sequences this short faster than the fused one on a CPU, by a quarter

    def forward(self, x, t, text=None):  # as of a DiT
        words, seen = self.reader.read(len(x), text)
        v = self.net(rearrange(x, "b f c h w -> b c f h w"), 1000*torch.as_tensor(t, device=x.device).expand(len(x)), encoder_hidden_states=words*seen[..., None]).sample
        return rearrange(v, "b c f h w -> b f c h w").float()


PEERS = {"DiT, Muon + AdamW": 4., "DiT, AdamW": 0., "U-Net, AdamW": 0.}  # Muon's rate in units of lr


@lru_cache
def _peers():
    "What every point shares: latents of many clips by the VAE that ships, their captions, the networks, and the seconds of a step of each, measured in turns."
    torch.set_num_threads(1)  # then a second is the processor's, which other programs hardly lengthen
    world, sora, g = World(), Sora.from_pretrained("t2v", core.device()), core.generator(0)
    pool, batch, source, z, said = core.at_scale(test=16, cpu=12_000, gpu=100_000), core.at_scale(test=4, cpu=64, gpu=256), WorldClips(world, cli.LEVELS), [], []
    bf16 = _bf16()
    for _ in range(0, pool, 200):
        few = source.batch(g, min(200, pool), captions=4)
        z.append(sora.latents(few["clips"].to(sora.device)).half().cpu()); said += [c for row in few["captions"] for c in row]
    z, ids = torch.cat(z), sora.ids(said).cpu().view(len(said)//4, 4, -1)

    def new(what, seed):
        torch.manual_seed(seed)
        c = sora.dit.config
        net = UNet(c.channels, c.vocab, c.text_width, core.at_scale(test=(16, 16), cpu=(64, 112), gpu=(64, 112))) if what.startswith("U-Net") else DiT(replace(c, depth=core.at_scale(test=1, cpu=c.depth, gpu=c.depth)))
        model = Sora(net, sora.vae, sora.tokenizer, dict(sampling=sora.card["sampling"])).to(sora.device)
        model.mean.copy_(sora.mean); model.std.copy_(sora.std)
        model.detail = world.detail
        return model

    def draw(g, n=batch):
        i, k = torch.randint(len(z), (n,), generator=g), torch.randint(4, (n,), generator=g)
        return dict(latents=z[i].float(), eps=torch.randn(n, *z.shape[1:], generator=g), t=sample_times(n, 2.5, g), text=ids[i, k])

    def step(what):
        model, b = new(what, 0), {k: v.to(sora.device) for k, v in draw(core.generator(0)).items()}
        opts = optimizers(model.dit, Recipe(muon=PEERS[what]))
        def run():
            with torch.autocast(sora.device.type, torch.bfloat16, enabled=bf16): value = model.loss(**b)
            value.backward()
            for o in opts: o.step(); o.zero_grad()
        return run
    times = race({what: step(what) for what in PEERS}, core.at_scale(test=1, cpu=5, gpu=20), sora.device)
    return SimpleNamespace(world=world, sora=sora, new=new, draw=draw, bf16=bf16, batch=batch, vae=sora.card["vae_sha256"][:12], seconds={k: middle(v) for k, v in times.items()})


def peer(
    what,  # of `PEERS`
    lr,  # of both optimizers
    seed,  # of weights, batches and prompts
):
    "Train for the same seconds, counted in steps by what a step takes; loss on unseen clips (velocity, weighted as in training) and percent right of unseen long prompts, by attribute."
    d, n, budget = _peers(), core.at_scale(test=4, cpu=384, gpu=1024), core.at_scale(test=.1, cpu=100, gpu=100)
    model, steps = d.new(what, seed), max(2, round(budget/d.seconds[what]["median"]))
    recipe = Recipe(steps=steps, lr=lr, warmup=min(50, steps//4), muon=PEERS[what], ema=.99, bf16=d.bf16, compile=False, seed=seed)
    began = time.process_time()
    run = fit(model.dit, model.loss, d.draw, recipe, name=f"{what}, {lr}, seed {seed}")
    took, scenes, g = time.process_time() - began, d.world.sample(n, core.generator(2**40 + seed)), core.generator(2**41 + seed)
    z = d.sora.latents(d.world.render(scenes).to(model.device))
    with torch.no_grad(): loss = model.loss(z, torch.randn(z.shape, generator=g).to(z.device), sample_times(n, 2.5, g).to(z.device), model.ids(d.world.caption(scenes))).item()
    drawn = cli.draw(model, d.world.caption(scenes), [n*seed + k for k in range(n)], quiet=True)
    return dict(budget=budget, processor_seconds=round(took, 1), seconds_a_step=d.seconds[what], steps=steps, batch=d.batch, flops=run["flops"], parameters=core.num_params(model.dit), loss=round(loss, 5), n=n,
                right={k: round(100*v.rate, 3) for k, v in grade(drawn, scenes).rates.items()}, vae=d.vae, bf16=d.bf16, compiled=False)


# --- raven (claim 4, chapter 13): the ninth cell, drawn and chosen, by size of model

@lru_cache
def chapter(name):
    "What a chapter without a module defines: its cells of nothing but imports, functions, classes and constants in capitals, exercises left out, run in order."
    space = {"__name__": name}
    for cell in json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("#| exercise"): continue
        tree = ast.parse(source)
        constant = lambda n: isinstance(n, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() for t in n.targets)
        if all(isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or constant(n) for n in tree.body): exec(compile(tree, name, "exec"), space)
    return SimpleNamespace(**space)


def raven(
    size,  # of `SIZES` in the chapter
    seed,  # of weights and batches
    without="",  # an attribute and its rule that are never trained; else the chapter's held-out combination is
):
    "Train on whole matrices, then grade the ninth cell, drawn and chosen."
    torch.set_num_threads(1)
    return chapter("13_raven").point(size, seed, without)[1]


# --- probes (claims 6, 7, 9 and 10, chapter 37): one world, many learners, one axis

WATCHED = "CLIP", "Cap", "CapPa", "DiT", "DALL·E", "iGPT", "random network"


def probes(
    learner,  # of `LEARNERS` in the chapter, or `pixels`
    seed,  # of weights and batches
):
    "Train, and on the way read shape, color, size, texture and background off the features by linear probes; at the end also with few labels, and characters of fonts."
    torch.set_num_threads(1)
    return chapter("37_probes").point(learner, seed)[1]


def points():
    "Name → function and its points, in the order in which they run: one seed of everything first."
    budgets = core.at_scale(test=(.001,), cpu=(5, 20), gpu=(20, 80, 320))
    return dict(latents=(latents, [dict(what=what, tflop=b, seed=seed) for seed in (0, 1, 2) for b in budgets for what in ("latents", "raw")]),
                trials=(latents, [dict(what="latents", tflop=core.at_scale(test=.001, cpu=15, gpu=60), seed=0, trial=trial) for trial in TRIALS]),
                abilities=(abilities, [dict(width=w, seed=seed) for seed in (0, 1, 2) for w in core.at_scale(test=(16,), cpu=tuple(WIDTHS), gpu=(*WIDTHS,))]),
                drawing=(drawing, [dict(what=w, seed=seed) for w, seeds in DRAWING.items() for seed in seeds]),
                levels=(levels, [dict(size=size, tflop=b, seed=seed) for seed in (0, 1) for b in core.at_scale(test=(.001,), cpu=(5, 20, 80), gpu=(20, 80, 320)) for size in SIZES]),
                limits=(limits, [dict(what=what, seed=seed) for seed in (0, 1, 2) for what in ARMS]),
                peer=(peer, [dict(what=what, lr=lr, seed=0) for what, lr in (("DiT, Muon + AdamW", 2e-3), ("U-Net, AdamW", 2e-3), ("DiT, AdamW", 2e-3), ("U-Net, AdamW", 5e-4))]),
                raven=(raven, [dict(size=size, seed=seed, without="") for seed in core.at_scale(test=(0,), cpu=(0, 1, 2), gpu=(0, 1, 2)) for size in ("3k", "18k", "63k", "0.2M", "0.8M")] + [dict(size="63k", seed=0, without="color distribute three")]),
                probes=(probes, [dict(learner="pixels", seed=0)] + [dict(learner=l, seed=seed) for seed in (0, 1, 2) for l in WATCHED]))


# --- the runner

def study(name, out, only=(), listing=False):
    "Run the points that the table does not have; returns the table."
    run, todo = points()[name]
    read = lambda: json.loads(out.read_text(encoding="utf-8")) if out.is_file() else dict(study=name, what=run.__doc__, world=VERSION, points=[])
    has = lambda table, point: any(point.items() <= {k: v for k, v in p.items() if k in point}.items() and p["scale"] == core.scale() for p in table["points"])
    todo = [p for p in todo if all(f"{k}={v}" in only for k, v in p.items() if any(o.startswith(f"{k}=") for o in only))]
    for i, point in enumerate(todo):
        done, said = has(read(), point), " ".join(f"{k}={v}" for k, v in point.items())
        if done or listing: print(f"{i + 1}/{len(todo)} {said}: {'done' if done else 'to do'}", flush=True); continue
        began = time.monotonic()
        result = dict(point, **run(**point), scale=core.scale(),
                      device=torch.cuda.get_device_name() if core.device().type == "cuda" else f"{os.cpu_count()} CPU cores", minutes=round((time.monotonic() - began)/60, 1))
        table = read()  # again: another runner may have added its own
        table["points"].append(result)
        core.write_atomic(out, json.dumps(table, indent=1, allow_nan=False) + "\n")
        print(f"{i + 1}/{len(todo)} {said}: {json.dumps({k: v for k, v in result.items() if k not in point})}", flush=True)
    return read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(points()))
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="only the points that say so")
    parser.add_argument("--out", type=Path, help="the table (default: minisora/results/NAME.json)")
    args = parser.parse_args()
    if not args.out and core.scale() == "test": sys.exit("study.py: numbers of the test scale mean nothing: expected --out FILE")
    study(args.name, args.out or ROOT/"minisora"/"results"/f"{args.name}.json", args.only, args.list)


if __name__ == "__main__":
    main()
