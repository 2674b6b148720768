"""The page of results: what it shows and refuses, and how a browser takes it."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.studies import report, results

RESULTS = Path(report.__file__).parents[1] / "results"
ENVIRONMENT = {"time": "2026-11-24T15:12:27+00:00", "commit": "0123456789abcdef+changes", "cpu": "Some CPU", "cores": 2}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE_WIDTH = 390
PAPER_WIDTH = 700  # A4 less its margins, in CSS pixels
CONSOLE = re.compile(r":CONSOLE\b.*")
# Asked of the page itself, once everything is loaded.
PROBE = """<script>
addEventListener("load", () => {
  const facts = {
    innerWidth,
    scrollWidth: document.documentElement.scrollWidth,
    pictures: [...document.images].map((picture) => picture.naturalWidth),
    tables: document.querySelectorAll("table").length,
    rows: document.querySelectorAll("tr").length,
    deadLinks: [...document.links].map((link) => link.getAttribute("href"))
      .filter((target) => target.startsWith("#") && !document.getElementById(target.slice(1))),
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
  };
  const shown = document.createElement("pre");
  shown.id = "facts";
  shown.textContent = JSON.stringify(facts);
  parent.document.body.append(shown);
});
</script></head>"""


def add(folder: Path, name: str, text: str = "", **record: Any) -> Path:
    """A result as a benchmark leaves it, the text extended by hand."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": f"run {name}", "environment": ENVIRONMENT, **record}))
    facts = "\n".join(f"- {key}: {value}" for key, value in ENVIRONMENT.items())
    path.with_suffix(".md").write_text(f"# {name.rsplit('_', 2)[0]}\n\n`run {name}`\n\n{facts}\n\n{text}\n")
    return path


def page_of(folder: Path) -> str:
    return report.page(report.read_results(folder), commit="fedcba", date="2026-11-25")


def run_browser(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium with a profile of its own, what the page says to the console in stderr."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        missing = "no Chromium (Debian: apt-get install chromium), so the page of results is not opened"
        if os.environ.get("EVENTKERN_NEEDS_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    # Without a sandbox, which a container's root cannot have; the page is our own.
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [browser, *switches, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"]
    return subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True, cwd=folder
    )


def inspect(text: str, folder: Path, width: int) -> dict[str, Any]:
    """Facts about a page that wide, told by a script that only this copy may run.

    The copy lies in a frame, since Chromium's own window is never narrower than 500 pixels.
    """
    policy = "default-src 'none'"
    assert policy in text
    assert "</head>" in text
    copy = text.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</head>", PROBE, 1)
    frame = folder / "frame.html"
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe width="{width}" height="844" frameborder="0" '
        f'srcdoc="{html.escape(copy)}"></iframe>'
    )
    done = run_browser(frame, folder, "--dump-dom")
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    return {**json.loads(html.unescape(found[1])), "console": CONSOLE.findall(done.stderr)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main(["--results", str(RESULTS), "--out", str(path)]) == 0
    return path


def shown_texts() -> list[str]:
    """The texts of the results that the page should show, found without its code."""
    newest = {path.stem.rsplit("_", 1)[0]: path for path in sorted(RESULTS.glob("*_*_*.json"))}
    texts = [path.with_suffix(".md").read_text() for path in newest.values()]
    return [re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for text in texts]


def test_the_page_of_all_results_opens_clean_on_a_phone(page: Path, tmp_path: Path) -> None:
    texts = shown_texts()
    lines = [line for text in texts for line in text.splitlines() if line.startswith("|")]
    num_tables = sum(re.fullmatch(r"\|( *:?-+:? *\|)+", line) is not None for line in lines)
    num_pictures = sum(text.count("![") for text in texts)
    assert num_tables >= 15
    assert num_pictures >= 1
    text = page.read_text()
    assert f'content="{report.POLICY}"' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    facts = inspect(text, tmp_path, PHONE_WIDTH)
    assert facts["console"] == []
    assert facts["fetched"] == []
    assert facts["deadLinks"] == []
    assert len(facts["pictures"]) == num_pictures
    assert min(facts["pictures"]) > 0
    assert facts["tables"] == num_tables + 1
    assert facts["rows"] == len(lines) - num_tables + len(texts) + 1
    assert facts["innerWidth"] == PHONE_WIDTH
    assert facts["scrollWidth"] <= PHONE_WIDTH


def test_nothing_is_cut_off_on_paper(tmp_path: Path) -> None:
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    row = ("gpu_optimized, a CUDA card", *["1,234,567"] * 8, "not run: torch 2.13.0 sees no CUDA device " * 4)
    add(folder, "memory_some-cpu-2c_20261124", results.aligned([tuple(f"heading {place}" for place in range(10)), row]))
    text = page_of(folder)
    assert text.count("@media print") == 1
    facts = inspect(text.replace("@media print", "@media all"), tmp_path, PAPER_WIDTH)
    assert facts["innerWidth"] == PAPER_WIDTH
    assert facts["scrollWidth"] <= PAPER_WIDTH


def test_it_prints(page: Path, tmp_path: Path) -> None:
    run_browser(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 10


def test_the_inspection_sees_what_is_wrong(tmp_path: Path) -> None:
    wrong = (
        f'<!doctype html><head><meta http-equiv="Content-Security-Policy" content="{report.POLICY}"></head>'
        '<a href="#nowhere">a</a><img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/far.png">'
        '<script>console.warn("beware")</script><p style="width: 500px">wide</p>'
    )
    facts = inspect(wrong, tmp_path, PHONE_WIDTH)
    assert facts["pictures"] == [0, 0]
    assert facts["scrollWidth"] > facts["innerWidth"]
    assert facts["deadLinks"] == ["#nowhere"]
    said = " ".join(facts["console"])
    assert "beware" in said
    assert "far.png" in said
    assert "Content Security Policy" in said


def test_the_newest_of_each_hardware_studies_first(tmp_path: Path) -> None:
    for name in (
        "attention_some-cpu-2c_20261124",
        "attention_nvidia-h200_20261101",
        "roofline_some-cpu-2c_20261124",
        "loss_gap_some-cpu-2c_20261123",
        "loss_gap_some-cpu-2c_20251231",
        "loss_gap_some-cpu-16c_20261001",
    ):
        add(tmp_path, name, f"text of {name}")
    text = page_of(tmp_path)
    order = re.findall(r"text of (\w+_[\w-]+_\d{8})", text)
    assert order == [
        "loss_gap_some-cpu-16c_20261001",
        "loss_gap_some-cpu-2c_20261123",
        "roofline_some-cpu-2c_20261124",
        "attention_nvidia-h200_20261101",
        "attention_some-cpu-2c_20261124",
    ]
    nav = text[text.index("<nav>") : text.index("</nav>")]
    assert re.findall(r'href="#([\w-]+)"', nav) == ["loss_gap", "roofline", "attention"]
    assert "Studies without results: throughput, utilization, shuffle, memory." in nav


def test_the_summary_says_what_was_found_and_what_waits(tmp_path: Path) -> None:
    rows = "| device | s |\n| --- | --: |\n| cpu | 1 |\n| cuda | not run |\n| mps, not run | Not run |\n| all | 2 |\n"
    sentence = "It was **storage**, 1.5 times of v0.2, e.g. <files>."
    add(tmp_path, "shuffle_some-cpu-2c_20261124", rows, conclusion=[f"{sentence} More of it."])
    add(tmp_path, "sampler_some-cpu-2c_20261124", "Not run on a GPU.", cases=[{}, {}])
    add(tmp_path, "sampler_nvidia-h200_20261124", "", cases=[{}])
    text = page_of(tmp_path)
    summary = text[text.index('id="summary"') : text.index("<nav>")]
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in summary.splitlines() if "<td>" in line]
    commit = "<code>0123456789+changes</code>"
    assert [line[1:] for line in cells] == [
        [
            "some-cpu-2c",
            "2026-11-24",
            commit,
            "2 rows not run, no result from a GPU",
            "It was <strong>storage</strong>, 1.5 times of v0.2, e.g. &lt;files&gt;.",
        ],
        ["nvidia-h200", "2026-11-24", commit, "", "1 case"],
        ["some-cpu-2c", "2026-11-24", commit, "", "2 cases"],
    ]
    assert "fedcba" in text
    assert "<code>some-cpu-2c</code> (Some CPU, 2 cores)" in text


def test_text_is_shown_and_never_run(tmp_path: Path) -> None:
    add(
        tmp_path,
        "loader_some-cpu-2c_20261124",
        "<script>alert(1)</script>\n\n## A & B\n\nDataLoader, __getitems__ _it_ **ours**\n\n[x](javascript:alert(1))",
        command="pytest -k '<b>'",
        environment={**ENVIRONMENT, "note": "<i>"},
    )
    text = page_of(tmp_path)
    body = text[text.index("<article") :]
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert "<h4>A &amp; B</h4>" in body
    assert "DataLoader, __getitems__ _it_ <strong>ours</strong>" in body
    assert 'href="javascript' not in body
    assert "<code>pytest -k &#x27;&lt;b&gt;&#x27;</code>" in body
    assert "<dt>note</dt><dd>&lt;i&gt;</dd>" in body


def test_what_a_study_writes_is_shown_with_its_picture_and_its_facts_once(tmp_path: Path) -> None:
    command = "python -m benchmarks.studies.shuffle --quick"
    table = results.aligned([("layer", "s"), ("order", "0.5")])
    text = results.markdown("What did it cost?", command, ["Nothing.", "## Layers", table], ENVIRONMENT)
    record = {"command": command, "environment": ENVIRONMENT, "conclusion": ["Nothing."]}
    written = results.write(tmp_path, "shuffle", record, text, {"layers": ("Every layer", Figure((1, 1)))})
    shown = page_of(tmp_path)
    assert '<h2><a class="up" href="#top">to the top</a>shuffle: What did it cost?</h2>' in shown
    (source,) = re.findall(r'<img src="([^"]*)" alt="Every layer"', shown)
    assert source.startswith("data:image/png;base64,")
    assert written[2].suffix == ".png"
    assert shown.count(command) == 1
    assert shown.count(str(ENVIRONMENT["time"])) == 1
    assert "Environment</h" not in shown
    assert '<td style="text-align:right" class="short">0.5</td>' in shown


def remove_text(folder: Path) -> None:
    (folder / "sampler_some-cpu-2c_20261124.md").unlink()


def break_record(folder: Path) -> None:
    (folder / "sampler_some-cpu-2c_20261124.json").write_text('{"command": ')


def forget_environment(folder: Path) -> None:
    (folder / "sampler_some-cpu-2c_20261124.json").write_text("[]")


def show(name: str) -> Any:
    return lambda folder: add(folder, "sampler_some-cpu-2c_20261124", f"![a picture]({name})")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (shutil.rmtree, "no folder of results at"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no results"),
        (remove_text, "sampler_some-cpu-2c_20261124.md is missing"),
        (break_record, "sampler_some-cpu-2c_20261124.json is not JSON"),
        (forget_environment, "sampler_some-cpu-2c_20261124.json holds no object"),
        (show("there%20not.png"), "sampler_some-cpu-2c_20261124.md shows there not.png, which is missing"),
        (show("../secret.png"), "shows ../secret.png; want"),
        (show("https://example.org/a.png"), "shows https://example.org/a.png; want"),
        (show("letter.txt"), "shows letter.txt; want"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Any, words: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    add(folder, "sampler_some-cpu-2c_20261124")
    mistake(folder)
    assert report.main(["--results", str(folder), "--out", str(tmp_path / "page.html")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_is_no_result_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, "sampler_some-cpu-2c_20261124")
    (tmp_path / "throughput_some-cpu-2c.resume.json").write_text("half")
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    seen = capsys.readouterr()
    assert "throughput_some-cpu-2c.resume.json: not named" in seen.err
    assert "1 result," in seen.out


def test_a_large_page_is_told_and_not_shrunk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LARGE_BYTES", 3_000_000)
    (tmp_path / "large.png").write_bytes(bytes(3_000_000))
    add(tmp_path, "memory_some-cpu-2c_20261124", "![large](large.png)")
    out = tmp_path / "page.html"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert "larger than 3 MB, 4.0 MB of it pictures. None was shrunk." in capsys.readouterr().err
    assert out.stat().st_size > 4_000_000
