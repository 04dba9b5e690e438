"README's table of claims is what the records say, and the records say all that a reader needs to judge them."
import json, re
from pathlib import Path

import pytest
from minisora import cli, core

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "minisora" / "results" / "ledger"
FILES = sorted(FOLDER.glob("*.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_says_what_the_records_say():
    before, rest = README.split(core.MARKS[0])
    table, after = rest.split(core.MARKS[1])
    assert table == f"\n\n{core.claims_table(core.ledger(FOLDER))}\n\n", "README and records part: minisora ledger --readme README.md"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_record(path):
    r = json.loads(path.read_text(encoding="utf-8"))
    empty = {k for k in ("metric", "value", "ci", "kind", "n", "verdict", "scale", "device", "notebook", "date") if r[k] in (None, "", [])}
    assert not empty
    assert r["claim"] in core.CLAIMS and r["verdict"] in core.VERDICTS and r["scale"] in ("cpu", "gpu")
    assert {"seeds", "baseline", "floor", "world"} <= set(r) and (ROOT / "nbs" / f"{r['notebook']}.ipynb").is_file()
    assert r["ci"] is None or r["ci"][0] <= r["value"] <= r["ci"][1]
    assert path.name.startswith(f"{r['claim']:02d}-") and re.fullmatch(r"\d{4}-\d\d-\d\d", r["date"])


def test_cards_say_the_grades_that_the_records_say():
    said = {r["metric"]: [r["value"], *(r["ci"] or ())] for r in core.ledger(FOLDER)}
    for card in (ROOT / "minisora" / "weights").glob("*.json"):
        if card.stem == "pairs-vae": continue                      # graded as part of what it belongs to
        grades = json.loads(card.read_text(encoding="utf-8"))["grades"]
        assert grades and all(said[k] == v for k, v in grades.items()), f"{card.name} and the records part: python scripts/ship.py --grades"


def test_one_record_per_claim_and_metric():
    assert FILES and len({(r["claim"], r["metric"]) for r in core.ledger(FOLDER)}) == len(FILES)


def test_table_is_rectangular_and_complete():
    records = core.ledger(FOLDER)
    lines = core.claims_table(records).split("\n\n")[0].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + len(records) + len({r["claim"] for r in records})
    everything = core.claims_table([])
    assert all(f"{k}. {title}" in everything for k, title in core.CLAIMS.items()) and "Not measured yet" in everything


@pytest.mark.parametrize("change", [dict(value=12.5), dict(ci=[1., 99.]), dict(n=7), dict(seeds=9), dict(baseline=3.), dict(floor=2.), dict(verdict="holds in part"), dict(scale="gpu"),
                                    dict(device="one abacus"), dict(notebook="99_x"), dict(metric="another | thing"), dict(claim=23), dict(kind="by eye")])
def test_every_field_shows(change):
    r = dict(claim=17, metric="all right (%)", value=39.2, ci=[35.8, 42.7], kind="new seed", n=768, seeds=[0, 1, 2], baseline=None, floor=0., verdict="holds", scale="cpu",
             device="2 CPU cores", notebook="41_sora")
    assert core.claims_table([r]) != core.claims_table([r | change])
    assert len(re.findall(r"(?<!\\)\|", core.claims_table([r | change]).splitlines()[3])) == 7


def test_command_writes_between_the_marks_only(tmp_path, capsys):
    readme, records = tmp_path / "README.md", tmp_path / "minisora" / "results" / "ledger"
    call = lambda: (cli.main(["ledger", "--readme", str(readme)]), *capsys.readouterr())
    assert call()[0] == 2
    readme.write_text("no marks\n", encoding="utf-8")
    code, out, err = call()
    assert code == 2 and "has no place for the table" in err and err.count("\n") == 1
    readme.write_text(f"before – é\n{core.MARKS[0]}\nstale\n{core.MARKS[1]}\nafter\n", encoding="utf-8")
    code, out, err = call()
    assert code == 2 and "has no records" in err
    records.mkdir(parents=True)
    (records / FILES[0].name).write_bytes(FILES[0].read_bytes())
    assert call()[:2] == (0, f"{readme}: table of claims written\n") and call()[:2] == (0, f"{readme}: nothing to change\n")
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before – é\n{core.MARKS[0]}\n\n| measured") and text.endswith(f"{core.MARKS[1]}\nafter\n") and "stale" not in text
    readme.write_text(f"{core.MARKS[1]}\n{core.MARKS[0]}\n")
    assert call()[0] == 2
