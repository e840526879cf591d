"""A package, so that no other of this name is taken for it (torch-fidelity installs one)."""
