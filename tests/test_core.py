"Weights that were tampered with are refused; the ledger is where it must be; FLOPs are those of the formula."
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from minisora import core


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "toy.safetensors"
    core.save(path, {"a": torch.arange(6.).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"world": "1", "config": {"depth": 2}})
    return path


def refused(path, words, **kw):
    with pytest.raises(core.UserError, match=words) as e: core.load(path, **kw)
    assert "\n" not in str(e.value) and path.stem in str(e.value)


def test_round_trip(saved):
    tensors, card = core.load(saved, world="1")
    assert core.load(saved)[1] == card          # the world of today; a card that names none is of no world
    assert torch.equal(tensors["a"], torch.arange(6.).view(2, 3)) and tensors["b"].dtype == torch.float16
    assert card["config"] == {"depth": 2} and len(card["sha256"]) == 64


def test_equal_contents_give_equal_bytes(saved, tmp_path):
    other = tmp_path / "other" / "toy.safetensors"
    core.save(other, {"b": torch.ones(4, dtype=torch.float16), "a": torch.arange(6.).view(3, 2).T.contiguous().T.reshape(2, 3)}, {"world": "1", "config": {"depth": 2}})
    for end in (".safetensors", ".json"): assert saved.with_suffix(end).read_bytes() == other.with_suffix(end).read_bytes()


def test_every_changed_byte_is_found(saved):
    good = saved.read_bytes()
    for k in range(len(good)):
        saved.write_bytes(good[:k] + bytes([good[k] ^ 1]) + good[k + 1:])
        with pytest.raises(core.UserError, match="sha256 differs|truncated|pickled"): core.load(saved)


def test_every_truncation_is_found(saved):
    good = saved.read_bytes()
    for k in range(len(good)):
        saved.write_bytes(good[:k])
        with pytest.raises(core.UserError, match="truncated|sha256 differs"): core.load(saved)


def test_pickles_are_never_opened(saved, tmp_path):
    marker = tmp_path / "ran"
    class Evil:
        def __reduce__(self): return (Path.touch, (marker,))
    torch.save(Evil(), saved)
    refused(saved, "pickled checkpoint")
    torch.save(Evil(), saved, _use_new_zipfile_serialization=False)
    refused(saved, "pickled checkpoint")
    for end in (".pt", ".ckpt", ".bin"):
        saved.with_suffix(end).write_bytes(b"anything")
        refused(saved.with_suffix(end), "pickled checkpoint")
    assert not marker.exists()


def test_cards(saved):
    card = saved.with_suffix(".json")
    refused(saved, "trained on world '1', this is world '2'", world="2")
    text = card.read_text()
    for bad, words in (("{", "not JSON"), ("[]", "sha256 differs"), ("{}", "sha256 differs")):
        card.write_text(bad)
        refused(saved, words)
    card.unlink()
    refused(saved, "has no card")
    card.write_text(text)
    core.load(saved)


def test_not_there(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot read .*No such file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "is a folder")
    (tmp_path / "clip.gif").write_bytes(b"GIF89a")
    refused(tmp_path / "clip.gif", "not a .safetensors")
    with pytest.raises(core.UserError, match="ends in .safetensors"): core.save(tmp_path / "a.pt", {}, {})


def test_a_bad_card_leaves_nothing(tmp_path):
    with pytest.raises(ValueError): core.save(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_interrupted_write_keeps_the_old(tmp_path, monkeypatch):
    core.write_atomic(tmp_path / "a", "old")
    def fail(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", fail)
        with pytest.raises(core.UserError, match="cannot write .*No space left"): core.write_atomic(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(core.UserError, match="cannot write"): core.write_atomic(tmp_path / "a" / "b", "below a file")


PAIRS = {"old": torch.zeros(2), "new": torch.ones(2), "newest": torch.full((2,), 2.)}


def save_cut(path, what, at, monkeypatch, calls=("fsync", "replace")):
    "Save, but let the machine die before call number `at` of those that touch the disk; says whether it got that far."
    count = iter(range(10**6))
    def dying(real):
        def call(*args):
            if next(count) == at: raise KeyboardInterrupt
            return real(*args)
        return call
    with monkeypatch.context() as m:
        for name in calls: m.setattr(os, name, dying(getattr(os, name)))
        try: core.save(path, {"w": PAIRS[what]}, {"what": what})
        except KeyboardInterrupt: return True
    return False


def whole(path):
    "What a load finds: card and weights of one save."
    tensors, card = core.load(path)
    assert torch.equal(tensors["w"], PAIRS[card["what"]])
    return card["what"]


def test_a_save_cut_short_anywhere_loses_nothing(tmp_path, monkeypatch):
    found = []
    for at in range(100):
        path = tmp_path / str(at) / "m.safetensors"
        core.save(path, {"w": PAIRS["old"]}, {"what": "old"})
        cut = save_cut(path, "new", at, monkeypatch)
        found.append(whole(path))
        for again in range(100):  # and it happens again, before anybody repaired the first one
            copy = tmp_path / f"{at}-{again}" / "m.safetensors"
            shutil.copytree(path.parent, copy.parent)
            cut_again = save_cut(copy, "newest", again, monkeypatch)
            assert whole(copy) in (found[-1], "newest")
            if not cut_again: break
        assert whole(copy) == "newest" and {".safetensors", ".json"} == {p.suffix for p in copy.parent.iterdir() if p.suffix != ".tmp"}
        if not cut: break
    assert found == sorted(found, key=["old", "new"].index) and {"old", "new"} == set(found) and at >= 6


def test_a_first_save_cut_short_is_no_pair(tmp_path, monkeypatch):
    for at in range(3):
        path = tmp_path / str(at) / "m.safetensors"
        assert save_cut(path, "new", at, monkeypatch)
        with pytest.raises(core.UserError, match="cannot read|has no card"): core.load(path)
        core.save(path, {"w": PAIRS["new"]}, {"what": "new"})
        assert whole(path) == "new"


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    said = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, real=getattr(os, name): (said.append(name if name == "fsync" else Path(args[1]).suffix), real(*args))[1])
    folder = ["fsync"] if os.name == "posix" else []
    for first in (".safetensors", ".new"):
        said.clear()
        core.save(tmp_path / "m.safetensors", {"w": torch.ones(2)}, {})
        assert said == ["fsync", first, *folder, "fsync", ".json", *folder, *([".safetensors", *folder] if first == ".new" else [])]


def test_save_returns_the_card(tmp_path):
    card = core.save(tmp_path / "m.safetensors", {"w": torch.ones(2)}, {"what": "new"})
    assert card == core.load(tmp_path / "m.safetensors")[1] and card["what"] == "new"


def test_waiting_weights_are_checked_too(saved):
    good, digest = saved.read_bytes(), json.loads(saved.with_suffix(".json").read_text())["sha256"]
    late = saved.with_name(f".{saved.name}.{digest[:16]}.new")
    late.write_bytes(b"rubbish")
    core.load(saved)
    saved.write_bytes(good[:-1] + b"x")
    refused(saved, "sha256 differs")
    late.write_bytes(good)
    core.load(saved)


def test_shared_parameters_are_saved_once_each(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    core.save(tmp_path / "m.safetensors", model.state_dict(), {})
    assert set(core.load(tmp_path / "m.safetensors")[0]) == set(model.state_dict()) and core.num_params(model) == 4 + 2 + 2


def record(**kw): return core.record(**{**dict(claim=17, metric="All right, unseen (%)", value=91.23456789, verdict="holds", notebook="41_sora", world="1"), **kw})


def test_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISORA_SCALE", "test")
    record(folder=tmp_path / "l")
    assert not (tmp_path / "l").exists()
    monkeypatch.setenv("MINISORA_SCALE", "cpu")
    record(folder=tmp_path / "l", ci=(90., 92.), kind="new seed", seeds=[0, 1, 2])
    record(folder=tmp_path / "l", claim=5, metric="psnr")
    assert [p.name for p in sorted((tmp_path / "l").iterdir())] == ["05-psnr.json", "17-all-right-unseen.json"]
    first, second = core.ledger(tmp_path / "l")
    assert (first["claim"], second["claim"], second["value"], second["ci"], second["scale"]) == (5, 17, 91.2346, [90., 92.], "cpu")
    with pytest.raises(ValueError, match="verdict"): record(verdict="great")
    with pytest.raises(ValueError, match="Out of range"): record(folder=tmp_path / "l", value=float("nan"))


def test_results_go_to_the_checkout_or_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert core.results() == tmp_path / "results"
    (tmp_path / "minisora").mkdir(); (tmp_path / "minisora" / "__init__.py").touch(); (tmp_path / "settings.ini").touch(); (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert core.results() == tmp_path / "minisora" / "results"


def test_scale(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.delenv("MINISORA_SCALE", raising=False)
    assert core.scale() == ("gpu" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("IN_TEST", "1")
    assert core.scale() == "test"
    monkeypatch.setenv("MINISORA_SCALE", "gpu")
    assert core.at_scale(test=1, cpu=2, gpu=3) == 3
    monkeypatch.setenv("MINISORA_SCALE", "large")
    with pytest.raises(core.UserError, match="large"): core.scale()


@pytest.mark.parametrize("mask", [False, True])
def test_attention_is_counted_however_it_runs(mask):
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    step = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(16, 16, dtype=torch.bool) if mask else None)
    assert core.flops(step) == 2 * 3 * 4 * 16 * 16 * 8
    assert core.flops(lambda: step().sum().backward()) == 3 * 2 * 3 * 4 * 16 * 16 * 8


def test_device():
    assert core.device("cpu") == torch.device("cpu")
    for bad in ("abacus", "cuda:99"):
        with pytest.raises(core.UserError, match=bad): core.device(bad)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, float("nan")])
def test_a_whole_number_is_one(value):
    with pytest.raises(ValueError, match="steps is .*: expected a whole number from 1"): core.whole_number(value, "steps")
    assert core.whole_number(np.int64(3), "steps") == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_finite_number_is_one(value):
    with pytest.raises(ValueError, match="cfg_scale is .*: expected a finite number"): core.finite(value, "cfg_scale")
    assert core.finite(2, "cfg_scale") == 2
