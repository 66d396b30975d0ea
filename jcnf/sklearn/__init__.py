"""Densities of tables as scikit-learn estimators."""

from jcnf.sklearn.columns import Column as Column
from jcnf.sklearn.density import FlowDensity as FlowDensity
