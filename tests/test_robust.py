"""Whatever is given to it, minisora ends with 0, or with 2 and one line; never a traceback, a hang, or half a file.

MINISORA_LONG=1: ten times the mutations, fifty kills. MINISORA_SOAK=5: trains and samples for five minutes and looks at memory and rate.
"""
import contextlib, hashlib, io, json, os, pickle, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image

from minisora import cli, core, data, world
from minisora.text import Tokenizer
from minisora.train import only_here
import test_train
from test_train import run as toy_run

ROOT = Path(__file__).resolve().parent.parent
LONG = bool(os.environ.get("MINISORA_LONG"))
TRAIN = "train --preset tiny --data world --steps 40 --save-every 5 --seed 5 --device cpu".split()
PROMPT = "a large red circle moving left on a black background"


def mutations(n):
    "n examples, always the same ones; a failure is shrunk."
    return settings(max_examples=n * (10 if LONG else 1), derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck))


def minisora(*args, codes=(0, 2)):
    "Exit code and lines on stderr of a command, in process; fails on a traceback, a hang, or a mistake that is not one line."
    def hang(*_): raise AssertionError(f"hangs: {args}")
    old = signal.signal(signal.SIGALRM, hang) if hasattr(signal, "SIGALRM") else None
    if old is not None: signal.alarm(300)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err: code = cli.main([str(a) for a in args])
    finally:
        if old is not None: signal.alarm(0); signal.signal(signal.SIGALRM, old)
    lines = [l for l in re.split(r"[\r\n]", err.getvalue()) if l.strip()]
    assert code in codes, (code, args, lines)
    if code == 2: assert lines[-1].startswith("minisora: ") and len([l for l in lines if re.match("minisora: (?!note: )", l)]) == 1, lines
    assert all(c.isprintable() for l in lines for c in l if ord(c) < 32), lines
    return code, lines


# --- what may happen to a file

RAW = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=30)),
    st.tuples(st.just("empty")), st.tuples(st.just("remove")), st.tuples(st.just("folder")), st.tuples(st.just("pipe")),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\n" * 9, b"[" * 3000, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\x80\x04K\x05."])),
    st.tuples(st.just("swap"), st.integers(0, 20)),
    st.tuples(st.just("rename"), st.sampled_from(["\x1b[2J\n", "é" * 100, ".", "a b", "-rf", "%s%n", "con", "<script>", "a\u202eb", "'\"", "x" * 200, "\\..\\up"])))


def spoil(path, how, others):
    "Do to a file what is written in `how`; others: files that it may be swapped with."
    what, *more = how
    whole = path.read_bytes()
    at = lambda x: int(x * len(whole))
    if what == "cut": path.write_bytes(whole[:at(more[0])])
    elif what == "flip":
        b = bytearray(whole)
        for x, bit in more[0] if whole else (): b[at(x)] ^= 1 << bit
        path.write_bytes(b)
    elif what == "empty": path.write_bytes(b"")
    elif what == "insert": path.write_bytes(whole[:at(more[0])] + more[1] + whole[at(more[0]):])
    elif what == "overwrite": path.write_bytes(whole[:at(more[0])] + more[1] + whole[at(more[0]) + len(more[1]):])
    elif what == "swap":
        other = others[more[0] % len(others)]
        path.write_bytes(other.read_bytes())
        if other != path: other.write_bytes(whole)
    elif what == "rename":
        with contextlib.suppress(OSError): path.rename(path.with_name(more[0].replace("/", "") + path.suffix))
    else:
        path.unlink()
        if what == "folder": path.mkdir()
        if what == "pipe" and hasattr(os, "mkfifo"): os.mkfifo(path)


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def no_leftovers(folder): assert not [f for f in folder.rglob("*") if f.name.endswith((".tmp", ".new"))]


# --- folders of clips

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "One small clip of each kind, captions in both ways."
    out, w = tmp_path_factory.mktemp("clips"), world.World(size=16, frames=4)
    scenes, lines = w.sample(9, core.generator(1)), []
    for i, (clip, caption, kind) in enumerate(zip(w.render(scenes), w.caption(scenes), (".png", ".gif", ".webp", ".mp4", ".jpg", ".png", ".gif", ".apng", ".jpeg"))):
        data.write_clip(clip[:1] if kind in (".jpg", ".jpeg") else clip, out / f"{i}{kind}")
        if i < 5: lines.append(json.dumps(dict(file=f"{i}{kind}", caption=[caption, "ü"] if i == 2 else caption)))
        else: (out / f"{i}.txt").write_text(caption)
    (out / "captions.jsonl").write_text("\n".join(lines))
    return out


def look(p, source, *args, **kw):
    "In place of a training: all that it asks of a folder."
    batch = source.batch(core.generator(0), 12, captions=2)
    assert batch["clips"].shape == (12, 17, 3, 32, 32) and batch["clips"].isfinite().all()
    Tokenizer.from_texts(source.texts(0)).encode([c for row in batch["captions"] for c in row])


def read_folder(folder, tmp):
    with patch.multiple(cli, train_sora=look, page=lambda out, *_: out): code, lines = minisora("train", "--preset", "tiny", "--data", folder, "--out", tmp / "out")
    assert not (tmp / "out").exists() or {f.name for f in (tmp / "out").iterdir()} <= {"clips", ".lock"}     # what was decoded
    shutil.rmtree(tmp / "out", ignore_errors=True)
    return code, lines


@mutations(40)
@given(st.lists(st.tuples(st.integers(0, 13), RAW), min_size=1, max_size=4))
def test_spoiled_folders(clips, tmp_path_factory, spoils):
    tmp = tmp_path_factory.getbasetemp() / "folder"
    folder = copy(clips, tmp / "clips")
    for i, how in spoils:
        files = sorted(f for f in folder.iterdir() if f.is_file())
        if files: spoil(files[i % len(files)], how, files)
    read_folder(folder, tmp)


ANY = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**30), st.floats(), st.text(max_size=20)), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


@mutations(15)
@given(st.lists(st.one_of(ANY, st.fixed_dictionaries(dict(file=st.one_of(ANY, st.sampled_from(["0.png", "5.png", "../0.png", "/etc/passwd", "C:\\0.png", "0.png\0"])), caption=ANY)),
                          st.fixed_dictionaries(dict(file=st.sampled_from(["0.png", "1.gif"]), caption=st.one_of(st.text(), st.lists(st.text(), max_size=3))))), max_size=6), st.binary(max_size=30))
def test_captions_of_any_form(clips, tmp_path_factory, lines, beside):
    tmp = tmp_path_factory.getbasetemp() / "captions"
    folder = copy(clips, tmp / "clips")
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(l) for l in lines))
    (folder / "5.txt").write_bytes(beside)
    assert read_folder(folder, tmp)[0] == 0                       # 6 to 8 are always good


def bomb(path, side=20_000):
    "A PNG of a few kilobytes that says it is side x side."
    import struct, zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b""))


FOUND = {  # what was found by mutating, or feared: what is put beside good clips → words of the line about it
    "bomb": (lambda f: bomb(f / "0.png"), "0.png cannot be decoded .*pixels"),
    "bomb below the limit of Pillow": (lambda f: bomb(f / "0.png", 9000), "0.png cannot be decoded .81,000,000 pixels: at most 67,108,864"),
    "a million frames": (lambda f: (f / "1.gif").write_bytes((f / "1.gif").read_bytes()[:-1] + b"\x2c\0\0\0\0\1\0\1\0\0\2\2D\1\0" * 10_100 + b";"), "1.gif cannot be decoded .*frames: at most 10,000"),
    "a caption of a million characters": (lambda f: (f / "5.txt").write_text("red " * 250_000), "5.txt has a caption of 999,999 characters for 5.png"),
    "control characters": (lambda f: (f / "5.txt").write_bytes(b"a \x1b[2J\x00red\x07 circle"), None),
    "half a character": (lambda f: (f / "captions.jsonl").write_text('{"file": "0.png", "caption": "\\ud83d red"}'), None),
    "a caption that is a dict": (lambda f: (f / "captions.jsonl").write_text('{"file": "0.png", "caption": {"red": 1}}'), "line 1 does not have the form"),
    "captions from a pipe": (lambda f: ((f / "captions.jsonl").unlink(), os.mkfifo(f / "captions.jsonl")), "captions.jsonl is not a file"),
    "a name that writes to the terminal": (lambda f: (f / "\x1b[2Jno.png").write_bytes(b""), r"x1b\[2Jno.png is empty"),
    "more words than int16 counts": (lambda f: [(f / "captions.jsonl").write_text(json.dumps(dict(file="0.png", caption=[" ".join(f"w{100*k + i}" for i in range(100)) for k in range(400)])))], None),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(clips, tmp_path, case):
    if "pipe" in case and not hasattr(os, "mkfifo"): pytest.skip("POSIX")
    folder = copy(clips, tmp_path / "clips")
    do, words = FOUND[case]
    do(folder)
    seen = {}
    def train(p, source, *args, **kw):
        look(p, source)
        for i in range(len(source)):                              # every clip is tried
            with contextlib.suppress(core.UserError): source._sound(i)
        seen.update(texts=source.texts())
    with patch.multiple(cli, train_sora=train, page=lambda out, *_: out): code, lines = minisora("train", "--preset", "tiny", "--data", folder, "--out", tmp_path / "out")
    assert code == 0 and (words is None or any(re.search(words, l) for l in lines)), lines
    for text in seen["texts"]: assert text.isprintable() and len(text) <= 1000 and text.encode()


# --- weights, cards, checkpoints

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "run"
    assert minisora("train", "--preset", "tiny", "--steps", 4, "--batch", 2, "--out", out, "--device", "cpu")[0] == 0
    for d in ("vae", "dit"): shutil.rmtree(out / d)
    return out


def draw_with(folder, tmp):
    out = tmp / "clip.gif"
    out.unlink(missing_ok=True)
    code, lines = minisora("sample", PROMPT, "--weights", folder, "--out", out, "--device", "cpu")
    assert (code == 0) == out.exists()
    if code == 0: assert data.read_clip(out, 1).isfinite().all()
    no_leftovers(tmp)
    return code, lines


@mutations(20)
@given(st.lists(st.tuples(st.integers(0, 5), RAW), min_size=1, max_size=3))
def test_spoiled_weights(weights, tmp_path_factory, spoils):
    tmp = tmp_path_factory.getbasetemp() / "w"
    folder = copy(weights, tmp / "run")
    for i, how in spoils:
        files = sorted(f for f in folder.iterdir() if f.is_file())
        if files: spoil(files[i % len(files)], how, files)
    draw_with(folder, tmp)


VALUES = st.sampled_from([None, True, -1, 0, 1, 3, 10**5, 10**12, 10**30, .5, 1e308, float("inf"), "", "x", "\0", [], [1], {}, {"a": 1}, [[]], ["a", "a"], ["A B"], [None]])


def places(card, path=()):
    "Every place in a card."
    yield path
    items = card.items() if isinstance(card, dict) else enumerate(card) if isinstance(card, list) else ()
    for k, v in items: yield from places(v, (*path, k))


def put(card, path, value):
    for k in path[:-1]: card = card[k]
    if value is ...: del card[path[-1]]
    else: card[path[-1]] = value


@mutations(25)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(VALUES, st.just(...))), min_size=1, max_size=2), st.booleans())
def test_cards_that_lie(weights, tmp_path_factory, changes, vae):
    "Cards whose sums are right and whose facts are not."
    tmp = tmp_path_factory.getbasetemp() / "cards"
    file = copy(weights, tmp / "run") / ("model-vae.json" if vae else "model.json")
    card = json.loads(file.read_text())
    for k, value in changes:
        where = [p for p in places(card) if p and (len(p) == 1 or p[0] != "words")]
        put(card, where[k % len(where)], value)
    file.write_text(json.dumps(card))
    draw_with(file.parent, tmp)
    minisora("eval", "--weights", file.parent, "--n", 2, "--seeds", 1, "--steps", 1, "--split", "train", "--device", "cpu") if LONG else None


@pytest.mark.parametrize("part, key, value", [("dit", "width", 10**6), ("dit", "depth", 10**9), ("dit", "depth", 200), ("vae", "patch", 0), ("vae", "patch", "x"), ("vae", None, 3), ("sampling", "steps", 10**9),
                                              ("sampling", "frames", 10**9), ("sampling", None, "x"), ("scenes", "wings", 2), ("dit", "heads", 0)])
def test_cards_found(weights, tmp_path, part, key, value):
    file = copy(weights, tmp_path / "run") / "model.json"
    card = json.loads(file.read_text())
    if key: card[part][key] = value
    else: card[part] = value
    file.write_text(json.dumps(card))
    code, lines = draw_with(file.parent, tmp_path)
    assert code == 2 and "does not fit its card" in lines[-1]


@pytest.mark.parametrize("name, part, key, value", [("clip", "words", None, ""), ("clip", "config", "depth", 10**9), ("clip", "config", "heads", 0), ("captioner", "captioner", "width", 10**6), ("captioner", "captioner", "frames", 0),
                                                    ("captioner", "words", None, 3), ("dalle", "dalle", "depth", 10**9), ("dalle", "vq", "codes", -1), ("dalle", "sampling", "cfg_scale", [1]), ("dalle", "sampling", "steps", "x"), ("dalle", "scenes", None, ...)])
def test_cards_of_others(clips, tmp_path, name, part, key, value):
    for f in core.WEIGHTS.glob(f"{name}*"):
        if f.stem.partition("-")[0] == name: shutil.copy(f, tmp_path / f.name.replace(name, "model", 1))
    card = json.loads((tmp_path / "model.json").read_text())
    put(card, (part, key) if key else (part,), value)
    (tmp_path / "model.json").write_text(json.dumps(card))
    command = dict(clip=["rank", "a red circle", clips / "0.png"], captioner=["caption", clips / "0.png"], dalle=["sample", "a red circle", "--out", tmp_path / "a.png"])[name]
    code, lines = minisora(*command, "--weights", tmp_path, "--device", "cpu")
    assert code == 2 and "does not fit its card" in lines[-1] and not (tmp_path / "a.png").exists()


@mutations(15)
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(RAW, st.tuples(st.just("card"), st.integers(0, 10**6), VALUES))), min_size=1, max_size=3))
def test_spoiled_checkpoints(half, tmp_path_factory, spoils):
    "A run goes on, begins again, or says in one line why not."
    folder = copy(half, tmp_path_factory.getbasetemp() / "half")
    for i, how in spoils:
        files = sorted(f for f in folder.iterdir() if f.is_file() and (f.stat().st_size or f.suffix == ".json"))
        if not files: continue
        file = files[i % len(files)]
        if how[0] != "card": spoil(file, how, files); continue
        file = next(iter(folder.glob("step-*.json")), None)
        if file and file.is_file():
            with contextlib.suppress(ValueError):
                card = json.loads(file.read_text())
                where = [p for p in places(card) if p]
                put(card, where[how[1] % len(where)], how[2])
                file.write_text(json.dumps(card))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try: toy_run(folder)
        except core.UserError as e: assert "\n" not in str(e); return
    assert [f.name for f in folder.glob("step-*.json") if f.is_file()] == ["step-000020.json"]
    no_leftovers(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): tensors = toy_run(folder)[1].state_dict()
    assert all(v.isfinite().all() for v in tensors.values())


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    "A toy run that stopped at step 8 of 20."
    class Enough(Exception): pass
    def enough(): raise Enough
    out = tmp_path_factory.mktemp("half")
    with pytest.raises(Enough): toy_run(out, draw=test_train.after(18, enough))
    return out


# --- command lines

WORDS = st.one_of(st.sampled_from(["", "-1", "0", "1", "nan", "1e999", "9" * 40, "../../up", "a\tb", "é", "\x1b[2J", "~", "%00", "--", "-h", "x" * 5000, "\ud800", "cpu", "cuda:99", "world", "tiny", "figure", "in/a.gif", "in", "out", "out/x.gif", "nul"]), st.text(max_size=12))
OPTIONS = ["--out", "--seed", "--weights", "--steps", "--cfg-scale", "--frames", "--height", "--width", "--scale", "--fps", "--grid", "--force", "--prompts", "--negative", "--preset", "--data", "--batch", "--lr",
           "--save-every", "--resume", "--bf16", "--shard", "--n", "--seeds", "--level", "--split", "--json", "--readme", "--seconds", "--device", "--sampler", "--only", "--quick", "--best-of"]


@mutations(90)
@given(st.sampled_from(["sample", "train", "eval", "ledger", "demo", "rank", "caption", "bench", ""]), st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=5), st.lists(WORDS, max_size=2), st.booleans())
def test_any_command_line(weights, clips, tmp_path_factory, command, options, words, sound):
    home = tmp_path_factory.getbasetemp() / "command"
    shutil.rmtree(home, ignore_errors=True)
    (home / "a" / "b" / "in").mkdir(parents=True)
    (home / "a" / "b" / "in" / "a.gif").write_bytes(b"GIF")
    args = [command, *words, *(x for pair in options for x in pair)]
    if sound: args += dict(sample=["--out", "out/", "a red circle"], train=["--preset", "tiny", "--out", "out"]).get(command, [])
    blank = lambda model, prompts, seeds, quiet=False, **kw: torch.zeros(len(prompts), 1, 3, 8, 8)
    def stop(*_, **__): raise core.UserError("no weights here")
    with contextlib.chdir(home / "a" / "b"), patch.object(cli, "draw", blank), patch.multiple(cli, train_sora=look, page=lambda out, *_: out), patch.object(cli, "evaluate", stop), patch.object(cli, "demo", stop), patch.object(cli, "load_sora", lambda *_: None), patch("minisora.bench.run", lambda *_, **__: {}):
        minisora(*args)
    assert {f.name for f in home.iterdir()} == {"a"} and {f.name for f in (home / "a").iterdir()} == {"b"}, "written outside"
    no_leftovers(home)


@pytest.mark.parametrize("args, words", [
    (["sample", "red " * 300_000, "--out", "o/"], "1,200,000 characters"),
    (["sample", "a", "--out", "x" * 300 + ".gif"], "name too long|No such|cannot write"),
    (["sample", "a", "--out", "o/", "--frames", 2**20], "pixels"),
    (["sample", "a", "--out", "o/", "--height", 2**19, "--width", 2**19], "pixels"),
    (["train", "--preset", "tiny", "--out", "o", "--batch", 10**9], "--batch"),
    (["rank", "red " * 300_000, "a.gif"], "1,200,000 characters"),
    (["rank", "", "a.gif"], "prompt is empty"),
    (["caption", "--weights", "x" * 5000, "a.gif"], "no file a.gif"),
    (["bench", "--only", "peak", "--out", "a" * 300 + ".json"], "name too long|cannot write")])
def test_commands_found(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, lines = minisora(*args)
    assert code == 2 and re.search(words, lines[-1]) and not list(tmp_path.iterdir())


def test_names_never_write_to_the_terminal(clips, tmp_path, capsys):
    for name in ("\x1b[2Ja.gif", "b\n.gif", "\x07torn.gif"): (tmp_path / name).write_bytes((clips / "1.gif").read_bytes()[:None if "torn" not in name else 20])
    for command in (["caption", tmp_path], ["caption", tmp_path, "--json"], ["rank", "a red circle", *sorted(tmp_path.iterdir())]):
        assert cli.main([*map(str, command)]) == 0
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 2 and all(c.isprintable() or c == "\n" for c in said.out)
        line, = [l for l in said.err.splitlines() if l.startswith("minisora: ")]
        assert line.startswith("minisora: note: left out: ") and r"\x07torn.gif" in line


def test_a_line_is_not_a_page():
    code, lines = minisora("sample", "--weights", "y" * 100_000, "a", "--out", "o.gif")
    assert code == 2 and len(lines[-1]) < 1100


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_outside_of_the_loop(tmp_path, monkeypatch, kind):
    "Before the first step, between the stages, after the last: a line that says how to go on, and the handlers are as before."
    monkeypatch.setattr(cli, "train_sora", lambda *_, **__: signal.raise_signal(kind))
    code, lines = minisora(*TRAIN, "--out", tmp_path / "run", codes=(130,))
    assert lines[-1] == "minisora: interrupted; what was saved is whole: the same command with --resume goes on from there"
    monkeypatch.setattr(cli, "targets", lambda *_: signal.raise_signal(kind))
    code, lines = minisora("sample", "a", "--out", tmp_path / "a.gif", codes=(130,))
    assert lines[-1] == "minisora: interrupted" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_that_is_gone_and_a_signal_that_was_ignored(tmp_path, monkeypatch):
    "A shell's `&` starts a program deaf to SIGINT; who sends it all the same wants it to stop."
    monkeypatch.setattr(cli, "train_sora", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert "--resume" in minisora(*TRAIN, "--out", tmp_path / "run", codes=(130,))[1][-1]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, old)
    (tmp_path / "gone").mkdir()
    with contextlib.chdir(tmp_path):
        os.chdir("gone"); os.rmdir(tmp_path / "gone")
        assert "the current folder is gone" in minisora("ledger", codes=(2,))[1][-1]


def test_closed_streams(monkeypatch):
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, None)
    assert cli.main(["ledger"]) == 0 and cli.main(["train"]) == 2


def test_prompts_are_never_paths(weights, tmp_path):
    prompts = ["../../up", "/etc/passwd", "..\\..\\up", "C:\\up", "~/up", "𝐀" * 90, ".", "\x00\x1b[2J", "con"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    before = {f for f in tmp_path.rglob("*")}
    with patch.object(cli, "draw", lambda model, prompts, *_, **__: torch.zeros(len(prompts), 1, 3, 8, 8)):
        assert minisora("sample", "--prompts", tmp_path / "p.txt", "--weights", weights, "--out", tmp_path / "a" / "b" / "out")[0] == 0
    made = {f for f in tmp_path.rglob("*") if f.is_file()} - before
    assert len(made) == len(prompts) and {f.parent for f in made} == {tmp_path / "a" / "b" / "out"}
    assert all(re.fullmatch(r"[\w-]+\.gif", f.name) for f in made)


# --- security

def test_neither_network_nor_pickle(tmp_path, clips):
    "Training, its resumption, drawing and grading open no socket and read no pickle."
    def refuse(*_, **__): raise AssertionError("network or pickle")
    with patch.object(socket, "socket", refuse), patch.object(socket, "create_connection", refuse), patch.object(socket, "getaddrinfo", refuse), \
         patch.object(pickle, "load", refuse), patch.object(pickle, "loads", refuse), patch.object(pickle, "Unpickler", refuse), patch.object(torch, "load", refuse):
        train = "train", "--preset", "tiny", "--data", clips, "--steps", 6, "--batch", 2, "--save-every", 2, "--device", "cpu", "--out", tmp_path / "run"
        assert minisora(*train)[0] == 0
        (tmp_path / "run" / "model.json").unlink()
        assert minisora(*train, "--resume")[0] == 0
        assert minisora("sample", "a", "--weights", tmp_path / "run", "--out", tmp_path / "a.webp", "--steps", 1)[0] == 0
        assert minisora("eval", "--weights", "t2v", "--n", 2, "--seeds", 1, "--steps", 1, "--split", "train", "--device", "cpu")[0] == 0


def test_no_pickle_in_the_tree():
    words = re.compile(r"\b(torch\.(load|save)|pickle\.loads?|cPickle|dill|joblib\.load|allow_pickle=True|weights_only=False|(broadcast|all_gather|scatter)_object)\b")
    for name in ("minisora", "scripts"):
        for f in (ROOT / name).glob("*.py"): assert not words.search(f.read_text(encoding="utf-8")), f


# --- the machine fails

def in_a_child(code, *args):
    "Runs code in a process of its own, as limits hold for ever."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=7200 if LONG else 900)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_full_disk(weights, tmp_path):
    "No file may grow beyond a limit, as on a disk that is full: one line, the last checkpoint is whole, and with room again the run ends in the same bytes."
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from minisora.cli import main
train, out, weights = sys.argv[3:], sys.argv[1], sys.argv[2]
soft = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from minisora.train import Checkpoints
save, count = Checkpoints.save, [0]
def fills(self, *args):
    count[0] += 1
    if count[0] == 3: soft(50_000)
    save(self, *args)
Checkpoints.save = fills
codes = [main(train + ["--out", out])]
codes.append(main(["sample", "a red circle", "--weights", weights, "--out", out + ".png", "--frames", "41", "--scale", "9", "--steps", "1"]))
soft(resource.RLIM_INFINITY)
print(codes)
"""
    out, train = tmp_path / "run", [*TRAIN]
    done = in_a_child(code, out, weights, *train)
    assert done.stdout.splitlines()[-1] == "[2, 2]" and "Traceback" not in done.stderr, done.stderr
    said = [l for l in re.split(r"[\r\n]", done.stderr) if l.startswith("minisora: ")]
    assert len(said) == 2 and all("File too large" in l for l in said) and "step-000015" in said[0], said
    assert [f.name for f in (out / "vae").glob("step-*.json")] == ["step-000010.json"] and not list(tmp_path.glob("*.png"))
    no_leftovers(tmp_path)


def test_the_folder_goes_away(tmp_path):
    "A run writes its next checkpoint where it was told to, and says so in a line if that cannot be."
    out = tmp_path / "run"
    toy_run(out, draw=test_train.after(13, lambda: shutil.rmtree(out) if out.exists() else None))
    assert [f.stem for f in out.glob("step-*.json")] == ["step-000020"]
    def file():
        if out.is_dir(): shutil.rmtree(out); out.write_text("in the way")
    shutil.rmtree(out)
    with pytest.raises(core.UserError, match="cannot write") as e: toy_run(out, draw=test_train.after(13, file))
    assert "\n" not in str(e.value) and out.read_text() == "in the way"


def test_two_runs_and_a_clock_that_jumps(tmp_path, monkeypatch):
    with only_here(tmp_path / "run" / "vae"):
        code, lines = minisora(*TRAIN, "--out", tmp_path / "run")
        assert code == 2 and "another run is writing to" in lines[-1]
    clock = iter(range(10**9, 0, -10**6))
    monkeypatch.setattr(time, "time", lambda: next(clock))        # back by eleven days whenever it is asked
    toy_run(tmp_path / "a")
    assert [l["seconds"] for l in test_train.read_log(tmp_path / "a")] == sorted(l["seconds"] for l in test_train.read_log(tmp_path / "a"))


# --- killed anywhere

KILLER = r"""
import json, os, random, re, signal, sys, time
from pathlib import Path
import torch
from minisora import cli, train, vae, dit, sora, data, world, flow, information, text
home, kills, args = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng, done, rounds, where = random.Random(kills), 0, 0, {}

def phase(out):
    "How far a run had come."
    if (out / "model.json").exists(): return "after the end"
    for name in ("dit", "vae"):
        found = train.Checkpoints(out / name).found()
        if found: return name + (" finished" if int(found[0].stem[5:]) == 20 else " under way")
    return "before the first checkpoint"

polite = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, polite)                 # until the command has begun, and after it has ended
real_train_on = cli.train_on
def train_on(*args):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, polite)
    try: real_train_on(*args)
    finally: signal.pthread_sigmask(signal.SIG_BLOCK, polite)
cli.train_on = train_on

def child(out, how, n):
    "The command; killed at the n-th file that it writes (half of it), renames or removes, or from outside."
    left = [n]
    def die(*_): os.kill(os.getpid(), 9)
    def count(what, before):
        def act(path, *more, **options):
            left[0] -= 1
            if left[0] < 0:
                before(path, *more)
                die()
            return what(path, *more, **options)
        return act
    def half(path, content):
        with open(path, "wb") as file: file.write(content[:len(content) // 2]); file.flush()
    if how == "write": Path.write_bytes = count(Path.write_bytes, half)
    if how == "rename": os.replace = count(os.replace, lambda *_: None)
    if how == "renamed": real = os.replace; os.replace = count(os.replace, real)
    if how == "unlink": Path.unlink = count(Path.unlink, lambda *_: None)
    sys.stdout = sys.stderr = open(home / "said", "w")
    code = cli.main([*args, "--out", str(out), "--resume"])
    sys.stderr.flush()
    os._exit(code)

def session(out, how="", n=0, wait=None):
    pid = os.fork()
    if not pid:
        try: child(out, how, n)
        finally: os._exit(1)
    if wait is not None:
        time.sleep(wait)
        try: os.kill(pid, dict(SIGINT=2, SIGTERM=15).get(how, 9))
        except ProcessLookupError: pass
    code, said = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (home / "said").read_text()
    assert code in ((0, 130) if how[:3] == "SIG" else (0, -9)), (how, code, said)
    if code == 130:                                              # one line, which says how to go on
        line, = [l for l in re.split(r"[\r\n]", said) if l.startswith("minisora: ")]
        assert "--resume" in line and "Traceback" not in said, said
    return code

began = time.monotonic()
session(home / "whole")
took, turns = time.monotonic() - began, 0
while done < kills:
    out = home / f"run{rounds}"
    how = ("time", "write", "SIGINT", "rename", "time", "renamed", "SIGTERM", "unlink")[turns % 8]
    turns += 1
    code = session(out, how, rng.randrange(1, 9), rng.uniform(0, took) if how[:3] in ("tim", "SIG") else None)
    done += code == -9
    if code:
        at = dict(time="at a random moment", write="in the middle of a file", rename="before a file got its name", renamed="after a file got its name", unlink="before an old file went",
                  SIGINT="not killed: asked by SIGINT to stop", SIGTERM="not killed: asked by SIGTERM to stop")[how] + "; " + phase(out)
        where[at] = where.get(at, 0) + 1
    for name in ("vae", "dit"):                                  # what lies there is whole, or there was nothing yet
        found = train.Checkpoints(out / name).found()
        if found: assert train.Checkpoints(out / name).load()[0] is not None or not list((out / name).glob("step-*.safetensors")), how
    if (out / "model.json").exists(): session(out); rounds += 1
session(home / f"run{rounds}")
print(json.dumps([done, rounds + 1, where]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_the_command_killed_anywhere(tmp_path):
    kills = int(os.environ.get("MINISORA_KILLS", 60 if LONG else 3))
    done = in_a_child(KILLER, tmp_path, kills, *TRAIN)
    assert done.returncode == 0, done.stderr
    n, rounds, where = json.loads(done.stdout.splitlines()[-1])
    digest = lambda folder: {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "log.jsonl"}
    different = [k for k in range(rounds) if digest(tmp_path / f"run{k}") != digest(tmp_path / "whole")]
    test_train.keep(" ".join(["minisora", *TRAIN, "--resume"]), n, rounds, where, not different)
    assert n >= kills and rounds >= 1 and not different


# --- for hours

@pytest.mark.skipif(not os.environ.get("MINISORA_SOAK"), reason="long: MINISORA_SOAK=minutes")
def test_memory_and_rate_hold(weights, tmp_path):
    "Half of the minutes training, half drawing: the memory's slope is about nothing, the second half as fast as the first."
    code = """
import json, sys, time
from pathlib import Path
import torch
from minisora import cli, core
seconds, home, weights = float(sys.argv[1]) * 30, Path(sys.argv[2]), sys.argv[3]
rss = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
marks = dict(train=[], draw=[])
from minisora import train
real, began = train.Log.write, time.monotonic()
class Over(Exception): pass
def write(self, step, **entry):
    real(self, step, **entry)
    if "loss" in entry: marks["train"].append((time.monotonic() - began, time.process_time(), step, rss()))
    if time.monotonic() - began > seconds: raise Over
train.Log.write = write
try: cli.main(["train", "--preset", "tiny", "--steps", "10000000", "--batch", "8", "--save-every", "200", "--device", "cpu", "--out", str(home / "run")])
except Over: pass
model, began, n = cli.load_sora(weights, "cpu"), time.monotonic(), 0
while time.monotonic() - began < seconds:
    cli.draw(model, [f"a red circle {n + k}" for k in range(8)], [n + k for k in range(8)], quiet=True)
    n += 8
    marks["draw"].append((time.monotonic() - began, time.process_time(), n, rss()))
print(json.dumps(marks))
"""
    done = in_a_child(code, os.environ["MINISORA_SOAK"], tmp_path, weights)
    assert done.returncode == 0, done.stderr
    for name, marks in json.loads(done.stdout.splitlines()[-1]).items():
        t, cpu, n, mb = np.array(marks)[len(marks) // 5:].T       # after the first fifth, when all caches are full
        slope, m = np.polyfit(n, mb, 1)[0] * 1000, len(n) // 2
        rates = [(n[j] - n[i]) / (cpu[j] - cpu[i]) for i, j in ((0, m), (m, -1))]
        print(f"{name}: {n[-1]:.0f} {'steps' if name == 'train' else 'prompts'} in {t[-1]:.0f} s, {mb[0]:.0f} to {mb[-1]:.0f} MB, {slope:+.3f} MB a thousand, {rates[0]:.1f} and {rates[1]:.1f} a CPU second")
        assert mb[-1] - mb[0] < .02 * mb[0] + 5
