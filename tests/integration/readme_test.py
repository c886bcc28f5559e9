"""What the README prints works as printed, but for the ports: another one may be free here."""

import re
import subprocess
import sys

from checkpoints import ROOT
from fathom_server import FathomServer, free_port

SERVED_NAME = "quickstart"  # as deploy/quickstart calls it


def readme_blocks(language):
    """Fenced blocks of README.md in this language."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def curl_commands():
    """Every curl command of README.md, with its continuation lines."""
    shell = "\n".join(readme_blocks("sh"))
    return re.findall(r"^(curl .*(?:(?<=\\)\n.*)*)", shell, re.MULTILINE)


def test_every_curl_line_works(model):
    """Each succeeds, and says something where there is something to say."""
    commands = curl_commands()
    assert len(commands) >= 5
    with FathomServer(model, "--served-model-name", SERVED_NAME,
                      tensor_parallel_size=8) as server:
        for command in commands:
            here = re.sub(r"^curl (.*?):8000/", rf"curl -fsS \1:{server.port}/", command)
            assert here != command
            done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, (here, done.stderr)
            assert done.stdout or here.endswith("/health"), here
            assert '"error":{' not in done.stdout, (here, done.stdout)


def test_the_grpc_client_works():
    """The Python block, run in the root of the repository as the README says."""
    (block,) = [block for block in readme_blocks("python") if "import grpc" in block]
    port = free_port()
    here = block.replace("127.0.0.1:50051", f"127.0.0.1:{port}")
    assert here != block and len(block.splitlines()) < 30
    with FathomServer(ROOT / "tests/golden/v3_tiny/ckpt", "--grpc-listen",
                      f"127.0.0.1:{port}") as server:
        done = subprocess.run([sys.executable, "-"], input=here, cwd=ROOT, capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^\d+ -\d+\.\d{3}$", done.stdout, re.MULTILINE)) == 16, done.stdout
        assert done.stdout.endswith("finished: FINISH_REASON_LENGTH\n")
        server.wait_until_idle()
