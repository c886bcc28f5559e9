#!/usr/bin/env python3
"""Plants bugs in the coordinator, one at a time, and says at which seed the simulation finds each.

  tests/simulation/planted_bugs.py              plants, builds and runs each; undoes it afterwards
  tests/simulation/planted_bugs.py --check      only sees whether the places are still there

Exit code 1 when a bug is not found within --seeds, or a place is gone.
"""

import argparse
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What is wrong then, the file, what stands there, what stands there instead.
BUGS = [
    ("answers of an epoch that is over are taken", "coordinator/worker_group.cc",
     "if (epoch == options_.epoch && is_due) {",
     "if (is_due) {"),
    ("a block is handed out again while it can still be found", "coordinator/block_pool.cc",
     "  Unlink(least_recently_used);\n  Remove(least_recently_used);\n",
     "  Unlink(least_recently_used);\n"),
    ("requests with different salts share KV", "coordinator/block_hash.cc",
     "return HashOf(salt.data(), salt.size());",
     "return HashOf(salt.data(), 0);"),
    ("requests that wait are forgotten when the workers are lost", "coordinator/engine.cc",
     "    const bool was_computed = sequence->slot >= 0;\n",
     "    const bool was_computed = sequence->slot >= 0;\n    if (!was_computed) continue;\n"),
    ("prompt logprobs are told twice after the workers were lost", "coordinator/sequence.h",
     "num_prompt_logprobs_done(progress.num_prompt_logprobs_done)",
     "num_prompt_logprobs_done(0)"),
    ("a request goes on with another group from its beginning", "coordinator/group_router.cc",
     "loop.Resume(request.live)",
     "loop.Resume({.request = request.live.request, .stream = request.live.stream})"),
    ("what a client does not want to hear any more is told", "coordinator/engine.cc",
     "    std::erase_if(deliveries_,",
     "    if (false) std::erase_if(deliveries_,"),
    ("a token of an earlier stay in a slot is taken", "coordinator/scheduler.cc",
     "return sequence->num_admissions == scheduled.admission ? sequence : nullptr;",
     "return sequence;"),
]


def text_with(bug):
    """The file's text without and with the bug; None when its place is gone."""
    _, name, good, bad = bug
    text = (ROOT / name).read_text(encoding="utf-8")
    return (text, text.replace(good, bad)) if text.count(good) == 1 else None


def find(bug, build, num_seeds):
    """Plants one bug and runs the simulation; what it says, or None when it finds nothing."""
    what, name, _, _ = bug
    path = ROOT / name
    good, bad = text_with(bug)
    path.write_text(bad, encoding="utf-8")
    try:
        subprocess.run(["cmake", "--build", build, "--target", "simulate"], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL)
        started = time.monotonic()
        run = subprocess.run([f"{build}/tests/simulate", "--seeds", str(num_seeds)], cwd=ROOT,
                             capture_output=True, text=True)
        seconds = time.monotonic() - started
    finally:
        path.write_text(good, encoding="utf-8")
    if run.returncode == 0:
        print(f"NOT FOUND in {num_seeds} seeds: {what} ({name})", flush=True)
        return False
    # A failed CHECK speaks first, on the other stream.
    lines = (run.stderr + run.stdout).splitlines()
    said = next((line for line in lines if line.startswith("seed ")), "no seed was named")
    cause = lines[0] if lines and "CHECK" in lines[0] else ""
    print(f"found: {what} ({name})\n  {said} {cause} [{seconds:.1f} s]", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="look for the places only")
    parser.add_argument("--only", default="", help="plant those whose description has this")
    parser.add_argument("--build", default="build/cpu", help="a build tree with the simulation")
    parser.add_argument("--seeds", type=int, default=1000, help="within which a bug must be found")
    parser.add_argument("--bin", help="ignored: every Python test is told where the programs are")
    arguments = parser.parse_args()
    gone = [bug for bug in BUGS if text_with(bug) is None]
    for what, name, good, _ in gone:
        print(f"{name} does not have exactly one place to plant '{what}':\n{good}")
    if gone or arguments.check:
        return 1 if gone else 0
    chosen = [bug for bug in BUGS if arguments.only in bug[0]]
    return 0 if all([find(bug, arguments.build, arguments.seeds) for bug in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
