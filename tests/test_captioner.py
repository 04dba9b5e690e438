"The captioner: one pass = word by word, cache = no cache, what each way of predicting may know, scores by hand, checkpoints, bad input, and the command line."
import json, math, shutil
from pathlib import Path

import minisora
import pytest
import torch
from minisora import captioner, cli, core
from minisora.captioner import Captioner, CaptionerConfig, Encoder, caption_loss, generate, glimpses, nats, score
from minisora.core import generator, num_params
from minisora.data import Folder, write_clip
from minisora.text import Tokenizer
from minisora.train import Recipe, fit
from minisora.world import World

IMAGES, CLIPS = World(frames=1), World()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    words = Tokenizer.from_texts([c for W in (IMAGES, CLIPS) for level in ("long", "short") for c in W.caption(W.sample(300, generator(0)), level)])
    m = Captioner(CaptionerConfig(words.vocab_size, ("long", "short"), 16, width=32, encoder=1, decoder=2, heads=4), words).eval()
    for p in m.parameters(): p.data += .05*torch.randn_like(p)
    return m


def batch(model, b=3):
    s = CLIPS.sample(b, generator(1))
    return CLIPS.render(s), model.tokenizer.encode(CLIPS.caption(s), length=14)[0], torch.zeros(b, dtype=torch.long), CLIPS.caption(s)


@torch.no_grad()
def test_no_word_knows_a_later_one_and_in_parallel_none_knows_any(model):
    clips, text, level, _ = batch(model)
    other = text.clone(); other[:, 4] = torch.where(text[:, 4] == 257, 258, 257)
    a, b = model(clips, text, level), model(clips, other, level)
    assert a.shape == (3, 15, model.config.vocab) and torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and (a - b)[:, 5:].abs().amax((0, 2)).min() > 1e-4
    flags = torch.tensor([True, False, True])
    a, b = model(clips, text, level, flags), model(clips, other, level, flags)
    assert torch.equal(a[flags], b[flags]) and not torch.equal(a[~flags], b[~flags])
    assert torch.allclose(a[~flags], model(clips, text, level)[~flags], atol=1e-5)                # one flag does not touch its neighbours
    assert not torch.allclose(a, model(clips, text, level + 1, flags), atol=1e-3)                 # the kind of caption is known both ways
    assert not torch.allclose(a, model(clips.flip(0), text, level, flags), atol=1e-3)             # and so is the picture


@torch.no_grad()
def test_scores_by_hand(model):
    clips, text, level, captions = batch(model)
    logp = model(clips, text, level).log_softmax(-1)
    for i in range(3):
        ids = [*text[i][text[i] > 0].tolist(), 0]
        want = sum(logp[i, j, k] for j, k in enumerate(ids))/math.log(2)
        assert abs(score(model, clips[i:i + 1], [captions[i]]) - want).max() < 1e-3
    together = score(model, clips, captions, chunk=2)
    assert together.shape == (3, 3) and torch.allclose(together, score(model, clips, [captions]*3), atol=1e-3)
    assert torch.allclose(together[:, 1:], score(model, clips, captions[1:]), atol=1e-3)          # however long the others are
    assert torch.allclose(nats(model(clips, text, level), text).sum(1), -together.diagonal()*math.log(2), atol=1e-2)
    words = (text > 0).sum() + 3
    assert torch.allclose(caption_loss(model, clips, text, level), -together.diagonal().sum()*math.log(2)/words, atol=1e-3)
    assert not torch.allclose(together, score(model, clips, captions, parallel=True), atol=1e-2)
    assert torch.equal(score(model, clips, captions, "long"), together) and not torch.allclose(score(model, clips, captions, "short"), together, atol=1e-2)


@torch.no_grad()
def test_probabilities_of_all_captions_sum_to_one():
    words, W = Tokenizer(["a", "b"]), 2
    torch.manual_seed(1)
    m = Captioner(CaptionerConfig(words.vocab_size, length=W, width=16, encoder=1, decoder=1, heads=2, frames=1, patch=16), words).eval()
    x = torch.rand(1, 1, 3, 32, 32)*2 - 1
    m.head.weight.data[1:257] = 0; m.norm.weight.data.zero_(); m.norm.bias.data.normal_()         # some distribution over words, bytes among them
    logp = m(x, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)).log_softmax(-1)[0, 0]
    first = {t: 2**score(m, x, [t]).item() for t in ("", "a", "b", "a a", "a b", "b a", "b b")}
    assert abs(first[""] - logp[0].exp()) < 1e-5
    p, end = logp.exp(), logp[0].exp()
    assert abs(sum(first[t] for t in ("a", "b")) - (p[257] + p[258])*end) < 1e-5
    assert abs(sum(v for t, v in first.items() if " " in t) - (p[257] + p[258])**2*end) < 1e-5


@pytest.mark.parametrize("how", [dict(), dict(temperature=1.), dict(temperature=.5, level="short")])
def test_cache_word_for_word(model, how):
    clips = batch(model)[0]
    a, b = (generate(model, clips, cache=cache, generator=generator(2), **how) for cache in (True, False))
    assert a == b == generate(model, clips, generator=generator(2), **how) and len(a) == 3
    if "temperature" not in how: assert a[1:2] == generate(model, clips[1:2], **how)              # a caption is the same alone


def test_bytes_are_never_spoken(model):
    said = generate(model, batch(model)[0].repeat(20, 1, 1, 1, 1), temperature=3., generator=generator(0))
    assert not [w for text in said for w in text.split() if w not in model.tokenizer.ids]
    assert all(len(model.tokenizer.encode([t])[0][0]) <= model.config.length for t in said)


def test_glimpses():
    x = CLIPS.render(CLIPS.sample(2, generator(0)))
    assert torch.equal(glimpses(x, 5), x[:, [0, 4, 8, 12, 16]]) and torch.equal(glimpses(x, 1), x[:, :1])
    image = glimpses(x[:, :1], 5)
    assert image.shape[1] == 5 and torch.equal(image[:, :1], x[:, :1]) and not image[:, 1:].any()
    assert torch.equal(glimpses(x[:, :2], 5)[:, [0, 4]], x[:, :2])
    look = Encoder(32, 5, 8, 16, 1, 2)
    assert torch.equal(look(x), look(glimpses(x, 5))) and look(x).shape == (2, 16, 16)
    torch.testing.assert_close(look(x)[1:], look(x[1:]))


def test_learns_one_batch_by_heart():
    scenes = IMAGES.sample(6, generator(3))
    captions = IMAGES.caption(scenes, "short")
    words = Tokenizer.from_texts(captions)
    torch.manual_seed(0)
    m = Captioner(CaptionerConfig(words.vocab_size, ("short",), 4, width=32, encoder=1, decoder=1, heads=2, frames=1), words)
    x, text = IMAGES.render(scenes), words.encode(captions, length=4)[0]
    def draw(g): return dict(clips=x, text=text, level=torch.zeros(6, dtype=torch.long), parallel=(torch.rand(1, generator=g) < .75).expand(6))
    fit(m, lambda **b: caption_loss(m, **b), draw, Recipe(steps=100, warmup=5, lr=4e-3, muon=4., ema=.8, compile=False))
    m.eval()
    assert generate(m, x) == captions and score(m, x, [[c] for c in captions]).min() > -2.2


def test_checkpoint(model, tmp_path):
    clips, _, _, captions = batch(model)
    model.save_pretrained(tmp_path/"a", seed=7)
    again = Captioner.from_pretrained(tmp_path/"a")
    assert again.card["seed"] == 7 and again.config == model.config and torch.equal(score(again, clips, captions), score(model, clips, captions))
    file = again.save_pretrained(tmp_path/"b.safetensors", half=True)
    assert file.stat().st_size < .6*(tmp_path/"a"/"model.safetensors").stat().st_size
    assert (score(Captioner.from_pretrained(file), clips, captions) - score(model, clips, captions)).abs().max() < 1
    with pytest.raises(core.UserError, match="no weights at"): Captioner.from_pretrained(tmp_path/"none")
    with pytest.raises(core.UserError, match="expected the weights of a captioner"): Captioner.from_pretrained(Path(minisora.__file__).parent/"weights"/"t2v.safetensors")
    card = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(dict(card, words=card["words"][1:])))
    with pytest.raises(core.UserError, match="does not fit its card"): Captioner.from_pretrained(file)


@pytest.mark.parametrize("wrong, words", [(dict(captions=[]), "captions has"), (dict(captions=[["a"], ["a", "b"], ["a"]]), "captions has"), (dict(captions=["a "*40]), "40 tokens"),
                                          (dict(captions=["a"], level="loud"), "expected one of long, short")])
def test_bad_questions(model, wrong, words):
    with pytest.raises(ValueError, match=words): score(model, batch(model)[0], **wrong)


def test_bad_pictures_and_configs(model):
    for x in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 1, 32, 32), torch.zeros(2, 1, 3, 16, 32)):
        with pytest.raises(ValueError, match="expected \\(b, f, 3, 32, 32\\)"): generate(model, x)
    with pytest.raises(ValueError, match="temperature"): generate(model, batch(model)[0], temperature=-1.)
    with pytest.raises(ValueError, match="patch"): Encoder(32, 1, 7, 16, 1, 2)
    with pytest.raises(ValueError, match="the tokenizer has"): Captioner(CaptionerConfig(5), Tokenizer(["a"]))


# --- what ships

@pytest.fixture(scope="module")
def shipped(): return Captioner.from_pretrained()


def test_shipped_captioner(shipped):
    file = Path(captioner.__file__).parent/"weights"/"captioner.safetensors"
    assert file.stat().st_size <= 3e6 and num_params(shipped) < 1.5e6 and shipped.config.levels[0] == "long"
    s = IMAGES.sample(60, generator(77))
    x, true = IMAGES.render(s), IMAGES.caption(s)
    said = IMAGES.asked(generate(shipped, x))
    assert (said.color == s.color).float().mean() > .5 and (said.background == s.background).float().mean() > .8      # chance: an eighth, a third
    assert (score(shipped, x, [[c, d] for c, d in zip(true, true[1:] + true[:1])])).argmax(1).float().mean() < .2      # rather its own caption than the next picture's


# --- minisora caption

def test_command_line(tmp_path, capsys):
    s = CLIPS.sample(2, generator(5))
    clip, image = CLIPS.render(s)[0], IMAGES.render(IMAGES.sample(1, generator(5)))[0]
    write_clip(clip, tmp_path/"in"/"a.gif"); write_clip(image, tmp_path/"in"/"deep"/"b.png"); write_clip(image, tmp_path/"in"/".hidden"/"c.png")
    (tmp_path/"in"/"torn.gif").write_bytes(b"GIF89a"); (tmp_path/"in"/"notes.txt").write_text("not a picture")
    def call(*args):
        capsys.readouterr()
        code = cli.main(["caption", *map(str, args)])
        return code, *(x.splitlines() for x in capsys.readouterr())
    code, out, err = call(tmp_path/"in", tmp_path/"gone.png")
    assert code == 0 and [l.split(": ")[0] for l in out] == [str(tmp_path/"in"/"a.gif"), str(tmp_path/"in"/"deep"/"b.png")] and all(l.endswith("% sure)") for l in out)
    assert len(err) == 2 and "torn.gif" in err[0] and "gone.png" in err[1] and all(l.startswith("minisora: ") for l in err)
    code, out, err = call(tmp_path/"in"/"a.gif", "--json", "--level", "short")
    line = json.loads(out[0])
    assert code == 0 and not err and set(line) == {"file", "caption", "bits"} and line["bits"] >= 0
    code, out, err = call(tmp_path/"in", "--json")                                                  # of a folder: lines for its captions.jsonl
    (tmp_path/"in"/"captions.jsonl").write_text("\n".join(out), encoding="utf-8")
    assert [json.loads(l)["file"] for l in out] == ["a.gif", "deep/b.png"] and [name for name, _ in Folder(tmp_path/"in", say=lambda line: None).items] == ["a.gif", "deep/b.png"]
    model = Captioner.from_pretrained()
    assert line["caption"] == generate(model, cli_clip(tmp_path/"in"/"a.gif"), "short")[0]
    (tmp_path/"none").mkdir()
    for args, words in (([tmp_path/"in"/"torn.gif"], "torn.gif can be read"), ([tmp_path/"none"], "none can be read"), ([tmp_path/"in"/"a.gif", "--level", "loud"], "--level is 'loud'"), ([tmp_path/"in"/"a.gif", "--weights", "nowhere"], "no weights"),
                        ([tmp_path/"in"/"a.gif", "--weights", "t2v"], "expected the weights of a captioner"), ([], "required")):
        code, out, err = call(*args)
        assert code == 2 and not out and words in err[-1] and err[-1].startswith("minisora: "), err


def cli_clip(file):
    from minisora.data import read_clip
    return read_clip(file)[None]


def test_training_from_the_command_line(tmp_path, capsys):
    train = ["train", "--preset", "captioner", "--steps", "3", "--batch", "4", "--seed", "3"]
    for data in ("world", "folder"):
        if data == "folder":
            W = World()
            s = W.sample(3, generator(8))
            for i, x in enumerate(W.render(s)): write_clip(x, tmp_path/"folder"/f"{i}.gif"); (tmp_path/"folder"/f"{i}.txt").write_text(W.caption(s)[i])
        out = tmp_path/f"run-{data}"
        args = [*train, "--data", str(tmp_path/"folder") if data == "folder" else "world", "--out", str(out)]
        assert cli.main(args) == 0
        model = Captioner.from_pretrained(out)
        assert model.card["data"] == data and model.card["command"].startswith("minisora train --preset captioner") and str(tmp_path) not in json.dumps(model.card)
        assert model.config.levels == (tuple(cli.SAID) if data == "world" else ("own",))
        assert cli.main(args) == 2 and cli.main([*args, "--resume"]) == 0                          # a run is not overwritten, a finished one stays as it is
        if data == "world":
            shutil.copytree(out, tmp_path/"again"); shutil.rmtree(out)
            assert cli.main(args) == 0 and (out/"model.safetensors").read_bytes() == (tmp_path/"again"/"model.safetensors").read_bytes()
    assert cli.main(["caption", str(tmp_path/"folder"/"0.gif"), "--weights", str(tmp_path/"run-folder")]) == 0
