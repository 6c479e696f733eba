"""Damaged files: an InputError in one line or a right result, never anything else."""
