"""The guides: q(z|s) from label maps, q(z|x) from scans, q(z) of one scan, and the label factors q(s|z), q(s|z,x)."""
