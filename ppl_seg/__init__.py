"""ppl_seg: label maps teach an anatomical prior, unlabelled scans get segmentations with uncertainty.

    prior  = ppl_seg.learn_prior(label_maps, spacing=2.0)
    model  = ppl_seg.fit_scans(scans, prior=prior)
    result = model.segment("sub-01_FLAIR.nii.gz", draws=200)

The names of the Python API are imported on first use, so that `import ppl_seg` (and with it
`ppl-seg --help`) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_seg.api import evaluate, fit_scans, learn_prior, load_model
    from ppl_seg.inference import objectives

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "fit_scans", "learn_prior", "load_model", "objectives"]


def __getattr__(name: str) -> Any:
    """Import `name` of the API on first use (PEP 562); it stays in the module's namespace afterwards."""
    if name == "objectives":
        value: Any = importlib.import_module("ppl_seg.inference.objectives")
    elif name in __all__:
        value = getattr(importlib.import_module("ppl_seg.api"), name)
    else:
        raise AttributeError(f"module 'ppl_seg' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
