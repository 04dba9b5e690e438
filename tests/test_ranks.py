"""Two processes are one run: the same losses, one format of checkpoint, one line whatever goes wrong.

MINISORA_LONG=1 also kills ranks of the command line's training at random moments.
"""
import math, os, random, re, shutil, signal, socket, subprocess, sys, time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from minisora import core
from minisora.train import Checkpoints, Engine, Recipe, Stopped, fit, rank, ranks, read_log
from test_train import keep

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(steps=12, warmup=4, save_every=4, log_every=3, compile=False, seed=5)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or os.name == "nt", reason="no gloo here")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out, self.unused = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)) for _ in range(2))
    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks: x = x + block(x)
        return self.out(x)
    def loss(self, x, y):
        error = (self(x) - y).square()
        return error.mean(), error.detach().abs().mean()


def draw(g):
    x = torch.randn(12, 4, generator=g)
    return {"x": x, "y": x[:, :1].sin()}


def run(out, draw=draw, resume=True, **kw):
    "Losses, and the weights as plain tensors."
    shard = kw.pop("shard", False)
    model = Toy()
    seen = lambda step, m: {"seen": m.blocks[0][0].weight.sum().item()}
    losses = fit(model, model.loss, draw, replace(RECIPE, **kw), out, resume, hook=seen, shard=shard)["losses"]
    return losses, {k: v.detach().clone() for k, v in model.state_dict().items()}


def after(n, what, change=lambda batch: batch):
    "Like `draw`, but from batch n on `what` happens first and the batch is changed."
    left = iter(range(n))
    def draws(g):
        if next(left, None) is not None: return draw(g)
        what()
        return change(draw(g))
    return draws


def alike(a, b, **kw):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], **{**dict(rtol=1e-5, atol=1e-6), **kw})


CASES = dict(ddp=dict(muon=0.), fsdp=dict(muon=0., shard=True), parts=dict(accumulate=2), odd=dict(accumulate=3, shard=True))


def worker(home):
    "What each of two ranks does; the test compares it with what one process does."
    home, results = Path(home), {}
    with ranks(torch.device("cpu")):
        me = rank()[0]
        for name, kw in CASES.items():
            losses, weights = run(home / name, **kw)
            results |= {f"{name}.{k}": v for k, v in weights.items()} | {f"{name}.losses": torch.tensor(losses, dtype=torch.float64)}
        for shard in (False, True):
            def stop(): me and signal.raise_signal(signal.SIGTERM)                 # rank 1 alone is asked
            try: run(home / f"stopped{shard:d}", draw=after(6, stop), shard=shard, muon=0.)
            except Stopped as e: results[f"stopped{shard:d}"] = torch.tensor(int(str(e).split()[3]))
            run(home / f"begun{shard:d}", shard=shard, muon=0.)                    # by one process
        if not me: core.save(home / "results.safetensors", results, {})
        half = torch.tensor([0., math.nan if me else 0.] * 6)[:, None]             # every second row, which are rank 1's
        run(home / "nan", draw=after(5, lambda: None, lambda batch: {**batch, "y": half if me else batch["y"]}))


def together(code, *args, n=2, meanwhile=lambda started: None):
    "Start n ranks by hand, as torchrun would; their exit codes and what each wrote to stderr."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    started = [subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env={**env, "RANK": str(k), "LOCAL_RANK": str(k)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") for k in range(n)]
    meanwhile(started)
    said = [p.communicate(timeout=900)[1] for p in started]
    return [p.returncode for p in started], said


def lines(said): return [l for text in said for l in re.split(r"[\r\n]", text) if l.startswith("minisora: ")]


CODE = """
import sys
from minisora.cli import main
from minisora import cli
if sys.argv[1] == "worker":
    import test_ranks
    cli.ledger = lambda args: test_ranks.worker(sys.argv[2])      # errors come out as they do of any command
    sys.exit(main(["ledger"]))
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_are_one_run(tmp_path):
    class Enough(Exception): pass
    def enough(): raise Enough
    for shard in (0, 1):
        with pytest.raises(Enough): run(tmp_path / f"begun{shard}", draw=after(6, enough), muon=0.)
    codes, said = together(CODE, "worker", tmp_path)
    assert codes == [2, 2], said
    line, = lines(said)                                                            # rank 1 found it and spoke, rank 0 is silent
    assert "step 6" in line and "'y' of the batch" in line and [p.stem for p in Checkpoints(tmp_path / "nan").found()] == ["step-000004"]
    seen, _ = core.load(tmp_path / "results.safetensors")
    for name, kw in CASES.items():
        kw, close = {k: v for k, v in kw.items() if k != "shard"}, {} if kw.get("muon") == 0 else dict(rtol=2e-2, atol=2e-3)   # Muon rounds to bf16
        losses, weights = run(tmp_path / f"alone-{name}", **kw)
        torch.testing.assert_close(seen[f"{name}.losses"], torch.tensor(losses, dtype=torch.float64), **close or dict(rtol=1e-5, atol=1e-5))
        alike({k: seen[f"{name}.{k}"] for k in weights}, weights, **close)
        tensors, card = Checkpoints(tmp_path / name).load()
        theirs, plain = Checkpoints(tmp_path / f"alone-{name}").load()
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in theirs.items()}       # one format, whole tensors
        assert card["recipe"] == plain["recipe"] and (card["flops"] == plain["flops"] or "muon" not in kw)
        alike({k: v for k, v in tensors.items()}, theirs, **close)
        assert [(l["step"], "seen" in l) for l in read_log(tmp_path / name)] == [(l["step"], "seen" in l) for l in read_log(tmp_path / f"alone-{name}")]
    _, weights = run(tmp_path / "alone", muon=0.)
    for shard in (0, 1):
        assert seen[f"stopped{shard}"] == 7 and Checkpoints(tmp_path / f"stopped{shard}").found()[0].stem == "step-000007"
        alike(run(tmp_path / f"stopped{shard}", muon=0.)[1], weights)                                    # two ranks stopped, one goes on
        ended, _ = Checkpoints(tmp_path / f"begun{shard}").load()                                        # one began, two ended
        alike({k: v for k, v in ended.items() if k.startswith("ema")}, {f"ema.{k}": v for k, v in weights.items()})


TRAIN = "train --preset tiny --data world --save-every 5 --seed 5 --device cpu".split()


def test_a_killed_rank_stops_all(tmp_path):
    out = tmp_path / "run"
    def kill(started):
        end = time.monotonic() + 600
        while not list(out.glob("vae/step-*.json")) and time.monotonic() < end and started[1].poll() is None: time.sleep(.05)
        started[1].kill()
    codes, said = together(CODE, *TRAIN, "--steps", 4000, "--out", out, meanwhile=kill)
    assert codes == [2, -9], said
    line, = lines(said)
    assert "lost another rank" in line and "--resume" in line and "Traceback" not in said[0]
    tensors, card = Checkpoints(out / "vae").load()
    assert tensors and card["step"] >= 5


def test_what_ranks_refuse(tmp_path, monkeypatch, capsys):
    from minisora import cli
    assert cli.main([*TRAIN, "--shard", "--out", str(tmp_path / "r")]) == 2 and "torchrun" in capsys.readouterr().err
    monkeypatch.setattr("minisora.train.rank", lambda: (0, 5))
    monkeypatch.setattr("minisora.train.over_ranks", lambda values, device: values)
    monkeypatch.setattr("minisora.train.engine", lambda model, shard: Engine(model))
    with pytest.raises(core.UserError, match="'x' of a batch has 12 rows, which 5 ranks cannot share"): run(None)


@pytest.mark.skipif(not os.environ.get("MINISORA_LONG"), reason="long: torchrun, killed at random moments")
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_torchrun_killed_and_resumed(tmp_path, shard):
    "A rank, or torchrun with all its ranks, is killed; the run ends in the bytes of one that nobody killed, whose losses are those of one process."
    import psutil
    rng, out, wanted, where = random.Random(1), tmp_path / "run", int(os.environ.get("MINISORA_KILLS", 8)), Counter()
    command = [*TRAIN, "--steps", "40", "--resume", *shard]
    started = lambda out: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "minisora.cli", *command, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    began = time.monotonic()
    subprocess.run(started(tmp_path / "whole"), cwd=ROOT, env=env, check=True, capture_output=True)
    took = time.monotonic() - began
    while where.total() < wanted or not (out / "model.json").exists():
        if (out / "model.json").exists(): shutil.rmtree(out)
        with subprocess.Popen(started(out), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
            if where.total() < wanted:
                with suppress(subprocess.TimeoutExpired): p.wait(rng.uniform(.2, 1) * took)
            workers = [c for c in psutil.Process(p.pid).children() if "minisora.cli" in c.cmdline()] if p.poll() is None and where.total() < wanted else []
            if workers:
                whom = rng.choice([workers[:1], workers[1:], [psutil.Process(p.pid), *workers]])
                for process in whom:
                    with suppress(psutil.NoSuchProcess): process.kill()
                step = max([f"{f.parent.name} at step {int(f.stem[5:])}" for f in out.glob("*/step-*.json")], default="before the first checkpoint")
                where[f"{'torchrun and all ranks' if len(whom) > 2 else 'a rank'}, {step}"] += 1
            said = p.communicate()[1]
        assert p.returncode == 0 or len(lines([said])) <= 1, said
    subprocess.run([sys.executable, "-m", "minisora.cli", *(command[:-1] if shard else command), "--out", str(tmp_path / "one")], cwd=ROOT, env=env, check=True, capture_output=True)
    a, b, one = (core.load(folder / "model.safetensors")[0] for folder in (out, tmp_path / "whole", tmp_path / "one"))
    equal = all(torch.equal(a[k], b[k]) for k in b) and a.keys() == b.keys()
    keep(f"torchrun, two ranks, {'sharded' if shard else 'replicated'}", where.total(), 1, where, equal)
    assert equal and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in one.items()}
    losses = [[l["loss"] for l in read_log(folder / "vae") if "loss" in l] for folder in (out, tmp_path / "one")]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("preset, kind", [("clip", "clip"), ("captioner", "captioner")])
def test_models_without_latents_are_one_run_too(tmp_path, preset, kind):
    codes, said = together(CODE, "train", "--preset", preset, "--steps", 2, "--batch", 4, "--seed", 3, "--device", "cpu", "--no-bf16", "--out", tmp_path / "two")
    assert codes == [0, 0], said
    from minisora.cli import main
    assert main(["train", "--preset", preset, "--steps", "2", "--batch", "4", "--seed", "3", "--device", "cpu", "--no-bf16", "--out", str(tmp_path / "one")]) == 0
    assert core.load(tmp_path / "two" / "model.safetensors")[1]["kind"] == kind
    two, one = ([l["loss"] for l in read_log(tmp_path / k / kind) if "loss" in l] for k in ("two", "one"))
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=1e-2)      # of so few rows the first steps of an optimizer make much of a rounding
