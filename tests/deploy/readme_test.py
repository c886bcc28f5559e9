"""README.md's tables have every flag of `fathom serve`, and the files it names exist.

That its command lines work as printed is tests/integration/readme_test.py's business.
"""

import pathlib
import re
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
README = (ROOT / "README.md").read_text(encoding="utf-8")


class ReadmeTest(unittest.TestCase):
    def test_the_tables_have_every_flag_and_no_other(self):
        text = subprocess.run([BIN / "fathom", "serve", "--help"], capture_output=True, text=True,
                              check=True).stdout
        flags = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
        section = README.split("## Flags")[1].split("\n## ")[0]
        general, limits = section.split("| what | limit | flag |")
        cells = [line.split(" | ")[0] for line in general.splitlines() if line.startswith("| `")]
        cells += [line.split(" | ")[-1] for line in limits.splitlines() if line.startswith("| ")]
        named = {flag for cell in cells for flag in re.findall(r"--[a-z][a-z-]+", cell)}
        self.assertEqual(named, flags)

    def test_the_files_it_names_exist(self):
        for name in re.findall(r"`((?:deploy|tests|oracle)/[\w./-]+)", README):
            self.assertTrue((ROOT / name).exists(), name)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
