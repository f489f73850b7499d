"""The page of `vmitap report` in a real browser: what it makes of the markup, and what it draws."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
FIRST, SECOND = (0x3B, 0x6E, 0xA5), (0xD1, 0x78, 0x3D)
"""The colours of the two symbols in the charts."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        # CI says that there has to be one: a skipped test would be green for ever.
        if os.environ.get("VMITAP_REQUIRE_BROWSER"):
            pytest.fail("no browser is installed here: sudo apt-get install chromium")
        pytest.skip("no browser is installed here")
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "hits.parquet"
    words = ("--capture", "path=Cstr(Arg(0), max=64)", "--capture", "callers=Backtrace(4)", "--on-return", "fd=Reg.rax.i32")
    vmitap("trace", "open_file", "read_file", "demo", "--cmdline", "rounds=6", "-o", str(path), *words)
    return path


def vmitap(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "vmitap", *words], capture_output=True, timeout=120, check=True)


def browse(browser: str, page: Path, *options: str) -> str:
    common = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}", "--window-size=1100,1600")
    command = [browser, *common, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


Pixel = tuple[int, int, int]


def pixels(picture: bytes) -> list[list[Pixel]]:
    """The rows of a PNG as a browser makes it: 8 bits a colour, not interlaced."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    parts: dict[bytes, bytes] = {}
    at = 8
    while at < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, at)
        parts[kind] = parts.get(kind, b"") + picture[at + 8 : at + 8 + length]
        at += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    each = {2: 3, 6: 4}[colour]
    data, step = zlib.decompress(parts[b"IDAT"]), width * each + 1
    assert len(data) == step * height
    above, rows = bytearray(width * each), []
    for start in range(0, len(data), step):
        above = unfiltered(data[start], data[start + 1 : start + step], above, each)
        rows.append(list(zip(above[::each], above[1::each], above[2::each], strict=True)))
    return rows


def unfiltered(kind: int, line: bytes, above: bytearray, each: int) -> bytearray:
    """One row of a PNG (PNG specification, 9.2)."""
    if kind == 0:
        return bytearray(line)
    if kind == 2:
        return bytearray((a + b) & 255 for a, b in zip(line, above, strict=True))
    row = bytearray(line)
    for at, value in enumerate(line):
        left, up, corner = (row[at - each], above[at], above[at - each]) if at >= each else (0, above[at], 0)
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = (left + up) >> 1
        else:
            from_left, from_up, from_corner = abs(up - corner), abs(left - corner), abs(left + up - corner - corner)
            guess = left if from_left <= from_up and from_left <= from_corner else up if from_up <= from_corner else corner
        row[at] = (value + guess) & 255
    return row


class Dom(HTMLParser):
    """Each section's heading, with what is in it: how many of each tag, and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, tuple[Counter[str], list[str]]] = {}
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.tags, self.words = Counter(), []
        self.tags[tag] += 1
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.sections[data] = (self.tags, self.words)
        self.words.append(data)


def test_a_browser_makes_of_the_page_what_was_meant(browser: str, recorded: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    vmitap("report", str(recorded), "-o", str(page))
    dom = Dom(browse(browser, page, "--dump-dom"))
    table = pyarrow.parquet.read_table(recorded)
    assert list(dom.sections) == ["Timeline", "How long vCPUs stood still", "Most frequent callers", "Most frequent values of path"]
    (timeline, titles), (holds, names), (callers, _), (paths, opened) = dom.sections.values()
    # What the bars say is all of the rows, and each has its words.
    bars = [re.fullmatch(r"(open_file|read_file): ([\d,]+) at [\d.]+ s", title) for title in titles]
    counts = [int(bar[2].replace(",", "")) for bar in bars if bar]
    assert (len(counts), sum(counts)) == (timeline["rect"], table.num_rows)
    assert (timeline["svg"], timeline["li"], holds["svg"], holds["table"]) == (1, 2, 1, 1)
    assert {"open_file", "read_file", "99 of 100"} <= set(names)
    # A browser puts rows into a body, and closes what was left open.
    assert (holds["tbody"], holds["tr"], callers["tr"]) == (1, 3, len({each[0] for each in table["callers"].to_pylist() if each}))
    assert set(table["path"].drop_null().to_pylist()) == {word for word in opened if word.startswith("/")}
    assert paths["tr"] == len(set(table["path"].drop_null().to_pylist()))


def test_a_browser_draws_the_charts(browser: str, recorded: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "report.png"
    vmitap("report", str(recorded), "-o", str(page))
    browse(browser, page, f"--screenshot={picture}")
    drawn = pixels(picture.read_bytes())
    artefacts = Path(os.environ.get("VMITAP_ARTEFACTS") or Path(__file__).parents[2] / "target" / "artefacts")
    artefacts.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, artefacts / "report.png")
    text = page.read_text()
    bare, count = re.subn("<section>.*</section>", "", text, flags=re.DOTALL)
    assert count == 1
    page.write_text(bare)
    browse(browser, page, f"--screenshot={picture}")
    empty = pixels(picture.read_bytes())

    assert (len(drawn), {len(row) for row in drawn}) == (1600, {1100})
    found, without = Counter(pixel for row in drawn for pixel in row), Counter(pixel for row in empty for pixel in row)
    # The bars of both symbols, and nothing of them where there are no sections.
    assert (found[FIRST] > 10_000, found[SECOND] > 1_000) == (True, True)
    assert (without[FIRST], without[SECOND]) == (0, 0)
    # The second symbol has bars in the timeline only, and they are spread over its width.
    columns = {x for row in drawn for x, pixel in enumerate(row) if pixel == SECOND}
    assert max(columns) - min(columns) > 700
    # The sections are white on a page that is not, and have words.
    assert found[255, 255, 255] - without[255, 255, 255] > 300_000
    assert drawn[0][0] == empty[0][0] == (0xF6, 0xF7, 0xF8)
    dark = [sum(count for pixel, count in colours.items() if max(pixel) < 0x80) for colours in (found, without)]
    assert dark[0] > dark[1] + 3_000 > 3_500


def test_a_picture_is_decoded_whatever_the_filters_are() -> None:
    # The five filters on a row of two pixels each, by hand.
    lines = [(0, 1, 2, 3, 4, 5, 6), (1, 10, 20, 30, 1, 1, 255), (2, 1, 1, 1, 1, 1, 1), (3, 0, 0, 0, 0, 0, 0), (4, 0, 0, 0, 5, 5, 5)]
    header = struct.pack(">IIBBBBB", 2, 5, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(value for line in lines for value in line))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", data[:9]), (b"IDAT", data[9:]), (b"IEND", b"")):
        made += struct.pack(">I", len(part)) + kind + part + bytes(4)
    assert pixels(made) == [
        [(1, 2, 3), (4, 5, 6)],
        [(10, 20, 30), (11, 21, 29)],
        [(11, 21, 31), (12, 22, 30)],
        [(5, 10, 15), (8, 16, 22)],
        [(5, 10, 15), (13, 21, 27)],
    ]
