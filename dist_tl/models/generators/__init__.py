"""Class-conditional generators: a small diffusion model and adapters for published ones."""
