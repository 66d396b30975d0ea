"""The divergence of a field, tr(dv/dx): exactly or by a stochastic estimate.

| strategy | products (dv/dx) e | error |
|---|---|---|
| `Exact` | none with a closed form, else as `ForwardMode` | none |
| `ForwardMode` | dim | none |
| `Hutchinson(k)` | k | unbiased, variance ~ 1/k |
| `HutchPlusPlus(k)` | 3k | unbiased, variance ~ 1/k^2 where the spectrum decays |
| `XTrace(k)` | 2k | the same, with a smaller constant |
"""

from jcnf.divergence.estimators import Estimator as Estimator
from jcnf.divergence.estimators import Hutchinson as Hutchinson
from jcnf.divergence.estimators import HutchPlusPlus as HutchPlusPlus
from jcnf.divergence.estimators import XTrace as XTrace
from jcnf.divergence.exact import Exact as Exact
from jcnf.divergence.exact import ForwardMode as ForwardMode
from jcnf.divergence.strategy import Divergence as Divergence
from jcnf.divergence.strategy import Drawn as Drawn
from jcnf.divergence.strategy import Local as Local

DIVERGENCES: dict[str, type[Divergence]] = {
    "exact": Exact,
    "forward": ForwardMode,
    "hutchinson": Hutchinson,
    "hutch++": HutchPlusPlus,
    "xtrace": XTrace,
}
