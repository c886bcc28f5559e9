"""Units, manifests and the Dockerfile: well-formed, hardened, and about the programs as they are."""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
KUBERNETES = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
UNITS = sorted((ROOT / "deploy/systemd").iterdir())


def flags_of(program, *subcommand):
    """The flags that a program says it has."""
    text = subprocess.run([BIN / program, *subcommand, "--help"], capture_output=True, text=True,
                          check=True).stdout
    return set(re.findall(r"--[a-z][a-z0-9-]*", text))


class Programs(unittest.TestCase):
    def check_flags(self, arguments, where):
        """`arguments`: a program's name and its arguments."""
        program = pathlib.Path(arguments[0]).name
        subcommand = [arguments[1]] if program == "fathom" else []
        known = flags_of(program, *subcommand)
        for argument in arguments[1:]:
            if argument.startswith("--"):
                self.assertIn(argument.split("=")[0], known, f"{where}: {program} has no such flag")


class KubernetesTest(Programs):
    def documents(self):
        for path in KUBERNETES:
            for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
                yield path.name, document

    def pods(self):
        for name, document in self.documents():
            if document["kind"] in ("Deployment", "StatefulSet"):
                yield name, document, document["spec"]["template"]["spec"]

    def test_documents_are_complete(self):
        kinds = {}
        for name, document in self.documents():
            self.assertLessEqual({"apiVersion", "kind", "metadata", "spec"}, document.keys(), name)
            kinds.setdefault(name, []).append(document["kind"])
        self.assertEqual(kinds.keys(), {"single-node.yaml", "pod-per-role.yaml"})
        for found in kinds.values():
            self.assertLessEqual({"Service", "NetworkPolicy"}, set(found))

    def test_every_pod_is_hardened(self):
        for name, document, pod in self.pods():
            where = f"{name} {document['metadata']['name']}"
            self.assertIs(pod["automountServiceAccountToken"], False, where)
            self.assertIs(pod["securityContext"]["runAsNonRoot"], True, where)
            self.assertEqual(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault")
            for container in pod["containers"]:
                context = container["securityContext"]
                self.assertIs(context["allowPrivilegeEscalation"], False, where)
                self.assertIs(context["readOnlyRootFilesystem"], True, where)
                self.assertEqual(context["capabilities"]["drop"], ["ALL"], where)
                self.assertIn("memory", container["resources"]["limits"], where)

    def test_every_container_is_probed_at_a_port_it_has(self):
        for name, document, pod in self.pods():
            for container in pod["containers"]:
                ports = {port["name"] for port in container["ports"]}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    action = container[probe].get("httpGet") or container[probe]["tcpSocket"]
                    self.assertIn(action["port"], ports, f"{name} {document['metadata']['name']}")

    def test_a_server_that_loads_for_an_hour_is_not_restarted(self):
        for _, document, pod in self.pods():
            for container in pod["containers"]:
                startup = container["startupProbe"]
                if "httpGet" in startup:  # 200 only once the model is loaded
                    self.assertGreaterEqual(startup["periodSeconds"] * startup["failureThreshold"],
                                            3600, document["metadata"]["name"])
                self.assertNotIn("httpGet", container["livenessProbe"])  # 503 is no reason to kill

    def test_selectors_find_the_pods(self):
        for name, document in self.documents():
            if document["kind"] != "Service":
                continue
            wanted = document["spec"]["selector"].items()
            found = [other for path, other, _ in self.pods() if path == name and
                     wanted <= other["spec"]["template"]["metadata"]["labels"].items()]
            self.assertTrue(found, f"{name} {document['metadata']['name']}")

    def test_volumes_that_are_mounted_exist(self):
        for _, document, pod in self.pods():
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                self.assertLessEqual(mounted, volumes, document["metadata"]["name"])

    def test_the_programs_have_the_flags(self):
        for name, _, pod in self.pods():
            for container in pod["containers"]:
                self.check_flags([*container.get("command", ["fathom"]), *container["args"]], name)


class SystemdTest(Programs):
    def test_the_programs_have_the_flags(self):
        for unit in UNITS:
            for line in re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE):
                self.check_flags(line.split(), unit.name)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_finds_nothing_wrong_and_little_exposed(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for unit in UNITS:
                copy = pathlib.Path(folder) / unit.name.replace("@.", "@0.")
                copy.write_text(unit.read_text().replace("/usr/bin/fathom", f"{BIN}/fathom"))
                paths.append(copy)
            verify = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths],
                                    capture_output=True, text=True, cwd=folder)
            complaints = [line for line in verify.stderr.splitlines() if "fathom" in line]
            self.assertEqual(complaints, [])
            for path in paths:
                if path.suffix != ".service":
                    continue
                security = subprocess.run(  # the threshold is in tenths: 1.5 of 10
                    ["systemd-analyze", "security", "--offline=true", "--threshold=15",
                     "--no-pager", path], capture_output=True, text=True, cwd=folder)
                self.assertEqual(security.returncode, 0, security.stdout[-300:] + security.stderr)


class DockerfileTest(unittest.TestCase):
    def test_the_image_has_the_libraries_that_the_programs_link(self):
        release = pathlib.Path("/etc/os-release").read_text()
        if 'VERSION_ID="12"' not in release or "ID=debian" not in release:
            self.skipTest("the image is Debian 12, this is not")
        text = (ROOT / "deploy/container/Dockerfile").read_text()
        image = set(re.findall(r"^      (lib\S+)", text.split("FROM debian:12-slim\n")[-1],
                               re.MULTILINE))
        unseen = set(image)  # and what comes along with those
        while unseen:
            depends = subprocess.run(["dpkg-query", "-W", "-f", "${Depends}\n", *unseen],
                                     capture_output=True, text=True, check=True).stdout
            found = {name.split()[0].split(":")[0] for name in re.split(r"[,\n|]", depends)
                     if name.strip()}
            installed = subprocess.run(["dpkg-query", "-W", "-f", "${Package}\n", *found],
                                       capture_output=True, text=True).stdout.split()
            unseen = set(installed) - image
            image |= unseen
        needed = {}
        for program in ("fathom", "fathom-worker", "fathom-coordinator", "fathom-gateway",
                        "fathom-grammar"):
            linked = subprocess.run(["ldd", BIN / program], capture_output=True, text=True,
                                    check=True).stdout
            for library in re.findall(r"=> (\S+)", linked):
                needed[str(pathlib.Path(library).resolve())] = program
        owners = subprocess.run(["dpkg", "-S", *needed], capture_output=True, text=True).stdout
        for line in owners.splitlines():
            package, path = line.split(":")[0], line.split()[-1]
            if package not in ("libc6", "libstdc++6", "libgcc-s1"):
                self.assertIn(package, image, f"{needed.get(path)} links {path}")


class ScriptsTest(unittest.TestCase):
    def test_shell_scripts_parse(self):
        for script in ("deploy/install-dependencies", "deploy/quickstart", "tests/run",
                       "tests/fuzz/run", ".ci/run"):
            subprocess.run(["bash", "-n", ROOT / script], check=True)

    def test_the_packages_are_listed_once_with_a_version(self):
        lines = [line.split() for line in (ROOT / "deploy/packages.txt").read_text().splitlines()
                 if line and not line.startswith("#")]
        self.assertTrue(all(len(line) == 3 for line in lines))
        names = [line[1] for line in lines]
        self.assertEqual(len(names), len(set(names)))
        listed = subprocess.run([ROOT / "deploy/install-dependencies", "--list", "--fuzz"],
                                capture_output=True, text=True, check=True).stdout.split()
        self.assertEqual(listed, names)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
