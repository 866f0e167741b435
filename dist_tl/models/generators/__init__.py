"""Class-conditional generators: our own small diffusion model and adapters for published ones."""
