#!/usr/bin/env python3
"""Writes unicode_tables.inc: which class every code point belongs to, as runs.

Usage: make_unicode_tables.py            writes gateway/text/unicode_tables.inc beside this file
       make_unicode_tables.py --check    compares it with the regular expressions of Hugging Face

Unicode version: 16.0.0, because that is what the `tokenizers` library answers. Its engine
(Oniguruma, as bundled in tokenizers 0.23.3) was asked about every code point for \\p{L}, \\p{M},
\\p{N}, \\p{P}, \\p{S} and \\s; `regex` 2024.11.6 (Unicode 16.0) gives the same answer for all of
them, Python 3.11's unicodedata (14.0) and the regex of Unicode 17 do not. Needs
`pip install regex==2024.11.6`, and `tokenizers==0.23.3` for --check.
"""

import argparse
import pathlib
import sys

# Exclusive: no code point has two of these. Order and names are those of unicode.h.
CLASSES = [
    ("kLetter", r"\p{L}"),
    ("kMark", r"\p{M}"),
    ("kNumber", r"\p{N}"),
    ("kPunctuation", r"\p{P}"),
    ("kSymbol", r"\p{S}"),
    ("kSpace", r"\s"),
]
OUTPUT = pathlib.Path(__file__).with_name("unicode_tables.inc")


def code_points():
    return [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def classes_by_regex():
    import regex

    if regex.__version__ != "2.5.148":  # what the release 2024.11.6 calls itself
        sys.exit(f"regex {regex.__version__} may know another Unicode; install regex==2024.11.6")
    classes = {}
    for name, pattern in CLASSES:
        matches = regex.compile(pattern).match
        for code_point in code_points():
            if matches(chr(code_point)):
                if code_point in classes:
                    sys.exit(f"U+{code_point:04X} is {classes[code_point]} and {name}")
                classes[code_point] = name
    return classes


def classes_by_tokenizers():
    from tokenizers import Regex, pre_tokenizers

    classes = {}
    for name, pattern in CLASSES:
        remove = pre_tokenizers.Split(Regex(pattern), "removed")
        everything = code_points()
        for start in range(0, len(everything), 4096):
            chunk = everything[start : start + 4096]
            kept = set("".join(p for p, _ in remove.pre_tokenize_str("".join(map(chr, chunk)))))
            classes.update((c, name) for c in chunk if chr(c) not in kept)
    return classes


def runs(classes):
    previous = None
    for code_point in range(0x110000):
        name = classes.get(code_point, "kOther")
        if name != previous:
            yield code_point, name
            previous = name


def table(classes):
    lines = ["// Made by make_unicode_tables.py from Unicode 16.0.0: where each run of a class begins."]
    line = ""
    for code_point, name in runs(classes):
        entry = f"{{0x{code_point:X}, {name}}},"
        if len(line) + len(entry) + 1 > 100:
            lines.append(line)
            line = ""
        line += (" " if line else "") + entry
    lines.append(line)
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if table(classes_by_tokenizers()) != OUTPUT.read_text():
            sys.exit(f"{OUTPUT} differs from what the tokenizers library answers")
        print("equal for every code point")
    else:
        OUTPUT.write_text(table(classes_by_regex()))


if __name__ == "__main__":
    main()
