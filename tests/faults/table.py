"""The table of bad inputs and their messages in README.md; ``python -m tests.faults.table`` writes it anew."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.faults.cases import CASES, Case
from tests.faults.forked import Done, fedsim_command
from tests.faults.place import Place

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"


def play(case: Case, place: Place) -> Done:
    """The case's command in its place, which is spoiled already."""
    paths = {name: getattr(place, name) for name in ("root", "config", "tree", "run", "out")}
    words = [word.format(**paths) for word in case.words.split()]
    return fedsim_command(*words, environment=place.environment, before=case.before, extra=case.extra(place))


def message(done: Done, place: Place) -> str:
    """What follows ``fedsim:`` on standard error, without names of folders that differ from run to run, and with long
    lists of keys and axes cut, which grow with every feature."""
    found = re.search(r"^fedsim: (.*)\Z", done.err, re.DOTALL | re.MULTILINE)
    text = found[1].rstrip("\n") if found else ""
    text = re.sub(r"folder-[0-9a-f]{16}", "folder-HASH", text.replace(str(place.root), "DIR"))
    text = re.sub(r"(known: [\w-]+)(, [\w-]+){8,}", r"\1, ...", text)
    return re.sub(r"\(rule '(\w+)', [^)]*\)", r"(rule '\1', ...)", text)


def row(case: Case, text: str) -> str:
    """A line of the table."""
    cells = case.area, case.name, f"`fedsim {case.words}`", str(case.code), text.replace("\n  ", "<br>")
    return "| " + " | ".join(re.sub(r"[0-9a-f]{64}", "HASH", c).replace("|", "\\|") for c in cells) + " |\n"


def rows() -> list[str]:
    """The table's lines as they are committed."""
    table = README.read_text().partition(BEGIN)[2].partition(END)[0]
    return table.splitlines(keepends=True)[2:]


def main() -> None:
    lines = ["| what | input | command | exit code | message |\n", "| --- | --- | --- | --- | --- |\n"]
    with tempfile.TemporaryDirectory() as folder:
        good = Place.build(Path(folder) / "good")
        for number, case in enumerate(CASES):
            place = good.copy(Path(folder) / str(number))
            case.arrange(place)
            lines.append(row(case, message(play(case, place), place)))
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + "".join(lines) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
