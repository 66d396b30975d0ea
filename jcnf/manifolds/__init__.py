"""Flows on spheres, tori, rotations and products: `CNF(TangentField(net, M), Uniform(M))`."""

from jcnf.manifolds.base import TOLERANCE as TOLERANCE
from jcnf.manifolds.base import Manifold as Manifold
from jcnf.manifolds.bases import Independent as Independent
from jcnf.manifolds.bases import Uniform as Uniform
from jcnf.manifolds.bases import VonMisesFisher as VonMisesFisher
from jcnf.manifolds.bases import WrappedNormal as WrappedNormal
from jcnf.manifolds.field import TangentField as TangentField
from jcnf.manifolds.field import TangentProbes as TangentProbes
from jcnf.manifolds.flat import Euclidean as Euclidean
from jcnf.manifolds.flat import Torus as Torus
from jcnf.manifolds.matching import EmbeddedCoupling as EmbeddedCoupling
from jcnf.manifolds.matching import Geodesic as Geodesic
from jcnf.manifolds.product import Product as Product
from jcnf.manifolds.rotations import SO3 as SO3
from jcnf.manifolds.sphere import Sphere as Sphere
