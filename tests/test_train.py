"""A run that is killed anywhere ends in the same bytes; whatever else goes wrong is one line and loses nothing.

MINISORA_LONG=1 kills sixty times instead of six.
"""
import hashlib, json, math, os, random, signal, subprocess, sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from minisora import core
from minisora.train import Checkpoints, Recipe, Stopped, averaged, first_bad, fit, only_here, optimizers, read_log, schedule, stop_politely

RECIPE = Recipe(steps=20, warmup=4, save_every=4, log_every=3, accumulate=2, compile=False, seed=5)


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))


def loss_of(model):
    def loss(x, y):
        error = (model(x) - y).square()
        return error.mean(), error.max()
    return loss


def draw(g):
    x = torch.randn(16, 4, generator=g)
    return {"x": x, "y": x[:, :1].sin()}


def run(out=None, recipe=RECIPE, resume=True, draw=draw, model=None, **kw):
    model = model or toy()
    return fit(model, loss_of(model), draw, recipe, out, resume, hook=lambda step, m: {"seen": m[0].weight.sum().item()}, **kw), model


def contents(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(out).iterdir() if p.name != "log.jsonl"}


def steps(out):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, *run(out)


def same(whole, out):
    assert contents(whole[0]) == contents(out) and steps(whole[0]) == steps(out)


def after(n, what):
    "Like `draw`, but `what` happens before batch n."
    left = iter(range(n))
    def draws(g):
        if next(left, None) is None: what()
        return draw(g)
    return draws


def keep(name, kills, runs, where, equal, **more):
    "What a long form found, in minisora/results/kills.json: kills, in how many runs, where they hit, and whether the runs ended in the bytes of one that nobody killed."
    if not os.environ.get("MINISORA_LONG"): return
    file = Path(__file__).resolve().parent.parent / "minisora" / "results" / "kills.json"
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    table[name] = dict(kills=kills, runs=runs, where=dict(sorted(where.items(), key=lambda x: (-x[1], x[0]))), equal=equal, **more, torch=torch.__version__.split("+")[0],
                       device=f"{os.cpu_count()} CPU cores", date=datetime.now(timezone.utc).date().isoformat())
    core.write_atomic(file, json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def one_line(error, *words):
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


# Runs that die at the n-th line that Python runs in train.py and core.py, or half-way through their n-th file; each is a fork of one process, which imported torch once.
KILLER = """
import json, os, random, sys
from collections import Counter
from pathlib import Path
from test_train import RECIPE, Checkpoints, run
home, kills = Path(sys.argv[1]), int(sys.argv[2])

def child(out, how, left):
    def die(where):
        with open(home / "where", "w") as file: file.write(where)
        os.kill(os.getpid(), 9)
    def trace(frame, event, arg):
        nonlocal left
        name = Path(frame.f_code.co_filename).stem
        if name not in ("train", "core"): return None
        if event == "line":
            left -= 1
            if left < 0: sys.settrace(None); die(f"{name}.{frame.f_code.co_name}")
        return trace
    real = Path.write_bytes
    def torn(path, data):
        nonlocal left
        left -= 1
        if left >= 0: return real(path, data)
        with open(path, "wb") as file:
            file.write(data[:len(data) // 2])
            file.flush()
            die("half of a " + path.name.split(".")[2 if path.name[0] == "." else 1])
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if how == "line": sys.settrace(trace)
    else: Path.write_bytes = torn
    run(out)
    os._exit(0)

rng, where, runs = random.Random(3), Counter(), 0
while where.total() < kills or runs == 0:
    out, how = home / f"run{runs}", "file" if where.total() % 3 == 1 else "line"
    left = rng.randrange(4300) if how == "line" else rng.randrange(11)
    if where.total() == kills: how, left = "line", 10**9
    pid = os.fork()
    if not pid:
        try: child(out, how, left)
        finally: os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -9), (code, how, left)
    if code: where[(home / "where").read_text()] += 1
    found = Checkpoints(out).found()
    runs += bool(found) and json.loads(found[0].read_text())["step"] == RECIPE.steps
print(json.dumps([runs, where]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_killed_anywhere_resumed_to_the_same_bytes(whole, tmp_path):
    kills = 60 if os.environ.get("MINISORA_LONG") else 6
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), str(kills)], capture_output=True, text=True, timeout=3600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), *sys.path])})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    runs, where = json.loads(done.stdout.splitlines()[-1])
    for k in range(runs): run(tmp_path / f"run{k}")  # killed after its last checkpoint, it only ends
    different = [k for k in range(runs) if contents(tmp_path / f"run{k}") != contents(whole[0]) or steps(tmp_path / f"run{k}") != steps(whole[0])]
    keep("fit, at any line of it and in any file", sum(where.values()), runs, where, not different)
    assert runs and not different and sum(where.values()) == kills


def test_interrupted_by_a_signal(whole, tmp_path):
    for kind in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / kind.name
        with pytest.raises(Stopped) as e: run(out, draw=after(13, lambda: signal.raise_signal(kind)))     # in the seventh step
        one_line(e, "step 7 of 20", "--resume")
        assert [p.name for p in Checkpoints(out).found()] == ["step-000007.json"]
        assert Checkpoints(out).load()[1]["flops"] * 20 == whole[1]["flops"] * 7                          # what was spent, not what was planned
        run(out)
        same(whole, out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_comes_too_late_is_passed_on(whole, tmp_path):
    "In the last step of one training, Ctrl-C stops what would come after it, such as the next stage."
    with pytest.raises(KeyboardInterrupt): run(tmp_path, draw=after(39, lambda: signal.raise_signal(signal.SIGINT)))      # twenty steps of two batches
    same(whole, tmp_path)
    said, old = [], signal.signal(signal.SIGTERM, lambda *_: said.append("then"))
    try:
        with stop_politely(): signal.raise_signal(signal.SIGTERM)
        assert said == ["then"]
        with stop_politely() as asked: signal.raise_signal(signal.SIGTERM); asked.clear()
        assert said == ["then"]
    finally: signal.signal(signal.SIGTERM, old)


def test_weights_that_are_not_finite_never_take_a_good_checkpoint_s_place(tmp_path, monkeypatch):
    monkeypatch.setattr("minisora.train.schedule", lambda i, recipe: 1e38 if i == 7 else schedule(i, recipe))
    seen, model = [], toy()
    with pytest.raises(core.UserError) as e: fit(model, loss_of(model), draw, replace(RECIPE, muon=0., weight_decay=1e3), tmp_path, hook=lambda step, _: seen.append(step))
    one_line(e, "step 8", "the weight 0.weight", "lower lr")
    assert [p.name for p in Checkpoints(tmp_path).found()] == ["step-000004.json"] and seen == [4]      # no hook draws with them either


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "no weights", "bad card"])
def test_a_torn_checkpoint_is_passed_over(whole, tmp_path, damage, capsys):
    class Enough(Exception): pass
    def enough(): raise Enough
    with pytest.raises(Enough): run(tmp_path, draw=after(10, enough))                                      # step 4 is saved
    old = {p: p.read_bytes() for p in tmp_path.glob("step-*")}
    with pytest.raises(Enough): run(tmp_path, draw=after(10, enough))                                      # now step 8
    for path, content in old.items(): path.write_bytes(content)
    new = tmp_path / "step-000008.safetensors"
    data = new.read_bytes()
    if damage == "cut": new.write_bytes(data[:-7])
    if damage == "flip": new.write_bytes(data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    if damage == "empty": new.write_bytes(b"")
    if damage == "no weights": new.unlink()
    if damage == "bad card": new.with_suffix(".json").write_text('{"step": 8, ')
    first = []
    with pytest.raises(Enough): run(tmp_path, draw=lambda g: first.append(g.initial_seed()) or enough())
    assert "passed over" in capsys.readouterr().out
    seeds = []
    run(recipe=replace(RECIPE, steps=5), draw=lambda g: seeds.append(g.initial_seed()) or draw(g))
    assert first[0] == seeds[8]                                                                            # batch 8 opens step 5
    run(tmp_path)
    same(whole, tmp_path)


def test_nothing_whole_starts_over_aloud(whole, tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "step-000020.safetensors").write_bytes(b"")
    run(tmp_path)
    assert "starting at step 0" in capsys.readouterr().out
    same(whole, tmp_path)


def test_a_finished_run_returns_at_once(whole, capsys):
    before = contents(whole[0])
    result, model = run(whole[0], draw=None)                                                               # nothing is drawn
    assert "finished" in capsys.readouterr().out and result["losses"] == [] and result["flops"] == whole[1]["flops"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole[2].parameters())) and contents(whole[0]) == before
    tensors, _ = Checkpoints(whole[0]).load()
    assert torch.equal(model[0].weight, tensors["ema.0.weight"]) and not torch.equal(model[0].weight, tensors["model.0.weight"])


def test_a_checkpoint_holds_neither_time_nor_path(whole):
    text = (whole[0] / "step-000020.json").read_text()
    assert str(whole[0]) not in text and set(json.loads(text)) == {"recipe", "flops", "compiled", "recent", "step", "sha256"}
    assert {p.name for p in whole[0].iterdir()} == {".lock", "log.jsonl", "step-000020.json", "step-000020.safetensors"}


def test_the_log(whole):
    lines = read_log(whole[0])
    assert [l["step"] for l in lines if "loss" in l] == [3, 6, 9, 12, 15, 18, 20] and [l["step"] for l in lines if "seen" in l] == [4, 8, 12, 16, 20]
    losses = whole[1]["losses"]
    assert lines[0]["loss"] == sum(losses[:3]) / 3 and len(lines[0]["parts"]) == 1
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:]))


def test_what_differs_is_refused(whole, tmp_path):
    for words, kw in {"--resume": dict(resume=False), "recipe.lr 0.002, this run asks for 0.1": dict(recipe=replace(RECIPE, lr=.1)),
                      "world None, this run asks for '2'": dict(card={"world": "2"}),
                      "other tensors": dict(model=nn.Sequential(nn.Linear(4, 1)))}.items():
        with pytest.raises(core.UserError) as e: run(whole[0], **kw)
        one_line(e, words, str(whole[0]))
    for words, kw in {"steps is 0": dict(steps=0), "lr is nan": dict(lr=math.nan), "clip is 0": dict(clip=0.), "ema is 1.5": dict(ema=1.5),
                      "accumulate is True": dict(accumulate=True), "seed is -1": dict(seed=-1)}.items():
        with pytest.raises(core.UserError, match=words): Recipe(**kw)


def test_two_runs_in_one_folder(tmp_path):
    with pytest.raises(core.UserError) as e: run(tmp_path, draw=after(5, lambda: run(tmp_path)))
    one_line(e, "another run", str(tmp_path))
    with only_here(tmp_path): pass                                                                         # free again


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(core.UserError) as e: run(tmp_path / "file" / "run")
    one_line(e, "cannot write", "file")

    def full(path, data): raise OSError(28, "No space left on device")
    def fill(): patch.object(Path, "write_bytes", full).start()
    try:
        with pytest.raises(core.UserError) as e: run(tmp_path / "run", draw=after(13, fill))
    finally: patch.stopall()
    one_line(e, "No space left", "step-000008")
    assert [p.name for p in tmp_path.glob("run/step-*.json")] == ["step-000004.json"]
    run(tmp_path / "run")                                                                                  # there is room again


def test_nan_stops_at_its_step_and_is_named(tmp_path):
    nan = lambda g: {**draw(g), "y": torch.full((16, 1), math.inf)}
    good = iter([draw] * 13)
    with pytest.raises(core.UserError) as e: run(tmp_path, draw=lambda g: next(good, nan)(g))
    one_line(e, "step 7", "'y' of the batch", "lower lr than 0.002")
    assert [p.name for p in Checkpoints(tmp_path).found()] == ["step-000004.json"]

    model, batch = toy(), draw(core.generator(0))
    assert first_bad(model, loss_of(model), batch) is None
    model[2][0].weight.data.fill_(3e38)
    assert first_bad(model, loss_of(model), batch) == "what 2.0 gives"
    model[3].bias.data.fill_(math.nan)
    assert first_bad(model, loss_of(model), batch) == "the weight 3.bias"
    model = toy()
    assert first_bad(model, lambda x, y: model(x).mean() / 0, batch) == "the loss itself"
    model[0].weight.grad = torch.full((8, 4), math.inf)
    assert first_bad(model, loss_of(model), batch) == "the gradient of 0.weight"


def test_accumulation_is_one_large_batch():
    whole = draw(core.generator(0))
    quarter = iter(range(4 * 6))
    recipe = Recipe(steps=6, warmup=0, muon=False, compile=False)            # Muon rounds to bf16, which hides what is tested
    large, a = run(recipe=recipe, draw=lambda g: whole)
    def part(g):
        k = next(quarter) % 4
        return {name: x[4 * k : 4 * k + 4] for name, x in whole.items()}
    small, b = run(recipe=replace(recipe, accumulate=4), draw=part)
    torch.testing.assert_close(large["losses"], small["losses"], rtol=1e-5, atol=1e-6)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert small["flops"] == large["flops"]


def test_batches_depend_on_seed_and_number_alone():
    seen = {}
    for seed in range(3):
        seen[seed] = []
        run(recipe=replace(RECIPE, seed=seed), draw=lambda g: seen[seed].append(g.initial_seed()) or draw(g))
    drawn = [s for seeds in seen.values() for s in seeds]
    assert len(set(drawn)) == 3 * 40 and max(drawn) < 2**32 and min(drawn) > 10_000       # torch reads 32 bits; small seeds are other people's
    first = {torch.rand(1, generator=core.generator(seeds[0])).item() for seeds in seen.values()}
    assert len(first) == 3


def test_flops_of_a_run_are_those_of_the_formula():
    recipe = Recipe(steps=7, compile=False)
    adam, _ = run(recipe=replace(recipe, muon=False))
    muon, _ = run(recipe=recipe)
    layers = 2 * 16 * (4 * 8 + 8 * 8 + 8)                       # forward; each is also a gradient of weights and, but for the first, of inputs
    assert adam["flops"] == 7 * (3 * layers - 2 * 16 * 4 * 8)
    newton_schulz = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in ((4, 8), (8, 8), (1, 8)))      # in a Sequential all three are inside
    assert muon["flops"] - adam["flops"] == 7 * newton_schulz


def test_who_gets_which_optimizer():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), "head": nn.Linear(8, 3)})
    model["head"].bias.requires_grad_(False)
    muon, adamw = optimizers(model, RECIPE)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(8, 8)] * 2
    assert [p.shape for p in adamw.param_groups[0]["params"]] == [(5, 8), (8,), (8,), (3, 8)]
    assert len(optimizers(model, replace(RECIPE, muon=False))) == 1


def test_schedule_and_average():
    r = Recipe(steps=100, lr=1., warmup=10, final=.1)
    rates = [schedule(i, r) for i in range(100)]
    assert rates[0] < .11 and rates.index(max(rates)) == 9 and .1 < rates[-1] < .101 and rates[10:] == sorted(rates[10:], reverse=True)
    no_average, model = run(recipe=replace(RECIPE, ema=0.))
    average, other = run()
    assert no_average["losses"] == average["losses"] and not torch.equal(model[0].weight, other[0].weight)
    kept = model[0].weight.clone()
    with pytest.raises(ZeroDivisionError), averaged(model, {k: torch.zeros_like(p) for k, p in model.named_parameters()}):
        assert model[0].weight.abs().sum() == 0
        1 / 0
    assert torch.equal(model[0].weight, kept)


def test_a_compiler_that_fails_is_announced_once(tmp_path, capsys):
    def broken(f, **kw):
        def call(**batch): raise RuntimeError("no C++ compiler\nand a long story")
        return call
    with patch("torch.compile", broken): result, _ = run(tmp_path, replace(RECIPE, compile=True))
    text = capsys.readouterr().out
    assert text.count("torch.compile fails here") == 1 and "long story" not in text and result["compiled"] is False
    assert result["losses"] == run()[0]["losses"]
    assert json.loads((tmp_path / "step-000020.json").read_text())["compiled"] is False


def test_compiled_is_eager_and_resumes_to_the_same_bits(whole, tmp_path, capsys):
    recipe = replace(RECIPE, compile=True)
    result, _ = run(tmp_path / "a", recipe)
    if not result["compiled"]: pytest.skip(capsys.readouterr().out)
    torch.testing.assert_close(result["losses"], whole[1]["losses"], rtol=1e-4, atol=1e-5)
    with pytest.raises(Stopped): run(tmp_path / "b", recipe, draw=after(13, lambda: signal.raise_signal(signal.SIGINT)))
    run(tmp_path / "b", recipe)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and steps(tmp_path / "a") == steps(tmp_path / "b")


def test_what_was_tried_before_leaves_no_gradient():
    def losses(before):
        torch.manual_seed(0)
        net, g = torch.nn.Linear(3, 1), torch.Generator()
        if before: (100*net(torch.ones(2, 3)).sum()).backward()
        draw = lambda g: dict(x=torch.randn(4, 3, generator=g))
        return fit(net, lambda x: net(x).square().mean(), draw, Recipe(steps=3, warmup=1, compile=False))["losses"]
    assert losses(False) == losses(True)


def test_a_hook_may_give_numbers_of_any_kind(tmp_path):
    import numpy as np
    net = torch.nn.Linear(3, 1)
    fit(net, lambda x: net(x).square().mean(), lambda g: dict(x=torch.randn(4, 3, generator=g)), Recipe(steps=2, warmup=1, compile=False), tmp_path, hook=lambda i, m: dict(a=np.float32(.5), b=torch.tensor(2.)))
    assert [(l["a"], l["b"]) for l in read_log(tmp_path) if "a" in l] == [(.5, 2.)]
