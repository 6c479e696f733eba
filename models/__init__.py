"""The program z → s → x: shape prior p(z) p(s|z), intensity model p(x|s), and the segmentation model that joins them."""
