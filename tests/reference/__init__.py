"""Slow, obviously right versions of the equations, and tiny problems to compare them on."""
