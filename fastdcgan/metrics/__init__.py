"""How good images are, in numbers: networks of features, FID, KID, Inception Score, precision,
recall, density, coverage, spectra, sheets of nearest neighbours, and the probe of a discriminator.

Importing this package loads nothing heavy; a name below loads its file when it is first used. Not
here: training, and the choice between runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdcgan.metrics.comparison import Comparison as Comparison
    from fastdcgan.metrics.comparison import compare as compare
    from fastdcgan.metrics.evaluation import Report as Report
    from fastdcgan.metrics.evaluation import evaluate as evaluate
    from fastdcgan.metrics.networks import FeatureNetwork as FeatureNetwork
    from fastdcgan.metrics.networks import load_network as load_network
    from fastdcgan.metrics.probe import probe as probe
    from fastdcgan.metrics.scores import Scores as Scores
    from fastdcgan.metrics.scores import score as score

_HOME = {
    "Comparison": "comparison",
    "compare": "comparison",
    "Report": "evaluation",
    "evaluate": "evaluation",
    "FeatureNetwork": "networks",
    "load_network": "networks",
    "probe": "probe",
    "Scores": "scores",
    "score": "scores",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"fastdcgan.metrics.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastdcgan.metrics' has no attribute {name!r}")
