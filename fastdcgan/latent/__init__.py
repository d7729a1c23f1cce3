"""The latent space: drawing from a trained generator."""
