"""Two-stage offline distillation of Stable Diffusion U-Nets: encode, teacher-cache, distill."""

import logging
import os

# diffusers imports torchao where it is there, which tells at every start of GPU libraries that it did not find.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
