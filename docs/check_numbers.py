"""Is every number in a page's table one that was measured? `python docs/check_numbers.py` looks each of them up.

A comment above a table says in which rows of which CSV file its numbers are, by the addresses of these rows:

    <!-- numbers: docs/ddpm.csv calls/{row}/{column}/fid -->

An address is experiment/setting/x/y/n .../seed ...; its end may be left out, and * is any text. {row} is the first cell
of the number's row, {column} the header of its column. Each further line of the comment is one of

    mean docs/ddpm.csv bits/{row}/1000/deviation * 0.2     one more source: a mean, over seeds perhaps, times 0.2
    docs/runs.csv lesson run/*/*/minutes for two cores     a source for the row or the column `two cores` only
    docs/runs.csv classifier/*/*/minutes for row, column   and one for the number in this row and column only
    large := large variance, clip                          what the row or the column `large` is called in addresses
    levels := formula                                      no number of this row or column is measured

where the last word is one of REASONS. It may also stand for a whole table: <!-- numbers: paper -->. Behind it and a
comma may stand the file of a test. A number matches if it is a measured one, rounded to as many digits; of "a to b", if
it is the least or the largest; of "under a", if it is more. "100 calls" is the x of a row.
"""

import csv
import functools
import glob
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
REASONS = ("paper", "formula", "setting", "notation", "words")
TABLE = re.compile(r"(?:^<!-- numbers: ((?:(?!-->)[\s\S])*)-->\n)?((?:^\|.*\n?)+)", re.MULTILINE)
SOURCE = re.compile(r"(mean )?(\S+\.csv) (.+?)(?: \* (-?[\d.]+))?(?: for (.+))?")
NAMES = re.compile(r"`[^`]*`|\b(lessons?|seeds?) \d+((, | and )\d+)*")  # code, and what names runs: "seeds 1 and 2"
DIGIT = re.compile(r"(?<![\w^{.])(?<!\w-)\d")  # but not those of x_0, x^2, sigma_{i-1}, CIFAR-10
NUMBER = re.compile(r"(?<![\w.^+-])(-?(?:\d{1,3}(?: \d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?)(?![\w.]*\w)( ?%| calls\b)?")


class Wrong(Exception):  # noqa: N818
    """What is wrong with a comment or with a source, in a line."""


@functools.cache
def measurements(path: Path) -> list[tuple[str, float, str]]:
    """Address, value and x of each in a CSV file. Wrong without the file, or a row's command, machine or date."""
    if not path.is_file():
        raise Wrong(f"there is no file {path.name}")
    found = []
    for line, row in enumerate(csv.DictReader(path.read_text().splitlines()), start=2):
        if not (row.get("command") and row.get("machine") and row.get("date")):
            raise Wrong(f"{path.name}, line {line}, lacks a command, a machine or a date")
        if "value" in row:
            key, values = [row["experiment"], row["setting"], row["x"]], {row["y"]: row["value"]}
        else:  # measure.csv and sampling_calls.csv have three values in a row, and names for what they vary
            key, values = list(row.values())[:2], {y: row[y] for y in ("fid", "precision", "recall")}
        for y, value in values.items():
            found.append(("/".join([*key, y, f"n {row['n']}", f"seed {row['seed']}", ""]), float(value), key[-1]))
    return found


def plain(cell: str) -> str:
    """A cell without bold type, links, and spaces around it; minus signs as -, and powers of ten as 1e-3."""
    cell = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("**", "").replace("−", "-").strip()
    return re.sub(r"\s*\\cdot\s*10\^\{?(-?\d+)\}?", r"e\1", cell)


def tables(text: str) -> Iterator[tuple[int, list[str], list[list[str]]]]:
    """Of each table on a page in Markdown: the number of its first line, the comment above it, and rows of cells."""
    text = re.sub(r"^```[\s\S]*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.MULTILINE)
    for found in TABLE.finditer(text):
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in found[2].splitlines()]
        comment = [plain(line) for line in (found[1] or "").splitlines() if line.strip()]
        yield text[: found.start(2)].count("\n") + 1, comment, [[plain(cell) for cell in row] for row in rows]


def is_rounded(text: str, value: float) -> bool:
    """Whether `text` is the value, rounded to as many digits; a half may go either way."""
    digits, _, power = text.partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(text) - value) <= 0.5 * step * (1 + 1e-9)


def look_up(source: re.Match, root: Path, labels: tuple[str, str], names: dict[str, str]) -> list:
    """What a source has for a number in a row and a column that are called `labels`; as `measurements`."""
    average, file, address, factor, only = source.groups()
    if only and only not in (*labels, ", ".join(labels)):
        return []
    for key, label in zip(("{row}", "{column}"), labels):
        address = address.replace(key, glob.escape(names.get(label, label)))
    found = [m for m in measurements(root / file) if fnmatchcase(m[0], f"{address}/*")]
    if average and found:
        found = [(found[0][0], mean(value for _, value, _ in found), found[0][2])]
    return [(address, value * float(factor or 1), x) for address, value, x in found]


def fits(number: re.Match, cell: str, found: list) -> bool:
    """Whether a number in a cell is one of those found: of "a to b" the least or the largest; of "under a", no more."""
    text, unit = number[1].replace(" ", ""), (number[2] or "").strip()
    values = [float(x) if unit == "calls" else value * (100 if unit == "%" else 1) for _, value, x in found]
    if cell[: number.start()].endswith("under "):
        return max(values) < float(text)
    if cell[number.end() :].startswith(" to "):
        values = [min(values)]
    elif cell[: number.start()].endswith(" to "):
        values = [max(values)]
    return any(is_rounded(text, value) for value in values)


def read(comment: list[str], rows: list[list[str]], root: Path) -> tuple[list[re.Match], dict[str, str]]:
    """The sources of a comment, none for a reason, and {label: name}. Wrong if it names what is not there."""
    names = dict(line.split(" := ", 1) for line in comment if " := " in line)
    lines = [line for line in comment if " := " not in line]
    labels = {row[0] for row in rows} | {*rows[0]}
    pairs = {f"{row[0]}, {column}" for row in rows for column in rows[0]}
    reason, *files = lines[0].split(", ") if lines else ("",)
    if reason in REASONS:
        missing = [file for file in files if not (root / file).is_file()]
        if missing:
            raise Wrong(f"there is no file {missing[0]}")
        return [], dict.fromkeys(labels, reason)
    sources = [SOURCE.fullmatch(line) for line in lines]
    if None in sources:
        raise Wrong(f"`{lines[sources.index(None)]}` is no source, no reason and no `label := name`")
    for label in {*names} - labels | {source[5] for source in sources if source[5]} - labels - pairs:
        raise Wrong(f"no row and no column is called {label}")
    return sources, names


def check_table(comment: list[str], rows: list[list[str]], root: Path) -> Iterator[tuple[int, str]]:
    """For each number: how many lines it stands below the first, and what is wrong with it, or "". Wrong, if all is."""
    sources, names = read(comment, rows, root)
    for below, (row, *cells) in enumerate(rows[2:], start=2):
        for column, cell in zip(rows[0][1:], cells):
            cell = NAMES.sub("", cell)
            if not comment and DIGIT.search(cell):
                raise Wrong("there are numbers, and no comment above says where they are from")
            if not comment or names.get(row) in REASONS or names.get(column) in REASONS:
                continue
            found = [m for source in sources for m in look_up(source, root, (row, column), names)]
            near = ", ".join(f"{address.rstrip('/')} = {value:g}" for address, value, _ in found[:4])
            for number in NUMBER.finditer(cell):
                yield below, "" if found and fits(number, cell, found) else f"{number[0]} is not {near or 'measured'}"
            if re.search(r"\d", NUMBER.sub("", cell)):
                yield below, f"cannot read the numbers in `{cell}`"


def check(page: Path, root: Path) -> tuple[int, int, list[str]]:
    """How many tables and numbers a page has, and what is wrong: a line each."""
    count, wrong, found = 0, [], list(tables(page.read_text(encoding="utf-8")))
    for line, comment, rows in found:
        try:
            for below, fault in check_table(comment, rows, root):
                count += 1
                wrong += [f"{page.relative_to(root)}:{line + below}: {fault}"] if fault else []
        except Wrong as error:
            wrong.append(f"{page.relative_to(root)}:{line}: {error}")
    return len(found), count, wrong


def pages(root: Path) -> list[Path]:
    """The READMEs, that of the top folder and those of the lessons, and docs/running.md."""
    return [root / "README.md", *sorted(root.glob("lesson_*/README.md")), root / "docs" / "running.md"]


def main() -> None:
    """Checks all READMEs; the status is 1 if anything is wrong."""
    wrong = []
    for page in pages(ROOT):
        tables, numbers, faults = check(page, ROOT)
        wrong += faults
        print(f"{page.relative_to(ROOT)}: {tables} tables, {numbers} numbers, {len(faults)} wrong", *faults, sep="\n  ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
