"""Take a finished run into the package: weights at half precision, their card, and how the training went.

    python scripts/ship.py RUN NAME "2 CPU cores, bf16"
    python scripts/ship.py RUN t2v-judge "2 CPU cores, bf16"        # a run of preset judge: beside t2v, whose card then names it
    python scripts/ship.py --grades                                 # when chapters were executed: their records of what ships, onto the cards

RUN is a folder that `minisora train` wrote; out come minisora/weights/NAME.safetensors, NAME-vae.safetensors (or NAME-vq.safetensors) if there is one,
their cards, and minisora/results/NAME_training.json, which chapters 21, 33 and 41 draw. A stage that the run did not train (a DiT on a
VAE that ships already) stays there as it was recorded.
"""
import json, sys
from pathlib import Path

from minisora import core
from minisora.captioner import Captioner
from minisora.cli import load_sora, preset
from minisora.clip import CLIP
from minisora.sora import Sora
from minisora.train import read_log

ROOT = Path(__file__).resolve().parent.parent

GRADES = {  # weights: how the records of the ledger begin that grade them
    "t2v": ("17-all-attributes-right-unseen", "17-all-attributes-right-held-out", "17-clips-that-obey", "17-least-right"), "t2v-judge": ("17-all-attributes-right-best-of-8",),
    "pairs": ("10-swapped-colors-of-two-sprites-told-apart-pairings", "10-swapped-shapes"), "figure": ("12-i-x-caption-by-i-mmse-trained-denoiser-caption", "12-excess"),
    "clip": ("08-zero-shot-by-clip", "07-retrieval"), "captioner": ("09-f1", "09-zero-shot"), "dalle": ("01-one-sprite", "03-top-half"), "dalle-vq": ("01-all-right-after-the-codes",),
    "t2v-vae": ("17-all-attributes-right-after-the-vae",), "pairs-vae": ()}


def grades(folder=ROOT / "minisora/weights"):
    "Every card with the records that grade its weights: metric → value and interval."
    for name, begins in GRADES.items():
        path = folder / f"{name}.json"
        records = [r for f in sorted((ROOT / "minisora/results/ledger").glob("*.json")) if f.stem.startswith(begins) for r in [json.loads(f.read_text(encoding="utf-8"))]]
        card = json.loads(path.read_text(encoding="utf-8")) | dict(grades={r["metric"]: [r["value"], *r["ci"]] for r in records})
        if name.endswith(("-vq", "-vae")):            # a stage of another's training
            whole, part = json.loads((folder / f"{name.rpartition('-')[0]}.json").read_text(encoding="utf-8")), name.rpartition("-")[2]
            card |= {k: whole[k] for k in ("data", "command", "device")} | {k: whole[k][part] for k in ("flops", "steps", "minutes") if part in (whole.get(k) if isinstance(whole.get(k), dict) else ())}
        core.write_atomic(path, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def stage(folder, every=200):
    "FLOPs and minutes of one stage, and every so many steps of its log, grades always."
    card = json.loads(max(folder.glob("step-*.json"), key=lambda p: p.stem).read_text(encoding="utf-8"))
    log, past, last = [], 0., 0.
    for entry in read_log(folder):
        if entry["seconds"] < last: past += last  # early versions began a session's clock anew
        last = entry["seconds"]
        log.append({k: v for k, v in entry.items() if k not in ("norm", "lr", "parts", "seconds")} | dict(minutes=round((past + last) / 60, 2)))
    kept = [e for e in log if "loss" not in e or e["step"] % every == 0 or e["step"] == card["step"]]
    return dict(steps=card["step"], flops=card["flops"], compiled=card["compiled"], minutes=log[-1]["minutes"], recipe=card["recipe"], log=kept)


def main(run, name, device):
    one = core.load(Path(run) / "model.safetensors")[1]["kind"]  # captioner and clip have one stage, of that name
    kinds = dict(captioner=Captioner, clip=CLIP)
    table, model = ROOT / f"minisora/results/{name}_training.json", kinds[one].from_pretrained(run) if one in kinds else load_sora(run, "cpu")
    stages = json.loads(table.read_text(encoding="utf-8"))["stages"] if table.is_file() else {}
    stages |= {k: stage(Path(run) / k) for k in ("vae", "dit", "gpt", *kinds) if (Path(run) / k).is_dir()}
    total = {k: {s: stages[s][k] for s in stages} for k in ("steps", "flops", "minutes", "compiled")}
    command = model.card["command"] + " --bf16"*("--bf16" not in model.card["command"] and any(s.get("recipe", {}).get("bf16") is True for s in stages.values()))
    model.save_pretrained(ROOT / f"minisora/weights/{name}.safetensors", half=True, device=device, command=command, **({k: v[one] for k, v in total.items()} if one in kinds else total))
    about = dict(device=device, seed=model.card["seed"], world=model.card.get("world"), command=command, stages=stages)
    core.write_atomic(table, json.dumps(about) + "\n")
    if name.endswith("-judge"):
        sora = Sora.from_pretrained(name.removesuffix("-judge"))
        sora.judge, sora.card["sampling"] = model, {**sora.card["sampling"], "best_of": preset("judge").best_of}
        sora.save_pretrained(ROOT / f"minisora/weights/{name.removesuffix('-judge')}.safetensors", half=True)
    print({k: total[k] for k in ("steps", "minutes")}, f"{sum(total['flops'].values()) / 1e12:.0f} TFLOP")


if __name__ == "__main__":
    if sys.argv[1:] == ["--grades"]: grades()
    elif len(sys.argv) != 4: sys.exit(__doc__)
    else: main(*sys.argv[1:])
