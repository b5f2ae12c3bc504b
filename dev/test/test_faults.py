"""The first cases of faults.py, which looks for faults for as long as one likes."""

import shutil
import subprocess
import sys

import pytest

from helpers import TIMEOUT

ROUNDS = {"kills": 40, "calls": 60, "disks": 40, "options": 100}


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
@pytest.mark.parametrize("part", ROUNDS)
def test_faults(root, part):
    command = [sys.executable, root / "dev/test/faults.py", "--only", part, "--rounds", str(ROUNDS[part])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout
