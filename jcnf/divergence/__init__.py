"""The divergence of a field, tr(dv/dx): exactly or by a stochastic estimate.

| strategy | products (dv/dx) e | error |
|---|---|---|
| `Exact` | none with a closed form, else as `ForwardMode` | none |
| `ForwardMode` | dim | none |
| `Hutchinson(k)` | k | unbiased, variance ~ 1/k |
| `HutchPlusPlus(k)` | 3k | unbiased, variance ~ 1/k^2 where the spectrum decays |
| `XTrace(k)` | 2k | the same, with a smaller constant |
"""

from jcnf.divergence.base import Divergence
from jcnf.divergence.base import Drawn as Drawn
from jcnf.divergence.base import Local as Local
from jcnf.divergence.estimators import Estimator as Estimator
from jcnf.divergence.estimators import Hutchinson, HutchPlusPlus, XTrace
from jcnf.divergence.exact import Exact, ForwardMode

DIVERGENCES: dict[str, type[Divergence]] = {
    "exact": Exact,
    "forward": ForwardMode,
    "hutchinson": Hutchinson,
    "hutch++": HutchPlusPlus,
    "xtrace": XTrace,
}
