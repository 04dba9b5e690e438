"Chapter 37's probes, learners and glyphs: known answers, sets that do not meet, and a study whose budgets are equal."
import json
from pathlib import Path

import pytest
import torch
from test_ground import script

from minisora.core import generator

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def probes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISORA_SCALE", "test")
        yield script("study").chapter("37_probes")


def test_sets_lie_one_after_the_other(probes):
    assert probes.cut(dict(a=3, b=1, c=2)) == dict(a=slice(0, 3), b=slice(3, 4), c=slice(4, 6))


def test_held_out_pairs_are_nowhere_else(probes):
    _, labels = probes.exam()
    at, pair = probes.cut(probes.SETS), labels["shape"]*8 + labels["color"]
    elsewhere = torch.cat([pair[at[s]] for s in ("learn", "check", "unseen")])
    assert not set(pair[at["heldout"]].tolist()) & set(elsewhere.tolist())
    _, ids, words = probes.pool()
    said = [probes.W.parse(text) for text in words.decode(ids)]
    assert len(said) == probes.POOL and all(text for text in said)


def test_probe_reads_what_is_there_and_chooses_it_on_check(probes):
    sets, y = dict(learn=120, check=60, unseen=200, heldout=100), torch.randint(3, (480,), generator=generator(0))
    noise, planted = torch.randn(480, 6, generator=generator(1)), torch.nn.functional.one_hot(y, 3)*1. + .1*torch.randn(480, 3, generator=generator(2))
    found = probes.probe(dict(noise=noise, planted=planted), dict(y=y), sets)["y"]
    assert found["readout"] == "planted" and found["unseen"] > 99 and found["heldout"] > 99
    assert probes.probe(dict(noise=noise), dict(y=y), sets)["y"]["unseen"] < 50
    swapped = y.clone(); swapped[380:] = (y[380:] + 1) % 3  # the last set lies: nothing else may change
    assert probes.probe(dict(planted=planted), dict(y=swapped), sets)["y"] | dict(heldout=0) == found | dict(heldout=0)


def test_few_labels_of_one_kind_are_no_error(probes):
    y = torch.tensor([2]*30 + [1, 2]*20)
    out = probes.few(dict(x=torch.randn(70, 4, generator=generator(0))), dict(y=y), dict(learn=30, check=20, unseen=20), dict(y=dict(readout="x")), (5, 30))
    assert out == {"5": {"y": 50.0}, "30": {"y": 50.0}}


@pytest.mark.parametrize("name, blocks, tokens", [("Cap", "encoder", 16), ("CLIP", "image", 17), ("DiT", "trunk", 16), ("iGPT", None, 256), ("DALL·E", "gpt", 16)])
def test_features_are_means_over_picture_tokens(probes, name, blocks, tokens):
    learner, x = probes.LEARNERS[name](0), probes.exam()[0][:3]
    part = learner.net if blocks is None else getattr(learner.net, blocks)
    kept = []
    hook = part.blocks[0].register_forward_hook(lambda _, a, out: kept.append(out))
    seen = probes.readouts(learner, x)
    hook.remove()
    torch.testing.assert_close(next(v for k, v in seen.items() if k.startswith("block 1")), kept[0][:, -tokens:].float().mean(1), rtol=1e-3, atol=1e-3)
    assert all(v.shape == (3, probes.WIDTH) for v in seen.values()) and len(seen) == (probes.DEPTH + 1)*(3 if name == "DiT" else 1) + (name == "CLIP")


def test_dalle_reads_captions_as_its_own_tokenizer_does(probes):
    learner, (_, ids, words) = probes.LEARNERS["DALL·E"](0), probes.pool()
    assert torch.equal(learner.ids[:20], learner.net.ids(words.decode(ids[:20])))


def test_characters_of_the_sets_do_not_meet(probes):
    x, labels, sets = probes.letters()
    assert x.shape[1:] == (1, 3, 16, 16) and len(x) == sum(sets.values()) == len(labels["letters"]) and x.min() >= -1 and x.max() > .5
    fonts = list(probes.BY_FONT.values())
    assert len(set(sum(fonts, ()))) == len(sum(fonts, ()))


def test_the_table_compares_equal_budgets():
    table = json.loads((ROOT/"minisora"/"results"/"probes.json").read_text(encoding="utf-8"))["points"]
    trained = [p for p in table if p["flops"]]
    assert {p["learner"] for p in trained} == {"CLIP", "Cap", "CapPa", "DiT", "DALL·E", "iGPT"} and {p["seed"] for p in trained} == {0, 1, 2} and len(trained) == 18
    for looks in zip(*([l["flops"] for l in p["looks"][1:]] for p in trained)): assert max(looks) < 1.6*min(looks)
    assert max(p["flops"] for p in trained) < 1.06*min(p["flops"] for p in trained)
    assert all(0 <= v["unseen"] <= 100 and 0 <= v["heldout"] <= 100 for p in table for l in p["looks"] for v in l["probe"].values())
