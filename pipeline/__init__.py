"""Two-stage offline distillation of Stable Diffusion U-Nets: encode, teacher-cache, distill."""

import logging
import os

# diffusers imports torchao if it is installed, and torchao logs missing GPU libraries at every start.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
