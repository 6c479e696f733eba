"""`python -m ppl_seg` is the same as the command `ppl-seg`."""

from __future__ import annotations

from ppl_seg.cli import main

if __name__ == "__main__":
    main()
