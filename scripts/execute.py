"""Execute notebooks and save their outputs, so that a second run leaves no difference.

    python scripts/execute.py [nbs/30_flow.ipynb …]      (all of nbs/ where none is named)

Each notebook gets a fresh kernel, started in its own folder. The stubs of exercises are skipped. What would differ from
run to run is dropped: times, stderr, all but the last state of a progress line. A notebook that fails is left untouched.
"""
import re, sys, time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent


def skipped(cell, flags):
    "Whether nbdev_test would skip this cell too."
    words = [line[2:].split() for line in cell.source.splitlines() if line.startswith("#|")]
    return any(w and (w[0] in flags or w[:2] == ["eval:", "false"]) for w in words)


def tidy(outputs):
    "One block of text in place of many, without stderr and without the overwritten states of a line."
    kept = []
    for o in outputs:
        if o.output_type == "stream":
            if o.name == "stderr": continue
            if kept and kept[-1].output_type == "stream": kept[-1].text += o.text; continue
        elif any(mime.startswith("application/vnd.jupyter.widget") for mime in o.get("data", {})): continue
        kept.append(o)
    for o in kept:
        if o.output_type == "stream": o.text = re.sub(r"[^\n]*\r(?!\n)", "", o.text)
    return kept


def execute(path, flags):
    nb = nbformat.read(path, as_version=4)
    sources = {c.id: c.source for c in nb.cells}
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
        if c.cell_type == "code" and skipped(c, flags): c.source = ""
    NotebookClient(nb, timeout=None, startup_timeout=600, kernel_name="python3", record_timing=False, store_widget_state=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for c in nb.cells:
        c.source = sources[c.id]
        if c.cell_type == "code": c.outputs = tidy(c.outputs)
    nb.metadata = nbformat.from_dict({"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    clean_nb(nb)
    aside = path.with_suffix(".tmp")
    aside.write_text(nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n", encoding="utf-8", newline="\n")
    aside.replace(path)


def main():
    ini = ConfigParser(delimiters="=")
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    flags, failed = ini["DEFAULT"]["tst_flags"].split(), []
    for path in [Path(a).resolve() for a in sys.argv[1:]] or sorted((ROOT / "nbs").glob("[!_.]*.ipynb")):
        start = time.time()
        try: execute(path, flags)
        except CellExecutionError as e:
            failed.append(path.name)
            print(e, file=sys.stderr)
        print(f"{path.name}: {'failed' if failed and failed[-1] == path.name else 'executed'} in {time.time() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
