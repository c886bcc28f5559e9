"""JSON Schemas to try structured output with, out of archives of the Python package index that
tests/sources.txt pins: the official test suite, and the tools of the Berkeley Function Calling
Leaderboard. Each is (name, schema); none is there twice.

    tests/integration/schemas.py FILE      writes the suite, for a test in C++: a list of {"name",
                                           "schema": JSON, "invalid": [JSON that does not obey it]}
"""

import json
import re
import subprocess
import sys
import tarfile
import zipfile

from checkpoints import ROOT

ARCHIVES = ROOT / ".cache" / "sources"

# The leaderboard's words for types, and OpenAPI's (which its own runner turns them into).
TYPES = {"dict": "object", "float": "number", "double": "number", "long": "integer",
         "short": "integer", "byte": "integer", "char": "string", "bool": "boolean",
         "tuple": "array", "list": "array", "ArrayList": "array", "Array": "array",
         "HashMap": "object", "Hashtable": "object", "String": "string", "Boolean": "boolean"}


def archive(project):
    """The file that tests/sources.txt names for it, downloaded if need be."""
    subprocess.run([ROOT / "deploy" / "fetch-sources", "tests/sources.txt"], check=True)
    for line in (ROOT / "tests" / "sources.txt").read_text(encoding="utf-8").splitlines():
        if line.split()[:1] == [project]:
            return ARCHIVES / line.split()[1]
    raise KeyError(project)


def once(named):
    """Without those that say the same."""
    seen = {}
    for name, schema in named:
        seen.setdefault(json.dumps(schema), (name, schema))
    return list(seen.values())


def suite_cases():
    """JSON-Schema-Test-Suite, draft 2020-12, the optional part included: (name, its case)."""
    with tarfile.open(archive("jsonschema")) as archived:
        for member in archived:
            _, found, name = member.name.partition("/json/tests/draft2020-12/")
            if not found or not name.endswith(".json"):
                continue
            for case in json.load(archived.extractfile(member)):
                yield f"{name}: {case['description']}", case


def official_suite():
    """The schemas of the test suite."""
    return once((name, case["schema"]) for name, case in suite_cases())


def plain(node):
    """With JSON Schema's own types."""
    if isinstance(node, list):
        return [plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: plain(value) for key, value in node.items()}
    if isinstance(node.get("type"), str):
        node["type"] = TYPES.get(node["type"], node["type"])
        if node["type"] == "any":
            del node["type"]
    return node


def tools():
    """The parameters of the leaderboard's functions."""
    def functions():
        with zipfile.ZipFile(archive("bfcl-eval")) as archived:
            for name in sorted(archived.namelist()):
                if not re.fullmatch(r"bfcl_eval/data/(BFCL_|multi_turn_func_doc/).*\.json", name):
                    continue
                lines = archived.read(name).decode().splitlines()
                for line in lines if lines[0].startswith('{"') else []:
                    entry = json.loads(line)
                    yield from [entry] if "parameters" in entry else entry.get("function", [])
    return once((function["name"], plain(function["parameters"])) for function in functions())


def main():
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    def compact(value):
        return json.dumps(value, separators=(",", ":"))

    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump([{"name": name, "schema": compact(case["schema"]),
                    "invalid": [compact(test["data"]) for test in case["tests"]
                                if not test["valid"]]}
                   # The draft's formats are annotations: they forbid nothing.
                   for name, case in suite_cases() if not name.startswith("optional/format")], file)


if __name__ == "__main__":
    main()
