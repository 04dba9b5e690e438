"""Take a finished run into the package: weights at half precision, their card, and how the training went.

    python scripts/ship.py RUN NAME "2 CPU cores, bf16"
    python scripts/ship.py RUN t2v-judge "2 CPU cores, bf16"        # a run of preset judge: beside t2v, whose card then names it

RUN is a folder that `minisora train` wrote; out come minisora/weights/NAME.safetensors, NAME-vae.safetensors (or NAME-vq.safetensors) if there is one,
their cards, and minisora/results/NAME_training.json, which chapters 21, 33 and 41 draw. A stage that the run did not train (a DiT on a
VAE that ships already) stays there as it was recorded.
"""
import json, sys
from pathlib import Path

from minisora import core
from minisora.captioner import Captioner
from minisora.cli import load_sora
from minisora.clip import CLIP
from minisora.sora import Sora
from minisora.train import read_log

ROOT = Path(__file__).resolve().parent.parent
BEST_OF = 8  # clips that a model with a judge draws for a prompt


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
        sora.judge, sora.card["sampling"] = model, {**sora.card["sampling"], "best_of": BEST_OF}
        sora.save_pretrained(ROOT / f"minisora/weights/{name.removesuffix('-judge')}.safetensors", half=True)
    print({k: total[k] for k in ("steps", "minutes")}, f"{sum(total['flops'].values()) / 1e12:.0f} TFLOP")


if __name__ == "__main__":
    if len(sys.argv) != 4: sys.exit(__doc__)
    main(*sys.argv[1:])
