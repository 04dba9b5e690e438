"The benchmark: same networks, honest books, and what it refuses. No timings here."
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minisora import bench, cli, core
from minisora.bench import Original, Products, decoding, growth, kept, knee, middle, parts, products_alone, published_step, race, shaken, times_as_long, to_diffusers
from minisora.dit import ClassDiT

ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
TINY, RESULT = dict(width=48, depth=2, heads=3), ROOT / "minisora" / "results" / "bench.json"


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"): yield


# --- time

def test_race_takes_turns_and_another_begins_each_round():
    order = []
    times = race({k: lambda k=k: order.append(k) for k in "abc"}, 4, CPU, warm=2)
    assert "".join(order) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert {k: len(v) for k, v in times.items()} == dict(a=4, b=4, c=4) and all(s >= 0 for v in times.values() for s in v)


def test_ratios_are_taken_round_by_round():
    assert middle([3., 1., 2.]) == dict(median=2, low=1, high=3)
    assert times_as_long(dict(a=[2., 40., 6.], b=[1., 10., 6.]), "a", "b") == dict(median=2, low=1, high=4)


# --- products

def test_products_are_those_of_the_way_forth_and_back():
    net, x = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)), torch.randn(5, 6, requires_grad=True)
    step = lambda: net(x).sum().backward()
    with Products() as noted: step()
    shapes = sorted(tuple(m[0] for m in pair) for pair in noted.seen)
    assert shapes == sorted([((5, 6), (6, 10)), ((5, 10), (10, 4)), ((5, 4), (4, 10)), ((4, 5), (5, 10)), ((5, 10), (10, 6)), ((10, 5), (5, 6))])
    multiply, flops = products_alone(step, CPU)
    assert multiply() is None and flops == core.flops(step) == 6 * 5 * (6 * 10 + 10 * 4)


def test_products_keep_transposition_and_type():
    a, b = torch.randn(3, 8, 4), torch.randn(3, 8, 5)
    with Products() as noted, torch.autocast("cpu", torch.bfloat16): a.mT @ b
    (left, right), = noted.seen
    assert left == ((3, 4, 8), True, torch.bfloat16) and right == ((3, 8, 5), False, torch.bfloat16)
    assert products_alone(lambda: a.mT @ b, CPU)[1] == 2 * 3 * 4 * 8 * 5


def test_products_of_a_dit_are_all_its_flops():
    model, x, t, y = shaken(ClassDiT(**TINY, patch=4, side=16)), torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), torch.tensor([3, 4])
    step = lambda: model(x, t, y).square().mean().backward()
    assert products_alone(step, CPU)[1] == core.flops(step)                       # attention's products among them


# --- parity

@pytest.fixture
def trio():
    torch.manual_seed(0)
    ours = shaken(ClassDiT(**TINY, patch=4, side=16))
    return ours, (torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 7, 1000]))


def test_original_form_computes_the_same_gradients_too(trio):
    ours, args = trio
    other = Original(ours)
    assert core.num_params(other) == core.num_params(ours)
    torch.testing.assert_close(other(*args), ours(*args), rtol=1e-5, atol=1e-5)
    for m in (ours, other): m(*args).square().mean().backward()
    torch.testing.assert_close(torch.cat([m.weight.grad for m in other.mods]), ours.trunk.mod.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.embed.weight.grad.permute(0, 2, 3, 1).flatten(1), ours.embed.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.blocks[0].attn.qkv.weight.grad, ours.trunk.blocks[0].attn.qkv.weight.grad, rtol=1e-4, atol=1e-6)


def test_diffusers_computes_the_same_gradients_too(trio):
    pytest.importorskip("diffusers")
    ours, (x, t, y) = trio
    theirs = to_diffusers(ours.published(), 3, 16)
    out = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(out, ours(x, t, y), rtol=1e-4, atol=1e-4)
    out.square().mean().backward(), ours(x, t, y).square().mean().backward()
    torch.testing.assert_close(theirs.transformer_blocks[1].ff.net[2].weight.grad, ours.trunk.blocks[1].mlp.fc2.weight.grad, rtol=1e-3, atol=1e-5)


def test_another_network_is_not_timed(monkeypatch):
    forward = Original.forward
    monkeypatch.setattr(Original, "forward", lambda self, *args: forward(self, *args) * 1.001)
    with pytest.raises(RuntimeError, match="not the same network.*original"): published_step(TINY, 4, 2, 1, CPU, side=16)


def test_a_compiled_loss_that_differs_is_not_timed():
    with pytest.raises(RuntimeError, match="loss 2.0, eager 1.0"): bench.enter({}, "x", lambda: torch.tensor(2.), 1.)
    calls = {}
    def broken(): raise RuntimeError("no compiler\nlong story")
    assert bench.enter(calls, "x", broken, 1.) == "RuntimeError: no compiler" and not calls


# --- what the parts say

def test_published_step():
    r = published_step(TINY, 4, 2, 2, CPU, side=16)
    names = {f"{k}, {how}" for k in ("ours", "original", *(["diffusers"] if "diffusers" in r["parity"] else [])) for how in ("eager", "compiled")} | {"products alone"}
    assert set(r["seconds"]) == set(r["products"]) == set(r["ours"]) == names
    assert r["products"]["products alone"]["median"] == r["ours"]["ours, compiled"]["median"] == 1 and max(r["parity"].values()) < 1e-4
    for m in r["seconds"].values(): assert 0 < m["low"] <= m["median"] <= m["high"]


def test_parts():
    rows = parts(TINY, 4, 2, 2, CPU, fast=False, side=16)
    assert list(rows) == ["attention", "MLP", "adaLN", "optimizer", "data", "fresh_memory"]
    n, d = 2 * 16, 48
    assert rows["MLP"]["flops"] == 2 * 3 * 2 * n * 8 * d * d
    assert rows["attention"]["flops"] == 2 * 3 * (2 * n * 4 * d * d + 4 * n * 16 * d)
    assert rows["adaLN"]["flops"] == 3 * 2 * 2 * d * 14 * d


def test_kept_counts_each_storage_once_and_no_weights():
    x, layer = torch.randn(4, 8), nn.Linear(8, 16)
    assert kept(lambda: layer(x).sum()) == 4 * 8 * 4                              # the input, for the weight's gradient
    assert kept(lambda: F.gelu(layer(x)).sum()) == 4 * (4 * 8 + 4 * 16)           # and GELU's
    def chain():
        h = layer(x)
        return (h * h.detach().view(-1).view(4, 16) + h.mT.mT).sum()
    assert kept(chain) == 4 * (4 * 8 + 4 * 16)


def test_memory_grows_linearly_but_for_scores():
    r = growth((64, 128, 256), 1, CPU, width=64, depth=1)
    a, b, c = r["rows"]
    assert abs(r["slopes"]["kept"] - 1) < .05 and abs(c["kept"] - b["kept"] - 2 * (b["kept"] - a["kept"])) < .02 * c["kept"]
    assert c["kept_plain"] - 2 * b["kept_plain"] > 4 * 256**2 * .4                # at least the table of scores more
    assert "kept_plain" not in growth((64, 128), 1, CPU, plain=64, width=64, depth=1)["rows"][1]


def test_knee_is_the_cheapest_point_not_clearly_worse(monkeypatch):
    right = {1: .1, 4: .4, 7: .9, 16: .9, 50: .5}                                         # of the clips, by steps: the first ones
    def generate(prompts, seed, sampler, steps, best_of):
        assert best_of == 1 and len(prompts) in (64, 16) and seed == 10_000 + (len(prompts) == 16) * 64
        return torch.full((len(prompts), 1), float(steps))
    monkeypatch.setattr(bench, "grade", lambda clips, scenes, level: SimpleNamespace(right=torch.arange(80) < 80 * right[int(clips[0])]))
    model = SimpleNamespace(card=dict(scenes={}, sampling=dict(steps=8)), generate=generate)
    r = knee(model, 80, dict(euler=(1, 4, 7, 16), heun=(4,)), say=lambda text: None)
    rates = {(p["sampler"], p["steps"]): p["right"] for p in r["points"]}
    assert rates == {("euler", 1): .1, ("euler", 4): .4, ("euler", 7): .9, ("euler", 16): .9, ("heun", 4): .4} and r["default"] == 8
    assert (r["knee"]["sampler"], r["knee"]["calls"]) == ("euler", 7) and next(p for p in r["points"] if p["sampler"] == "heun")["calls"] == 7
    assert knee(model, 80, dict(euler=(7, 4, 1), heun=(1,)), say=lambda text: None)["knee"]["steps"] == 7
    assert knee(model, 80, dict(euler=(7, 50), heun=(1,)), say=lambda text: None)["knee"]["steps"] == 7      # more steps may be worse
    lost = r["points"][1]
    assert lost["lost"] == .5 and abs(lost["error"] - 1.96 * (.25 / 79)**.5) < 1e-3  # of the paired differences: half are 1, half 0


def test_decoding_wants_the_same_tokens(monkeypatch):
    shape = dict(vocab=16, width=32, depth=1, heads=2)
    r = decoding(shape, 2, 12, (1, 6, 12), 2, CPU)
    assert r["tokens"] == 12 and r["batch"] == 2 and r["speedup"]["median"] > 0
    generate = bench.GPT.generate
    monkeypatch.setattr(bench.GPT, "generate", lambda self, tokens, n, cache=True, **kw: generate(self, tokens, n, cache=cache, **kw) + cache)
    with pytest.raises(RuntimeError, match="changes tokens"): decoding(shape, 2, 12, (1, 6, 12), 2, CPU)


# --- all of it

def test_parts_are_added_to_what_is_known():
    seen = []
    one = bench.run(quick=True, device="cpu", only=("gpu",), write=lambda r: seen.append(json.loads(json.dumps(r))), say=lambda text: None)
    assert one["gpu"] == "not measured" and "peak" not in one and seen == [one] and list(one["minutes"]) == ["gpu"]
    two = bench.run(quick=True, device="cpu", only=("bf16",), known=one, say=lambda text: None)
    assert two["gpu"] == "not measured" and set(two["minutes"]) == {"gpu", "bf16"}
    with pytest.raises(core.UserError, match="another machine"): bench.run(quick=False, device="cpu", only=("gpu",), known=one)
    for torn in (3, [1], dict(peak=3), dict(machine=3, minutes={}), dict(one, minutes=None)):
        with pytest.raises(core.UserError, match="another machine"): bench.run(quick=True, device="cpu", only=("gpu",), known=torn)
    with pytest.raises(core.UserError, match="no part is called speed"): bench.run(device="cpu", only=("speed",))


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = lambda *args: (cli.main(["bench", *args]), capsys.readouterr())
    for args, say in ((["--out", "a.txt"], "ends in .json"), (["--only", "speed"], "invalid choice"), (["--device", "abacus"], "abacus")):
        code, text = call(*args)
        assert code == 2 and say in text.err and text.err.count("\n") == 1 and not list(tmp_path.iterdir())
    code, text = call("--quick", "--only", "gpu", "bf16", "--device", "cpu")
    assert code == 0 and text.out.splitlines()[-1] == "bench.json" and json.loads(Path("bench.json").read_text())["gpu"] == "not measured"
    Path("bench.json").write_text("torn")
    assert call("--quick", "--only", "gpu")[0] == 2
    assert set(cli.BENCH_PARTS) == set(json.loads(RESULT.read_text(encoding="utf-8"))["minutes"])


def test_shipped_result():
    r = json.loads(RESULT.read_text(encoding="utf-8"))
    assert max(r["published"]["parity"].values()) <= 1e-4 and set(r["machine"]) == {"cpu", "cores", "threads", "gpu", "clock", "load", "versions"}
    assert r["decoding"]["params"] > 4e6 and r["decoding"]["batch"] == 16
    assert all(r["published"]["products"][k]["median"] >= .9 for k in r["published"]["products"])    # nobody beats the products
    assert r["gpu"] == "not measured" or r["machine"]["gpu"]
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(3, 2)
    bench.draw(r, panels)
    assert all(ax.get_title() and ax.get_xlabel() for ax in panels.flat)
    plt.close(figure)
