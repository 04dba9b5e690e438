"""Watch a training that runs: does its memory hold, and its rate?

    python scripts/soak.py PID RUN/dit          until it ends, or for --minutes; Linux

Writes minisora/results/soak.json: resident memory every 30 s and the steps of the run's log, from the first reading on.
"""
import argparse, json, time
from datetime import date
from pathlib import Path

import numpy as np

from minisora import core
from minisora.train import read_log


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n\n")[0])).add_argument
    add("pid", type=int); add("run", type=Path); add("--minutes", type=float, default=180); add("--device", default="one CPU core, shared")
    args, began, marks = parser.parse_args(), time.time(), []
    def status():
        try: return dict(line.split(":", 1) for line in Path(f"/proc/{args.pid}/status").read_text().splitlines())
        except OSError: return {}
    while "VmRSS" in (seen := status()) and time.time() - began < 60*args.minutes:      # a dead process, not yet buried, has none
        steps = [l["step"] for l in read_log(args.run) if "loss" in l]
        marks.append((time.time() - began, int(seen["VmRSS"].split()[0])/1024, steps[-1] if steps else 0))
        time.sleep(30)
    s, mb, step = np.array(marks).T
    half = len(s)//2
    rate = lambda a, b: round((step[b] - step[a])/(s[b] - s[a]), 2)
    core.write_atomic(core.results()/"soak.json", json.dumps(dict(
        what="resident memory and rate of a training, read every 30 s (scripts/soak.py)", date=str(date.today()), device=args.device, minutes=round(s[-1]/60, 1), samples=len(s),
        steps=[int(step[0]), int(step[-1])], rss_mb=dict(first=round(mb[0], 1), last=round(mb[-1], 1), least=round(mb.min(), 1), most=round(mb.max(), 1), slope_an_hour=round(np.polyfit(s/3600, mb, 1)[0], 2)),
        steps_a_second=dict(first_half=rate(0, half), second_half=rate(half, -1))), indent=1) + "\n")


if __name__ == "__main__": main()
