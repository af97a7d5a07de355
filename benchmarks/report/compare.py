"""Base against head; the speed of what is not known to be right is not printed."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report.results import Results, seconds


def red_files(junit: Iterable[Path]) -> set[str]:
    """Test files with a failure or an error, of JUnit XML files (``pytest --junit-xml``)."""
    red = set()
    for path in junit:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                name = case.get("file") or case.get("classname") or case.get("name") or ""
                red.add(name.replace(".", "/").removesuffix("/py") + ".py")
    return red


def subject(file: str) -> str:
    """What a file is about: ``cache`` of ``tests/cache/test_reader.py`` and ``bench_cache.py``."""
    path = Path(file)
    stem = re.sub(r"^(test|bench)_", "", path.stem)
    folder = path.parent.name
    return stem if folder in ("tests", "ops", "benchmarks", "gpu", "kernels", "native") else folder


def is_about(bench: str, test: str) -> bool:
    """Whether a red test file makes the speed of a benchmark file worthless."""
    about, tested = subject(bench), subject(test)
    return about == tested or about.startswith(f"{tested}_") or tested.startswith(f"{about}_")


def compare(base: Results, head: Results, red: set[str]) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether every row may be trusted.

    A row is withheld where its file has a failed benchmark in base or head, or where a red test
    file is about the same.  Red test files that no benchmark is about are named all the same.
    """
    failed = {name.partition("::")[0] for name in (*base.failed, *head.failed)}
    files = {row.file for row in (*base.rows, *head.rows)}
    why = dict.fromkeys(files & failed, "a benchmark of this file failed")
    for test in sorted(red):
        for file in files:
            if is_about(file, test):
                why[file] = f"{test} is red"
    lines = [f"base: {base.head}", f"head: {head.head}", ""]
    lines += [f"RED: {name}" for name in sorted(red | set(base.failed) | set(head.failed))]
    lines += ["", "| what | base | head | base / head |", "| --- | --- | --- | --- |"]
    lines += _rows(base, head, why)
    return lines, not red and not failed


def _rows(base: Results, head: Results, why: dict[str, str]) -> Iterator[str]:
    before = {row.fullname: row for row in base.rows}
    after = {row.fullname: row for row in head.rows}
    for name in dict.fromkeys((*before, *after)):
        row = after.get(name) or before[name]
        if row.file in why:
            yield f"| {row.label} | withheld: {why[row.file]} | | |"
        elif name not in after or name not in before:
            yield f"| {row.label} | only in {'base' if name in before else 'head'} | | |"
        else:
            one, other = before[name].seconds, after[name].seconds
            yield f"| {row.label} | {seconds(one)} | {seconds(other)} | {one / other:.2f} |"
