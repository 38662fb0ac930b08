"""Curvature operators: v ↦ Cv over mini-batches, never matrices."""

from nlpinf.curvature.operators import Matrix, Operator, Shifted
from nlpinf.curvature.products import Curvature, CurvatureKind, cross_product, curvature_samples

__all__ = [
    "Curvature",
    "CurvatureKind",
    "Matrix",
    "Operator",
    "Shifted",
    "cross_product",
    "curvature_samples",
]
