"""Two-stage offline distillation of Stable Diffusion U-Nets: encode, teacher-cache, distill."""

import logging
import os
import sys

# Output directories are locked, and child processes bound to their parent, with what only these systems have.
if sys.platform == "win32":
    raise SystemExit("distill-sd does not run on Windows itself. Run it in WSL.")

# diffusers imports torchao if it is installed, and torchao logs missing GPU libraries at every start.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
