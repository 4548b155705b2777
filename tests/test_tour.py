"""docs/tour.ipynb runs from top to bottom. `jupyter execute --inplace docs/tour.ipynb` makes its pictures anew."""

import re
import subprocess
import sys

import nbclient
import nbformat

from tests.running import ENVIRONMENT, ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
CAPTURED = {"capture_output": True, "text": True, "env": ENVIRONMENT}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_the_tour_runs_and_shows_its_pictures(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # and not the person's own settings
    shown, notebook = nbformat.read(TOUR, 4), nbformat.read(TOUR, 4)
    nbformat.validate(shown)
    assert len(shown.cells) <= 10 and TOUR.stat().st_size < 1_000_000
    for cell in code(notebook):
        cell.outputs = []
    first = code(notebook)[0]
    first.source, changed = re.subn(r"^N = 12 ", "N = 2 ", first.source, flags=re.MULTILINE)
    assert changed == 1
    how = {"resources": {"metadata": {"path": str(TOUR.parent)}}, "timeout": 300, "iopub_timeout": 60}  # if it is busy
    nbclient.NotebookClient(notebook, **how).execute(env=ENVIRONMENT)  # raises if a cell does
    for page in (shown, notebook):
        assert [len(pictures(cell)) for cell in code(page)] == [0, 3, 2, 3, 3]
        assert [cell.execution_count for cell in code(page)] == [1, 2, 3, 4, 5]  # once, from top to bottom
        assert all(output.get("name") != "stderr" for cell in code(page) for output in cell.outputs)


def test_the_tour_finds_the_repository_or_says_what_to_do(tmp_path):
    start, _, _ = code(nbformat.read(TOUR, 4))[0].source.partition("import torch")

    def found(source):
        ran = subprocess.run([sys.executable, "-c", source + "\nprint(ROOT)"], cwd=tmp_path, **CAPTURED)
        return ran.stdout.strip(), ran.stderr

    assert "AssertionError: open this page inside a copy of the repository, or " in found(start)[1]
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "origin" / "lesson_03_ncsn").mkdir(parents=True)
    (tmp_path / "origin" / "lesson_03_ncsn" / "sample.py").touch()
    for command in (["init"], ["add", "."], ["commit", "-m", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path / "origin", check=True, capture_output=True)
    elsewhere = start.replace('REPOSITORY = ""', f'REPOSITORY = "file://{tmp_path / "origin"}"')
    assert found(elsewhere)[0] == str(tmp_path / "repository")
    assert found(start)[0] == str(tmp_path / "repository")  # there now: the page was run again
