"""Choose few experts of a hub for each input."""
