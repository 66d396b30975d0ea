"""The divergence tr(dv/dx) of a field, exact or by a stochastic estimate.

| strategy | products (dv/dx) e | error |
|---|---|---|
| `Exact` | none with a closed form, otherwise dim | none |
| `ForwardMode` | dim | none |
| `Hutchinson(k)` | k | unbiased, variance ~ 1/k |
| `HutchPlusPlus(k)` | 3k | unbiased, variance ~ 1/k^2 if the spectrum decays |
| `XTrace(k)` | 2k | unbiased, with a smaller constant than `HutchPlusPlus` |
"""

from jcnf.divergence.base import Divergence as Divergence
from jcnf.divergence.base import FieldEvaluation as FieldEvaluation
from jcnf.divergence.base import FixedNoise as FixedNoise
from jcnf.divergence.estimators import Estimator as Estimator
from jcnf.divergence.estimators import Hutchinson as Hutchinson
from jcnf.divergence.estimators import HutchPlusPlus as HutchPlusPlus
from jcnf.divergence.estimators import XTrace as XTrace
from jcnf.divergence.exact import Exact as Exact
from jcnf.divergence.exact import ForwardMode as ForwardMode
