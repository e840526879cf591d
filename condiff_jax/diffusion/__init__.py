"""Diffusion as pure maths on callables: schedules, losses, guidance, samplers."""
