"""What the READMEs promise: equations are where the tables say, links lead somewhere, quoted changes are the files'."""

import ast
import re
import shlex
from dataclasses import fields

import pytest

import common.play
from tests.conftest import LESSONS
from tests.running import ROOT, script

READMES = sorted(
    [ROOT / "README.md", *ROOT.glob("lesson_*/README.md"), *ROOT.glob("common/*/README.md"), *ROOT.glob("docs/*.md")]
)
PLACE = re.compile(r"`(\w+\.py)::([\w.]+)`")


def readme(lesson):
    return (ROOT / lesson / "README.md").read_text()


def section(text, title):
    """What stands between the heading and the next one."""
    found = re.search(rf"^##+ {re.escape(title)}.*?\n(.*?)(?=^##? |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def rows(text, header):
    """The cells of each row of the Markdown table whose first line is `header`."""
    lines = text.splitlines()
    start = lines.index(header) + 2
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return cells


def docstring(path, name):
    """Of a function, class or method "Class.method" in a file."""
    node = ast.parse(path.read_text())
    for part in name.split("."):
        found = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        assert found, f"{path} has no {name}"
        node = found[0]
    return " ".join((ast.get_docstring(node) or "").split())


@pytest.mark.parametrize("name", LESSONS)
def test_every_equation_is_where_the_table_says(name):
    table = rows(readme(name), "| paper | what it says | function |")
    assert len(table) >= 6
    for tags, _, places in table:
        assert PLACE.findall(places), places
        for file, function in PLACE.findall(places):
            for tag in tags.split(", "):
                assert tag in docstring(ROOT / name / file, function), f"{file}::{function} does not say {tag}"


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_named_is_there(path):
    for file, function in PLACE.findall(path.read_text()):
        near = [path.parent / file, ROOT / "common" / file, *(ROOT / lesson / file for lesson in LESSONS)]
        found = [p for p in near if p.is_file()]
        assert found, f"{file}, named in {path}"
        docstring(found[0], function)


def test_every_test_named_is_there():
    there = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in ROOT.glob("tests/*.py")), re.MULTILINE))
    for path in READMES:
        for name in re.findall(r"`(?:tests/test_\w+\.py::)?(test_\w+)`", path.read_text()):
            assert name in there, f"{path}: {name}"


@pytest.mark.parametrize("name", LESSONS)
def test_every_number_of_ours_is_explained(name):
    text = section(readme(name), "What we do differently from the paper, and why")
    module = script(name)
    ours = [field.name for field in fields(module.Config) if comments(module)[field.name].startswith("ours:")]
    ours += [key for key, comment in comments(module).items() if "; ours:" in comment and key not in ours]
    assert len(ours) > 10
    missing = [field for field in ours if f"`{field}`" not in text]
    assert not missing


@pytest.mark.parametrize("name", LESSONS)
def test_every_command_that_samples_has_flags_that_are_there(name, monkeypatch):
    commands = re.findall(r"python sample\.py( [^`#\n]*)", readme(name))
    assert len(commands) > 3
    for flags in commands:
        monkeypatch.setattr("sys.argv", ["sample.py", *shlex.split(flags.replace("--help", ""))])
        common.play.read_flags(script(name, "sample"))  # LessonError, or the end, for those that are not


def comments(module):
    from common.config import field_comments

    return field_comments(module.Config)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures(path):
    """Each relative link leads to a file of the repository, and to a heading in it if it names one."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), f"{path}: {target}"
        assert goal.is_relative_to(ROOT)
        if heading:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{path}: {target}"


def test_the_pictures_are_used_and_not_too_heavy():
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 6_000_000
    texts = "".join(path.read_text() for path in READMES)
    assert [path.name for path in pictures if path.name not in texts] == []


def test_mathematics_is_in_the_form_that_github_renders():
    """Markdown goes first: in $...$ it makes a comma of a thin space. Some macros are refused, and $ needs room."""
    for path in READMES:
        assert r"\operatorname" not in path.read_text(), path
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r"`[^`]*`", "", text)
        assert r"\(" not in text and r"\[" not in text, path
        for before, formula, after in re.findall(r"(.?)(\$\$?[^$]+\$\$?)(.?)", text):
            assert not re.search(r"\\[^a-zA-Z\s]", formula), f"{path}: {formula}"
            assert not re.match(r"[\w*-]", before) and not re.match(r"[\w*]", after), f"{path}: {formula}"
        for paragraph in text.split("\n\n"):
            assert paragraph.count("$") % 2 == 0, f"{path}: {paragraph}"


@pytest.mark.parametrize(
    "lessons",
    [
        ("lesson_03_ncsn", "lesson_04_ncsnv2"),
        ("lesson_05_ddpm", "lesson_09_improved_ddpm"),
        ("lesson_04_ncsnv2", "lesson_07_score_sde"),
    ],
)
def test_the_quoted_changes_are_in_the_files(lessons):
    quoted = re.findall(r"```diff\n(.*?)```", readme(lessons[1]), re.DOTALL)
    assert len(quoted) >= 2
    for block in quoted:
        first, hunks = block.split("\n", 1)
        file = first.removeprefix("@@ ")
        old, new = ((ROOT / lesson / file).read_text() for lesson in lessons)
        for hunk in hunks.rstrip("\n").split("\n...\n"):
            for other, source in (("+", old), ("-", new)):
                lines = [line[1:] for line in hunk.split("\n") if not line.startswith(other)]
                assert "\n".join(lines) in source, f"{file}: {hunk}"


@pytest.mark.parametrize("page, most", [("", 1500), ("lesson_03_ncsn", 2600), ("lesson_04_ncsnv2", 2600)])
def test_a_page_is_short(page, most):
    """Words with a letter or a digit, code and formulas among them, but not what GitHub does not show."""
    shown = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", (ROOT / page / "README.md").read_text(), flags=re.DOTALL)
    assert len([word for word in re.split(r"[\s|]+", shown) if re.search(r"\w", word)]) <= most


def test_every_exercise_has_an_outcome():
    for name in LESSONS:
        exercises = re.split(r"^\d\. ", section(readme(name), "Exercises"), flags=re.MULTILINE)[1:]
        assert len(exercises) == 5
        assert all("<details>" in text and "</details>" in text for text in exercises)
