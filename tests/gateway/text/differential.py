#!/usr/bin/env python3
"""Compares the tokenizer with Hugging Face's library on random text, until --count strings agree.

Usage: differential.py --program build/cpu/tests/tokenize_lines [--count N] [--seed S] [--time]
       differential.py --program build/cpu/tests/tokenize_lines --long

Needs the package `tokenizers` (tests/requirements.txt). Three tokenizers are compared: DeepSeek's,
the tiny one, and tiny ones whose added tokens overlap and take white space in random ways. Ids of
text, of bytes that are no text, and the text of random ids must be equal, and those of every entry
of the vocabulary and of a long run of one kind of character. --long means a million strings, the
whole vocabulary, runs of 1 MB, and the speed of both libraries. Exits with 77 (skipped) without the
package.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
try:
    import tokenizers
except ImportError:
    print("the package tokenizers is not installed")
    sys.exit(77)

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
BATCH = 2000

WORDS = """the of and to in is that for it was on as with be by at from this have The I'm don't we've
he'll you're They'D HELLO World naïve café Größe ñandú Ελλάδα Москва привет שלום مرحبا नमस्ते สวัสดี
ภาษาไทย 안녕하세요 こんにちは カタカナ 東京 你好世界 中文，分词。 tokenization antidisestablishmentarianism
HTTPServer snake_case_name camelCaseName kebab-case 3.14159 1,000,000 2024-01-31 0xDEADBEEF 1e-9
½ Ⅷ ² ٣٤٥ 〇一二三 ①②③ e\u0301 n\u0303 \u0915\u094d\u0937 ﬁ ß İ ı ǅ""".split()
CODE = """def f(x):\n    return x**2 + 1\n#include <vector>\nint main() { return 0; }\n\tfor (int i=0;i<n;++i)
\t\ta[i] += b[i]; // comment\n<div class="x">&nbsp;</div>\nSELECT * FROM t WHERE a >= 'b';\n{"k": [1, 2.5, null]}
fn main() -> Result<(), Box<dyn Error>> {\n\tlet x = &mut y;\n}\n#!/bin/sh\nset -euo pipefail\n$x = @{a="b"}
~/.config/../x\n\\\\server\\share\n\\frac{a}{b}\\n\n==== ---- **** ____ //// ...... !!!??? <!-- --> =>""".split("\n")
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\u00a0", "\u3000", "\u2028",
          "\u0085", "\u200b", "\ufeff", "\v", "\f", "\u1680", "\u202f", "\u180e"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "☃", "™", "∑", "€", "𝔘", "𠀀", "𐍈", "🫠"]
MARKS = [chr(c) for c in (0x301, 0x308, 0x327, 0x5B0, 0x64B, 0x93F, 0xE31, 0x3099, 0x309A, 0x20DD, 0xFE0F)]
EDGES = [chr(c) for c in (0x3040, 0x303F, 0x309F, 0x30A0, 0x30FB, 0x30FF, 0x3100, 0x4DFF, 0x4E00, 0x9FA5,
                          0x9FA6, 0x3007, 0x0, 0x1F, 0x7F, 0x80, 0xA0, 0xFFFD, 0xFFFF, 0x10FFFF, 0xE000)]


def any_character(rng):
    while True:
        c = rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10000),
                        rng.randrange(0x20000), rng.randrange(0x110000)))
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def piece(rng, added):
    kind = rng.randrange(13)
    if kind < 3:
        return rng.choice(("", " ", "  ", "\n")) + rng.choice(WORDS)
    if kind == 3:
        return rng.choice(CODE)
    if kind == 4:
        return "".join(rng.choices(SPACES, k=rng.randint(1, 5)))
    if kind == 5:
        return "".join(rng.choices("0123456789٣½", k=rng.randint(1, 9)))
    if kind == 6:
        return rng.choice(EMOJI) * rng.randint(1, 3)
    if kind == 7:
        return "".join(rng.choices(MARKS + list("ae कsが"), k=rng.randint(1, 6)))
    if kind == 8:
        token = rng.choice(added)
        return token if rng.random() < 0.7 else token[: rng.randint(1, len(token))]
    if kind == 9:
        return "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 8)))
    if kind == 10:
        return "".join(any_character(rng) for _ in range(rng.randint(1, 6)))
    if kind == 11:
        return "".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ aZ\r\n", k=rng.randint(1, 8)))
    return rng.choice((*SPACES, *EDGES, *"aé中1.")) * rng.randint(1, 40)


def random_text(rng, added):
    return "".join(piece(rng, added) for _ in range(rng.randint(1, 12)))


def random_bytes(rng, added):
    """Text with bytes changed, lost and put in."""
    data = bytearray(random_text(rng, added).encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        data[place:place + rng.randint(0, 2)] = rng.choice(
            (b"", b"\xff", b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80",
             rng.randbytes(3)))
    return bytes(data)


def random_ids(rng, num_ids):
    return [rng.randrange(num_ids + 10) for _ in range(rng.randint(1, 20))]


def with_random_added_tokens(rng, source, target):
    """Copies the tiny tokenizer with added tokens that contain, overlap and strip."""
    data = json.loads((source / "tokenizer.json").read_text())
    next_id = 1 + max(t["id"] for t in data["added_tokens"])
    next_id = max(next_id, 1 + max(data["model"]["vocab"].values()))
    contents = {"".join(rng.choices("<>ab中é", k=rng.randint(1, 4))) for _ in range(12)}
    known = set(data["model"]["vocab"])
    for content in sorted(contents - known):
        data["added_tokens"].append({
            "id": next_id, "content": content, "single_word": False,
            "lstrip": rng.random() < 0.4, "rstrip": rng.random() < 0.4,
            "normalized": rng.random() < 0.5, "special": rng.random() < 0.5})
        next_id += 1
    (target / "tokenizer.json").write_text(json.dumps(data))


class Program:
    """The program, loaded once, to be asked many things."""

    def __init__(self, path, model):
        self.process = subprocess.Popen([path, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        assert self.process.wait() == 0

    def answers(self, questions):
        lines = [{"hex": q.hex()} if isinstance(q, bytes) else q for q in questions]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

        def write():
            self.process.stdin.write(text)
            self.process.stdin.flush()

        writer = threading.Thread(target=write)
        writer.start()
        result = [json.loads(self.process.stdout.readline()) for _ in questions]
        writer.join()
        return result


def expected_answer(theirs, question):
    if isinstance(question, list):
        return {"text": theirs.decode(question, skip_special_tokens=False),
                "skipping": theirs.decode(question, skip_special_tokens=True)}
    text = question if isinstance(question, str) else question.decode(errors="replace")
    return {"ids": theirs.encode(text, add_special_tokens=False).ids}


def num_different(program, theirs, questions):
    different = 0
    for question, ours in zip(questions, program.answers(questions), strict=True):
        expected = expected_answer(theirs, question)
        if ours != expected:
            different += 1
            if different <= 5:
                print(f"{str(question)[:300]!a}\n  ours   {str(ours)[:300]}\n  theirs {str(expected)[:300]}")
    return different


def compare(path, model, rng, count):
    """Returns how many of `count` texts (a tenth of them no UTF-8) and as many id lists differ."""
    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    added = [t.content for t in theirs.get_added_tokens_decoder().values()]
    num_ids = theirs.get_vocab_size()
    different = 0
    with Program(path, model) as program:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            questions = [random_bytes(rng, added) if rng.random() < 0.1 else random_text(rng, added)
                         for _ in range(size)]
            questions += [random_ids(rng, num_ids) for _ in range(size)]
            different += num_different(program, theirs, questions)
    return different


def compare_vocabulary(path, model):
    """The text of every id, and the ids of that text."""
    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    num_ids = 1 + max(theirs.get_vocab(with_added_tokens=True).values())
    different = 0
    with Program(path, model) as program:
        for start in range(0, num_ids, BATCH):
            ids = range(start, min(start + BATCH, num_ids))
            texts = [theirs.decode([id], skip_special_tokens=False) for id in ids]
            different += num_different(program, theirs, [*([id] for id in ids), *texts])
    print(f"{model.name}: {num_ids} entries of the vocabulary, {different} differ")
    return different


RUNS = {"spaces": " ", "digits": "7", "letters": "a", "CJK": "中", "mixed CJK": "我们的中文文本", "newlines": "\n",
        "punctuation": "=", "combining marks": "e\u0301", "emoji": "😀"}


def compare_runs(path, model, num_bytes):
    """One kind of character over and over: the same ids, in time that grows with the length."""
    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    different = 0
    with Program(path, model) as program:
        for name, unit in RUNS.items():
            texts = [unit * (size // len(unit.encode())) for size in (num_bytes // 4, num_bytes)]
            different += num_different(program, theirs, texts)
            seconds = [num_bytes / 1e6 / speed_of(path, model, [text]) * len(text.encode()) / num_bytes
                       for text in texts]
            print(f"{num_bytes // 4} and {num_bytes} bytes of {name}: {seconds[0] * 1e3:.1f} and {seconds[1] * 1e3:.1f} ms")
    print(f"{len(RUNS)} kinds of runs, {different} differ")
    return different


def speed_of(path, model, texts):
    """MB/s of the program, in one thread; the best of three."""
    lines = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts)
    return float(subprocess.run([path, str(model), "--time", "3"], input=lines.encode(),
                                stdout=subprocess.PIPE, check=True).stdout)


def compare_speed(program, model, rng):
    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tree = pathlib.Path(__file__).parents[3]
    sources = [p.read_text() for folder in ("base", "coordinator", "gateway", "kernels", "worker")
               for p in sorted((tree / folder).rglob("*.h"))]
    mixed = [random_text(rng, ["<｜User｜>"]) for _ in range(20000)]
    vectors = [v["text"] for v in json.loads((model / "vectors.json").read_text())]
    corpora = {
        "this project's headers": sources,
        "random mixtures": mixed,
        "the golden vectors": vectors,
        "one run of 300 KB of letters": ["a" * 300000],
    }
    for name, texts in corpora.items():
        num_bytes = sum(len(t.encode()) for t in texts)
        ours = speed_of(program, model, texts)
        best = 0
        for _ in range(3):
            start = time.perf_counter()
            for text in texts:
                theirs.encode(text, add_special_tokens=False)
            best = max(best, num_bytes / 1e6 / (time.perf_counter() - start))
        print(f"{name}: {ours:.1f} MB/s, tokenizers {tokenizers.__version__} {best:.1f} MB/s, "
              f"{ours / best:.1f} times, one thread each")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--bin", help="unused: where the programs are")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--time", action="store_true", help="also compare the speed")
    parser.add_argument("--long", action="store_true", help="a million strings, everything else, and the speed")
    options = parser.parse_args()
    if options.long:
        options.count, options.time = max(options.count, 1_000_000), True
    rng = random.Random(options.seed)
    print(f"seed {options.seed}")

    different = compare(options.program, GOLDEN / "tokenizer_v3", rng, options.count // 2)
    different += compare(options.program, GOLDEN / "tokenizer_tiny", rng, options.count // 4)
    for _ in range(8):
        with tempfile.TemporaryDirectory() as folder:
            with_random_added_tokens(rng, GOLDEN / "tokenizer_tiny", pathlib.Path(folder))
            different += compare(options.program, pathlib.Path(folder), rng, options.count // 32)
    print(f"{options.count} texts and as many lists of ids: {different} differ", flush=True)
    for name in ("tokenizer_v3", "tokenizer_tiny") if options.long else ("tokenizer_tiny",):
        different += compare_vocabulary(options.program, GOLDEN / name)
    different += compare_runs(options.program, GOLDEN / "tokenizer_v3", 1_000_000 if options.long else 20_000)
    if options.time:
        compare_speed(options.program, GOLDEN / "tokenizer_v3", rng)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
