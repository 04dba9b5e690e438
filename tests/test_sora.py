"Caption to clip: seeds, batches, sizes, prompts, checkpoints, and what the shipped model knows."
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import minisora
from minisora import core
from minisora.clip import CLIP, CLIPConfig
from minisora.core import UserError, find_weights, generator
from minisora.dit import DiT
from minisora.sora import Pixels, Sora, judge_file, vae_file
from minisora.text import Tokenizer
from minisora.vae import PatchVAE, VAEConfig
from minisora.world import World, grade

ROOT = Path(minisora.__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    words = Tokenizer.from_texts(World().caption(World().sample(500, generator(0)), "long"))
    m = Sora(DiT(8, vocab=words.vocab_size, width=48, depth=2), PatchVAE(VAEConfig(channels=8, width=48, encoder=1, decoder=1)), words)
    for layer in (m.dit.trunk.mod, m.dit.trunk.out): torch.nn.init.normal_(layer.weight, std=.05)     # at birth it would say nothing
    return m.eval()


PROMPTS = ["a red circle", "a large checkered blue star moving up and left on a white background", "", "a green bar spinning"]


def test_a_clip_is_the_same_whatever_its_batch(model):
    together = model.generate(PROMPTS, steps=4, seed=10, cfg_scale=3.)
    for k, prompt in enumerate(PROMPTS):
        assert (model.generate(prompt, steps=4, seed=10 + k, cfg_scale=3.)[0] - together[k]).abs().max() < 1e-5
    listed = model.generate(PROMPTS[:2], steps=4, seed=[11, 10], cfg_scale=3.)
    assert (listed[1] - model.generate(PROMPTS[1], steps=4, seed=10, cfg_scale=3.)[0]).abs().max() < 1e-5
    assert (together[0] - together[3]).abs().max() > 1e-3


@pytest.mark.parametrize("frames, height, width", [(1, 32, 32), (2, 16, 16), (17, 40, 24), (20, 32, 32)])
def test_any_number_of_frames_and_sizes(model, frames, height, width):
    clip = model.generate("a red circle", frames=frames, height=height, width=width, steps=2)
    assert clip.shape == (1, frames, 3, height, width) and clip.abs().max() <= 1


def test_samplers_are_chosen_by_name_and_by_card(model):
    made = {k: model.generate("a red circle", seed=3, sampler=k, steps=6) for k in ("euler", "ddim", "heun")}
    assert (made["euler"] - made["ddim"]).abs().max() < 1e-4 < (made["euler"] - made["heun"]).abs().max()
    model.card["sampling"] = dict(sampler="heun", steps=6)
    assert torch.equal(model.generate("a red circle", seed=3), made["heun"])
    del model.card["sampling"]


def test_prompts_guide(model):
    a, b, c = (model.generate("a red circle", seed=1, steps=4, cfg_scale=3., negative=n) for n in ("", "a blue star", "a red circle"))
    assert (a - b).abs().max() > 1e-4
    assert (c - model.generate("a red circle", seed=1, steps=4, cfg_scale=1.)).abs().max() < 1e-4    # led away from itself: nowhere


def test_latents_are_white_and_come_back(model):
    clips = World().render(World().sample(24, generator(1)))
    kept = model.mean.clone(), model.std.clone()
    model.measure(clips)
    z = model.latents(clips).detach()
    assert z.mean((0, 1, 3, 4)).abs().max() < 1e-4
    assert (z.transpose(1, 2).transpose(0, 1).flatten(1).cov() - torch.eye(8)).abs().max() < 1e-3
    assert (model.clips(z) - model.vae.decode(model.vae.encode(clips)[0]).clamp(-1, 1)).abs().max() < 1e-4
    model.mean.copy_(kept[0]); model.std.copy_(kept[1])


def test_one_spread_for_all_channels_still_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors, card = core.load(tmp_path/"model.safetensors")
    core.save(tmp_path/"model.safetensors", tensors | dict(std=torch.tensor(2.)), card)
    assert torch.equal(Sora.from_pretrained(tmp_path).std, 2*torch.eye(8))


def test_prompts_can_be_told_in_full(model, tmp_path):
    full = World().detail(PROMPTS[:2], [5, 6])
    direct = model.generate(full, steps=2, seed=5)
    model.detail = World().detail
    assert torch.equal(model.generate(PROMPTS[:2], steps=2, seed=5), direct)
    model.detail = None
    assert (model.generate(PROMPTS[:2], steps=2, seed=5) - direct).abs().max() > 1e-4
    assert Sora.from_pretrained(model.save_pretrained(tmp_path)).detail is None
    core.save(tmp_path/"model.safetensors", core.load(tmp_path/"model.safetensors")[0], model.card | dict(captions=["pixels", "short"]))   # taught to be told all
    assert torch.equal(Sora.from_pretrained(tmp_path).generate(PROMPTS[:2], steps=2, seed=5), direct)
    assert Sora.from_pretrained(tmp_path, as_is=True).detail is None


def test_unknown_words_are_said_once_and_left_out(model):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, again = (model.ids(["A RED wug circle, please"]) for _ in range(2))
    assert len(said) == 1 and "wug" in str(said[0].message) and torch.equal(first, again)
    assert torch.equal(first, model.ids(["a red circle"]))


def test_words_that_ask_for_what_cannot_be_shown_are_said_once(tmp_path):
    model = Sora.from_pretrained("t2v")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2): model.generate(["a red circle and a blue square", "a red circle"], steps=1, best_of=2)
    assert len(said) == 1 and "'blue', 'square'" in str(said[0].message)


def test_weights_of_another_world_are_refused(tmp_path):
    Sora.from_pretrained("t2v").save_pretrained(tmp_path, world="999")
    with pytest.raises(core.UserError, match="was trained on world '999', this is world '1'"): Sora.from_pretrained(tmp_path)


def test_a_seed_is_any_whole_number_or_a_row_of_them(model):
    want = model.generate(["a", "b"], seed=3, steps=1)
    for seed in (np.int64(3), torch.tensor(3), [3, 4], range(3, 5), np.array([3, 4]), torch.tensor([3, 4])): assert torch.equal(model.generate(["a", "b"], seed=seed, steps=1), want)


@pytest.mark.parametrize("wrong, says", [(dict(prompts=[]), "prompts"), (dict(frames=0), "frames"), (dict(frames=2.5), "frames"), (dict(height=33), "height"), (dict(width=36), "width is 36: expected a multiple of"), (dict(prompts=7), "prompts"),
    (dict(sampler="x"), "sampler"), (dict(prompts=None), "prompts"), (dict(prompts=[1]), "prompts"), (dict(frames=True), "frames"), (dict(height=32.), "height"), (dict(cfg_scale=math.nan), "cfg_scale"), (dict(cfg_scale="2"), "cfg_scale"),
    (dict(seed=None), "seed"), (dict(seed="a"), "seed"), (dict(seed=1.5), "seed"), (dict(seed=2**64 + 5), "seed"), (dict(seed=[1, 2]), "seed"), (dict(steps=0), "steps"), (dict(best_of=0), "best_of"), (dict(best_of=1.5), "best_of"), (dict(image=torch.zeros(3, 32, 32)), "image")])
def test_wrong_arguments_are_named(model, wrong, says):
    with pytest.raises(ValueError, match=says): model.generate(**{**dict(prompts="a", steps=1), **wrong})


def test_a_negative_without_guidance_is_said(model):
    with pytest.warns(UserWarning, match="negative says nothing at cfg_scale 1"): model.generate("a", steps=1, negative="b", cfg_scale=1)


def test_save_load_identity(model, tmp_path):
    model.save_pretrained(tmp_path/"a", data="nothing")
    loaded = Sora.from_pretrained(tmp_path/"a")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(loaded.generate(PROMPTS[:2], steps=2), model.generate(PROMPTS[:2], steps=2)) and loaded.card["data"] == "nothing"
    loaded.save_pretrained(tmp_path/"b")
    for f in ("model.safetensors", "model-vae.safetensors", "model.json"): assert (tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes()


def test_pixels_instead_of_a_vae(tmp_path):
    words = Tokenizer.from_texts(["a red circle"])
    model = Sora(DiT(3, vocab=words.vocab_size, width=48, depth=2, patch=(1, 4, 4)), Pixels(), words, dict(sampling=dict(frames=1, height=16, width=24)))
    torch.nn.init.normal_(model.dit.trunk.out.weight, std=.05)
    clips = torch.rand(2, 1, 3, 16, 16)*2 - 1
    assert torch.equal(model.latents(clips), clips) and torch.equal(model.clips(clips), clips)
    model.save_pretrained(tmp_path, half=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    again = Sora.from_pretrained(tmp_path)
    drawn = again.generate("a red circle", steps=2)
    assert drawn.shape == (1, 1, 3, 16, 24) and isinstance(again.vae, Pixels)       # the card knows the size
    assert again.generate("a red circle", steps=2, frames=2, height=8).shape == (1, 2, 3, 8, 24)
    assert (drawn - model.generate("a red circle", steps=2)).abs().max() < .02
    again.save_pretrained(tmp_path/"b", half=True)
    assert (tmp_path/"b"/"model.safetensors").read_bytes() == (tmp_path/"model.safetensors").read_bytes()


def test_checkpoints_that_do_not_fit(model, tmp_path):
    with pytest.raises(UserError, match="t2v"): find_weights(tmp_path/"none")
    file = model.save_pretrained(tmp_path/"a")
    other = tmp_path/"b"/"model.safetensors"
    other.parent.mkdir()
    for f in (tmp_path/"a").iterdir(): shutil.copy(f, other.parent)
    data = bytearray(other.read_bytes()); data[-5] ^= 1; other.write_bytes(data)
    with pytest.raises(UserError, match="sha256"): Sora.from_pretrained(other)
    other.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated|sha256"): Sora.from_pretrained(other)
    shutil.copy(file, other)
    vae_file(other).unlink()
    with pytest.raises(UserError, match="model-vae"): Sora.from_pretrained(other)
    with pytest.raises(UserError, match="expected the weights of a Sora"): Sora.from_pretrained(vae_file(file))


def test_the_best_of_several(model):
    "The judge's choice among clips of which the first is the one drawn alone; the same in every batch."
    class Bright:
        seen = []
        def fits(self, clips, prompts): self.seen.append((clips, prompts)); return clips.flatten(1).mean(1)
    with pytest.raises(ValueError, match="best_of is 2, but this model has no judge"): model.generate("a", best_of=2, steps=1)
    alone = model.generate(PROMPTS, steps=2, seed=7)
    try:
        model.judge = Bright()
        best = model.generate(PROMPTS, steps=2, seed=7, best_of=3)
        (clips, prompts), = model.judge.seen
        assert clips.shape[0] == 12 and prompts == [p for p in PROMPTS for _ in range(3)] and (clips[::3] - alone).abs().max() < 1e-5
        assert torch.equal(best, clips.view(4, 3, *clips.shape[1:])[torch.arange(4), clips.flatten(1).mean(1).view(4, 3).argmax(1)])
        for k, p in enumerate(PROMPTS): assert (model.generate(p, steps=2, seed=7 + k, best_of=3)[0] - best[k]).abs().max() < 1e-5
        wider = model.generate(PROMPTS, steps=2, seed=7, best_of=5).flatten(1).mean(1)
        assert (wider >= best.flatten(1).mean(1) - 1e-5).all() and (best.flatten(1).mean(1) >= alone.flatten(1).mean(1) - 1e-5).all()     # more are drawn, none is lost
        assert (best - alone).abs().max() > 1e-2
        model.card["sampling"] = dict(best_of=3)
        assert torch.equal(model.generate(PROMPTS, steps=2, seed=7), best) and torch.equal(model.generate(PROMPTS, steps=2, seed=7, best_of=1), alone)
    finally: model.judge, model.card = None, {}


def test_a_judge_is_saved_with_its_model(model, tmp_path):
    words = Tokenizer.from_texts(["a red circle"])
    try:
        model.judge = CLIP(CLIPConfig(words.vocab_size, width=24, depth=1, heads=1, text_width=24, text_depth=1, text_heads=1, embed=8), words)
        drawn = model.generate(PROMPTS, steps=2, best_of=4)
        file = model.save_pretrained(tmp_path/"a")
        assert sorted(f.name for f in (tmp_path/"a").glob("*.safetensors")) == ["model-judge.safetensors", "model-vae.safetensors", "model.safetensors"]
        again = Sora.from_pretrained(tmp_path/"a")
        assert torch.equal(again.generate(PROMPTS, steps=2, best_of=4), drawn) and not any(k.startswith("judge") for k in core.load(file)[0])
        again.save_pretrained(tmp_path/"b")
        for f in (tmp_path/"a").iterdir(): assert f.read_bytes() == (tmp_path/"b"/f.name).read_bytes()
        with torch.no_grad(): model.judge.token.add_(1)
        model.save_pretrained(tmp_path/"c")
        for f in (judge_file(file), judge_file(file).with_suffix(".json")): shutil.copy(tmp_path/"c"/f.name, f)
        with pytest.raises(UserError, match="model-judge.safetensors is missing, or not the judge"): Sora.from_pretrained(tmp_path/"a")
        judge_file(file).unlink()
        with pytest.raises(UserError, match="model-judge.safetensors is missing"): Sora.from_pretrained(tmp_path/"a")
        again.judge = None
        assert Sora.from_pretrained(again.save_pretrained(tmp_path/"d")).judge is None
    finally: model.judge, model.card = None, {}


def test_the_shipped_judge_tells_textures():
    "Clips through the VAE, as it will see them; chance is a third, and the CLIP that learned from sharp stills is at three quarters."
    model, W = Sora.from_pretrained("t2v"), World()
    scenes = W.sample(60, generator(8))
    with torch.no_grad(): clips = model.clips(model.latents(W.render(scenes)))
    texts = W.near(W.caption(scenes))
    right = model.judge.fits(clips, [row[:3] for row in texts])
    assert all((right > model.judge.fits(clips, [[row[k], row[0], row[3 - k]] for row in texts])).float().mean() > .85 for k in (1, 2)) and model.card["sampling"]["best_of"] > 1


def test_the_shipped_model_follows_captions():
    model = Sora.from_pretrained("t2v")
    assert find_weights("t2v").stat().st_size <= 8e6 and model.card["world"]
    scenes = World().sample(24, generator(5))
    rates = grade(model.generate(World().caption(scenes, "long"), seed=0), scenes).rates
    assert rates["background"].rate > .9 and rates["color"].rate > .7 and rates["motion"].rate > .6


def test_readme_python_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT/"README.md").read_text(encoding="utf-8"), re.S)[1]
    names = {}
    exec(code, names)
    assert names["clips"].shape == (1, 17, 3, 32, 32)


def test_new_words_find_room(model, tmp_path):
    "Old captions draw the very clips they drew; new words have rows of their own, which are trained; saved and loaded it is the same."
    import copy
    from minisora.sora import learn_words
    old, new = model.generate(PROMPTS, steps=3, seed=4), copy.deepcopy(model)
    words, rows = list(new.tokenizer.words), new.dit.words.weight.clone()
    torch.manual_seed(3)
    assert learn_words(new, ["A red zeppelin, landing", "a blue zeppelin", ""]) == [",", "landing", "zeppelin"] and learn_words(new, ["a zeppelin"]) == []
    assert new.tokenizer.words == words + [",", "landing", "zeppelin"] and torch.equal(new.dit.words.weight[:len(rows)], rows) and new.dit.words.weight.requires_grad
    assert torch.equal(new.generate(PROMPTS, steps=3, seed=4), old) and new.dit.config.vocab == new.tokenizer.vocab_size == len(new.dit.words.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = new.generate("a zeppelin landing", steps=3, seed=4, cfg_scale=3.)
    assert (said - new.generate("a", steps=3, seed=4, cfg_scale=3.)).abs().max() > 1e-3
    new.save_pretrained(tmp_path)
    assert torch.equal(Sora.from_pretrained(tmp_path).generate("a zeppelin landing", steps=3, seed=4, cfg_scale=3.), said)


def test_beyond_what_it_learned_a_model_says_so_once():
    model = Sora.from_pretrained("t2v")
    with pytest.warns(UserWarning, match="learned 17 frames of 32x32: of frames 25, width 48 expect little sense"): model.generate("a red circle", frames=25, width=48, steps=1, best_of=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("a red circle", frames=25, width=48, steps=1, best_of=2)
        model.generate("a red circle", frames=torch.tensor(9), steps=1, best_of=1)      # fewer are no matter; a number is a number
