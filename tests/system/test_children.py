"""Child processes do not run the program's own file again."""

import subprocess
import sys

SCRIPT = """
from concurrent.futures import ProcessPoolExecutor

from pipeline.system.children import forkserver

print("ran", flush=True)
with ProcessPoolExecutor(1, mp_context=forkserver("zlib")) as pool:
    print(pool.submit(divmod, 7, 2).result())
"""


def test_a_script_needs_no_guard(tmp_path):
    """A program that calls a stage at its top level, as the page on Python shows."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr, done.returncode) == ("ran\n(3, 1)\n", "", 0)
