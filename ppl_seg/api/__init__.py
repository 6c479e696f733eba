"""The Python API: learn a prior from label maps, fit it to scans, segment, evaluate."""

from ppl_seg.api.fit import fit_scans
from ppl_seg.api.load import load_model
from ppl_seg.api.model import Model
from ppl_seg.api.prior import learn_prior
from ppl_seg.api.run import RunReport, segment_scans
from ppl_seg.results.evaluation import evaluate

__all__ = ["Model", "RunReport", "evaluate", "fit_scans", "learn_prior", "load_model", "segment_scans"]
