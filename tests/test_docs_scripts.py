"""The scripts that make the tables and figures of the READMEs."""

import subprocess
import sys

import pytest
import torch

from tests.running import ENVIRONMENT, ROOT

sys.path.append(str(ROOT / "docs"))

import ablation
import figures

from common.errors import LessonError


def run_script(name, *flags):
    command = [sys.executable, f"docs/{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_the_exact_score_is_the_gradient_of_the_log_density():
    images, sigmas = torch.rand(7, 1, 4, 4), torch.tensor([2.0, 0.3])
    i, x = torch.tensor([0, 1, 1]), torch.rand(3, 1, 4, 4, requires_grad=True)
    away = (x.flatten(1)[:, None] - images.flatten(1)).square().sum(2)  # (3, 7)
    (-away / (2 * sigmas[i][:, None] ** 2)).logsumexp(1).sum().backward()
    torch.testing.assert_close(figures.exact_score(images, sigmas)(x.detach(), i), x.grad)


@pytest.mark.parametrize("name", ["lesson_04_ladder", "lesson_04_step_size"])
def test_figures(name, tmp_path):
    figures.FIGURES[name](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_measurements(tmp_path):
    source = tmp_path / "calls.csv"
    with pytest.raises(LessonError, match="cannot read"):
        figures.sampling_calls(tmp_path / "a.png", source)
    source.write_text("sampler,calls,n,seed,fid\nconsistent,97,100,1,12.5\nlangevin,961,100,1,13\n")
    figures.sampling_calls(tmp_path / "a.png", source)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LessonError, match="needs the columns"):
        figures.ema(tmp_path / "b.png", source)


def test_figures_that_are_not_there():
    ran = run_script("figures.py", "nothing")
    assert ran.returncode == 1 and ran.stderr.startswith("error: there is no figure nothing: choose from ")


def test_ladders_of_the_ablation():
    ladders = [ablation.ladder(row, 16.8758) for row in range(3)]
    assert [len(sigmas) for sigmas in ladders] == [10, 10, 96]
    assert [round(float(sigmas[0]), 2) for sigmas in ladders] == [1.0, 16.88, 16.88]


def test_the_ablation_runs_and_goes_on(tmp_path):
    first = run_script("ablation.py", "--smoke", "--rows", "0,6", "--output", tmp_path)
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "results.csv").read_text()
    assert len(before.splitlines()) == 3
    again = run_script("ablation.py", "--smoke", "--rows", "0,6", "--output", tmp_path)
    assert again.returncode == 0 and (tmp_path / "results.csv").read_text() == before
    assert "| lesson 3 |" in again.stdout and "| + the last denoising step |" in again.stdout


def test_flags_of_the_ablation():
    ran = run_script("ablation.py", "--rows", "9")
    assert ran.returncode == 1 and ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr
