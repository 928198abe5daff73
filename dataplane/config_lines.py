"""Where a key stands in a TOML text.

``tomllib`` gives values without positions. This is a recursive descent over the tokens of a text that tomllib has
accepted, so it never has to judge: it follows keys, tables, arrays of tables, inline tables and arrays, and notes the
line of each. A path is a tuple of keys and indexes: ``("pods", "static", 0, "ip", 1)``.
"""

import re
import tomllib
from collections.abc import Mapping
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(
    r'''(?P<string>"""(?:\\.|[^\\])*?"""+|\'\'\'.*?\'\'\'+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')'''
    r"""|(?P<skip>[ \t\r]+|\#[^\n]*)|(?P<newline>\n)|(?P<word>[A-Za-z0-9_-]+)|(?P<sign>.)""",
    re.DOTALL | re.VERBOSE,
)


def find_lines(source: str) -> dict[KeyPath, int]:
    """Return the line, from 1, of every table, key and array element of a valid TOML text."""
    return _Scanner(source).scan()


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of ``path`` or, for what is not in the text, of the nearest table around it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


class _Scanner:
    """Tokens with their lines, one position, and the table that keys belong to."""

    def __init__(self, source: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.counts: dict[KeyPath, int] = {}  # elements so far of each array of tables
        self.tokens: list[tuple[str, str, int]] = []
        self.at = 0
        line = 1
        for match in _TOKEN.finditer(source):
            kind = match.lastgroup or ""
            if kind != "skip":
                self.tokens.append((kind, match[0], line))
            line += match[0].count("\n")
        self.tokens.append(("end", "", line))

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.kind != "end":
            if self.kind == "newline":
                self.at += 1
            elif self.word == "[":
                table = self.header()
            else:
                self.pair(table)
        return self.lines

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def word(self) -> str:
        return self.tokens[self.at][1]

    @property
    def line(self) -> int:
        return self.tokens[self.at][2]

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def skip_newlines(self) -> None:
        while self.kind == "newline":
            self.at += 1

    def key(self) -> list[str]:
        """Read a dotted key."""
        parts = [self.key_part()]
        while self.word == ".":
            self.at += 1
            parts.append(self.key_part())
        return parts

    def key_part(self) -> str:
        if self.kind == "string":
            return str(tomllib.loads(f"key = {self.take()}")["key"])
        return self.take()

    def header(self) -> KeyPath:
        """Read ``[table]`` or ``[[array]]`` and return the path of the table it opens."""
        line = self.line
        self.at += 1
        is_array = self.word == "["
        self.at += is_array
        parts = self.key()
        self.at += 1 + is_array
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self.element((*path, part), line)
        path = (*path, parts[-1])
        if is_array:
            self.lines.setdefault(path, line)
            self.counts[path] = self.counts.get(path, -1) + 1
            path = (*path, self.counts[path])
        self.lines.setdefault(path, line)
        return path

    def element(self, path: KeyPath, line: int) -> KeyPath:
        """Note a table on the way; in an array of tables it is the last one."""
        self.lines.setdefault(path, line)
        return (*path, self.counts[path]) if path in self.counts else path

    def pair(self, table: KeyPath) -> None:
        """Read ``key = value``."""
        path, line = table, self.line
        for part in self.key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self.at += 1
        self.value(path)

    def value(self, path: KeyPath) -> None:
        if self.word == "[":
            self.array(path)
        elif self.word == "{":
            self.inline_table(path)
        else:
            while self.kind not in ("newline", "end") and self.word not in (",", "]", "}"):
                self.at += 1

    def array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        self.skip_newlines()
        while self.word != "]":
            self.lines[(*path, index)] = self.line
            self.value((*path, index))
            index += 1
            self.skip_newlines()
            self.at += self.word == ","
            self.skip_newlines()
        self.at += 1

    def inline_table(self, path: KeyPath) -> None:
        self.at += 1
        self.skip_newlines()
        while self.word != "}":
            self.pair(path)
            self.skip_newlines()
            self.at += self.word == ","
            self.skip_newlines()
        self.at += 1
