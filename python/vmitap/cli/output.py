"""What commands print: tables and colour on a terminal, plain lines in a pipe, one JSON object a line with `--json`."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

# What a terminal may take for a command, and what would break a line: text of a guest or of its image may hold anything.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Output:
    """Where one command's results go. `json` commands print objects only; the others print what people read."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.terminal = not as_json and sys.stdout.isatty()
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """The terminal; it honours NO_COLOR and its own width."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(highlight=False, soft_wrap=True)
        return self._console

    def object(self, value: Mapping[str, Json]) -> None:
        """Prints one JSON object on one line; nothing without `--json`."""
        if self.as_json:
            print(json.dumps(value), flush=True)

    def text(self, plain: str = "", style: str | None = None) -> None:
        """Prints one line for people; nothing with `--json`."""
        if self.as_json:
            return
        if self.terminal:
            self.console.print(harmless(plain), style=style, markup=False)
        else:
            print(harmless(plain), flush=True)

    def line(self, *parts: tuple[str, str]) -> None:
        """Prints one line made of (text, style) parts for people; nothing with `--json`."""
        if not self.terminal:
            self.text("".join(text for text, _ in parts))
            return
        from rich.text import Text

        self.console.print(Text.assemble(*((harmless(text), style) for text, style in parts)))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
        """Prints a table: ruled on a terminal, tab-separated with a header line in a pipe; nothing with `--json`."""
        if self.as_json:
            return
        if not self.terminal:
            for row in (columns, *rows):
                print("\t".join(harmless(cell) for cell in row), flush=True)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title, title_justify="left", header_style="bold", border_style="dim")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        self.console.print(table)


def harmless(text: str) -> str:
    """The text with control characters written out: nothing from a guest reaches the terminal as a command."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def hexdump(data: bytes, address: int) -> str:
    """Sixteen bytes a line: address, bytes, printable characters."""
    lines = []
    for start in range(0, len(data), 16):
        part = data[start : start + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{address + start:016x}  {part.hex(' '):<47}  {shown}")
    return "\n".join(lines)


def per_second(count: float) -> str:
    """A rate with as many digits as are worth reading: "1.2 M/s", "34 k/s"."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}/s"
    return f"{count:.3g} /s"


def microseconds(seconds: float) -> str:
    """A short time for people."""
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
