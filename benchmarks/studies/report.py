"""One page of everything measured, from the results files alone.

    python -m benchmarks.studies.report [--results benchmarks/results] [--out report.html]

Of every subject and hardware the newest <subject>_<hardware>_<yyyymmdd>.json with the .md beside it. The page holds its
pictures and its style in itself, runs no script and asks the network for nothing.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from benchmarks.environment import environment
from eventkern.train.termination import ending_quietly

STUDIES = ("loss_gap", "throughput", "utilization", "shuffle", "roofline", "memory")
NAME = re.compile(r"(?P<subject>[a-z0-9_]+)_(?P<hardware>[a-z0-9-]+)_(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)")
KINDS = ("case", "part")
MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".webp": "image/webp"}
LARGE_BYTES = 8_000_000
SHORT_LENGTH = 12
"""Characters of a cell that stays on one line: a number and its unit do, a reason may not."""
NOT_RUN = re.compile(r"\bnot run\b", re.IGNORECASE)
SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)[.!?](?=\s+[^a-z]|$)", re.DOTALL)
TABLE_OPEN = '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>\n'
# What the page may load: its own style, pictures out of itself, and nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Result:
    """A subject on one hardware: its record, and its text as the page shows it."""

    subject: str
    hardware: str
    date: str
    record: dict[str, Any]
    title: str
    body: str
    num_not_run: int

    @property
    def environment(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.record["environment"]
        return facts

    @property
    def commit(self) -> str:
        """Short, and whether there were changes besides."""
        commit, plus, changes = str(self.environment.get("commit", "unknown")).partition("+")
        return f"{commit[:10]}{plus}{changes}"

    @property
    def is_on_gpu(self) -> bool:
        """By the name, which counts cores where no card is."""
        return re.search(r"-\d+c$", self.hardware) is None

    @property
    def anchor(self) -> str:
        return f"{self.subject}_{self.hardware}"

    @property
    def rank(self) -> tuple[int, str, bool, str]:
        """Studies in their order, then benchmarks by name; of each GPUs first."""
        place = STUDIES.index(self.subject) if self.subject in STUDIES else len(STUDIES)
        return place, self.subject, not self.is_on_gpu, self.hardware


def read_results(folder: Path) -> list[Result]:
    """The newest result of each subject and hardware, in the order of the page.

    Raises:
        FileNotFoundError: no such folder, no results in it, a record without its text, or a picture that is missing.
        ValueError: a record that is no JSON object with an environment.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of results at {folder}")
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-8:]):
        if name := NAME.fullmatch(path.stem):
            newest[name["subject"], name["hardware"]] = path
    if not newest:
        raise FileNotFoundError(f"no results (<subject>_<hardware>_<yyyymmdd>.json) in {folder}")
    return sorted((read_result(path) for path in newest.values()), key=lambda result: result.rank)


def read_result(path: Path) -> Result:
    """One record, and the text beside it with its pictures."""
    name = NAME.fullmatch(path.stem)
    assert name is not None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("environment"), dict):
        raise ValueError(f'{path} holds no object with an "environment"')
    text_path = path.with_suffix(".md")
    if not text_path.is_file():
        raise FileNotFoundError(f"{path} has no text beside it: {text_path.name} is missing")
    parser = markdown_parser()
    tokens = parser.parse(without_facts(text_path.read_text(encoding="utf-8"), record))
    title = name["subject"]
    if tokens and tokens[0].tag == "h1":
        title, tokens = tokens[1].content, tokens[3:]
    for cell, content in pairwise(tokens):
        if cell.type == "td_open" and len(content.content) <= SHORT_LENGTH:
            cell.attrSet("class", "short")
    for token in every(tokens):
        if token.type in {"heading_open", "heading_close"}:
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        elif token.type == "image":
            token.attrSet("src", picture(text_path, unquote(str(token.attrs["src"]))))
    return Result(
        subject=name["subject"],
        hardware=name["hardware"],
        date="-".join(name.group("year", "month", "day")),
        record=record,
        title=title,
        body=parser.renderer.render(tokens, parser.options, {}),
        num_not_run=count_not_run(tokens),
    )


def markdown_parser() -> MarkdownIt:
    """CommonMark and tables, which scroll in a box of their own; HTML in a text is shown as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.core.ruler.push("names", keep_underscores)
    parser.add_render_rule("table_open", lambda *_: TABLE_OPEN)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser


def keep_underscores(state: StateCore) -> None:
    """Underscores belong to names, such as __getitems__; asterisks alone emphasise."""
    for token in every(state.tokens):
        if token.type in {"em_open", "em_close", "strong_open", "strong_close"} and "_" in token.markup:
            token.type, token.tag, token.nesting, token.content = "text", "", 0, token.markup


def without_facts(text: str, record: dict[str, Any]) -> str:
    """The text without command and environment, where they stand as in the record: the page shows the record's."""
    facts = "\n".join(f"- {name}: {value}" for name, value in record["environment"].items())
    for known in (f"## Environment\n\n{facts}\n", f"\n{facts}\n", f"\n`{record.get('command')}`\n"):
        text = text.replace(known, "\n", 1)
    return text


def every(tokens: Sequence[Token]) -> Iterator[Token]:
    """All tokens, those inside a line too."""
    for token in tokens:
        yield token
        yield from every(token.children or ())


def picture(text_path: Path, name: str) -> str:
    """A picture that a text shows, as a data URI."""
    path = text_path.parent / name
    media_type = MEDIA_TYPES.get(path.suffix)
    if Path(name).name != name or media_type is None:
        raise ValueError(f"{text_path} shows {name}; want a {', '.join(MEDIA_TYPES)} of the same folder")
    if not path.is_file():
        raise FileNotFoundError(f"{text_path} shows {name}, which is missing")
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def count_not_run(tokens: Sequence[Token]) -> int:
    """Rows of tables that say "not run"."""
    count, says_so = 0, False
    for token in tokens:
        if token.type == "tr_open":
            says_so = False
        elif token.type == "inline":
            says_so = says_so or NOT_RUN.search(token.content) is not None
        elif token.type == "tr_close":
            count += says_so
    return count


def finding(result: Result) -> str:
    """The first sentence of a study's conclusion, else how much a benchmark or a suite holds."""
    conclusion = result.record.get("conclusion")
    if conclusion:
        text = conclusion if isinstance(conclusion, str) else conclusion[0]
        sentence = SENTENCE.match(text)
        return markdown_parser().renderInline(sentence[0] if sentence else text)
    return ", ".join(counted(len(result.record[f"{kind}s"]), kind) for kind in KINDS if f"{kind}s" in result.record)


def counted(count: int, kind: str) -> str:
    return f"{count} {kind}{'' if count == 1 else 's'}"


def still_to_run(result: Result, results: Sequence[Result]) -> str:
    """Rows that say so, and whether a GPU has seen the subject."""
    words = []
    if result.num_not_run:
        words.append(f"{counted(result.num_not_run, 'row')} not run")
    if not any(other.is_on_gpu for other in results if other.subject == result.subject):
        words.append("no result from a GPU")
    return ", ".join(words)


def hardware_text(result: Result) -> str:
    """A name of hardware in full."""
    facts = result.environment
    if result.is_on_gpu:
        named = {"gpus": "{}", "driver": "driver {}", "cuda": "CUDA {}"}
    else:
        named = {"cpu": "{}", "cores": "{} cores", "instruction_set": "{}"}
    words = ", ".join(form.format(facts[name]) for name, form in named.items() if name in facts)
    return f"<code>{result.hardware}</code>{f' ({escape(words)})' if words else ''}"


def summary(results: Sequence[Result]) -> str:
    """One line for each result."""
    head = ("subject", "hardware", "date", "commit", "still to run", "found")
    lines = [
        (
            f'<a href="#{result.anchor}">{result.subject}</a>',
            result.hardware,
            result.date,
            f"<code>{escape(result.commit)}</code>",
            still_to_run(result, results),
            finding(result),
        )
        for result in results
    ]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>\n" for line in lines)
    names = "".join(f"<th>{name}</th>" for name in head)
    opening = TABLE_OPEN.replace("<table>", '<table id="summary">').replace('"table"', '"summary"')
    return f"{opening}<thead><tr>{names}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"


def by_subject(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    return [(subject, list(chosen)) for subject, chosen in groupby(results, key=lambda result: result.subject)]


def contents(results: Sequence[Result]) -> str:
    """Links to the subjects, the studies first."""
    parts = []
    for heading, wanted in (("Studies", True), ("Benchmarks", False)):
        items = [
            f'<li><a href="#{subject}">{subject}</a>{title_text(chosen[0])}</li>\n'
            for subject, chosen in by_subject(results)
            if (subject in STUDIES) is wanted
        ]
        if items:
            parts.append(f"<h4>{heading}</h4>\n<ul>\n{''.join(items)}</ul>\n")
    missing = [study for study in STUDIES if all(result.subject != study for result in results)]
    if missing:
        parts.append(f'<p class="quiet">Studies without results: {", ".join(missing)}.</p>\n')
    return f"<nav>\n{''.join(parts)}</nav>\n"


def title_text(result: Result) -> str:
    """What a text calls itself, where that is more than the subject's name."""
    return "" if result.title == result.subject else f": {markdown_parser().renderInline(result.title)}"


def section(subject: str, results: Sequence[Result]) -> str:
    """A subject on every hardware."""
    up = '<a class="up" href="#top">to the top</a>'
    return (
        f'<section id="{subject}">\n<h2>{up}{subject}{title_text(results[0])}</h2>\n'
        f"{''.join(map(article, results))}</section>\n"
    )


def article(result: Result) -> str:
    """A subject on one hardware: command, text, and what it ran on."""
    command = result.record.get("command")
    told = f'<p class="command"><code>{escape(command)}</code></p>\n' if command else ""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>\n"
        for name, value in result.environment.items()
    )
    return (
        f'<article id="{result.anchor}">\n'
        f"<h3>{result.hardware}, {result.date}, commit <code>{escape(result.commit)}</code></h3>\n"
        f"{told}{result.body}<dl>\n{facts}</dl>\n</article>\n"
    )


def page(results: Sequence[Result], *, commit: str, date: str) -> str:
    """The whole page.

    Args:
        results: in order, as `read_results` gives them.
        commit: of the checkout that renders it.
        date: of the page.
    """
    hardware = {result.hardware: hardware_text(result) for result in results}
    sections = "".join(section(subject, chosen) for subject, chosen in by_subject(results))
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en" id="top">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>eventkern: what was measured</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n<h1>eventkern: what was measured</h1>\n"
        f"<p>Page of {escape(date)}, at commit <code>{escape(commit)}</code>. "
        f"Measured on {'; '.join(hardware.values())}. "
        "Of each subject and hardware the newest result is shown. A row that a missing device left says "
        "\u201cnot run\u201d.</p>\n"
        f"{summary(results)}{contents(results)}{sections}</body>\n</html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Render the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        text = page(results, commit=str(environment()["commit"]), date=date)
        options.out.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in sorted(options.results.glob("*.json")):
        if not NAME.fullmatch(path.stem):
            print(f"left out {path}: not named <subject>_<hardware>_<yyyymmdd>.json", file=sys.stderr)
    num_bytes = len(text.encode())
    print(f"wrote {options.out}: {counted(len(results), 'result')}, {num_bytes / 1e6:.1f} MB")
    if num_bytes > LARGE_BYTES:
        pictures = sum(map(len, re.findall(r'src="data:[^"]*"', text)))
        print(
            f"The page is larger than {LARGE_BYTES / 1e6:.0f} MB, {pictures / 1e6:.1f} MB of it pictures. "
            "None was shrunk.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
