"What a person types: every command, every format, every mistake in one line, and a killed run that comes back to the bit."
import html.parser, json, os, re, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from minisora import cli, core, data, sora, train, world
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a large red circle moving left on a black background"
TRAIN = "train --preset tiny --data world --steps 40 --save-every 5 --seed 5".split()


def started(*args, **kw):
    return subprocess.Popen([sys.executable, "-m", "minisora.cli", *map(str, args)], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **kw)


def pixels(file):
    "What is in a file, as it is: (f c h w) in [-1, 1]."
    if file.suffix == ".mp4":
        import av
        with av.open(str(file)) as video: frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    else:
        with Image.open(file) as image: frames = [np.asarray((image.seek(k), image.convert("RGB"))[1]) for k in range(image.n_frames)]
    return torch.tensor(np.stack(frames)).permute(0, 3, 1, 2) / 127.5 - 1


def ok(*args):
    assert cli.main([str(a) for a in args]) == 0, args


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    ok(*TRAIN, "--out", out)
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    out, w = tmp_path_factory.mktemp("clips"), world.World()
    scenes = w.sample(4, core.generator(1))
    for i, clip in enumerate(w.render(scenes)): data.write_clip(clip, out / f"{i}{cli.FORMATS[i % 3]}")
    (out / "captions.jsonl").write_text("".join(json.dumps(dict(file=f"{i}{cli.FORMATS[i % 3]}", caption=c)) + "\n" for i, c in enumerate(w.caption(scenes))))
    (out / "torn.gif").write_bytes(b"GIF89a")
    return out


@pytest.fixture
def says(capsys):
    def check(*args, code=2, words=""):
        "The one line that answers a mistake."
        capsys.readouterr()
        assert cli.main([str(a) for a in args]) == code
        lines = capsys.readouterr().err.splitlines()
        assert lines and lines[-1].startswith("minisora: ") and re.search(words, lines[-1]), lines
        assert len([l for l in lines if l.startswith("minisora: ")]) == 1
        return lines[-1]
    return check


# --- answers at once

@pytest.mark.parametrize("args, code", [(["--help"], 0), (["--version"], 0), (["sample", "--help"], 0), (["train", "--help"], 0), ([], 2), (["sample", "a"], 2),
    (["sample", "--out", "a.gif"], 2), (["sample", "a", "--out", "a.avi"], 2), (["sample", "a", "--out", "a.gif", "--weights", "nowhere"], 2), (["sample", "a", "--out", "a.gif", "--seed", "x"], 2),
    (["train", "--preset", "nope", "--out", "r"], 2), (["train", "--preset", "tiny", "--data", "nowhere", "--out", "r"], 2), (["eval", "--weights", "nowhere"], 2), (["rank", "a", "a.gif"], 2), (["caption", "a.gif", "b.gif"], 2), (["demo", "--data", "nowhere"], 2)])
def test_torch_is_not_needed(args, code, tmp_path):
    check = f"import sys\nfrom minisora.cli import main\ncode = main({args!r})\nassert code == {code}, code\nassert not {{'torch', 'numpy', 'PIL'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    assert code == 0 or re.match(r"minisora: \S.*", done.stderr.splitlines()[-1]) and len(done.stderr.splitlines()) == 1


def test_names_agree():
    assert set(cli.SAMPLER_NAMES) == set(sora.SAMPLERS) and set(cli.LEVELS) <= {*world.LEVELS, "paraphrase"}
    assert abs(sum(cli.LEVELS.values()) - 1) < 1e-9
    for name in cli.PRESETS: cli.preset(name)
    with pytest.raises(ValueError, match="nope"): cli.preset("nope")


# --- training

def test_killed_and_resumed_is_the_same_run(run, tmp_path):
    out = tmp_path / "again"
    with started(*TRAIN, "--out", out, "--resume") as p:        # --resume on an empty folder starts
        end = time.time() + 120
        while not list(out.glob("dit/step-*.json")) and p.poll() is None and time.time() < end: time.sleep(.02)
        p.kill()
    assert list(out.glob("dit/step-*.json")) and not (out / "model.json").exists()
    (out / ".samples.webp.1.tmp").write_bytes(b"half")          # of a writer that was killed, too
    ok(*TRAIN, "--out", out, "--resume")
    names, again = (sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()) for folder in (run, out))
    assert names == again
    assert {n for n in names if (out / n).read_bytes() != (run / n).read_bytes()} <= {"dit/log.jsonl", "vae/log.jsonl"}, "only the log's seconds may differ"
    assert "seconds" not in (run / "model.json").read_text() and str(run.parent) not in (run / "model.json").read_text()


def test_ctrl_c_saves(tmp_path):
    if os.name == "nt": pytest.skip("Ctrl-C cannot be sent to one process there")
    out = tmp_path / "r"
    with started("train", "--preset", "tiny", "--steps", 4000, "--out", out) as p:
        end = time.time() + 120
        while not list(out.glob("vae/step-*.json")) and p.poll() is None and time.time() < end: time.sleep(.02)
        p.send_signal(signal.SIGINT)
        err = p.communicate()[1]
    assert p.returncode == 130 and err.splitlines()[-1].startswith("minisora: stopped after step") and "--resume" in err.splitlines()[-1]


def test_interrupt_elsewhere(monkeypatch, says, tmp_path):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "targets", stop)
    says("sample", "a", "--out", tmp_path / "a.gif", code=130, words="interrupted")


def test_bugs_are_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "targets", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): cli.main(["sample", "a", "--out", str(tmp_path / "a.gif")])


def test_finished_runs(run, says, capsys):
    ok(*TRAIN, "--out", run, "--resume")
    assert "finished already" in capsys.readouterr().out
    says(*TRAIN, "--out", run, words="holds a run already: expected --resume")
    says(*TRAIN, "--out", run, "--resume", "--batch", 4, words="finished run of .*expected")


def test_folders_that_lie_in_each_other(tmp_path, folder, says):
    mine, out = ("train", "--preset", "tiny", "--steps", 2, "--data"), tmp_path / "r"
    says(*mine, folder, "--aside", folder, "--out", out, words="hold the same clips")
    shutil.copytree(folder, out / "clips")
    before = sorted(p.name for p in (out / "clips").iterdir())
    says(*mine, out / "clips", "--out", out, words="keeps files of its own")
    assert sorted(p.name for p in (out / "clips").iterdir()) == before
    says(*mine, folder, "--out", tmp_path / "x.safetensors", words="expected a folder")
    for name in ("dalle", "clip", "captioner"): says(*mine, folder, "--start", name, "--out", tmp_path / "s", words=f"--start is {name}, which holds a {name}")
    for name in ("index.html", "samples.webp"):
        (tmp_path / "page").mkdir(exist_ok=True)
        (tmp_path / "page" / name).write_text("somebody's")
        says(*TRAIN, "--out", tmp_path / "page", words="expected --resume, or another --out")
        (tmp_path / "page" / name).unlink()


def test_names_and_numbers_at_their_ends(tmp_path, run, folder, says):
    says("caption", "", words="a file is empty")
    says("sample", "red", "--height", 36, "--out", tmp_path / "a.gif", words="--height is 36: expected a multiple of 16")
    assert world.World().parse("red circle x99999999999999999999 y5 with grain 99999999999999999999999")["color"] == "red"
    long = tmp_path / ("n" * 245 + ".gif")
    ok("sample", "a red circle x99999999999999999999 y5", "--weights", run, "--steps", 1, "--out", long)
    assert long.is_file() and len(list(tmp_path.iterdir())) == 1


def test_weights_and_folders_in_use_are_safe(tmp_path, says):
    "Weights without their checkpoints are not written over; a folder has one run at a time, whatever the preset."
    for name in ("model.safetensors", "model.json"): (tmp_path / name).write_text("somebody's")
    says(*TRAIN, "--out", tmp_path, words="holds a run already: expected --resume, or another --out")
    assert (tmp_path / "model.safetensors").read_text() == "somebody's"
    with train.only_here(tmp_path / "r"):
        for how in (TRAIN, ("train", "--preset", "captioner", "--steps", 2, "--batch", 2)): says(*how, "--out", tmp_path / "r", words="another run is writing to")


def test_configuration_comes_first(run, capsys, tmp_path):
    ok("train", "--preset", "tiny", "--steps", 3, "--batch", 2, "--lr", .001, "--out", tmp_path / "r", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: ") and "lr=0.001" in "".join(lines[:8]) and "steps=2" in "".join(lines[:8]) and lines[-1].startswith("finished: ")
    card = core.load(tmp_path / "r" / "model.safetensors")[1]
    assert card["steps"] == [2, 1] and card["world"] == world.VERSION and card["command"].startswith("minisora train --preset tiny") and card["flops"] > 0
    assert pixels(tmp_path / "r" / "samples.webp").shape[-1] > 32


def test_training_on_a_folder(folder, tmp_path, capsys):
    ok("train", "--preset", "tiny", "--data", folder, "--steps", 4, "--out", tmp_path / "r")
    said = capsys.readouterr()
    assert "torn.gif" in said.err and "4 clips to learn from, 0 kept aside, 1 complaints" in said.out
    model = sora.Sora.from_pretrained(tmp_path / "r")
    assert model.card["data"] == "folder" and not model.tokenizer.unknown(data.Folder(folder, say=lambda _: None).texts()[0])
    assert cli.main(["eval", "--weights", str(tmp_path / "r"), "--n", "2"]) == 2 and "not trained on the sprite world" in capsys.readouterr().err


def test_a_tenth_is_kept_aside(tmp_path, capsys):
    ok("train", "--preset", "tiny", "--data", ROOT / "data_samples", "--steps", 8, "--save-every", 2, "--batch", 4, "--out", tmp_path / "r")
    said, card = capsys.readouterr().out, json.loads((tmp_path / "r" / "model.json").read_text())
    n = len(data.Folder(ROOT / "data_samples"))
    assert card["aside"] == round(.1 * n) and card["clips"] == n - card["aside"]
    logged = [json.loads(l)["aside"] for l in (tmp_path / "r" / "dit" / "log.jsonl").read_text().splitlines() if "aside" in l]
    assert len(logged) == 2 and all(0 < x < 10 for x in logged)
    assert f"loss on {card['aside']} clips kept aside: {logged[0]:.4f} at step 2" in said and re.search(r"^\.gif +\d+ +\d+", said, re.M)
    seen = [json.loads(l) for l in (tmp_path / "r" / "dit" / "log.jsonl").read_text().splitlines() if "aside" in l]
    assert all({"own", "aside", "frechet", "floor"} <= set(l) and 0 <= l["floor"] <= 4 and 0 < l["frechet"] <= 4 for l in seen) and len({l["floor"] for l in seen}) == 1
    assert f"step 2: loss {seen[0]['own']:.4f} on clips it learns from, {seen[0]['aside']:.4f} on clips kept aside; Fréchet distance to these {seen[0]['frechet']:.3f}" in said
    best, lowest = json.loads((tmp_path / "r" / "best" / "model.json").read_text()), min(seen, key=lambda l: l["aside"])
    assert best["steps"] == lowest["step"] and (f"best/ of the run is the model of step {lowest['step']}" in said) == (lowest is not seen[-1])
    sora.Sora.from_pretrained(tmp_path / "r" / "best")
    text = (tmp_path / "r" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.images) == 2 * (card["aside"] + 8) and "Clips it never saw" in text and 'class="aside"' in text
    assert all(pixels(tmp_path / "r" / i["src"]).shape[1:] == (3, 32, 32) and i["alt"] for i in page.images) and not re.search(r"https?://|<script", text)


def test_from_a_folder_alone(folder, run, tmp_path, capsys, says):
    "Nothing but --data and --out, on the worst of folders; then on from what that gave, with words of its own."
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    for k, size in enumerate(((5, 90), (64, 64), (200, 31))): Image.new("RGB", size, "red").save(mine / f"mute{k}.jpg")
    (mine / "<b>bad & worse.gif").write_bytes(b"GIF89a")
    ok("train", "--data", mine, "--steps", 2, "--batch", 2, "--out", tmp_path / "a", "--device", "cpu")
    said, card = capsys.readouterr(), json.loads((tmp_path / "a" / "model.json").read_text())
    assert "passed over: 2" in said.out and "without a caption: 3" in said.out and re.search(r"^start   t2v: \d+ words .* off, and ", said.out, re.M) and "the page: " in said.out
    assert sum("bad & worse" in line for line in said.err.splitlines()) == 1 and card["start"] == json.loads((ROOT / "minisora" / "weights" / "t2v.json").read_text())["sha256"]
    text = (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    assert not Page(text).open and "<b>bad" not in text and "&lt;b&gt;bad &amp; worse.gif" in text and str(tmp_path) not in text and len(Page(text).images) == 8
    (mine / "captions.jsonl").write_text('{"file": "0.gif", "caption": "a zeppelin landing"}\n', encoding="utf-8")
    shutil.copytree(mine, tmp_path / "other")
    ok("train", "--preset", "tiny", "--data", mine, "--aside", tmp_path / "other", "--start", run, "--steps", 4, "--out", tmp_path / "b")
    said, old, new = capsys.readouterr(), sora.Sora.from_pretrained(run), sora.Sora.from_pretrained(tmp_path / "b")
    assert "2 words of these captions are new" in said.out and new.tokenizer.words == old.tokenizer.words + ["landing", "zeppelin"] and new.card["aside"] == 7
    (tmp_path / "b" / "index.html").unlink()
    ok("train", "--preset", "tiny", "--data", mine, "--aside", tmp_path / "other", "--start", run, "--steps", 4, "--out", tmp_path / "b", "--resume")
    assert "finished already" in capsys.readouterr().out and (tmp_path / "b" / "index.html").is_file()
    ok("sample", "a zeppelin", "--weights", tmp_path / "b", "--out", tmp_path / "z.gif")
    for wrong, words in ((("--data", mine, "--start", "nowhere"), "no weights at nowhere"), (("--data", mine, "--start", "pairs"), "pairs, which draws 1 frames.*expected 17"), (("--start", "t2v", "--preset", "tiny"), "expected --data FOLDER"),
                         (("--data", mine, "--aside", tmp_path / "none"), "--aside is .*none"), ((), "--preset is missing.*t2v"), (("--data", mine, "--start", "clip"), "which holds a clip: expected a model of clips")):
        says("train", *wrong, "--out", tmp_path / "no", words=words)
    says("train", "--data", mine, "--out", mine / "run", words="lies in --data .*expected a folder elsewhere")


def test_steps_are_shared():
    for name in cli.PRESETS:
        a, b = cli.preset(name), cli.adjusted(cli.preset(name), steps=2)
        assert (b.vae_recipe.steps if b.vae_recipe else 0, b.dit_recipe.steps) == ((0, 2) if a.vae_recipe is None else (1, 1)) and not b.dit_recipe.compile
        assert cli.adjusted(cli.preset(name)).dit_recipe.steps == a.dit_recipe.steps


def test_captions_by_the_handful():
    source = data.WorldClips(world.World(), cli.LEVELS)
    batch, again = (source.batch(core.generator(3), 50, captions=20) for _ in range(2))
    assert torch.equal(batch["clips"], again["clips"]) and batch["captions"] == again["captions"]
    flat = [c for row in batch["captions"] for c in row]
    assert len(flat) == 1000 and 60 < flat.count("") < 140
    words = {w for text in source.texts(0) for w in re.findall(r"\w+", text.lower())}
    assert not {w for c in flat for w in re.findall(r"\w+", c.lower())} - words


def test_figure_learns_every_scene_in_pixels(tmp_path, says, folder):
    tiny = world.World.tiny()
    out = tmp_path / "figure"
    ok("train", "--preset", "figure", "--steps", 2, "--batch", 2, "--out", out, "--device", "cpu")
    card = json.loads((out / "model.json").read_text())
    assert card["steps"] == [0, 2] and world.World(**card["scenes"]) == tiny and not (out / "model-vae.safetensors").exists() and not (out / "vae").exists()
    ok("sample", "a red circle", "--weights", out, "--out", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").shape == (1, 3, 16, 16)
    ok("eval", "--weights", out, "--n", 4, "--seeds", 1, "--split", "train", "--level", "full")
    says("train", "--preset", "figure", "--data", folder, "--out", tmp_path / "no", words="figure learns all scenes.*expected world")


def test_figure_reads_one_caption_of_the_picture_at_a_time(tmp_path, monkeypatch):
    seen, p, tiny = {}, cli.adjusted(cli.preset("figure"), steps=2), world.World.tiny()
    def fit(model, loss, draw, *_, **__):
        seen.update(draw(core.generator(0)))
        return dict(flops=0, compiled=False)
    monkeypatch.setattr("minisora.train.fit", fit)
    words = cli.train_sora(p, data.WorldClips(tiny, dict.fromkeys(p.captions, 1)), tmp_path).tokenizer
    scenes, kinds = tiny.enumerate(), []
    near = torch.cdist(seen["latents"].flatten(1), tiny.render(scenes).flatten(1)).min(1)
    assert near.values.max() < .1 and seen["text"].shape[1] == words.encode(tiny.caption(scenes, "pixels"))[0].shape[1]
    for k, text in zip(near.indices.tolist(), words.decode(seen["text"])):
        said = {words.decode(words.encode(tiny.caption(scenes[[k]], level))[0])[0]: level for level in world.LEVELS}
        kinds.append(said[text])
    assert set(kinds) == set(world.LEVELS) and kinds.count("none") > 8


# --- drawing

def test_every_format(run, tmp_path, capsys):
    for end in (".png", *cli.FORMATS):
        file = tmp_path / f"clip{end}"
        ok("sample", PROMPT, "--weights", run, "--out", file, "--seed", 1, "--frames", 9, "--height", 16, "--width", 48, "--force")
        assert capsys.readouterr().out.split() == [str(file)]
        clip = pixels(file)
        assert clip.shape == (9, 3, 16, 48), end
        if end == ".png": exact = clip
        else: assert (clip - exact).abs().mean() < (.4 if end == ".mp4" else .1), end
    ok("sample", PROMPT, "--weights", run / "model.safetensors", "--out", tmp_path / "big.png", "--seed", 1, "--frames", 9, "--height", 16, "--width", 48, "--scale", 3)
    assert torch.equal(pixels(tmp_path / "big.png")[..., ::3, ::3], exact)


def test_folder_grid_and_prompts_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n", encoding="utf-8")
    ok("sample", PROMPT, "--prompts", tmp_path / "prompts.txt", "--weights", run, "--out", tmp_path / "many", "--seed", 7)
    names = sorted(f.name for f in (tmp_path / "many").iterdir())
    assert names == ["a-blue-star-seed-9.gif", "a-large-red-circle-moving-left-on-a-black-background-seed-7.gif", "a-red-circle-seed-8.gif"]
    ok("sample", "a blue star", "--weights", run, "--out", tmp_path / "alone.gif", "--seed", 9)     # by itself it is the same clip
    assert (pixels(tmp_path / "alone.gif") - pixels(tmp_path / "many" / names[0])).abs().mean() < .02
    ok("sample", "a", "b", "c", "--weights", run, "--out", tmp_path / "grid.mp4", "--grid", "--steps", 2, "--sampler", "heun", "--cfg-scale", 1, "--negative", "red")
    assert pixels(tmp_path / "grid.mp4").shape == (17, 3, 66, 66)
    ok("sample", "a", "--weights", run, "--out", tmp_path / "grid.mp4", "--force", "--frames", 1)
    assert len(pixels(tmp_path / "grid.mp4")) == 1


def test_unseen_words_are_said_once(run, tmp_path, capsys):
    ok("sample", "a RED zeppelin circle", "a zeppelin", "--weights", run, "--out", tmp_path / "z")
    lines = [l for l in re.split(r"[\r\n]", capsys.readouterr().err) if "zeppelin" in l]
    assert len(lines) == 1 and lines[0].startswith("minisora: note: ")


# --- mistakes

def test_mistakes_of_sample(run, says, tmp_path):
    s, out = ["sample", PROMPT, "--weights", run], tmp_path / "a.gif"
    says("sample", "--out", out, words="no prompt: expected")
    says("sample", " ", "--out", out, words="prompt is empty")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("un carré".encode("latin1"))
    says("sample", "--prompts", tmp_path / "empty.txt", "--out", out, words="empty.txt holds no prompt")
    says("sample", "--prompts", tmp_path / "latin.txt", "--out", out, words="latin.txt is not UTF-8")
    (tmp_path / "long.txt").write_text("a circle\n" + "a "*900 + "\n")
    says("sample", "--prompts", tmp_path / "long.txt", "--out", out, words="long.txt, line 2: a prompt of 1,799 characters: expected at most 1,000")
    says("sample", "--prompts", tmp_path / "none.txt", "--out", out, words="cannot read .*none.txt: No such file")
    for option, value in (("--seed", "-1"), ("--seed", "1.5"), ("--seed", "9" * 30), ("--frames", "0"), ("--steps", "x"), ("--cfg-scale", "nan"), ("--fps", "0"), ("--fps", "51"), ("--scale", "1000"), ("--sampler", "magic"), ("--device", "abacus"), ("--wat", "1")):
        says(*s, "--out", out, f"{option}={value}", words=re.escape(option))
    says(*s, "--out", out, "--height", 33, words="--height is 33: expected a multiple of 8")
    says(*s, "--out", out, "--width", 12, words="--width is 12: expected a multiple of 8")
    if not torch.cuda.is_available(): says(*s, "--out", out, "--device", "cuda", words="device is 'cuda'.*expected cuda, mps or cpu")
    assert not out.exists()
    out.write_bytes(b"mine")
    says(*s, "--out", out, words="a.gif exists: expected --force")
    says(*s, "--out", out / "b.gif", words="cannot write .*a.gif is not a folder")
    assert out.read_bytes() == b"mine"
    says("sample", "a", "b", "--weights", run, "--out", tmp_path / "b.gif", words="2 prompts for the one file .*--grid")
    says(*s, "--out", tmp_path / "b.avi", words=r"\.gif \.png \.webp \.mp4, or a folder")
    says(*s, "--grid", "--out", tmp_path / "many", words="--grid writes one clip")
    if os.name != "nt" and os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        says(*s, "--out", tmp_path / "locked" / "a.gif", words="no right to write")


def test_mistakes_about_weights(run, says, tmp_path):
    def mended(change, words):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        shutil.copytree(run, tmp_path / "w")
        change(tmp_path / "w" / "model.safetensors")
        says("sample", PROMPT, "--weights", tmp_path / "w", "--out", tmp_path / "a.gif", words=words)
        assert not (tmp_path / "a.gif").exists()
    def card(**kw): return lambda f: f.with_suffix(".json").write_text(json.dumps({**json.loads(f.with_suffix(".json").read_text()), **kw}))
    mended(lambda f: f.write_bytes(b"\x80\x04pickle"), "pickled")
    mended(lambda f: f.write_bytes(f.read_bytes()[:-9]), "truncated")
    mended(lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])), "sha256 differs")
    mended(lambda f: f.with_suffix(".json").unlink(), "has no card")
    mended(lambda f: f.with_suffix(".json").write_text("{"), "not JSON")
    mended(lambda f: f.unlink(), "no weights at .*expected")
    mended(card(kind="clip"), "holds clip: expected the weights of a Sora")
    mended(card(world="0"), "trained on world '0', this is world .*train it again")
    mended(card(dit=dict(channels=8, width=7)), "does not fit its card")
    (tmp_path / "a.pt").write_bytes(b"x")
    says("sample", PROMPT, "--weights", tmp_path / "a.pt", "--out", tmp_path / "a.gif", words="pickled")
    says("eval", "--weights", "nothing", words="no weights at nothing: expected")
    says("eval", "--weights", run, "--json", tmp_path, words="--json: cannot write .*it is a folder")      # before hours of drawing, not after
    says("eval", "--weights", run, "--json", tmp_path / "a.pt" / "b.json", words="--json: cannot write .*a.pt is not a folder")


def test_mistakes_of_train(says, folder, tmp_path):
    out = ["--out", tmp_path / "r"]
    says("train", "--preset", "huge", *out, words="'huge'.*tiny.*t2v")
    says("train", "--preset", "tiny", words="--out")
    says("train", *out, words="--preset is missing: expected one of .*t2v")
    says("train", "--preset", "tiny", "--data", tmp_path / "none", *out, words="--data is .*none.*expected world, or a folder")
    (tmp_path / "empty").mkdir()
    says("train", "--preset", "tiny", "--data", tmp_path / "empty", *out, words="empty has no clip")
    (tmp_path / "file").write_text("")
    says("train", "--preset", "tiny", "--out", tmp_path / "file", words="file is not a folder")
    for option, value in (("--steps", 1), ("--lr", 0), ("--batch", 0), ("--save-every", "x"), ("--seed", "-3")): says("train", "--preset", "tiny", *out, f"{option}={value}", words=option)
    says("train", "--preset", "tiny", *out, "--data", "", words="--data is empty")                     # else it would read the current folder
    for option in ("--out", "--weights", "--prompts"): says("sample", "a", *out, option, "", words=f"{option} is empty")
    assert not (tmp_path / "r").exists()
    shutil.copytree(folder, tmp_path / "bad")
    for f in (tmp_path / "bad").iterdir():
        if f.suffix != ".jsonl": f.write_bytes(b"")
    says("train", "--preset", "tiny", "--data", tmp_path / "bad", *out, words="bad has no clip")


# --- a judge

def test_judge_learns_from_what_it_will_judge(tmp_path, capsys, says, folder, run, monkeypatch):
    "Frames of clips, half of them as t2v draws them, and captions that are wrong in one thing."
    from minisora import train
    seen, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda model, loss, draw, *a, **k: seen.append(draw(core.generator(0))) or fit(model, loss, draw, *a, **k))
    ok("train", "--preset", "judge", "--steps", 2, "--batch", 4, "--out", tmp_path / "r", "--device", "cpu")
    card, batch = json.loads((tmp_path / "r" / "model.json").read_text()), seen[0]
    assert card["kind"] == "clip" and batch["pixels"].shape == (4, 3, 32, 32) and batch["near"].shape[:2] == (4, 5)
    words = {k + 257: w for k, w in enumerate(card["words"])}
    w = world.World()
    for row in batch["near"].tolist():
        own, *others = (w.parse(" ".join(words[i] for i in ids if i)) for ids in row)
        own = {k: v for k, v in own.items() if k != "unknown"}
        for other, attribute in zip(others, ("texture", "texture", "size", "shape")):
            assert {k for k in own if own[k] != other.get(k)} | {k for k in other if k != "unknown" and other[k] != own.get(k)} == {attribute}
    assert "rank PROMPT FILE" in capsys.readouterr().out
    says("train", "--preset", "judge", "--data", folder, "--out", tmp_path / "no", words="judge learns to judge t2v, which draws the world: expected world")
    says("train", "--preset", "clip", "--through", "t2v", "--out", tmp_path / "no", words="--through is for a model that learns to judge")
    says("train", "--preset", "judge", "--through", "clip", "--out", tmp_path / "no", words="which holds clip: expected a model of clips")
    shutil.copytree(run, tmp_path / "mine")
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    ok("train", "--preset", "judge", "--steps", 2, "--batch", 4, "--accumulate", 2, "--through", tmp_path / "mine", "--out", tmp_path / "j", "--device", "cpu")
    assert "draws 8 clips for a prompt" in capsys.readouterr().out and (tmp_path / "mine" / "model.safetensors").read_bytes() == before
    mine = cli.load_sora(tmp_path / "mine", "cpu")
    assert mine.card["sampling"]["best_of"] == 8 and mine.judge is not None and str(tmp_path) not in json.dumps(mine.judge.card) and "--accumulate 2" in mine.judge.card["command"]


def test_a_run_belongs_to_its_clips(tmp_path, says, capsys):
    w = world.World()
    for name, word in (("fa", "apple"), ("fb", "fox")):
        (tmp_path / name).mkdir()
        for k in range(3):
            data.write_clip(w.render(w.sample(1, core.generator(k)))[0], tmp_path / name / f"{k}.gif")
            (tmp_path / name / f"{k}.txt").write_text(f"{word} {k}")
    go = lambda name, *more: ("train", "--preset", "tiny", "--data", tmp_path / name, "--out", tmp_path / "r", "--batch", 2, "--steps", 4, "--device", "cpu", *more)
    ok(*go("fa"))
    says(*go("fb", "--resume"), words="is a finished run on other clips than .*fb holds now")
    for name in ("model.safetensors", "model.json"): (tmp_path / "r" / name).unlink()         # as if killed just before the end
    says(*go("fb", "--resume"), words="was trained with digest")
    ok(*go("fa", "--resume"))
    assert "apple" in json.loads((tmp_path / "r" / "model.json").read_text())["words"]
    (tmp_path / "none").mkdir()
    says("demo", "--data", tmp_path / "none", "--out", tmp_path / "d", words="none")
    assert not (tmp_path / "d").exists()


# --- ranking

def test_rank(tmp_path, capsys, says):
    ok("train", "--preset", "clip", "--steps", 2, "--batch", 4, "--out", tmp_path / "r", "--device", "cpu")
    assert "finished: " in capsys.readouterr().out and json.loads((tmp_path / "r" / "model.json").read_text())["kind"] == "clip"
    w = world.World()
    for k, clip in enumerate(w.render(w.sample(3, core.generator(1)))): data.write_clip(clip, tmp_path / f"{k}{cli.FORMATS[k]}")
    data.write_clip(w.render(w.sample(1, core.generator(2)))[0, :1], tmp_path / "still.jpg")
    (tmp_path / "torn.gif").write_bytes(b"GIF89a")
    files, weights = [tmp_path / f for f in ("0.gif", "torn.gif", "1.png", "still.jpg", "2.webp", "gone.gif")], ["--weights", tmp_path / "r"]
    ok("rank", "a red circle", *files, *weights)
    said = capsys.readouterr()
    rows = [line.split("  ") for line in said.out.splitlines()]
    assert {row[-1] for row in rows} == {str(f) for f in files} - {str(tmp_path / "torn.gif"), str(tmp_path / "gone.gif")}
    scores = [float(line.split()[0]) for line in said.out.splitlines()]
    assert scores == sorted(scores, reverse=True) and all(-1 <= s <= 1 for s in scores)
    bad = [line for line in said.err.splitlines() if line.startswith("minisora: ")]
    assert len(bad) == 2 and "torn.gif" in bad[0] and "gone.gif" in bad[1]
    assert cli.main(["rank", "a red circle", *map(str, [files[1], files[5], *weights])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minisora: ")]
    assert len(lines) == 3 and "nothing to rank: none of " in lines[-1] and lines[-1].endswith("gone.gif can be read: expected images or clips")
    ok("rank", "a red circle", tmp_path, *weights)        # a folder: all that is in it
    assert sorted(Path(line.split("  ")[-1]).name for line in capsys.readouterr().out.splitlines()) == ["0.gif", "1.png", "2.webp", "still.jpg"]
    says("rank", " ", files[0], *weights, words="prompt is empty")
    says("rank", "a red circle", *weights, words="file")
    says("rank", "a", files[0], "--weights", "nowhere", words="no weights at nowhere: expected a name")
    says("sample", "a", "--out", tmp_path / "a.gif", *weights, words="holds clip: expected the weights of a Sora")
    assert cli.main(["rank", "zeppelin", str(files[0]), "--weights", str(tmp_path / "r")]) == 2 and "no word of it" in capsys.readouterr().err.splitlines()[-1]


# --- grading, ledger, demo

def test_eval(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINISORA_SCALE", "cpu")
    ok("eval", "--weights", run, "--n", 6, "--seeds", 2, "--physics", "--json", "e.json", "--record", "--steps", 2)
    out, result = capsys.readouterr().out, json.loads(Path("e.json").read_text())
    for split in ("train", "heldout"):
        rates = result["splits"][split]["rates"]
        assert {*world.NAMED["long"], "all", "physics", "all by chance"} - {"relation"} == set(rates)
        assert all(0 <= low <= rate <= high <= 100 for rate, low, high in rates.values())
        assert rates["all"][0] <= min(rates[k][0] for k in ("shape", "color", "motion")) + 1e-6
    assert "2 x 6 unseen prompts of level long" in out and "held-out" in out and "total variation" in out
    records = core.ledger(tmp_path / "results" / "ledger")
    assert len(records) == 8 and len({r["metric"] for r in records}) == 8 and all(r["metric"].endswith(f", weights {run.name}, steps 2 (%)") for r in records)   # never under the name of t2v's
    least = {k: min(rates[k][0] for k in world.NAMED["long"] if k != "relation") for k, rates in ((k, v["rates"]) for k, v in result["splits"].items())}
    assert sorted(r["value"] for r in records if r["metric"].startswith("least right")) == pytest.approx(sorted(least.values()), abs=1e-3)
    assert {r["claim"] for r in records} == {17} and all(r["notebook"] == "41_sora" and r["n"] == 12 and r["world"] == world.VERSION for r in records)
    ok("eval", "--weights", run, "--n", 4, "--seeds", 1, "--level", "short", "--split", "heldout", "--steps", 1)
    assert "texture" not in capsys.readouterr().out
    assert cli.load_sora(str(run)).detail and not cli.load_sora(str(run), as_is=True).detail      # it was trained on captions that say all
    assert "told in full" in out and result["detail"]
    ok("eval", "--weights", run, "--n", 4, "--seeds", 1, "--split", "train", "--steps", 1, "--as-is")
    assert "as they are" in capsys.readouterr().out


def test_a_perfect_model_is_graded_perfect(run, monkeypatch, capsys):
    w = world.World()
    monkeypatch.setattr(cli, "draw", lambda model, prompts, seeds, **kw: w.render(drawn.pop(0)))
    drawn = [w.sample(40, core.generator(2**41), s) for s in ("train",)]
    ok("eval", "--weights", run, "--n", 40, "--seeds", 1, "--split", "train", "--physics")
    out = capsys.readouterr().out
    rate = lambda name: float(re.search(rf"^  {name} +([\d.]+)", out, re.M)[1])
    assert rate("all") >= 97 and rate("physics") >= 95 and rate("all by chance") < 15 and rate("starts") < .1


def test_intervals_hold_every_seed():
    right = [torch.arange(100) < 90, torch.arange(100) < 60, torch.arange(100) < 75]
    rate, low, high = cli.spread(right)
    assert abs(rate - 75) < 1e-4 and abs(low - 60) < 1e-4 and abs(high - 90) < 1e-4
    a = torch.rand(4000, 2, generator=core.generator(0)) * 32
    assert cli.variation(a, a, 32) == 0 and cli.variation(a, a.flip(0), 32) == 0 and cli.variation(a / 4, a / 4 + 24, 32) == 1
    assert .3 < cli.variation(a, torch.full_like(a, 3.), 32) <= 1
    on_a_grid = (a / 2).floor() * 2                               # what is read a little off stays in its cell
    assert cli.variation(on_a_grid + .8 * (torch.rand(a.shape, generator=core.generator(1)) - .5), on_a_grid, 32, step=2) == 0


def test_ledger(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                   # wherever it is called
    ok("ledger", "--json")
    records = json.loads(capsys.readouterr().out)
    assert isinstance(records, list) and all(isinstance(r["claim"], int) for r in records)
    ok("ledger")
    assert len(capsys.readouterr().out.splitlines()) == len(records)


def test_output_that_nobody_reads(tmp_path):
    line = [sys.executable, "-m", "minisora.cli", "ledger"]
    env = dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parent.parent), PYTHONIOENCODING="ascii")
    assert subprocess.run([*line], env=env, cwd=tmp_path, capture_output=True).returncode == 0      # σ and é are spelled out
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(line, env=env, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 141

class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.open = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[k] for k in ("src", "href") if k in attrs]
        if tag == "img": self.images.append(attrs)
        if tag not in ("meta", "img", "br"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_demo(run, folder, tmp_path, capsys, says):
    out = tmp_path / "page"
    ok("demo", "--weights", run, "--data", folder, "--seconds", 0, "--out", out)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("index.html") and "torn.gif" in said.err
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.images) == 12 + 2 * 4 and all(i["alt"] for i in page.images)
    assert all((out / link).is_file() and not link.startswith(("/", "http")) for link in page.links)
    assert not re.search(r"https?://|<script|@import|url\(", text) and str(tmp_path) not in text
    for i in page.images: assert pixels(out / i["src"]).shape == (17, 3, 32, 32)
    assert "before" in text and "Its loss" in text and "prefers-color-scheme: dark" in text
    says("demo", "--weights", "none", "--data", folder, "--out", out, words="no weights at none")      # its own page may be written over
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    says("demo", "--weights", run, "--data", folder, "--out", tmp_path / "mine", words="no page of this demo")
    (tmp_path / "mine" / "index.html").write_text("somebody's")
    says("demo", "--weights", run, "--data", folder, "--out", tmp_path / "mine", words="no page of this demo")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["index.html", "thesis.txt"]
    for other in ("pairs", "figure", "clip"): says("demo", "--weights", other, "--data", folder, "--out", tmp_path / other, words="expected a model of clips of one sprite")
    assert not any((tmp_path / other).exists() for other in ("pairs", "figure", "clip"))
    says("demo", "--weights", run, "--data", tmp_path / "none", "--out", out, words="expected --data FOLDER")


def test_what_people_write_is_escaped():
    text = cli.cards(['<b>"a" & b'], [[("a.webp", "")]], [[("good", "<i>")]])
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;&quot;a&quot; &amp; b" in text
