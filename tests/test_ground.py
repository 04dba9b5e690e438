"The house rules: what imports what, notebooks as they must be, packaging in step, nothing that runs code on load."
import ast, configparser, importlib.util, json, os, re, shutil, subprocess, sys, tomllib, zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "minisora").glob("*.py") if p.stem not in ("__init__", "_modidx"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
SETTINGS = configparser.ConfigParser(delimiters="=")
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]

# the rooms of the course: what each module may import; all may import core
ROOMS = {
    "core": "", "plot": "", "world": "", "bayes": "world", "data": "world", "text": "", "transformer": "", "train": "",
    "vq": "transformer", "gpt": "transformer", "dalle": "text vq gpt", "clip": "text transformer", "captioner": "text transformer",
    "flow": "", "dit": "transformer", "information": "flow bayes", "classifier": "flow", "unclip": "clip flow dit",
    "vae": "transformer", "sora": "world text clip flow dit vae", "worldmodel": "flow dit vae", "emu": "text vq gpt", "bench": "world gpt dit sora train",
}
ROOMS["cli"] = " ".join(ROOMS)


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(path):
    "All modules that a file imports, wherever in it: full dotted names."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "minisora." * (node.level > 0) + (node.module or "")
            yield from [base] if node.module and base != "minisora" else [f"minisora.{a.name}" for a in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_backwards(path):
    used = {name.split(".")[1] for name in imports(path) if name.startswith("minisora.")} - {"__version__"}
    assert path.stem in ROOMS, "a new room: give it a place in the table"
    assert used <= {"core", *ROOMS[path.stem].split()} - {path.stem}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_nothing_runs_code_on_load(path):
    assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "nbdev", "fastcore", "execnb"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {f"{n.value.id}.{n.attr}" for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    assert not names & {"torch.load", "torch.save"}
    assert not {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords} & {"allow_pickle"}


def test_import_is_light():
    heavy = "nbdev fastcore execnb IPython ipykernel transformers diffusers sklearn av"
    code = (f"import sys, importlib, minisora; assert 'torch' not in sys.modules; assert minisora.__version__ == {SETTINGS['version']!r}\n"
            f"[importlib.import_module('minisora.' + m) for m in {[p.stem for p in MODULES]}]\n"
            f"assert not set({heavy.split()}) & set(sys.modules), set({heavy.split()}) & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- notebooks

def flags(cell): return [line[2:].split() for line in "".join(cell["source"]).splitlines() if line.startswith("#|")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells, code = nb["cells"], [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and len({c["id"] for c in cells}) == len(cells)
    outputs = [o for c in code for o in c["outputs"]]
    assert not code or outputs, "not executed: python scripts/execute.py " + path.name
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000
    assert not path.name.startswith("_"), "nbdev_test would skip it in silence"
    if code: assert any(f and f[0] == "default_exp" for f in flags(code[0])) or path.stem not in {p.stem for p in MODULES}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_only_exercises_are_skipped(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not [c for c in cells if any(f[:1] == ["eval:"] for f in flags(c))]
    stubs = [i for i, c in enumerate(cells) if ["exercise"] in flags(c)]
    assert path.stem == "index" or 3 <= len(stubs) <= 5, f"{len(stubs)} exercises"
    for i in stubs:  # a stub fails until it is solved, and a solution that runs comes next
        source = "".join(cells[i]["source"])
        assert source.startswith("#| exercise") and "raise NotImplementedError" in source and not cells[i]["outputs"]
        assert i + 1 < len(cells) and i + 1 not in stubs


def test_execution_is_deterministic_and_tidy(tmp_path):
    import nbformat
    sources = ["#| exercise\nraise NotImplementedError", "import sys; print('half', end='\\r'); print('whole'); print('noise', file=sys.stderr)", "object()"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s, id=f"cell{i}") for i, s in enumerate(sources)])
    path, seen = tmp_path / "toy.ipynb", []
    nbformat.write(nb, path)
    for _ in range(2):
        script("execute").execute(path, ["exercise"])
        seen.append(path.read_bytes())
    cells = json.loads(seen[0])["cells"]
    assert seen[0] == seen[1] and [c["source"] for c in cells] == [s.splitlines(True) for s in sources]
    assert cells[0]["outputs"] == [] and cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["whole\n"]}]
    assert cells[2]["outputs"][0]["data"]["text/plain"] == ["<object>"]


def test_sync_check_finds_orphans_and_hand_edits(tmp_path, monkeypatch, capfd):
    make = script("make")
    for d in ("nbs", "minisora"): (tmp_path / d).mkdir()
    for f in ("settings.ini", "pyproject.toml", "nbs/00_core.ipynb", "minisora/__init__.py"): shutil.copy(ROOT / f, tmp_path / f)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    tool = lambda name: shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    subprocess.run([tool("nbdev_export")], cwd=tmp_path, env=env, check=True)
    monkeypatch.setattr(make, "ROOT", tmp_path)
    make.in_sync(tool)
    (tmp_path / "minisora" / "orphan.py").write_text("# AUTOGENERATED\n")
    with open(tmp_path / "minisora" / "core.py", "a") as f: f.write("x = 1\n")
    with pytest.raises(SystemExit, match="minisora.core.py, minisora.orphan.py"): make.in_sync(tool)


# --- packaging

def test_packaging_is_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == SETTINGS["lib_name"]
    assert project["project"]["requires-python"] == f">={SETTINGS['min_python']}"
    for key, value in project["tool"]["nbdev"].items(): assert SETTINGS[key] == (value if isinstance(value, str) else str(value))


def test_constraints_hold_every_requirement():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    for line in " ".join(SETTINGS[k] for k in ("requirements", "dev_requirements", "video_requirements")).split():
        need = Requirement(line)
        assert need.name in pins and pins[need.name] in need.specifier, line
    assert not {"nbdev", "fastcore", "execnb", "ipython"} & {Requirement(r).name for r in SETTINGS["requirements"].split()}


def test_wheel_brings_weights_and_results(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "minisora", tree / "minisora", ignore=shutil.ignore_patterns("__pycache__"))
    for f in ("settings.ini", "setup.py", "pyproject.toml", "LICENSE"): shutil.copy(ROOT / f, tree)
    for f in ("weights/toy.safetensors", "weights/toy.json", "results/toy.json", "results/ledger/00-toy.json"):
        (tree / "minisora" / f).parent.mkdir(parents=True, exist_ok=True)
        (tree / "minisora" / f).write_text("{}")
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, tree],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = set(z.namelist())
        info = next(n for n in inside if n.endswith("METADATA")).rpartition("/")[0]
        meta, scripts = z.read(f"{info}/METADATA").decode(), z.read(f"{info}/entry_points.txt").decode()
    data = {p.relative_to(tree).as_posix() for p in (tree / "minisora").rglob("*") if p.suffix in (".py", ".json", ".safetensors")}
    assert data <= inside and f"{info}/licenses/LICENSE" in inside
    assert "minisora = minisora.cli:main" in scripts
    needs = {re.split(r"[<>=]", line.split(": ")[1])[0] for line in meta.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert needs == {"torch", "einops", "numpy", "matplotlib", "tqdm", "safetensors", "pillow"}


# --- what must not be in the tree

def texts():
    "Name and text of every file of the tree; of notebooks the sources and what they print."
    try: names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git here, or an unpacked archive
        names = [p.relative_to(ROOT).as_posix() for d in ("", "nbs", "minisora", "scripts", "tests", ".ci", ".github/workflows") for p in (ROOT / d).glob("*.*")]
    for name in names:
        path = ROOT / name
        if not path.is_file() or path.suffix in (".png", ".gif", ".webp", ".mp4", ".webm", ".jpg", ".safetensors", ".pyc", ".whl"): continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(c["source"]) + "".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", ""))
                                                              for o in c.get("outputs", [])) for c in cells)
        yield name, text


def test_no_machine_in_the_tree():
    place = re.compile(r"(?<![\w.:/~$}-])/(?:root|home|tmp|opt|work|mnt|Users)/\w|" + "|".join(["file:" + "///", r"pypi\." + "org", "python" + "hosted", r"download\.pytorch\." + "org"]))
    found = [f"{name}: {m.group()}" for name, text in texts() for m in place.finditer(text)]
    assert not found


def test_ledger_is_well_formed():
    from minisora.core import VERDICTS, ledger
    for r in ledger(ROOT / "minisora" / "results" / "ledger"):
        assert isinstance(r["claim"], int) and r["verdict"] in VERDICTS and r["scale"] in ("cpu", "gpu")
        assert {"metric", "value", "ci", "n", "seeds", "baseline", "floor", "device", "notebook", "world", "date"} <= set(r)
