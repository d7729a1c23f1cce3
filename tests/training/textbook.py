"""Losses written out as in their papers, of D and of G by real and fake logits; and a configuration
with everything on. Not here: any test."""

import torch
import torch.nn.functional as F


def log_sigmoid(d):
    return -torch.log(1 + torch.exp(-d))


# D's and G's losses as the papers write them, on logits of real (r) and generated images (f).
TEXTBOOK = {
    "bce": (
        lambda r, f: -log_sigmoid(r).mean() - torch.log(1 - 1 / (1 + torch.exp(-f))).mean(),
        lambda r, f: -log_sigmoid(f).mean(),
    ),
    "hinge": (
        lambda r, f: -(torch.minimum(r - 1, 0 * r).mean() + torch.minimum(-f - 1, 0 * f).mean()),
        lambda r, f: -f.mean(),
    ),
    "lsgan": (
        lambda r, f: 0.5 * F.mse_loss(r, torch.ones_like(r)) + 0.5 * (f**2).mean(),
        lambda r, f: 0.5 * ((f - 1) ** 2).mean(),
    ),
    "wgan-gp": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (
        lambda r, f: -log_sigmoid(r - f).mean(),
        lambda r, f: -log_sigmoid(f - r).mean(),
    ),
}

EVERYTHING = {
    "loss": "hinge", "r1": 1.0, "spectral_norm": True, "minibatch_std": True,
    "diffaugment": "color,translation,cutout", "instance_noise": 0.1, "instance_noise_steps": 50,
    "n_critic": 2,
}  # fmt: skip
