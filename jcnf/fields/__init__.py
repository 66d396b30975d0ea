"""Velocity fields: `field(t, x, context=None)` of one sample. Subclass `Field` to add one."""

from jcnf.fields.base import Field as Field
from jcnf.fields.base import check_field as check_field
from jcnf.fields.conv import Conv as Conv
from jcnf.fields.gaussian_tails import GaussianTails as GaussianTails
from jcnf.fields.layers import ACTIVATIONS as ACTIVATIONS
from jcnf.fields.layers import LAYERS as LAYERS
from jcnf.fields.mlp import MLP as MLP
from jcnf.fields.planar import Planar as Planar
from jcnf.fields.potential import Potential as Potential
from jcnf.fields.resnet import ResNet as ResNet
from jcnf.fields.unet import UNet as UNet
from jcnf.fields.wrappers import Cast as Cast
from jcnf.fields.wrappers import Embedded as Embedded
from jcnf.fields.wrappers import Guided as Guided
from jcnf.fields.wrappers import MinusIdentity as MinusIdentity
from jcnf.fields.wrappers import Mixture as Mixture
from jcnf.fields.wrappers import TimeRescaling as TimeRescaling
