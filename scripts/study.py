"""Run a study: a sweep too large for a chapter, point by point.

    python scripts/study.py latents             goes on where it stopped; in the background: nohup … >study.log 2>&1 &
    python scripts/study.py latents --list      what is done and what is left
    python scripts/study.py latents --only seed=0 what=raw

The table is minisora/results/NAME.json, written anew after each point; the chapter plots it, and calls the study's function
for one point of it, which must come out within the spread of the seeds (`sys.path.append("../scripts"); from study import latents`).
A study is a function from a point (seed among its arguments) to a dict of numbers, `flops` among them, and a list of points.
"""
import argparse, ast, json, os, sys, tempfile, time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange

from minisora import bayes, cli, core
from minisora.data import WorldClips
from minisora.dit import DiT
from minisora.flow import flow_loss, guide, sample_euler, sample_times
from minisora.information import LOGSNR, information, measure
from minisora.sora import Sora
from minisora.text import Tokenizer
from minisora.train import Recipe, fit
from minisora.world import LEVELS, VERSION, World, grade

ROOT = Path(__file__).resolve().parent.parent


# --- latents (claim 17, chapter 40): the same DiT on a VAE's latents and on raw patches, at equal training FLOPs

@lru_cache
def _latents_data():
    "What every point shares: scenes, captions, and clips as either kind of token, there and back."
    world, sora, pool = World(), Sora.from_pretrained("t2v", core.device()), core.at_scale(test=32, cpu=20_000, gpu=100_000)
    c, scenes = sora.vae.config, world.sample(pool, core.generator(0))
    captions = world.caption(scenes, "long")
    words, here = Tokenizer.from_texts(captions), sora.device
    ids = words.encode(captions)[0]
    cut, lay = "b (f pf) c (h ph) (w pw) -> b f (pf c ph pw) h w", "b f (pf c ph pw) h w -> b (f pf) c (h ph) (w pw)"
    size = dict(pf=c.frames, ph=c.patch, pw=c.patch)
    def raw(clips):  # frame 0 is repeated, to fill a box of its own
        return rearrange(torch.cat([clips[:, :1].repeat(1, c.frames, 1, 1, 1), clips[:, 1:]], 1), cut, **size)
    return SimpleNamespace(world=world, scenes=scenes, words=words, ids=ids, here=here, vae=sora.card["vae_sha256"][:12], ways=dict(
        latents=(c.channels, lambda clips: sora.latents(clips.to(here)), sora.clips),
        raw=(3*c.frames*c.patch**2, raw, lambda z: rearrange(z, lay, c=3, **size)[:, c.frames - 1:])))


def latents(
    what,  # `latents` or `raw`
    tflop,  # of training, the optimizer's products included
    seed,  # of weights and batches
):
    "Train for so many FLOPs, draw unseen prompts, grade."
    d = _latents_data()
    channels, there, back = d.ways[what]
    batch, n = core.at_scale(test=4, cpu=32, gpu=128), core.at_scale(test=4, cpu=256, gpu=512)

    def train(steps):
        torch.manual_seed(seed)
        net = DiT(channels, vocab=d.words.vocab_size, width=192, depth=4, text_width=96).to(d.here)
        def draw(g):
            i = torch.randint(len(d.scenes), (batch,), generator=g)
            x0 = there(d.world.render(d.scenes[i])).cpu()
            return dict(x0=x0, t=sample_times(batch, 2.5, g), eps=torch.randn(x0.shape, generator=g), text=d.ids[i]*(torch.rand(batch, 1, generator=g) > .1))
        recipe = Recipe(steps=steps, warmup=min(50, steps//3 + 1), seed=seed, compile=core.at_scale(test=False, cpu=True, gpu=True))
        return net, fit(net, lambda **b: flow_loss(net, **b), draw, recipe, name=f"{what}, {tflop} TFLOP, seed {seed}")

    steps = max(2, round(tflop*1e12/train(1)[1]["flops"]))
    net, run = train(steps)
    test = d.world.sample(n, core.generator(10_000 + seed))
    text = d.words.encode(d.world.caption(test, "long"), length=d.ids.shape[1])[0].to(d.here)
    noise = torch.randn(n, *there(d.world.render(test[:1]))[0].shape, generator=core.generator(seed)).to(d.here)
    with torch.no_grad(): drawn = back(sample_euler(guide(net, 2., dict(text=torch.zeros_like(text[:1]))), noise, steps=20, shift=2.5, text=text)).cpu()
    return dict(steps=steps, batch=batch, flops=run["flops"], parameters=core.num_params(net), loss=sum(run["losses"][-50:])/len(run["losses"][-50:]), n=n,
                right={k: round(100*v.rate, 3) for k, v in grade(drawn, test).rates.items()}, vae=d.vae, compiled=run["compiled"])


# --- levels (claims 12 and 13, chapter 33): every length of caption against compute, for two sizes of model

SIZES = dict(small=dict(width=48, depth=3, heads=2, text_width=48), large={})  # large: as the preset `figure`


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


def levels(
    size,  # `small` or `large`
    tflop,  # of training, the optimizer's products included
    seed,  # of weights and batches
):
    "Train on every level of caption at once for so many FLOPs; excess over the floor in bits, and pictures right, by level."
    p, n = cli.preset("figure"), core.at_scale(test=8, cpu=128, gpu=512)
    p.dit = p.dit | SIZES[size]
    bf16 = core.device().type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # in hardware; elsewhere float32
    def train(steps):
        p.dit_recipe = replace(p.dit_recipe, steps=steps, warmup=min(100, steps//4), compile=core.at_scale(test=False, cpu=steps >= 2000, gpu=True), bf16=bf16, save_every=steps)
        with tempfile.TemporaryDirectory() as out: return cli.train_sora(p, WorldClips(World(**p.world), dict.fromkeys(p.captions, 1)), out, seed)
    steps = max(2, round(tflop*1e12/train(1).card["flops"]))
    model = train(steps)
    world, scenes, pictures, said = _tiny()
    text, grid = {level: model.ids(world.caption(scenes, level)) for level in LEVELS}, torch.arange(LOGSNR[0], LOGSNR[1] + .1, core.at_scale(test=2.75, cpu=1., gpu=.5))
    seen = measure(pictures, said, grid, n, seed, lambda xt, t, i, level: model.dit(xt.to(model.device), t.expand(len(xt)).to(model.device), text[level][i]).cpu())
    return dict(steps=steps, batch=p.dit_batch, flops=model.card["flops"], parameters=core.num_params(model.dit), n=n, bf16=bf16, compiled=model.card["compiled"],
                excess={level: round(information([r.excess for r in seen[level]], grid).bits, 4) for level in LEVELS},
                right={k: round(v, 2) for k, v in right_pictures(model, n, seed).items()})


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


def points():
    "Name → function and its points, in the order in which they run: one seed of everything first."
    budgets = core.at_scale(test=(.001,), cpu=(2, 8, 32), gpu=(32, 128, 512))
    return dict(latents=(latents, [dict(what=what, tflop=b, seed=seed) for seed in (0, 1, 2) for b in budgets for what in ("latents", "raw")]),
                levels=(levels, [dict(size=size, tflop=b, seed=seed) for seed in (0, 1) for b in core.at_scale(test=(.001,), cpu=(.15, .5, 1.5, 4.5), gpu=(5, 15, 45)) for size in SIZES]),
                raven=(raven, [dict(size=size, seed=seed, without="") for seed in core.at_scale(test=(0,), cpu=(0, 1, 2), gpu=(0, 1, 2)) for size in ("3k", "18k", "63k", "0.2M", "0.8M")] + [dict(size="63k", seed=0, without="color distribute three")]))


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
