"""The program z → s → x: shape prior p(z) p(s|z), intensity model p(x|s), and the model that joins them."""
