"""`ours_none`: no class conditioning, the unconditional control of the benchmark."""
