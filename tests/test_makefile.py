"""The Makefile's targets: what they would run is there."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import LESSONS
from tests.running import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
NUMBERS = [name[:9].replace("_", "-") for name in LESSONS]  # lesson-03, lesson-04, ...


def would_run(*arguments):
    ran = subprocess.run(["make", "-n", "VENV=/nowhere", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    subprocess.run(["bash", "-n"], input=ran.stdout, text=True, check=True)
    return ran.stdout


@pytest.mark.parametrize("target", [*TARGETS.replace("$(LESSONS)", "").split(), *NUMBERS])
def test_the_scripts_of_every_target_are_there(target):
    commands = would_run(target)
    for script in re.findall(r"/python\" (\S+\.py)", commands):
        names = script.replace("$script", "figures") if "$script" in script else script
        assert (ROOT / names).is_file() or all((ROOT / lesson / names).is_file() for lesson in LESSONS)
    for module in re.findall(r"-m (common\S+)", commands):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_what_the_readme_says_of_targets():
    assert "cd lesson_04_* && " in would_run("train") and "-k" not in would_run("test")
    assert '-m pytest -n 2 --dist loadfile -k "lesson_07 or lesson_7"' in would_run("test", "L=7")
    assert "lesson_04_* lesson_07_*" in would_run("diff", "A=4", "B=7")
    assert all((ROOT / "docs" / f"{name}.py").is_file() for name in re.findall(r"figures\w*", would_run("figures")))
