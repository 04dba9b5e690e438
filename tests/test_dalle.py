"DALL·E: one stream of words and codes, its pads, places and losses; pictures that depend on nothing but prompt, seed and what is given; its files."
import json, math, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minisora import cli, core
from minisora.core import generator
from minisora.dalle import Dalle, DalleConfig, Places, agreement, complete, start_from_patches
from minisora.text import Tokenizer
from minisora.vq import VQConfig, VQVAE
from minisora.world import VERSION, World, grade

WEIGHTS = Path(cli.__file__).parent / "weights"
WORDS = ["a", "blue", "circle", "red", "star"]


def small(seed=0, text=6, **options):
    "A Dalle nobody trained: 16 codes of 8x8 pixels, images of 32x32."
    torch.manual_seed(seed)
    vq = VQVAE(VQConfig(codes=16, channels=192, width=192, encoder=0, decoder=1, heads=2, patch=8))
    start_from_patches(vq, World(frames=1).render(World(frames=1).sample(40, generator(seed))), generator(seed))
    model = Dalle(DalleConfig(len(WORDS), 16, text, 4, 4, 32, 2, 2, **options), vq, Tokenizer(WORDS))
    for p in model.gpt.parameters(): torch.nn.init.normal_(p, std=.2) if p.ndim > 1 else None  # no two tokens alike
    return model.eval()


@pytest.fixture(scope="module")
def model(): return small()


def test_a_stream_is_begin_words_pads_codes_in_one_vocabulary(model):
    ids = model.ids(["a red star", ""])
    assert ids.tolist() == [[1, 4, 5, 9, 10, 11], [6, 7, 8, 9, 10, 11]]       # each place has a pad of its own
    stream = model.stream(ids, torch.tensor([[0, 15], [3, 3]]))
    assert stream.tolist() == [[0, 1, 4, 5, 9, 10, 11, 12, 27], [0, 6, 7, 8, 9, 10, 11, 15, 15]]
    assert model.gpt.vocab == 28 and model.gpt.length == 1 + 6 + 16


def test_words_never_trained_are_said_once_and_left_out():
    model = small()
    with pytest.warns(UserWarning, match="'purple'"): ids = model.ids(["a purple star"])
    assert torch.equal(ids, model.ids(["a star"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.ids(["a purple star"])


def test_places_add_row_and_column():
    places = Places(3, 2, 4, 8)
    assert places.weight.shape == (3 + 8, 8)
    for r in range(2):
        for c in range(4): assert torch.equal(places.weight[3 + 4*r + c], places.row[r] + places.col[c])
    assert sum(p.numel() for p in places.parameters()) == (3 + 2 + 4)*8


def test_loss_is_the_paper_s_weighted_sum_of_two_means(model):
    text, tokens = model.ids(["a red star", "a blue circle"]), torch.randint(16, (2, 16), generator=generator(1))
    stream = model.stream(text, tokens)
    logp = model.gpt(stream[:, :-1]).log_softmax(-1)
    each = torch.stack([-logp[:, i, :].gather(1, stream[:, i + 1:i + 2])[:, 0] for i in range(22)], 1)
    loss, words, image = model.loss(text, tokens)
    assert torch.allclose(words, each[:, :6].mean(), atol=1e-5) and torch.allclose(image, each[:, 6:].mean(), atol=1e-5)
    assert torch.allclose(loss, words/8 + image*7/8, atol=1e-6)
    blind = small(text_weight=0.)
    assert torch.equal(blind.loss(text, tokens)[0], blind.loss(text, tokens)[2])


def test_no_word_sees_the_image_and_every_code_sees_every_word(model):
    text, tokens = model.ids(["a red star"]), torch.zeros(1, 16, dtype=torch.long)
    words, image = model.surprise(text, tokens)
    other, later = model.surprise(text, tokens + 1)
    assert torch.equal(words, other) and not torch.allclose(image, later)
    assert not torch.allclose(model.surprise(model.ids(["a blue star"]), tokens)[1], image)


def test_a_code_knows_its_patch_alone(model):
    clips = World(frames=1).render(World(frames=1).sample(8, generator(2)))
    half = clips.clone()
    half[..., 16:, :] = torch.randn(half[..., 16:, :].shape, generator=generator(3))
    assert torch.equal(model.tokens(clips)[:, :8], model.tokens(half)[:, :8])
    assert torch.equal(model.tokens(clips), model.vq.encode(clips).flatten(1))   # in eval mode; `tokens` does not move the codebook in any
    model.vq.train()
    book = model.vq.quantizer.codebook.clone()
    model.tokens(clips)
    model.vq.eval()
    assert torch.equal(book, model.vq.quantizer.codebook)


def test_start_from_patches_is_k_means_in_pixels():
    torch.manual_seed(0)
    vq = VQVAE(VQConfig(codes=64, channels=48, width=64, encoder=0, decoder=0, heads=2))
    world = World(frames=1)
    clips = world.render(world.sample(64, generator(0)))
    start_from_patches(vq, clips, generator(0))
    vq.eval()
    patches = clips.unfold(3, 4, 4).unfold(4, 4, 4)                          # b 1 c 8 8 4 4
    patches = patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 3).flatten(1)
    assert torch.allclose(torch.cdist(vq.features(clips).flatten(0, 3)[:99], vq.features(clips).flatten(0, 3)[:99]), torch.cdist(patches[:99], patches[:99]), atol=.01)
    drawn = vq.decode(vq.encode(clips))                                      # no decoder: each patch becomes its code's small picture
    error = (drawn - clips).pow(2).mean()
    assert error < .02 and len(vq.encode(clips).unique()) > 50


def test_guidance_temperature_and_prefix(model):
    a = model.generate(["a red star"], cfg_scale=1., seed=3)
    assert a.shape == (1, 1, 3, 32, 32) and a.abs().max() <= 1
    assert torch.equal(a, model.generate("a red star", cfg_scale=1., seed=3)) and not torch.equal(a, model.generate("a red star", cfg_scale=1., seed=4))
    codes = torch.randint(16, (1, 5), generator=generator(1))
    begun = model.generate("a red star", given=codes, temperature=0., cfg_scale=1.)
    seen, stream = codes, model.stream(model.ids(["a red star"]), codes)
    for _ in range(11):                                                     # the slow way: no cache, greedy, among codes alone
        logits = model.gpt(stream)[:, -1]
        stream = torch.cat([stream, model.codes + logits[:, model.codes:].argmax(-1)[:, None]], 1)
    assert torch.allclose(begun, model.clips(stream[:, 7:] - model.codes), atol=1e-5)
    null = model.stream(model.ids([""]))
    logits = [model.gpt(s)[0, -1, model.codes:] for s in (model.stream(model.ids(["a red star"])), null)]
    first = (logits[1] + 3*(logits[0] - logits[1])).argmax()
    strong = model.gpt.generate(model.stream(model.ids(["a red star"])), 1, temperature=0., cfg_scale=3., null=null, allowed=torch.arange(28) >= model.codes)
    assert strong[0, -1] - model.codes == first


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(model):
    prompts = ["a red star", "a blue circle", "a star"]
    together = model.generate(prompts, seed=10)
    for k, p in enumerate(prompts): assert torch.allclose(together[k:k + 1], model.generate(p, seed=10 + k), atol=1e-5)
    assert torch.allclose(together, model.generate(prompts, seed=[10, 11, 12]), atol=1e-5)


def test_complete_keeps_the_top_and_never_looks_below(model):
    world = World(frames=1)
    clips = world.render(world.sample(3, generator(4)))
    out = complete(model, clips, ["a red star"]*3, seed=1)
    blind = clips.clone(); blind[..., 16:, :] = 0
    assert torch.equal(out, complete(model, blind, ["a red star"]*3, seed=1))
    model.generate("a star", given=model.tokens(clips[:1])[:, :4], seed=1)
    for rows in (0, 4):
        with pytest.raises(ValueError, match="rows is"): complete(model, clips, ["a"]*3, rows=rows)


def test_agreement_is_a_difference_of_two_log_likelihoods(model):
    clips = model.clips(torch.randint(16, (2, 16), generator=generator(5)))
    tokens = model.tokens(clips)
    by_hand = []
    for k, prompt in enumerate(("a red star", "a blue circle")):
        total = []
        for text in (prompt, ""):
            stream = model.stream(model.ids([text]), tokens[k:k + 1])
            logp = model.gpt(stream).log_softmax(-1)[0]
            total.append(sum(logp[i - 1, stream[0, i]] for i in range(7, 23)))
        by_hand.append(total[0] - total[1])
    assert torch.allclose(agreement(model, clips, ["a red star", "a blue circle"]), torch.stack(by_hand), atol=1e-3)
    assert torch.equal(agreement(model, clips, ["", ""]), torch.zeros(2))


@pytest.mark.parametrize("call, words", [
    (lambda m: m.generate([]), r"prompts is \[\]"), (lambda m: m.generate([3]), "prompts is"), (lambda m: m.generate("a", seed=[1, 2]), "seed lists 2 for 1"),
    (lambda m: m.generate("a", seed=.5), "seed is 0.5"), (lambda m: m.generate("a", cfg_scale=float("nan")), "cfg_scale is nan"), (lambda m: m.generate("a a a a a a a"), "has 7 words: expected at most 6"),
    (lambda m: m.generate("a", frames=17), "frames is 17: expected 1"), (lambda m: m.generate("a", sampler="heun"), "sampler is 'heun'"), (lambda m: m.generate("a", steps=3), "steps is 3: expected 16"),
    (lambda m: m.generate("a", given=torch.zeros(1, 16, dtype=torch.long)), r"given is \(1, 16\)"), (lambda m: m.generate("a", temperature=-1.), "temperature is -1"),
    (lambda m: Dalle(DalleConfig(4, 16), m.vq, m.tokenizer), "config.words is 4: expected 5"), (lambda m: Dalle(DalleConfig(5, 8), m.vq, m.tokenizer), "config.codes is 8: expected 16")])
def test_mistakes_are_named(model, call, words):
    with pytest.raises(ValueError, match=words): call(model)


def test_saved_and_loaded_it_draws_the_same(model, tmp_path):
    want = model.generate("a red star", seed=1)
    assert model.save_pretrained(tmp_path / "run", seed=7) == tmp_path / "run" / "model.safetensors"
    for name in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        again = Dalle.from_pretrained(name)
        assert torch.equal(again.generate("a red star", seed=1), want) and again.card["seed"] == 7
    model.save_pretrained(tmp_path / "half.safetensors", half=True)
    half = Dalle.from_pretrained(tmp_path / "half.safetensors")
    assert half.gpt.head.weight.dtype == torch.float32 and torch.allclose(half.gpt.head.weight, model.gpt.head.weight, atol=1e-3)
    first, second = (tmp_path / "run" / f"model{s}" for s in ("-vq.safetensors", "-vq.json"))
    small(seed=1).save_pretrained(tmp_path / "other")
    for f in (first, second): f.write_bytes((tmp_path / "other" / f.name).read_bytes())
    with pytest.raises(core.UserError, match="not the VQ that"): Dalle.from_pretrained(tmp_path / "run")
    with pytest.raises(core.UserError, match="holds sora"): Dalle.from_pretrained(WEIGHTS / "pairs.safetensors")
    with pytest.raises(core.UserError, match="no weights at nowhere"): Dalle.from_pretrained("nowhere")
    card = json.loads((tmp_path / "half.json").read_text())
    card["dalle"]["width"] = 64
    (tmp_path / "half.json").write_text(json.dumps(card))
    with pytest.raises(core.UserError, match="does not fit its card"): Dalle.from_pretrained(tmp_path / "half.safetensors")


def test_the_preset_trains_resumes_and_draws_on_the_command_line(tmp_path, monkeypatch, capsys):
    old = cli.preset
    def quick(name):
        p = old(name)
        p.pool, p.captions = 24, 2
        p.vae.update(codes=32, width=48, decoder=1, heads=2); p.dit.update(width=32, depth=1, heads=2)
        return p
    monkeypatch.setattr(cli, "preset", quick)
    out = tmp_path / "run"
    train = ["train", "--preset", "dalle", "--steps", "6", "--batch", "2", "--save-every", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main(train) == 0
    said = capsys.readouterr().out
    assert "(VQ)" in said and "for the GPT" in said
    card = json.loads((out / "model.json").read_text())
    assert card["kind"] == "dalle" and card["world"] == VERSION and card["scenes"] == dict(frames=1) and card["flops"] > 0 and card["sampling"]["steps"] == 64
    assert cli.main([*train, "--resume"]) == 0 and "finished already" in capsys.readouterr().out
    assert cli.main(["sample", "a red circle", "--weights", str(out), "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 0
    capsys.readouterr()
    for bad, words in ((["--frames", "17"], "frames is 17"), (["--height", "64"], "height is 64")):
        assert cli.main(["sample", "a red circle", "--weights", str(out), "--out", str(tmp_path / "y.png"), "--device", "cpu", *bad]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["demo", "--weights", str(out), "--out", str(tmp_path / "demo")]) == 2 and "draws images" in capsys.readouterr().err


shipped = pytest.mark.skipif(not (WEIGHTS / "dalle.safetensors").is_file(), reason="no weights of that name")

@shipped
def test_the_weights_that_ship():
    model = Dalle.from_pretrained("dalle")
    files = [WEIGHTS / f"dalle{s}.safetensors" for s in ("", "-vq")]
    assert sum(f.stat().st_size for f in files) < 6e6 and model.card["world"] == VERSION and {"device", "minutes", "flops", "command", "grades"} <= set(model.card)
    world = World(**model.card["scenes"])
    scenes = world.sample(24, generator(3))
    clips = world.render(scenes)
    assert grade(model.clips(model.tokens(clips)), scenes, "pixels").right.float().mean() > .85      # what the codes keep
    drawn = model.generate(world.caption(scenes), seed=5)
    assert grade(drawn, scenes).right.float().mean() > .5
    assert agreement(model, clips, world.caption(scenes)).mean() > agreement(model, clips, world.caption(scenes[torch.arange(24).roll(1)])).mean()
