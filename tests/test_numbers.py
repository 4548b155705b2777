"""Every number in a README's table is one that docs/*.csv has, and docs/check_numbers.py finds one that is not."""

import re
import sys

import pytest

from tests.running import ROOT

sys.path.append(str(ROOT / "docs"))

import check_numbers
import origin

from common.errors import LessonError

COLUMNS = "experiment,setting,x,y,value,n,seed,command,machine,date\n"
ORIGIN = "python docs/ddpm.py calls,a laptop,2026-01-31"
CALLS = f"""{COLUMNS}calls,DDIM,10,fid,13.3047,500,1,{ORIGIN}
calls,DDIM,100,fid,7.6,500,1,{ORIGIN}
calls,ancestral,10,fid,10.3516,500,1,{ORIGIN}
calls,ancestral,100,fid,3.94101,500,1,{ORIGIN}
calls,ancestral,100,fid,4.4,500,2,{ORIGIN}
calls,ancestral,100,share,0.108,500,1,{ORIGIN}
calls,ancestral,1000,error,0.00132,500,1,{ORIGIN}
"""
SOURCE = "<!-- numbers: docs/a.csv calls/{row}/{column}/fid -->\n"
TABLE = "| calls | 10 | 100 |\n| --- | --- | --- |\n| DDIM | 13.3 | 7.6 |\n| ancestral | 10.4 | 3.9 |\n"


def faults(folder, text, measured=CALLS):
    """What is wrong with a page; docs/a.csv holds what was measured."""
    (folder / "docs").mkdir()
    (folder / "docs" / "a.csv").write_text(measured)
    (folder / "README.md").write_text(text)
    return check_numbers.check(folder / "README.md", folder)[2]


@pytest.mark.parametrize("page", check_numbers.pages(ROOT), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_number_of_the_pages_was_measured(page):
    tables, numbers, wrong = check_numbers.check(page, ROOT)
    assert wrong == []
    assert tables >= 2 and numbers >= 1


@pytest.mark.parametrize("page", check_numbers.pages(ROOT), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_number_would_be_wrong_if_others_had_been_measured(page, monkeypatch):
    real = check_numbers.measurements
    monkeypatch.setattr(
        check_numbers, "measurements", lambda path: [(address, 1e6 * y + 1, x + "1") for address, y, x in real(path)]
    )
    _, numbers, wrong = check_numbers.check(page, ROOT)
    assert len(wrong) == numbers


def test_a_page_that_is_right(tmp_path):
    assert faults(tmp_path, f"text\n\n{SOURCE}{TABLE}\n```\n| a | 7 |\n```\n") == []
    assert check_numbers.check(tmp_path / "README.md", tmp_path) == (1, 4, [])


@pytest.mark.parametrize(
    "old, new, line, text",
    [
        ("13.3", "13.4", 4, "13.4 is not calls/DDIM/10/fid/n 500/seed 1 = 13.3047"),  # not that number
        ("13.3", "13.31", 4, "13.31 is not "),  # 13.3047 has no 1 there
        ("10.4 | 3.9", "3.9 | 10.4", 5, "3.9 is not calls/ancestral/10/fid"),  # a measured one, in the wrong column
        ("| 7.6 |", "| 3.9 |", 4, "3.9 is not calls/DDIM/100/fid"),  # in the wrong row
        ("| 100 |", "| 50 |", 4, "7.6 is not measured"),  # nobody measured 50 calls
        ("| 7.6 |", "| 7.6, 5x |", 4, "cannot read the numbers in `7.6, 5x`"),
        (SOURCE, "", 1, "there are numbers, and no comment above"),
        (SOURCE, SOURCE + "\n", 3, "there are numbers, and no comment above"),  # not directly above
        ("docs/a.csv", "docs/b.csv", 2, "there is no file b.csv"),
        ("docs/a.csv calls", "calls", 2, "is no source, no reason and no `label := name`"),
        (" -->", "\nPNDM := DDIM -->", 3, "no row and no column is called PNDM"),
        (" -->", " for PNDM -->", 2, "no row and no column is called PNDM"),
        (" -->", " for DDIM, PNDM -->", 2, "no row and no column is called DDIM, PNDM"),
        (SOURCE, "<!-- numbers: formula, tests/nothing.py -->\n", 2, "there is no file tests/nothing.py"),
    ],
)
def test_a_page_that_is_wrong(tmp_path, old, new, line, text):
    assert old in SOURCE + TABLE
    first, *_ = faults(tmp_path, (SOURCE + TABLE).replace(old, new))
    assert first.startswith(f"README.md:{line}: ") and text in first


def test_a_measurement_without_an_origin(tmp_path):
    old_shape = CALLS.replace(f"7.6,500,1,{ORIGIN}", "7.6,500,1")
    assert "a.csv, line 3, lacks a command, a machine or a date" in faults(tmp_path, SOURCE + TABLE, old_shape)[0]


@pytest.mark.parametrize(
    "cell, address, fits",
    [
        ("4.2", "mean docs/a.csv calls/{row}/100/fid", True),
        ("3.9", "mean docs/a.csv calls/{row}/100/fid", False),
        ("**3.9** to 4.4", "docs/a.csv calls/{row}/100/fid", True),
        ("4.4 to 3.9", "docs/a.csv calls/{row}/100/fid", False),
        ("3.9 to 3.9", "docs/a.csv calls/{row}/100/fid", False),
        ("under 5", "docs/a.csv calls/{row}/100/fid", True),
        ("under 4", "docs/a.csv calls/{row}/100/fid", False),
        ("4.4", "docs/a.csv calls/{row}/100/fid/n 500/seed 1", False),
        ("3.9 and 4.4, seeds 1 and 2, 100 calls", "docs/a.csv calls/{row}/100/fid", True),
        ("3.9, 97 calls", "docs/a.csv calls/{row}/100/fid", False),
        ("11 %", "docs/a.csv calls/{row}/100/share", True),
        ("12 %", "docs/a.csv calls/{row}/100/share", False),
        ("11", "docs/a.csv calls/{row}/100/share", False),
        ("3.9 ± 0.2", "docs/a.csv calls/{row}/100/*", False),
        ("± 0.2", "docs/a.csv calls/{row}/100/share * 2", True),
        ("−1.3e-3", "docs/a.csv calls/{row}/1000/error * -1", True),
        (r"$1.3 \cdot 10^{-3}$", "docs/a.csv calls/{row}/1000/error", True),
        ("1.3e-2", "docs/a.csv calls/{row}/1000/error", False),
        ("7 600", "docs/a.csv calls/DDIM/100/fid * 1000", True),
        ("7 500", "docs/a.csv calls/DDIM/100/fid * 1000", False),
        ("`--calls 5`", "docs/a.csv calls/{row}/100/fid", True),
        ("5", "docs/a.csv calls/{row}/100/fid\nvalue := setting", True),
        ("5", "docs/a.csv calls/{row}/100/fid\na := paper", True),
        ("7.6", "docs/a.csv calls/{row}/100/fid\na := DDIM", True),
        ("7.6", "docs/a.csv calls/DDIM/100/fid for a", True),
        ("7.6", "docs/a.csv calls/DDIM/100/fid for b", False),
        ("7.6", "docs/a.csv calls/DDIM/100/fid for a, value", True),
        ("7.6", "docs/a.csv calls/DDIM/100/fid for b, value", False),
        ("5", "words", True),
    ],
)
def test_how_a_number_may_be_written(tmp_path, cell, address, fits):
    page = f"<!-- numbers: {address} -->\n| | value |\n| --- | --- |\n| a | {cell} |\n| b | |\n"
    assert (faults(tmp_path, page, CALLS.replace("ancestral", "a")) == []) == fits


def test_the_program_prints_and_fails(tmp_path, monkeypatch, capsys):
    assert faults(tmp_path, SOURCE + TABLE.replace("13.3", "13.4")) != []
    (tmp_path / "docs" / "running.md").touch()
    monkeypatch.setattr(check_numbers, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as ended:
        check_numbers.main()
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("README.md: 1 tables, 4 numbers, 1 wrong\n  README.md:4: 13.4 is not ")


def test_where_a_measurement_comes_from(tmp_path, monkeypatch):
    words = ["/home/me/docs/ddpm.py", "bits", "calls", "--num", "100", "--again", "--output", "/tmp/a b", "--seed", "2"]
    words += ["--csv=c.csv"]
    monkeypatch.setattr(sys, "argv", words)
    command, machine, date = origin.origin("calls")
    assert command == "python docs/ddpm.py calls --num 100 --seed 2"
    assert re.fullmatch(r".+, (\d+ threads?, )?PyTorch \d[\w.]+", machine)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    monkeypatch.setattr(sys, "argv", ["docs/sampling_calls.py"])
    assert origin.command() == "python docs/sampling_calls.py"
    assert origin.read(tmp_path / "a.csv", ("a", "b")) == [["a", "b"]]
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(LessonError, match="needs the columns a, b"):
        origin.read(tmp_path / "a.csv", ("a", "b"))
