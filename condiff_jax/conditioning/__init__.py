"""The conditioning mechanisms of the paper: what a denoiser is told, and how."""
