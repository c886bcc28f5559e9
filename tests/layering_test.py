"""The layout as a test: who may include whom, where heavy headers may stand, what files look like.

ARCHITECTURE.md describes the layout for people; this holds the code to it.
"""

import fnmatch
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Which folders a folder may include, besides itself. Tests and benchmarks may include anything.
ARROWS = {
    "base": [],
    "proto": ["base"],
    "kernels": ["base"],
    "grammar": ["base"],
    "worker": ["base", "proto", "kernels", "grammar"],
    "coordinator": ["base", "proto"],
    "gateway": ["base", "proto"],
    "deploy": ["base"],
}
# The same of folders in folders; the outer one's own files may include them all.
INNER_ARROWS = {
    "grammar/compiler": ["grammar", "gateway/text"],
    "gateway/text": [],
    "gateway/http": [],
    "gateway/rpc": ["gateway/http"],
    "gateway/openai": ["gateway/text", "gateway/http", "gateway/rpc"],
}

# Headers that cost a lot or tie code to a library, and the files that may include them.
HOMES = {
    r"grpc.*|google/protobuf/.*|.*\.grpc\.pb\.h": [
        "proto/endpoint.*", "proto/status.h", "*/main.cc", "*_service.*", "*/worker_group_calls.*",
        "*/worker_streams.*", "coordinator/worker_watch.cc", "coordinator/generate_session.*",
        "coordinator/grammar_gate.*", "gateway/rpc/*", "worker/remote_blackboard.cc", "worker/step_stream.*"],
    r"gloo/.*": ["worker/gloo_communicator.cc"],
    r"nccl.*|cuda.*": ["kernels/cuda/*", "worker/nccl_communicator.cc"],
    r"hwy/.*": ["kernels/cpu/*"],
    r"boost/.*": ["gateway/http/*"],
    r"openssl/.*": ["gateway/http/tls.*", "gateway/api_keys.cc", "deploy/launcher/health_probe.cc"],
    r"CLI/.*": ["base/flag_parser.cc", "deploy/launcher/command_line.cc", "deploy/launcher/gateway_flags.cc"],
    r"prometheus/.*": ["*/metrics.*"],
    r"xgrammar/.*|dlpack/.*": ["grammar/compiler/token_grammar.cc"],
    r"simdjson.*": ["worker/model_config.cc", "worker/safetensors.cc", "worker/sim_profile.cc", "gateway/*/*json*",
                    "gateway/text/tokenizer.cc", "grammar/compiler/schema_check.cc",
                    "deploy/launcher/memory_plan.cc"],
}

BANNED_FOLDERS = {"common", "util", "utils", "helper", "helpers", "misc", "shared", "lib"}
MAX_LINES = {".h": 300, ".cc": 600, ".cu": 800, ".py": 600}
# What a file keeps to itself: constants, variables, types, and functions with their parameters.
PRIVATE = re.compile(r"^namespace \{\n(.*?)^\}  // namespace$", re.MULTILINE | re.DOTALL)
PRIVATE_NAME = re.compile(
    r"^(?:(?:class|struct|enum|enum class) (?=\w+[ ;])|(?!class |struct |enum |namespace |using )\w[\w:<>,&* ]*[ &*])"
    r"(\w+)(?:\[\w*\])*(?: =| [:{]|\{|;|(\([^)]*\)) \{)", re.MULTILINE)
BACKEND_CONDITION = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif)\b.*(CUDA|NVCC|FATHOM_(CPU|DEVICE))")
# Folders of one machine; spelled so that this line is none.
MACHINE_PATHS = re.compile("/(" + "work|farm|root|home/" + r"\w+)/")


def tracked_files():
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others",
         "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


FILES = tracked_files()
CODE = [path for path in FILES if path.suffix in (".h", ".cc", ".cu", ".cuh")]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def is_product(path):
    return name_of(path).split("/")[0] in ARROWS


def includes_of(path):
    """What a file includes, without brackets and quotes."""
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"),
                      re.MULTILINE)


def folder_of(name):
    """The unit of layering that a file or an include belongs to, or None."""
    for folder in (*INNER_ARROWS, *ARROWS):
        if name.startswith(folder + "/"):
            return folder
    return None


class LayeringTest(unittest.TestCase):
    def assert_none(self, found, what):
        self.assertFalse(found, what + "\n  " + "\n  ".join(found))

    def test_folders_include_only_what_stands_below_them(self):
        found = []
        for path in filter(is_product, CODE):
            source = folder_of(name_of(path))
            for include in includes_of(path):
                target = folder_of(include)
                if target is None or target == source:
                    continue
                if source == "gateway" and target.startswith("gateway/"):
                    continue
                allowed = INNER_ARROWS.get(source, [])
                if target not in allowed + ARROWS[source.split("/")[0]]:
                    found.append(f"{name_of(path)} includes {include}")
        self.assert_none(found, "the arrows of ARCHITECTURE.md do not allow this:")

    def test_no_file_includes_itself_by_a_detour(self):
        graph = {name_of(path): [include for include in includes_of(path)] for path in CODE}
        done, in_progress = set(), []

        def visit(name):
            if name in in_progress:
                self.fail("circle: " + " -> ".join(in_progress[in_progress.index(name):] + [name]))
            if name in done or name not in graph:
                return
            in_progress.append(name)
            for include in graph[name]:
                visit(include)
            in_progress.pop()
            done.add(name)

        for name in graph:
            visit(name)

    def test_heavy_headers_stay_at_home(self):
        found = []
        for path in filter(is_product, CODE):
            for include in includes_of(path):
                for pattern, homes in HOMES.items():
                    if re.fullmatch(pattern, include) and not any(
                            fnmatch.fnmatch(name_of(path), home) for home in homes):
                        found.append(f"{name_of(path)} includes {include}")
        self.assert_none(found, "these headers have other homes (see HOMES here):")

    def test_a_source_includes_its_own_header_first(self):
        found = []
        for path in filter(is_product, CODE):
            header = path.with_suffix(".h")
            if path.suffix != ".cc" or not header.exists():
                continue
            includes = includes_of(path)
            if not includes or includes[0] != name_of(header):
                found.append(name_of(path))
        self.assert_none(found, "so that every header is seen to stand on its own:")

    def test_headers_guard_themselves(self):
        self.assert_none([name_of(path) for path in CODE if path.suffix == ".h"
                          and "#pragma once" not in path.read_text(encoding="utf-8")],
                         "#pragma once is missing:")

    def test_backends_are_files_and_not_conditions(self):
        found = []
        for path in CODE:
            if name_of(path).startswith("kernels/"):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if BACKEND_CONDITION.search(line):
                    found.append(f"{name_of(path)}:{number}: {line.strip()}")
        self.assert_none(found, "CMake chooses the backend's files:")

    def test_no_folder_is_a_drawer(self):
        found = {name_of(path) for path in FILES
                 if BANNED_FOLDERS & set(path.relative_to(ROOT).parts[:-1])}
        self.assert_none(sorted(found), "a folder is named after what it is about:")

    def test_files_stay_readable(self):
        found = []
        for path in FILES:
            lines = MAX_LINES.get(path.suffix)
            if lines and len(path.read_text(encoding="utf-8").splitlines()) > lines:
                found.append(f"{name_of(path)}: more than {lines} lines")
        self.assert_none(found, "one subject per file:")

    def test_only_main_reads_the_environment(self):
        self.assert_none([name_of(path) for path in filter(is_product, CODE)
                          if path.name != "main.cc"
                          and re.search(r"\b(secure_)?getenv\b", path.read_text(encoding="utf-8"))],
                         "configuration comes in Options:")

    def test_files_of_a_folder_share_no_private_name(self):
        """Without ccache they are compiled as one (cmake/fathom.cmake)."""
        apart = re.compile(r"kernels/.*|gateway/text/chat_.*|bench/.*|.*/main\.cc")
        homes = {}
        for path in filter(is_product, CODE):
            if path.suffix != ".cc" or apart.fullmatch(name_of(path)):
                continue
            for block in PRIVATE.findall(path.read_text(encoding="utf-8")):
                for name, parameters in PRIVATE_NAME.findall(block):
                    homes.setdefault((path.parent, name, " ".join(parameters.split())), set()).add(path.name)
        found = [f"{name_of(folder)}: {name} in {' and '.join(sorted(files))}"
                 for (folder, name, _), files in sorted(homes.items()) if len(files) > 1]
        self.assert_none(found, "one name, one meaning within a folder:")

    def test_nothing_names_a_folder_of_one_machine(self):
        found = []
        for path in FILES:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) > 1_000_000:
                continue
            for number, line in enumerate(text.splitlines(), 1):
                if MACHINE_PATHS.search(line):
                    found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
        self.assert_none(found, "the tree speaks of itself alone:")

    def test_the_code_is_formatted(self):
        tool = shutil.which("clang-format-14")
        if tool is None:
            self.skipTest("clang-format-14 is not installed; other versions format otherwise")
        paths = [str(path) for path in CODE]
        result = subprocess.run([tool, "--dry-run", *paths], capture_output=True, text=True)
        complaints = sorted(set(re.findall(r"^(.+?):\d+:\d+: warning", result.stderr,
                                           re.MULTILINE)))
        self.assert_none(complaints, f"run {tool} -i on:")


class ArchitectureTest(unittest.TestCase):
    """ARCHITECTURE.md names every header, by its path's stem, and nothing that is not there."""

    def setUp(self):
        self.text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
        self.headers = {name_of(path) for path in CODE if path.suffix == ".h" and is_product(path)}

    def test_every_header_is_named(self):
        words = set(re.findall(r"[\w-]+", self.text))
        missing = [name for name in sorted(self.headers) if pathlib.Path(name).stem not in words]
        self.assertFalse(missing, "ARCHITECTURE.md does not name\n  " + "\n  ".join(missing))

    def test_everything_named_exists(self):
        stems = {path.stem for path in FILES} | {path.name for path in FILES}
        stems |= {part for path in FILES for part in path.relative_to(ROOT).parts}
        layout = re.search(r"## Layout.*?```\n(.*?)```", self.text, re.DOTALL).group(1)
        # In the layout every word in lower case with an underscore is a file's stem.
        missing = [word for word in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", layout)
                   if word not in stems]
        missing += [name for name in re.findall(r"\b[\w/]+\.(?:h|cc|cu|py|proto|md)\b", self.text)
                    if pathlib.Path(name).name not in stems]
        self.assertFalse(missing, "ARCHITECTURE.md names what is not there\n  " +
                         "\n  ".join(missing))

    def test_every_folder_is_named(self):
        top = {path.relative_to(ROOT).parts[0] for path in FILES
               if len(path.relative_to(ROOT).parts) > 1}
        missing = [folder for folder in sorted(top) if not folder.startswith(".")
                   and folder != "cmake" and folder + "/" not in self.text]
        self.assertFalse(missing, "ARCHITECTURE.md does not name " + ", ".join(missing))


if __name__ == "__main__":
    if "--bin" in sys.argv:  # every Python test is told where the programs are; this one needs none
        at = sys.argv.index("--bin")
        del sys.argv[at:at + 2]
    unittest.main()
