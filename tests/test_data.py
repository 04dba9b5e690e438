"Files of every kind come back as they went; every bad one costs one line and never an exception; batches repeat."
import os, random, re, struct, tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from minisora import data
from minisora.core import UserError
from minisora.world import World
from PIL import Image

SAMPLES = Path(__file__).resolve().parent.parent / "data_samples"
ANIMATED, STILLS = (".png", ".apng", ".gif", ".webp", ".mp4"), (".jpg", ".jpeg")


@pytest.fixture(scope="module")
def clips():
    world = World()
    return world.render(world.sample(4, torch.Generator().manual_seed(0)))


def g(seed=0): return torch.Generator().manual_seed(seed)


def plain(colour, size=(8, 8)): return Image.new("RGB", size[::-1], colour)


def animation(path, colours, ms, size=(8, 8), **kw):
    frames = [plain(c, size) for c in colours]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=ms, **kw)


def quiet(path, **kw): return data.Folder(path, say=lambda line: None, **kw)


def check_lines(folder):
    for line in folder.bad: assert "\n" not in line and str(folder.path) in line and len(line) < 500, line


# --- round trips

@pytest.mark.parametrize("kind,mean", [(".png", .3), (".apng", .3), (".webp", .3), (".gif", 2), (".mp4", 5)])
def test_round_trip(clips, tmp_path, kind, mean):
    for k, clip in enumerate(clips):
        data.write_clip(clip, tmp_path / f"{k}{kind}")
        back = data.read_clip(tmp_path / f"{k}{kind}")
        error = 127.5 * (back - clip).abs()
        assert back.shape == clip.shape and back.dtype == torch.float32 and back.abs().max() <= 1
        assert error.mean() < mean and (mean > 1 or error.max() < .51)


@pytest.mark.parametrize("kind", ANIMATED)
def test_equal_clips_give_equal_bytes(clips, tmp_path, kind):
    for name in "ab": data.write_clip(clips[0], tmp_path / f"{name}{kind}")
    assert (tmp_path / f"a{kind}").read_bytes() == (tmp_path / f"b{kind}").read_bytes()
    if kind == ".mp4":  # x264 was seen to look at memory that others had used before
        for k in range(12):
            for clip, name in ((clips[k % 4].flip(0), "c"), (clips[0], "b")): data.write_clip(clip, tmp_path / f"{name}.mp4")
            np.random.default_rng(k).integers(0, 256, (9, 9999), "uint8").copy()
            assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
        (tmp_path / "c.mp4").unlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"a{kind}", f"b{kind}"]  # nothing is left aside


@pytest.mark.parametrize("kind", (".png", ".gif"))
def test_a_still_clip_keeps_all_its_frames(clips, tmp_path, kind):
    data.write_clip(clips[0, :1].expand(17, -1, -1, -1), tmp_path / f"a{kind}", fps=8)
    with Image.open(tmp_path / f"a{kind}") as im: assert im.n_frames == 17


def test_gif_colours_are_exact_while_they_fit_and_near_where_not(clips, tmp_path):
    few = torch.tensor([[1., -.8, -.8], [-1, -1, -1], [.2, .4, 1]])[torch.randint(3, (5, 16, 16), generator=g())].permute(0, 3, 1, 2)
    data.write_clip(few, tmp_path / "few.gif")
    assert 127.5 * (data.read_clip(tmp_path / "few.gif", 5, 16) - few).abs().max() < .51
    noisy = (clips[0] + .1 * torch.randn(clips[0].shape, generator=g())).clamp(-1, 1)
    data.write_clip(noisy, tmp_path / "noisy.gif")
    assert 127.5 * (data.read_clip(tmp_path / "noisy.gif") - noisy).abs().mean() < 4


def test_frame_rate_of_a_gif_is_right_on_average(clips, tmp_path):
    data.write_clip(clips[0], tmp_path / "a.gif", fps=8)  # 125 ms cannot be said in hundredths
    with Image.open(tmp_path / "a.gif") as im:
        assert sum((im.seek(k), im.info["duration"])[1] for k in range(im.n_frames)) == round(17 / 8 * 100) * 10


def test_grey_one_frame_and_odd_sizes(tmp_path):
    grey = torch.linspace(-1, 1, 15).view(1, 1, 3, 5)
    for kind in (".png", ".gif", ".webp", ".jpg"):
        data.write_clip(grey, tmp_path / f"a{kind}")
        assert (data.read_clip(tmp_path / f"a{kind}", 1, (3, 5)) - grey).abs().max() < (.06 if kind == ".jpg" else .005)


def test_write_refuses(clips, tmp_path):
    clip = clips[0]
    for name, words in {"a.avi": "one of .png .apng .gif .webp .jpg .jpeg .mp4", "a": "ends in", "a.jpg": "one frame"}.items():
        with pytest.raises(UserError, match=words) as e: data.write_clip(clip, tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
    with pytest.raises(UserError, match="even"): data.write_clip(clip[..., :31], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="shape"): data.write_clip(clip[0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="finite"): data.write_clip(clip / 0, tmp_path / "a.png")
    with pytest.raises(ValueError, match="fps"): data.write_clip(clip, tmp_path / "a.png", fps=0)
    with pytest.raises(UserError, match="cannot write"): data.write_clip(clip, Path(__file__) / "a.png")
    assert not list(tmp_path.iterdir())


# --- space and time

def test_crop_takes_the_centre():
    wide = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], "uint8"), 8, 1).repeat(8, 0))
    assert (np.asarray(data.crop(wide, (8, 8))) == (0, 255, 0)).all()
    assert (np.asarray(data.crop(wide.transpose(Image.Transpose.ROTATE_90), (8, 8))) == (0, 255, 0)).all()
    assert (np.asarray(data.crop(wide, (8, 24))) == np.asarray(wide)).all()
    half = np.asarray(data.crop(Image.fromarray(np.indices((64, 64)).sum(0).__mod__(2).astype("uint8") * 255), (16, 16)))
    assert abs(half.astype(int) - 127).max() <= 8  # a checkerboard turns grey
    for size in ((1, 1), (1, 500), (500, 1), (3, 7)): assert data.crop(plain("red", size), (5, 4)).size == (4, 5)


def test_moments_known_answers():
    assert data.moments(np.arange(18) * 40_000, 17) == list(range(17))
    assert data.moments(np.round(np.arange(34) * 1000 / 30) * 1000, 17) == list(range(0, 33, 2))
    assert data.moments(np.cumsum([0, 100, 100, 100, 700]) * 1000, 10) == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert data.moments(np.cumsum([0, 700, 100, 100, 100]) * 1000, 10) == [0] * 7 + [1, 2, 3]
    assert data.moments([5, 105], 4) == [0] * 4 and data.moments([0, 10, 20, 30], 1) == [0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges, frames = np.cumsum([0, *rng.integers(1000, 10**6, rng.integers(1, 40))]), int(rng.integers(1, 40))
        picks = data.moments(edges, frames)
        assert len(picks) == frames and picks == sorted(picks) and 0 <= picks[0] and picks[-1] < len(edges) - 1


@pytest.mark.parametrize("kind", (".gif", ".png", ".webp"))
def test_frame_lengths_are_respected(tmp_path, kind):
    colours, ms = ["red", "lime", "blue", "white"], [100, 400, 100, 400]
    animation(tmp_path / f"a{kind}", colours, ms, **({"lossless": True} if kind == ".webp" else {}))
    seen = data.read_clip(tmp_path / f"a{kind}", 10, 8)[:, :, 4, 4]
    red, lime, blue, white = torch.tensor([[1., -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])
    assert torch.allclose(seen, torch.stack([red, *[lime] * 4, blue, *[white] * 4]), atol=.02)


def test_length_zero_is_a_tenth_of_a_second(tmp_path):
    animation(tmp_path / "a.gif", ["red", "lime", "blue"], [0, 200, 0])
    assert (data.read_clip(tmp_path / "a.gif", 4, 8)[:, :, 4, 4] > 0).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_the_default_image_of_an_apng_is_no_frame(tmp_path):
    animation(tmp_path / "a.png", ["white", "red", "blue"], 100, default_image=True)
    assert (data.read_clip(tmp_path / "a.png", 2, 8)[:, :, 4, 4] > 0).int().tolist() == [[1, 0, 0], [0, 0, 1]]


def grey_video(path, n=40, gop=10, codec="libx264", rate=25, stamps=None, size=32):
    "Frame k has brightness 6 k."
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=rate, options={"g": str(gop), **({"crf": "4"} if "264" in codec else {"b": "2M"})})
        s.width = s.height = size
        s.pix_fmt = "yuv420p"
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 6 * k, "uint8"), format="rgb24")
            if stamps: frame.pts, frame.time_base = stamps[k], Fraction(1, rate)
            out.mux(s.encode(frame))
        out.mux(s.encode())
    return path


def numbers(path, frames): return (127.5 * (data.read_clip(path, frames, 8)[:, 0, 4, 4] + 1) / 6).round().int().tolist()


@pytest.mark.parametrize("kind,codec", [(".mp4", "libx264"), (".mov", "libx264"), (".webm", "libvpx"), (".mp4", "mpeg4")])
def test_video_frames_are_the_right_ones(tmp_path, kind, codec):
    path = grey_video(tmp_path / f"a{kind}", codec=codec)
    assert numbers(path, 40) == list(range(40)) and numbers(path, 4) == [0, 13, 26, 39] and numbers(path, 1) == [0]
    assert np.array_equal(numbers(path, 79), np.repeat(range(40), 2)[1:])


def test_a_long_video_is_jumped_through(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path, decoded = grey_video(tmp_path / "a.mp4", n=42, gop=2), []
    monkeypatch.setattr(data.Image, "fromarray", lambda a, real=Image.fromarray: decoded.append(1) or real(a))
    assert numbers(path, 3) == [0, 21, 41] and len(decoded) == 3


def test_frame_times_of_a_video_are_respected(tmp_path):
    stamps = [*range(5), *range(20, 25)]  # frame 4 is held for 16 ticks
    seen = numbers(grey_video(tmp_path / "a.mp4", n=10, stamps=stamps), 25)
    assert seen[:5] == [0, 1, 2, 3, 4] and seen[5:20] == [4] * 15 and seen[20:] == [5, 6, 7, 8, 9]


def test_a_video_that_lies_on_its_side(clips, tmp_path):
    data.write_clip(clips[0], tmp_path / "a.mp4")
    b = bytearray((tmp_path / "a.mp4").read_bytes())
    at = b.index(b"tkhd") + 44  # the matrix, whose rows say where x and y go: (x, y) → (-y, x) turns clockwise
    b[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(b)
    assert torch.equal(data.read_clip(tmp_path / "b.mp4"), data.read_clip(tmp_path / "a.mp4").rot90(-1, (-2, -1)))


def test_every_colour_mode(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1).astype("uint8")
    im, grey = Image.fromarray(photo), Image.fromarray(photo).convert("L")
    read = lambda name: ((data.read_clip(tmp_path / name, 1)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().astype(int)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        im.convert(mode).save(tmp_path / f"{mode}.png")
        assert np.array_equal(read(f"{mode}.png"), np.asarray(im.convert(mode).convert("RGB"))), mode
    Image.fromarray(np.asarray(grey).astype("uint16") * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read("deep.png"), np.asarray(grey.convert("RGB")))
    im.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(read("ink.jpg") - photo).mean() < 12
    half = im.convert("RGBA")
    half.putalpha(Image.fromarray(np.tile([0] * 16 + [255] * 16, (32, 1)).astype("uint8")))
    for name in ("half.png", "half.webp"):
        half.save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
        assert not read(name)[:, :16].any() and np.array_equal(read(name)[:, 16:], photo[:, 16:])
    side = Image.Exif()
    side[0x0112] = 6
    im.save(tmp_path / "side.png", exif=side)
    assert np.array_equal(read("side.png"), np.rot90(photo, -1))
    Image.fromarray(photo.repeat(20, 0).repeat(20, 1)).save(tmp_path / "large.jpg", quality=95, exif=side)
    assert np.abs(read("large.jpg") - np.rot90(photo, -1)).mean() < 8


# --- what is wrong with files

def test_every_cut_of_every_kind_is_found(clips, tmp_path):
    rng = random.Random(0)
    for kind in ANIMATED + STILLS: data.write_clip(clips[1] if kind in ANIMATED else clips[1, :1], tmp_path / f"a{kind}")
    grey_video(tmp_path / "a.webm", n=12, codec="libvpx")
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        assert data.complete(whole) is True, path
        for n in range(1, len(whole)): assert not data.complete(whole[:n]), (path, n)
        for n in rng.sample(range(1, len(whole)), 8):
            path.write_bytes(whole[:n])
            with pytest.raises(UserError, match="truncated|no PNG") as e: data.read_clip(path)
            assert str(path) in str(e.value)


def test_rubbish_is_never_an_exception(clips, tmp_path):
    "Bytes changed anywhere: a clip, or one line with the file's name."
    rng = random.Random(0)
    for kind in ANIMATED[1:] + STILLS[:1]:
        path = tmp_path / f"a{kind}"
        data.write_clip(clips[1] if kind in ANIMATED else clips[1, :1], path)
        whole = path.read_bytes()
        for _ in range(25):
            b = bytearray(whole)
            for _ in range(rng.choice((1, 3, 30))): b[rng.randrange(len(b))] = rng.randrange(256)
            path.write_bytes(b)
            try: assert data.read_clip(path, 4, 8).shape == (4, 3, 8, 8)
            except UserError as e: assert str(path) in str(e) and "\n" not in str(e)


def test_bombs_and_liars(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 30)).save(tmp_path / "large.png")  # warned of by Pillow
    Image.new("L", (600, 300)).save(tmp_path / "huge.png")  # refused by Pillow
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "image.mp4").write_bytes((tmp_path / "a.png").read_bytes())
    data.write_clip(clips[0], tmp_path / "b.mp4")
    (tmp_path / "video.png").write_bytes((tmp_path / "b.mp4").read_bytes())
    for name in ("large.png", "huge.png", "video.png"):
        with pytest.raises(UserError, match="cannot be decoded") as e: data.read_clip(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    assert data.read_clip(tmp_path / "image.mp4", 2).shape == (2, 3, 32, 32)  # FFmpeg reads a PNG, whatever it is called


def test_captions_that_lie_elsewhere_are_told(tmp_path):
    clip = World().render(World().sample(1))[0]
    (tmp_path / "sub").mkdir(); (tmp_path / "far").mkdir()
    for name in ("a.gif", "e\u0301.gif", "sub/c.gif"): data.write_clip(clip, tmp_path / name)
    (tmp_path / "captions.jsonl").write_text('{"file": "\u00e9.gif", "caption": "composed"}\n', encoding="utf-8")
    (tmp_path / "a.TXT").write_text("beside")
    (tmp_path / "sub" / "captions.jsonl").write_text('{"file": "c.gif", "caption": "nested"}\n')
    try: (tmp_path / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    except OSError: pass                                                  # Windows asks for a right
    folder = data.Folder(tmp_path, say=lambda line: None)
    assert dict(folder.items) == {"a.gif": ["beside"], "e\u0301.gif": ["composed"]}
    assert any("captions.jsonl is not read" in line for line in folder.bad) and (not (tmp_path / "linked").exists() or any("link to a folder" in line for line in folder.bad))


def test_a_side_that_a_format_cannot_hold(tmp_path):
    for name, side in (("a.gif", 2**16), ("a.webp", 2**14)):
        with pytest.raises(UserError, match="holds at most"): data.write_clip(torch.zeros(1, 3, 1, side), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_read_refuses(tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II*\0")
    for name, words in {"a.tiff": "suffix", "gone.png": "not a file", "gone": "not a file", ".": "is a folder"}.items():
        with pytest.raises(UserError, match=words): data.read_clip(tmp_path / name)
    for kw in (dict(frames=0), dict(size=0), dict(size=(0, 4))):
        with pytest.raises(ValueError, match="expected"): data.read_clip(tmp_path / "a.png", **kw)


def test_without_pyav_a_video_is_one_line(clips, tmp_path, monkeypatch):
    data.write_clip(clips[0], tmp_path / "a.mp4")
    data.write_clip(clips[0], tmp_path / "b.gif")
    for name in "ab": (tmp_path / f"{name}.txt").write_text("x")
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    folder = quiet(tmp_path)
    assert len(folder) == 1 and len(folder.bad) == 1 and "a.mp4" in folder.bad[0] and "pip install 'minisora[video]'" in folder.bad[0]
    with pytest.raises(UserError, match=r"minisora\[video\]"): data.write_clip(clips[0], tmp_path / "c.mp4")


# --- folders

@pytest.fixture
def good(clips, tmp_path):
    data.write_clip(clips[0], tmp_path / "good.gif")
    (tmp_path / "good.txt").write_text("a fine clip")
    return tmp_path


BAD = {  # what is put into a folder beside one good clip → words of the one line it must give
    "empty": ({"e.png": b"", "e.txt": "x"}, "e.png is empty"),
    "page": ({"e.png": b"<html>404</html>", "e.txt": "x"}, "e.png is no PNG"),
    "suffix": ({"e.avi": b"RIFF", "e.txt": "x"}, "e.avi has a suffix"),
    "no caption": ({"e.png": None}, "e.png has no caption"),
    "empty caption": ({"e.png": None, "e.txt": " \n"}, "e.txt has an empty caption for e.png"),
    "caption without clip": ({"e.txt": "x"}, "e.txt stands beside no clip"),
    "latin-1": ({"e.png": None, "e.txt": "grün".encode("latin-1"), "captions.jsonl": '{"file": "e.png", "caption": "x"}'}, "e.txt is not UTF-8"),
    "utf-16": ({"e.png": None, "e.txt": "grün".encode("utf-16")}, "e.txt is not UTF-8"),
    "latin-1 alone": ({"e.txt": "grün".encode("latin-1")}, "e.txt stands beside no clip"),
    "line not JSON": ({"captions.jsonl": '\n{"file": '}, "line 2 does not have the form"),
    "line a list": ({"captions.jsonl": "[1, 2]"}, "line 1 does not have the form"),
    "line without caption": ({"captions.jsonl": '{"file": "good.gif"}'}, "line 1 does not have the form"),
    "caption a number": ({"captions.jsonl": '{"file": "good.gif", "caption": 3}'}, "line 1 does not have the form"),
    "caption of numbers": ({"captions.jsonl": '{"file": "good.gif", "caption": [3]}'}, "line 1 does not have the form"),
    "file a number": ({"captions.jsonl": '{"file": 3, "caption": "x"}'}, "line 1 does not have the form"),
    "very deep": ({"captions.jsonl": "[" * 100_000}, "line 1 does not have the form"),
    "line latin-1": ({"captions.jsonl": '\n\n{"file": "good.gif", "caption": "grün"}'.encode("latin-1")}, "line 3 is not UTF-8"),
    "gone": ({"captions.jsonl": '{"file": "gone.gif", "caption": "x"}'}, "line 1 names gone.gif, which is no clip"),
    "outside": ({"captions.jsonl": '{"file": "../x.gif", "caption": "x"}'}, "outside the folder"),
    "absolute": ({"captions.jsonl": '{"file": "/x.gif", "caption": "x"}'}, "outside the folder"),
    "drive": ({"captions.jsonl": '{"file": "C:\\\\x.gif", "caption": "x"}'}, "outside the folder"),
    "twice": ({"e.png": None, "captions.jsonl": '{"file": "e.png", "caption": "x"}\n{"file": "./e.png", "caption": "y"}'}, "line 2 captions e.png again"),
    "both": ({"captions.jsonl": '{"file": "good.gif", "caption": "x"}'}, "good.txt captions good.gif again"),
    "one of two empty": ({"e.png": None, "captions.jsonl": '{"file": "e.png", "caption": ["x", ""]}'}, "line 1 has an empty caption for e.png"),
    "no list": ({"e.png": None, "captions.jsonl": '{"file": "e.png", "caption": []}'}, "line 1 has an empty caption for e.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_every_complaint(good, case, capsys):
    files, words = BAD[case]
    for name, content in files.items():
        if content is None: plain("red").save(good / name)
        else: (good / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    folder = data.Folder(good)
    assert [line for line in folder.bad if words in line] == folder.bad and len(folder.bad) == 1, folder.bad
    assert capsys.readouterr().err == folder.bad[0] + "\n"
    check_lines(folder)
    assert "good.gif" in [name for name, _ in folder.items] and folder.batch(g(), 3)["clips"].shape == (3, 17, 3, 32, 32)


def test_layouts(clips, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("x.gif", "a/x.GIF", "a/b/ü ø.png", ".hidden/x.gif", ".x.gif"):
        data.write_clip(clips[0], tmp_path / "w.gif" if "x" in name else tmp_path / name)
        if "x" in name: (tmp_path / "w.gif").rename(tmp_path / name)
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa caption\r\nin two lines\r\n")
    (tmp_path / "captions.jsonl").write_bytes('\ufeff{"file": "a\\\\x.GIF", "caption": ["p", "q  r"]}\r\n\r\n{"file": "a/b/ü ø.png", "caption": "ü", "more": 1}'.encode())
    folder = quiet(tmp_path)
    assert not folder.bad and folder.items == [("a/b/ü ø.png", ["ü"]), ("a/x.GIF", ["p", "q r"]), ("x.gif", ["a caption in two lines"])]
    assert folder.texts() == ["ü", "p", "q r", "a caption in two lines"]
    drawn = {c for seed in range(20) for c in folder.batch(g(seed), 4)["captions"]}
    assert drawn == set(folder.texts())
    many = quiet(tmp_path, unsaid=.2).batch(g(0), 90, captions=5)["captions"]
    assert len(many) == 90 and {len(row) for row in many} == {5} and {frozenset(row) for row in many if len({*row} - {""}) > 1} >= {frozenset({"p", "q r"})}
    assert 50 < sum(text == "" for row in many for text in row) < 130 and all(any({*row} <= {*texts, ""} for _, texts in folder.items) for row in many)
    assert folder.batch(g(0), 2, captions=0)["captions"] == [[], []]


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="POSIX")
def test_what_is_no_file(good):
    os.mkfifo(good / "pipe.png")  # opening it would wait for ever
    (good / "broken.png").symlink_to(good / "nowhere.png")
    (good / "folder.png").mkdir()
    folder = quiet(good)
    assert len(folder.bad) == 2 and all("is not a file" in line for line in folder.bad)
    if os.geteuid():
        (good / "good.gif").chmod(0)
        with pytest.raises(UserError, match="cannot be read"): quiet(good)


def test_nothing_left(tmp_path):
    with pytest.raises(UserError, match="not a folder"): quiet(tmp_path / "gone")
    with pytest.raises(UserError, match="expected files that end in"): quiet(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 complaints, the first: .*a.png is empty") as e: quiet(tmp_path)
    assert "\n" not in str(e.value)


def test_found_out_late(clips, tmp_path):
    "A hole in a file: named once, replaced by its neighbour, in the same way however much was drawn before."
    for k in range(6):
        data.write_clip(clips[k % 4], tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(str(k))
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:300] + bytes(50) + whole[350:])
    said = []
    folder = data.Folder(tmp_path, say=said.append)
    first = [folder.batch(g(seed), 16) for seed in range(4)]
    assert len(folder) == 6 and len(said) == 1 and "3.png cannot be decoded" in said[0] and folder.bad == said
    fresh = quiet(tmp_path).batch(g(3), 16)
    assert fresh["captions"] == first[3]["captions"] and torch.equal(fresh["clips"], first[3]["clips"])
    assert {c for b in first for c in b["captions"]} == set("01245")
    for k in range(6): (tmp_path / f"{k}.png").write_bytes(whole[:300] + bytes(50) + whole[350:])
    with pytest.raises(UserError, match="no clip that can be read"): quiet(tmp_path).batch(g(), 2)


def test_batches_repeat_whatever_the_cache(clips, tmp_path):
    for k in range(12):
        data.write_clip(clips[k % 4], tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(str(k))
    a, b = quiet(tmp_path), quiet(tmp_path, cache_mb=.12)
    for seed in range(3):
        x, y = a.batch(g(seed), 8), b.batch(g(seed), 8)
        assert torch.equal(x["clips"], y["clips"]) and x["captions"] == y["captions"]
        assert all((c - clips[int(t) % 4]).abs().max() < .005 for c, t in zip(x["clips"], x["captions"]))  # each with its own caption
    assert len(b._cache) == 2 and a.batch(g(1), 8)["captions"] != a.batch(g(2), 8)["captions"]


def test_memory_does_not_grow_with_the_folder(clips, tmp_path):
    data.write_clip(clips[0].repeat_interleave(2, -1).repeat_interleave(2, -2), tmp_path / "w.png")
    whole = (tmp_path / "w.png").read_bytes()
    (tmp_path / "w.png").unlink()
    for k in range(200):
        (tmp_path / f"{k}.png").write_bytes(whole)
        (tmp_path / f"{k}.txt").write_text("a red circle")
    tracemalloc.start()
    folder = quiet(tmp_path, cache_mb=1)
    start = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for seed in range(12): folder.batch(g(seed), 16)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now - start < 1.5e6 and peak - start < 6e6, (now - start, peak - start)  # all 200 decoded would be 10 MB


# --- the world, and the folder that ships

def test_one_switch(good):
    world, folder = data.open_data("world", 5, 16), data.open_data(good, 5, (16, 16), say=lambda line: None)
    for source in (world, folder):
        x, y = source.batch(g(), 4), source.batch(g(), 4)
        assert x["clips"].shape == (4, 5, 3, 16, 16) and x["captions"] == y["captions"] and torch.equal(x["clips"], y["clips"])
        assert len(x["captions"]) == 4 and source.texts() and not source.bad
    with pytest.raises(UserError, match="square"): data.open_data("world", 5, (16, 32))
    with pytest.raises(ValueError, match="tall"): data.WorldClips(World(), dict(tall=1))


def test_world_captions_belong_to_their_clips():
    world = World(frames=1)
    batch = data.WorldClips(world, dict(short=1, long=2)).batch(g(3), 64)
    by_background = {"black": -1., "white": 1.}
    long = [(c, t) for c, t in zip(batch["clips"], batch["captions"]) if "background" in t]
    assert 30 < len(long) < 56
    for clip, text in long:
        for name, value in by_background.items():
            if f"{name} background" in text: assert abs(clip.median() - value) < .01 or abs(clip[0, :, 0, 0] - value).max() < .01
    free = data.WorldClips(world, dict(paraphrase=1))
    assert len(set(free.batch(g(), 8)["captions"])) > 4 and free.batch(g(), 8)["captions"] == free.batch(g(), 8)["captions"]


def test_samples_ship_whole():
    folder = quiet(SAMPLES)
    files = [f for f in SAMPLES.rglob("*") if f.is_file()]
    assert not folder.bad and len(folder) >= 40 and sum(f.stat().st_size for f in files) < 500_000
    assert {".png", ".gif", ".webp", ".mp4", ".jpg", ".txt", ".jsonl", ".json"} == {f.suffix for f in files}
    for i in range(len(folder)): folder.clip(i)
    assert not folder.bad


def test_cut_samples_are_always_named(tmp_path):
    rng = random.Random(1)
    (tmp_path / "good.png").write_bytes(next(SAMPLES.rglob("*.png")).read_bytes())
    (tmp_path / "good.txt").write_text("good")
    for f in sorted(SAMPLES.rglob("*.*")):
        if f.suffix in data.SUFFIXES:
            whole = f.read_bytes()
            (tmp_path / f.name).write_bytes(whole[: rng.randrange(1, len(whole))])
            (tmp_path / f.with_suffix(".txt").name).write_text("cut")
    folder = quiet(tmp_path)
    assert [name for name, _ in folder.items] == ["good.png"] and folder.batch(g(), 2)["captions"] == ["good"] * 2
    for f in tmp_path.iterdir():
        if f.suffix in data.SUFFIXES and f.stem != "good": assert sum(f.name in line for line in folder.bad) == 1, f.name
    check_lines(folder)


def test_clips_kept_aside(clips, tmp_path):
    for k in range(20):
        data.write_clip(clips[k % 4], tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"clip {k}")
    whole, folder = quiet(tmp_path), quiet(tmp_path)
    aside = folder.keep_aside(.1)
    assert len(folder) == 18 and len(aside) == 2 and sorted(folder.items + aside.items) == sorted(whole.items)
    assert set(aside.batch(g(), 30)["captions"]) == set(aside.texts()) and not set(folder.batch(g(), 200)["captions"]) & set(aside.texts())
    (tmp_path / "more.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "more.txt").write_text("more")
    assert len({name for name, _ in quiet(tmp_path).keep_aside(.1).items} & {name for name, _ in aside.items}) >= 1   # by name, not by place
    (tmp_path / "torn.gif").write_bytes(b"GIF")
    lines = quiet(tmp_path).table().splitlines()
    assert lines[1].split()[:4] == [".png", "21", "21", "2.0"] and lines[-1].startswith("passed over: 1")
    assert lines[0].split()[-4:] == ["height", "width", "frames", "seconds"] and lines[1].split()[-4:] == ["-"] * 4   # not known before they are decoded


def test_what_is_found(clips, tmp_path):
    data.write_clip(clips[0], tmp_path / "a.gif", fps=8)
    data.write_clip(clips[1, :9, :, :16], tmp_path / "b.gif", fps=20)
    data.write_clip(clips[0], tmp_path / "c.mp4", fps=10)
    plain("red", (40, 30)).save(tmp_path / "d.jpg")
    data.write_clip(clips[0], tmp_path / "e.png")
    whole = (tmp_path / "e.png").read_bytes()
    (tmp_path / "e.png").write_bytes(whole[:300] + bytes(50) + whole[350:])
    (tmp_path / "a.txt").write_text("a fine clip")
    shown = []
    folder = quiet(tmp_path, silent=True).decode(lambda x: shown.append(len(x)) or x)
    assert shown == [5] and [name for name, _ in folder.items] == ["a.gif", "b.gif", "c.mp4", "d.jpg"] and "e.png" in folder.bad[0] and len(folder.bad) == 1
    assert folder.found["a.gif"] == dict(height=32, width=32, frames=17, seconds=2.12) and folder.found["d.jpg"] == dict(height=40, width=30, frames=1, seconds=0)
    assert folder.found["c.mp4"]["frames"] == 17 and abs(folder.found["c.mp4"]["seconds"] - 1.7) < .02
    head, gif, jpg, mp4, mute, bad = (re.split(r"  +", line.strip()) for line in folder.table().splitlines())
    assert gif[:4] == [".gif", "2", "1", "3.0"] and gif[5:] == ["16 to 32", "32", "9 to 17", "0.5 to 2.1"] and jpg[5:] == ["40", "30", "1", "0.0"]
    assert mute[0].startswith("without a caption: 3") and bad[0].startswith("passed over: 1") and folder.texts() == ["a fine clip"]
    assert set(folder.batch(g(), 40)["captions"]) == {"", "a fine clip"}
    assert folder.clips(2).shape == (2, 17, 3, 32, 32) and torch.equal(folder.clips([1])[0], data.read_clip(tmp_path / "b.gif")) and len(folder.clips(99)) == 4
    if os.name != "nt": assert quiet(tmp_path, silent=True, kept=SAMPLES / "captions.jsonl" / "x").decode().found == folder.found   # a place that cannot be: nothing is lost


def test_kept_clips_know_their_bytes(clips, tmp_path, monkeypatch):
    box, kept, decoded = tmp_path / "box", tmp_path / "kept", []
    box.mkdir()
    for k, name in enumerate(("a.png", "b.png")): data.write_clip(clips[k], box / name)
    real = data._pillow
    monkeypatch.setattr(data, "_pillow", lambda path, *a: decoded.append(path.name) or real(path, *a))
    def read(**kw):
        decoded.clear()
        return quiet(box, silent=True, kept=kept, **kw).decode().clips([0, 1])
    first = read()
    assert decoded == ["a.png", "b.png"] and torch.equal(read(), first) and not decoded
    assert quiet(box, silent=True, kept=kept).decode().found["a.png"] == dict(height=32, width=32, frames=17, seconds=2.125)
    (box / "b.png").rename(box / "c.png")
    assert torch.equal(read(), first) and not decoded                                     # the same bytes under another name
    date = (box / "a.png").stat().st_mtime_ns
    data.write_clip(clips[2], box / "a.png")
    os.utime(box / "a.png", ns=(date, date))
    assert torch.equal(read()[0], data._to_clip(real(box / "a.png", 17, (32, 32))[0])) and decoded == ["a.png"]     # other bytes, the old date
    good = read()
    assert read(frames=5).shape[1] == 5 and len(decoded) == 2 and read(size=16).shape[-1] == 16
    for file in kept.iterdir():                                                           # torn, changed, emptied, something else
        whole = file.read_bytes()
        for bad in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"[1]\n" + whole, b"\xff" + whole):
            file.write_bytes(bad)
            assert torch.equal(read(), good)
    assert not list(kept.glob(".*"))
    monkeypatch.setattr(data.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    said = []
    folder = data.Folder(box, silent=True, kept=tmp_path / "full", say=said.append).decode()
    assert len(folder) == 2 and len(said) == 1 and "No space left" in said[0] and not folder.bad


def test_a_gif_of_any_rate_reads_back_frame_by_frame(tmp_path):
    for fps in range(1, 51):                                       # a GIF's clock ticks in hundredths of a second
        for n in (2, 9, 23, 64):
            edges = [round(100 * k / fps) * 10_000 for k in range(n + 1)]
            assert data.moments(edges, n) == [*range(n)], (fps, n)
    clip = torch.linspace(-1, 1, 23)[:, None, None, None].expand(23, 3, 8, 8)
    data.write_clip(clip, tmp_path / "fast.gif", 40)
    back = data.read_clip(tmp_path / "fast.gif", 23, 8).mean((1, 2, 3))
    assert (back.diff() > 0).all()
    with pytest.raises(ValueError, match="uint8: expected a tensor of floating-point"): data.write_clip(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "a.png")


def test_a_folder_has_a_digest_of_names_captions_and_bytes(tmp_path):
    data.write_clip(torch.zeros(1, 3, 8, 8), tmp_path / "a.png"); (tmp_path / "a.txt").write_text("grey")
    first = data.Folder(tmp_path).digest()
    assert first == data.Folder(tmp_path).digest()
    (tmp_path / "a.txt").write_text("gray")
    second = data.Folder(tmp_path).digest()
    data.write_clip(torch.ones(1, 3, 8, 8), tmp_path / "a.png")
    assert len({first, second, data.Folder(tmp_path).digest()}) == 3


def test_markers_of_a_jpeg_may_be_filled_up(tmp_path):
    "Any number of 0xFF may stand before a marker (ITU T.81, B.1.1.2)."
    plain("red").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:2] + b"\xff\xff\xff" + whole[2:])
    assert torch.equal(data.read_clip(tmp_path / "a.jpg"), data.read_clip(tmp_path / "b.jpg"))
    assert not data.complete((tmp_path / "b.jpg").read_bytes()[:-2])


@pytest.mark.parametrize("wrong, says", [(dict(frames=2.5), "frames is 2.5"), (dict(size="5"), "height is '5'"), (dict(size=(0, 4)), "height is 0"), (dict(frames=True), "frames is True")])
def test_what_a_folder_is_cut_to_is_checked_before_its_files(tmp_path, wrong, says):
    plain("red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    with pytest.raises(ValueError, match=says): data.Folder(tmp_path, **wrong)
