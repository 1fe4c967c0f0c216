"""Two-stage offline distillation of Stable Diffusion U-Nets: encode, teacher-cache, distill."""
