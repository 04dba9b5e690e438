"A study goes on where it stopped, runs no point twice, and keeps what another runner wrote."
import json

import pytest
import torch
from test_ground import script


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setenv("MINISORA_SCALE", "cpu")
    module, module.ran = script("study"), []
    def toy(size, seed):
        "A toy."
        module.ran.append((size, seed))
        if len(module.ran) == module.dies_at: raise KeyboardInterrupt
        return dict(loss=size + seed, flops=1)
    module.dies_at = None
    monkeypatch.setattr(module, "points", lambda: dict(toy=(toy, [dict(size=n, seed=s) for s in (0, 1) for n in (1, 2)])))
    return module


def test_goes_on_where_it_stopped(study, tmp_path):
    out = tmp_path / "toy.json"
    study.dies_at = 3
    with pytest.raises(KeyboardInterrupt): study.study("toy", out)
    assert study.ran == [(1, 0), (2, 0), (1, 1)] and len(json.loads(out.read_text())["points"]) == 2
    table, text = study.study("toy", out), out.read_text()
    assert study.ran[3:] == [(1, 1), (2, 1)] and [p["loss"] for p in table["points"]] == [1, 2, 2, 3]
    assert study.study("toy", out) == table and len(study.ran) == 5 and out.read_text() == text
    assert {"seed", "flops", "scale", "device", "minutes"} <= set(table["points"][0]) and table["what"] == "A toy."


def test_only_and_list(study, tmp_path, capsys):
    out = tmp_path / "toy.json"
    study.study("toy", out, ["seed=1", "size=2", "size=1"])
    assert study.ran == [(1, 1), (2, 1)]
    capsys.readouterr()
    study.study("toy", out, listing=True)
    assert capsys.readouterr().out.count("to do") == 2 and len(study.ran) == 2


def test_two_runners_keep_each_other_s_points(study, tmp_path):
    out, inner = tmp_path / "toy.json", study.points()["toy"][0]
    def slow(size, seed):
        if (size, seed) == (1, 0): study.points = lambda: dict(toy=(inner, [dict(size=2, seed=0)])); study.study("toy", out)
        return inner(size, seed)
    study.points = lambda: dict(toy=(slow, [dict(size=1, seed=0)]))
    assert {p["size"] for p in study.study("toy", out)["points"]} == {1, 2}


def test_the_studies_points_are_calls(study):
    points = script("study").points()
    for run, todo in points.values():
        takes = run.__code__.co_varnames[:run.__code__.co_argcount]
        needs = takes[:len(takes) - len(run.__defaults__ or ())]
        assert run.__doc__ and {"seed", *needs} <= set(todo[0]) <= set(takes) and len({str(p) for p in todo}) == len(todo)


def test_raw_boxes_there_and_back():
    raw, clips = script("study").Raw(), torch.randn(2, 17, 3, 32, 32)
    z, _ = raw.encode(clips)
    assert z.shape == (2, *raw.latent_shape(17, 32, 32)) == (2, 3, 1536, 4, 4) and torch.equal(raw.decode(z), clips)
