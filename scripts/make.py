"""What `make test` and `make demo` do, also where there is no make:

    python scripts/make.py test          environment in .venv, install, every notebook and test
    python scripts/make.py demo          environment in .venv, install, clips and their page in demo/
    python scripts/make.py test --here   in the Python that runs this, which has `pip install -c constraints.txt -e ".[dev]"`
"""
import argparse, filecmp, hashlib, json, os, shutil, subprocess, sys, tempfile, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"


def run(*command, env=None, **kw):
    "Run a program of the environment; stop here if it fails."
    print("+", *(Path(c).name if i == 0 else c for i, c in enumerate(map(str, command))), flush=True)
    done = subprocess.run([str(c) for c in command], env=env, **{"cwd": ROOT, **kw})
    if done.returncode: sys.exit(done.returncode)


def environment(folder, dev):
    "The Python of an environment that has what the packaging files ask for."
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    digest = hashlib.sha256(b"".join((ROOT / f).read_bytes() for f in PACKAGING)).hexdigest()
    stamp, wanted = folder / "minisora.json", {"packaging": digest, "checkout": str(ROOT)}
    has = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if has in ({**wanted, "dev": True}, {**wanted, "dev": dev}): return python
    if not python.is_file():
        try: venv.create(folder, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as e:
            sys.exit(f"make.py: no environment could be made in {folder} ({e}); on Debian: apt install python3-venv; or use --here")
    if sys.platform == "linux" and not shutil.which("nvidia-smi"):
        print("note: without a CPU build in pip's reach, PyTorch brings gigabytes of CUDA libraries; README says how to get the CPU build")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt"]
    run(*pip, "setuptools", "wheel")
    run(*pip, "--no-build-isolation", "-e", ".[dev]" if dev else ".")
    stamp.write_text(json.dumps({**wanted, "dev": dev}))
    return python


def in_sync(tool):
    "Export and clean a copy of the tree without its modules: whatever differs was edited by hand, forgotten or left over."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".*", "__pycache__", "weights", "results")
        for d in ("nbs", "minisora"): shutil.copytree(ROOT / d, copy / d, ignore=skip)
        for f in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / f, copy)
        for f in (copy / "minisora").glob("*.py"):
            if f.name != "__init__.py": f.unlink()
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # where it is set, nbdev_export does nothing
        run(tool("nbdev_export"), env=env, cwd=copy)
        run(tool("nbdev_clean"), env=env, cwd=copy)
        names = {str(f.relative_to(t)) for t in (ROOT, copy) for p in ("minisora/*.py", "nbs/[!.]*.ipynb") for f in t.glob(p)}
        differ = [n for n in sorted(names) if not (ROOT / n).is_file() or not (copy / n).is_file() or not filecmp.cmp(ROOT / n, copy / n, shallow=False)]
    if differ: sys.exit(f"make.py: not in sync with the notebooks (run nbdev_export and nbdev_clean; delete what has no notebook): {', '.join(differ)}")


def notebooks(tool, env):
    "All notebooks under nbdev_test; count the ones that ran, for it says Success when it found none."
    there = {f.name for f in (ROOT / "nbs").glob("[!_.]*.ipynb")}
    command = [tool("nbdev_test"), "--do_print", "--timing", "--n_workers", "2"]
    print("+", "nbdev_test", *command[1:], flush=True)
    ran = set()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace") as p:
        for line in p.stdout:
            print(line, end="", flush=True)
            if "- Completed " in line: ran.add(Path(line.split("- Completed ")[1].strip()).name)
    if p.returncode or ran != there: sys.exit(f"make.py: {len(ran)} of {len(there)} notebooks ran, nbdev_test ended with {p.returncode}; missing: {sorted(there - ran)}")
    print(f"{len(ran)} of {len(there)} notebooks ran", flush=True)


def main():
    if sys.version_info < (3, 11): sys.exit(f"make.py: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["test", "demo"])
    parser.add_argument("--here", action="store_true", help="use the Python that runs this, install nothing")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    args = parser.parse_args()
    python = Path(sys.executable) if args.here else environment(args.env.absolute(), dev=args.target == "test")
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])

    def tool(name):
        return shutil.which(name, path=path) or sys.exit(f'make.py: {name} is not installed: pip install -c constraints.txt -e ".[dev]"')

    if args.target == "demo": return run(python, "-m", "minisora.cli", "demo", "--out", "demo")
    in_sync(tool)
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MINISORA_SCALE": "test", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    notebooks(tool, env)
    run(python, "-m", "pytest", "-q", env=env)


if __name__ == "__main__":
    main()
